"""`titans analyze`: the command, its files and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from titans_lm import Trace, cli, load, trace
from titans_lm.analyze.trace import read_bits

pytestmark = pytest.mark.usefixtures("unchecked")
TEXT = "One line.\nAnother line with é.\n\nOne line.\n" * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def meta_of(folder: Path) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="meta">(.*?)</script>', (folder / "index.html").read_text())[1]
    )


def test_it_writes_a_page_and_the_numbers(folder, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    out = tmp_path / "out"
    command = ["analyze", "--model", str(folder), "--text", str(text), str(other), "--out", str(out)]
    command += ["--what-if", "frozen:50", "--what-if", "skip:10-20"]
    assert cli.main(command) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    model, _ = load(folder)
    ids = np.frombuffer((TEXT + "something else\n").encode(), np.uint8).astype(np.int64)
    found, expected = Trace.from_npz(out / "trace.npz"), trace(model, ids)
    assert (found["token_id"] == ids).all()
    assert np.array_equal(found["bits_frozen"], expected["bits_frozen"], equal_nan=True)
    meta = meta_of(out)
    assert [one["start"] for one in meta["texts"]] == [0, len(TEXT.encode())]
    assert [one["label"] for one in meta["others"]] == ["memory frozen from 50", "10 to 20 not written"]
    assert [one["start"] for one in meta["others"]] == [50, 10]
    lines = {(token, line) for token, line, _ in meta["lines"]}
    assert (0, 1) in lines
    assert (len(TEXT.encode()), 1) in lines
    assert len(lines) == 13  # blank lines are not listed
    starts = [token for token, *_ in sorted(meta["lines"])]
    first = float(np.nansum(expected["bits"][: starts[1]])) / starts[1]
    assert {token: bits for token, _, bits in meta["lines"]}[0] == pytest.approx(first, abs=1e-3)
    best = int(np.nanargmin(expected.helped))
    assert meta["helped"][0][0] == best
    about = json.loads((out / "analyze.json").read_text())
    assert about["command"].startswith("titans analyze")
    skipped = read_bits(model, torch.from_numpy(ids), None, [(10, 20)])[0]
    assert about["what_if"][1]["bits_from_there"] == pytest.approx(float(skipped[10:].mean()))
    assert cli.main(command) == 0  # over its own files


def test_it_begins_with_a_memory_and_stops_after_some_tokens(folder, text, tmp_path, capsys):
    memory, out = tmp_path / "m.memory", tmp_path / "out"
    assert cli.main(["read", "--model", str(folder), "--memory", str(memory), str(text)]) == 0
    before = memory.read_bytes()
    command = ["analyze", "--model", str(folder), "--text", str(text), "--memory", str(memory), "--out", str(out)]
    assert cli.main([*command, "--tokens", "30"]) == 0
    assert "first 30 tokens" in capsys.readouterr().err
    found = Trace.from_npz(out / "trace.npz")
    assert len(found) == 30
    assert found.attributes["position"] == len(TEXT.encode())
    assert memory.read_bytes() == before
    assert meta_of(out)["texts"][0]["start"] == 0


def test_it_refuses_what_cannot_be(folder, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    base = {"--model": str(folder), "--text": str(text), "--out": str(tmp_path / "out")}
    for changes, words in (
        ({"--text": str(tmp_path / "none.txt")}, "none.txt does not exist"),
        ({"--out": str(tmp_path / "file")}, "is not a folder"),
        ({"--out": str(tmp_path / "site")}, "not of this command"),
        ({"--tokens": "1"}, "--tokens must be at least 2"),
        ({"--what-if": "frozen"}, "--what-if frozen: give frozen:START"),
        ({"--what-if": "skip:9-5"}, "--what-if skip:9-5: give"),
        ({"--what-if": "frozen:900"}, "only 172 tokens"),
        ({"--what-if": "skip:5-900"}, "only 172 tokens"),
        ({"--memory": str(tmp_path / "none.memory")}, "none.memory"),
    ):
        flags = [word for pair in {**base, **changes}.items() for word in pair]
        assert cli.main(["analyze", *flags]) == 2, changes
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("titans analyze: "), said
        assert words in said
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "site/index.html").read_text() == "mine"
