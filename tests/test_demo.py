"""`titans demo` and the models that are shipped."""

import json
import re
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conftest import tiny_config
from titans_lm import TitansForCausalLM, cli
from titans_lm.cli.demo import learning
from titans_lm.cli.demo.learning import read_text
from titans_lm.cli.demo.needle import Reading, chart, hide, read_through, stretches, summary, task_for
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.hub import load, ship
from titans_lm.models.model_files import NAMES, SHIPPED, find
from titans_lm.models.tokenizer import byte_tokenizer, load_tokenizer


@pytest.mark.usefixtures("unchecked")
def test_it_reads_asks_and_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the shipped model is found from anywhere
    command = ["demo", "--tokens", "9000", "--depth", "50", "--output", "out", "--seed", "3", "--text-tokens", "0"]
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
    assert "needle.html" in said
    assert found["key"] in Path("out/needle.html").read_text()
    assert not list(Path("out").glob(".*"))


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_finds_nothing_is_said_to_be_wrong(folder, tmp_path, capsys):
    assert (
        cli.main(["demo", "--tokens", "500", "--model", str(folder), "--output", str(tmp_path), "--text-tokens", "0"])
        == 0
    )
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["said"] != found["value"]
    assert found["right"] is False
    assert "WRONG" in capsys.readouterr().out


def test_what_is_seen_piece_by_piece_is_what_one_call_sees(model):
    ids = torch.randint(256, (1, PREFILL_TOKENS + 70), generator=torch.Generator().manual_seed(0))
    reading, state = read_through(model, ids, Console(quiet=True))
    with torch.no_grad():
        whole = torch.stack([s.loss.mean(2)[0] for s in model(ids, output_surprise=True).surprise]).mean(0)
    np.testing.assert_allclose(reading.surprise, whole.numpy(), rtol=1e-4)
    assert reading.tokens == [PREFILL_TOKENS, PREFILL_TOKENS + 70]
    assert reading.state_bytes == [state.nbytes] * 2


def test_rank_counts_what_surprised_more():
    hidden = hide(task_for(SHIPPED / "needle", 600, "noise", 50.0), 0)
    reading = Reading(np.zeros(hidden.ids.shape[1] - 1, np.float32), [1], [1], [None])
    needle = slice(hidden.start, hidden.start + hidden.length)
    for rank, other in ((1, 4), (1, 5), (2, 6)):  # the same is not more
        reading.surprise[needle] = 5
        reading.surprise[needle.start - hidden.length : needle.start] = other
        assert summary(hidden, reading, "")["surprise"]["rank"] == rank


