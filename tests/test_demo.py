"""`titans demo` and the models that are shipped."""

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from titans_lm import cli
from titans_lm.checkpoint import NAMES, SHIPPED, find, load, ship
from titans_lm.demo import chart, hide, stretches, task_for


@pytest.mark.usefixtures("unchecked")
def test_it_reads_asks_and_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the shipped model is found from anywhere
    command = ["demo", "--tokens", "9000", "--depth", "50", "--output", "out", "--seed", "3"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    found = json.loads(Path("out/demo.json").read_text())
    truth = re.search(rf"Truth: +(\d{{{len(found['value'])}}})\n", said)
    assert truth is not None
    assert truth[1] == found["value"]
    assert found["right"] == found["said"].startswith(found["value"])
    assert ("right" if found["right"] else "WRONG") in said
    assert found["right"]  # 9,000 tokens are not much
    assert found["state_bytes"]["least"] == found["state_bytes"]["most"] > 0
    assert 0.4 * 9000 < found["needle_at"] < 0.6 * 9000
    assert 1 <= found["surprise"]["rank"] <= found["surprise"]["stretches"]
    assert found["command"].startswith("titans demo --tokens 9000")
    assert Path("out/demo.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").glob(".*"))


def test_the_needle_is_where_it_is_said_to_be():
    task = task_for(SHIPPED / "needle", 4000, "words", 30.0)
    hidden = hide(task, 1)
    there = bytes(hidden.ids[0, hidden.start : hidden.start + hidden.length].tolist()).decode()
    assert there == f" {hidden.key}{hidden.value}."
    assert bytes(hidden.ids[0].tolist()).decode().endswith(f" {hidden.key}")
    assert hide(task, 1).value == hidden.value != hide(task, 2).value
    surprise = np.zeros(hidden.ids.shape[1], np.float32)
    surprise[hidden.start : hidden.start + hidden.length] = 5
    means, needle = stretches(hidden, surprise)
    assert means[needle] == 5
    assert means.sum() == 5
    bars, mark = chart(means, needle)
    assert bars.count("█") == 1
    assert bars.index("█") == mark.index("^")


def test_shipped_models_go_by_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert NAMES == ["needle"]
    assert find(Path("needle")) == SHIPPED / "needle"
    model, tokenizer = load(Path("needle"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert len(tokenizer) == 259
    ship(Path("needle"), tmp_path / "copy")
    again, _ = load(tmp_path / "copy")
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name  # it was in bfloat16 already
    assert (tmp_path / "copy" / "run.yaml").read_text() == (SHIPPED / "needle" / "run.yaml").read_text()
    (tmp_path / "needle").mkdir()
    with pytest.raises(ValueError, match="needle is not a model"):
        find(Path("needle"))
    (tmp_path / "copy" / "run.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no run\.yaml"):
        ship(tmp_path / "copy", tmp_path / "other")


def test_what_is_shipped_is_small_whole_and_in_the_package():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["titans_lm"]
    for file in (file for file in SHIPPED.rglob("*") if file.is_file()):
        assert any(fnmatch(str(file.relative_to(SHIPPED.parent)), pattern) for pattern in patterns)
    for name in NAMES:
        names = {file.name for file in (SHIPPED / name).iterdir()}
        assert {"config.json", "model.safetensors", "digests.json", "run.yaml", "README.md", "tokenizer.json"} <= names
        assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) < 12e6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "20"], "length=20 is too short"),
        (["--haystack", "hay"], "haystack='hay' is not one of"),
        (["--depth", "101"], "depth must be from 0 to 100"),
        (["--seed", "-1"], "--seed must be"),
        (["--model", "nothing"], "nothing is not a model: it has no config.json"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not Path("demo").exists()
