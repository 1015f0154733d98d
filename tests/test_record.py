"""Result files: whole at every moment, gone on with, never mixed; the command that made them."""

import argparse
import json
from pathlib import Path

import pytest

from titans_lm.utils.record import RESULTS, Lines, check_output, command_line, provenance, write_json


def test_lines_are_there_when_they_are_added_and_found_again(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path, {"seed": 1}, "titans x")
    assert not path.exists()  # nothing is written before there is something
    lines.add({"length": 8, "score": 0.5})
    lines.add({"length": 16, "score": 0.25})
    head, *rows = map(json.loads, path.read_text().splitlines())
    assert head["command"] == "titans x"
    assert {"date", "commit", "machine", "torch", "settings"} <= head.keys()
    assert rows == [{"length": 8, "score": 0.5}, {"length": 16, "score": 0.25}]
    again = Lines(path, {"seed": 1}, "titans x again")
    assert again.find(length=16) == {"length": 16, "score": 0.25}
    assert again.find(length=16, score=0.5) is None
    again.add({"length": 32})
    assert len(path.read_text().splitlines()) == 4
    assert not list(tmp_path.glob(".*"))


def test_the_folder_of_results_is_made_and_no_other(tmp_path, monkeypatch):
    """Commands are run outside a clone too, where there is no `results` yet."""
    monkeypatch.chdir(tmp_path)
    check_output(RESULTS / "a.json", picture=True)
    assert not RESULTS.exists()  # nothing is made before there is a result
    Lines(RESULTS / "a.jsonl", {}, "titans x").add({"length": 8})
    write_json(RESULTS / "a.json", {"command": "titans x"})
    assert {path.name for path in RESULTS.iterdir()} == {"a.jsonl", "a.json"}
    with pytest.raises(ValueError, match="the folder nowhere does not exist"):
        check_output(Path("nowhere/a.json"))


def test_names_of_any_length_and_modes_are_kept(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    write_json(path, {"command": "titans x"})
    path.chmod(0o600)
    write_json(path, {"command": "titans y"})
    assert json.loads(path.read_text())["command"] == "titans y"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_other_settings_are_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    Lines(path, {"seed": 1}, "").add({"length": 8})
    before = path.read_text()
    for settings in ({"seed": 2}, {"seed": 1, "more": 2}, {}):
        with pytest.raises(ValueError, match=r"lines\.jsonl has results of other settings"):
            Lines(path, settings, "")
    for text in ("no json", "[]\n", '{"a": 1}\n', ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a result file of this command"):
            Lines(path, {"seed": 1}, "")
        assert path.read_text() == text
    path.write_text(before)
    assert Lines(path, {"seed": 1}, "").rows == [{"length": 8}]


def test_a_result_is_told_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance("titans x")["commit"] == "unknown"


def test_a_command_is_told_in_full():
    given = argparse.Namespace(
        what="needle", files=["a b", "c"], lengths=[1, 2], show=True, quiet=False, out=None, batch_size=3,
        changes=["x.y=1", "x.z={a: 1}"],
    )  # fmt: skip
    assert command_line("evaluate needle", given, ["files"]) == (
        "titans evaluate needle 'a b' c --lengths 1 2 --show --batch-size 3 --set x.y=1 --set 'x.z={a: 1}'"
    )


def test_one_command_at_a_time_writes_a_file_of_results(tmp_path):
    """A second one would repeat the cells of the first and write over its lines."""
    path = tmp_path / "lines.jsonl"
    waiting = Lines(path, {}, "titans x")
    with Lines(path, {}, "titans x") as lines:
        with pytest.raises(ValueError, match=r"lines\.jsonl is in use by .*; wait until it is done"), waiting:
            pass
        lines.add({"length": 8})
    with waiting:
        assert waiting.find(length=8) is not None
        waiting.add({"length": 16})
    assert Lines(path, {}, "").rows == [{"length": 8}, {"length": 16}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_command_without_results_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Lines(RESULTS / "a.jsonl", {}, ""):
        assert RESULTS.is_dir()  # of the lock
    assert not RESULTS.exists()
    RESULTS.mkdir()
    with Lines(RESULTS / "a.jsonl", {}, ""):
        pass
    assert RESULTS.is_dir()  # one that was there stays