@pytest.mark.parametrize(
    ("run", "digits"),
    [
        ("data: {task: {name: needle, digits: 4}}", 4),
        ("data: {task: {name: mixed, tasks: [{name: mqar}, {name: needle, digits: 3}]}}", 3),
        ("data: {task: {name: mixed, tasks: [{name: mqar}, {name: needle}]}}", 7),
        ("data: {files: [book.txt], task: null}", 7),
        (None, 7),
    ],
)
def test_the_value_has_the_digits_that_the_model_was_trained_on(run, digits, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    if run is not None:
        (tmp_path / "run.yaml").write_text(run)
    assert len(hide(task_for(tmp_path, 300, "words", 30.0), 0).value) == digits


@pytest.mark.parametrize("run", ["", "data", "data: {task: needle}", "data: ["])
def test_a_damaged_run_is_told(run, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(run)
    with pytest.raises(ValueError, match=r"run\.yaml is not the settings of a run"):
        task_for(tmp_path, 300, "words", 30.0)


@pytest.mark.usefixtures("unchecked")
def test_a_model_without_a_memory_is_refused(tmp_path, capsys):
    TitansForCausalLM(tiny_config("window", vocab_size=260)).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--tokens", "500", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert cli.main(["demo", *arguments]) == 2
    assert "has no memory to show" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_shipped_is_half_as_large_and_computes_as_before(folder, tmp_path):
    (folder / "run.yaml").write_text("data: {}")
    ship(folder, tmp_path, surprise_threshold=3.5)
    (folder / "run.yaml").unlink()
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    before, after = load(folder)[0], load(tmp_path)[0]
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert q.dtype == torch.float32, name
        torch.testing.assert_close(q, p, rtol=2**-8, atol=0)
    assert [model.model.layers[0].memory.surprise_threshold for model in (before, after)] == [None, 3.5]


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
    assert NAMES == ["books", "needle", "streams"]
    assert find(Path("needle")) == SHIPPED / "needle"
    model, tokenizer = load(Path("needle"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert len(tokenizer) == 259
    ship(Path("needle"), tmp_path / "copy")
    again, _ = load(tmp_path / "copy")
    assert again.config.own_fields() == model.config.own_fields()
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name  # it was in bfloat16 already
    assert (tmp_path / "copy" / "run.yaml").read_text() == (SHIPPED / "needle" / "run.yaml").read_text()
    (tmp_path / "needle").mkdir()
    assert find(Path("needle")) == SHIPPED / "needle"  # texts of that name are not a model
    shutil.copy(tmp_path / "copy" / "config.json", tmp_path / "needle")
    assert find(Path("needle")) == Path("needle")
    with pytest.raises(ValueError, match="needles is not a model"):
        find(Path("needles"))
    (tmp_path / "copy" / "run.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no run\.yaml"):
        ship(tmp_path / "copy", tmp_path / "other")


def test_what_is_shipped_is_small_whole_and_in_the_package():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["titans_lm"]
    for file in (file for file in SHIPPED.rglob("*") if file.is_file()):
        assert any(fnmatch(str(file.relative_to(SHIPPED.parent.parent)), pattern) for pattern in patterns)
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
        (["--output", "mine"], "mine/demo.png is not of this command; give --output another folder"),
        (["--output", "mine/demo.png"], "--output mine/demo.png is not a folder"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/demo.png").write_text("mine")
    assert cli.main(["demo", *arguments]) == 2
    assert Path("mine/demo.png").read_text() == "mine"
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not Path("demo").exists()


@pytest.mark.usefixtures("unchecked")
def test_it_reads_a_text_of_the_user_s_and_learns_it(tmp_path, capsys, monkeypatch):
    """A log of a made-up service: memory on beats frozen, and the line that is like no other surprises most."""
    monkeypatch.chdir(tmp_path)
    lines = [f"unit-{n % 7} | state=ready | tick {1000 + 3 * n}" for n in range(400)]
    lines[350] = "!!! ~~ Quixotic vermilion anomaly ~~ !!!"
    Path("own.log").write_text("\n".join(lines))
    assert cli.main(["demo", "own.log", "--tokens", "2000", "--output", "out"]) == 0
    found = json.loads(Path("out/learning.json").read_text())
    assert found["text"] == "own.log"
    assert found["bytes"] == len("\n".join(lines))
    assert found["bits_per_byte"]["on"] < found["bits_per_byte"]["frozen"]
    assert found["buckets"][-1]["on"] < 0.8 * found["buckets"][0]["on"]
    late = [line for line in found["surprising"] if line["number"] > 20]
    assert late[0]["number"] == 351
    assert "Quixotic" in capsys.readouterr().out
    assert Path("out/learning.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_byte_does_not_count_as_known(folder, tmp_path):
    (tmp_path / "a.log").write_text("all is well\n" * 9)
    curves = read_text(*load(folder), [tmp_path / "a.log"], 100, Console(quiet=True))
    found = learning.summary(curves)
    for mode, bits in curves.bits.items():
        assert np.isnan(bits).tolist() == [True] + [False] * 99
        assert found["bits_per_byte"][mode] == found["buckets"][0][mode] == pytest.approx(bits[1:].mean())
    assert [line.number for line in curves.lines if line.number == 1] == [1]


def test_a_text_of_the_demo_needs_a_model_of_bytes(folder, tmp_path):
    model, _ = load(folder)
    with pytest.raises(ValueError, match="needs a model whose tokens are bytes"):
        read_text(model, load_tokenizer(str(words(tmp_path))), [], 100, Console(quiet=True))


def words(path: Path) -> Path:
    """A tokenizer whose tokens are not bytes."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return path
