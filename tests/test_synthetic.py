"""`titans evaluate synthetic`, accuracy by hand, and tasks as training data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from titans_lm import cli
from titans_lm.evaluate.cell import accuracy
from titans_lm.evaluate.synthetic import TASKS, run_of
from titans_lm.models.baselines import NAMES
from titans_lm.models.configuration import VARIANTS
from titans_lm.tasks import IGNORED, Rows, make_task
from titans_lm.training.config import load_settings, parse_settings
from titans_lm.training.train import model_for

SMALL = ["--set", "training.max_steps=3", "--set", "training.batch_size=4"]


def test_it_trains_tests_and_leaves_its_figures(tmp_path, capsys):
    out = tmp_path / "parity.json"
    command = ["evaluate", "synthetic", "parity", "--model", "lmm", "--lengths", "8", "24", "--samples", "6"]
    assert cli.main([*command, *SMALL, "--out", str(out), "--set", "data.task={length: 10}"]) == 0
    found = json.loads(out.read_text())
    assert [score["length"] for score in found["scores"]] == [8, 24]
    assert [score["samples"] for score in found["scores"]] == [6, 6]
    assert found["settings"]["data"]["task"] == {"name": "parity", "length": 10}
    assert found["steps"] == 3
    assert "lmm on parity" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_run_for_every_model(task):
    for model in (*VARIANTS, *NAMES):
        sections = run_of(task, model, [])
        sections["training"]["output_dir"] = "unused"
        settings = parse_settings(sections)
        assert settings.config().vocab_size >= make_task(settings.data.task).vocab_size
        for length in TASKS[task]["lengths"]:
            make_task({**settings.data.task, "length": length})


def test_a_run_that_ends_in_no_number_is_told_and_kept(tmp_path, capsys):
    out = tmp_path / "wild.json"
    command = ["evaluate", "synthetic", "mqar", *SMALL, "--set", "training.learning_rate=1e30", "--out", str(out)]
    assert cli.main([*command, "--set", "training.logging_steps=1", "--set", "training.max_steps=8"]) == 2
    assert "the loss is not a number at step" in capsys.readouterr().err
    assert json.loads(out.read_text())["status"] == "not finite"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parity", "--samples", "0"], "--samples must be at least 1"),
        (["parity", "--out", "nowhere/x.json"], "the folder nowhere does not exist"),
        (["parity", "--lengths", "1"], "length must be"),
        (["parity", "--set", "data.task={lenght: 8}"], "has no option 'lenght'"),
        (["parity", "--set", "data.task=8"], "data.task must be options"),
        (["parity", "--set", "model.vocab_size=1"], "vocab_size=1 is below the task's 2"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert cli.main(["evaluate", "synthetic", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ accuracy, data


def _settings(tmp_path: Path, **data):
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16,
             "memory_head_dim": 8, "memory_dim": 8, "window_size": 4}  # fmt: skip
    training = {"output_dir": str(tmp_path / "run"), "batch_size": 3}
    return parse_settings({"model": model, "data": data, "training": training})


def test_accuracy_counts_asked_positions_one_by_one(tmp_path):
    settings = _settings(tmp_path, task={"name": "mqar", "length": 24, "pairs": 3, "vocab_size": 8})
    task, model = make_task(settings.data.task), model_for(settings).eval()
    right = asked = whole = 0
    for number in range(2):  # 5 samples, 4 rows at once
        ids, labels = task.batch(np.random.default_rng((7, number)), 4 if number == 0 else 1)
        for row, wanted in zip(ids, labels, strict=True):
            logits = model(torch.from_numpy(row)[None]).logits[0]
            hits = [int(logits[t - 1].argmax()) == wanted[t] for t in range(1, 24) if wanted[t] != IGNORED]
            right, asked, whole = right + sum(hits), asked + len(hits), whole + all(hits)
    found = accuracy(model, task, 5, 7, 4)
    assert found == {"score": right / asked, "whole": whole / 5, "samples": 5, "length": 24}
    assert asked == 15


def test_rows_are_made_from_their_seed_in_batches_of_one_length():
    task = make_task({"name": "parity", "length": 64})
    rows = [row["input_ids"] for row, _ in zip(Rows(task, 4, 0, shortest=4), range(160), strict=False)]
    lengths = [len(row) for row in rows]
    assert all(len(set(lengths[i : i + 4])) == 1 for i in range(0, 160, 4))
    assert min(lengths) >= 4
    assert max(lengths) <= 64
    assert sorted(lengths)[80] == pytest.approx(16, rel=0.6)  # as many below 16 as above: even in the logarithm
    again = [row["input_ids"] for row, _ in zip(Rows(task, 4, 0, shortest=4), range(160), strict=False)]
    assert all(map(torch.equal, rows, again))
    other = [row["input_ids"] for row, _ in zip(Rows(task, 4, 1), range(4), strict=False)]
    assert all(len(row) == 64 for row in other)
    assert not torch.equal(other[0], other[1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "give one of data.files, data.dataset, data.task and data.sources"),
        ({"task": {"name": "parity"}, "files": ["a"]}, "give one of"),
        ({"task": {"name": "party"}}, "data.task: task 'party' is not one of"),
        ({"task": {"length": 4}}, "a task needs a name"),
        ({"task": {"name": "parity", "length": 0}}, "data.task: length must be"),
        ({"task": {"name": "parity"}, "shortest": 41}, "data.shortest must be from 1 to the task's length=40"),
        ({"task": {"name": "mqar"}, "shortest": 3}, "data.shortest: length must be"),
        ({"task": "parity"}, "data.task must be keys and values"),
    ],
)
def test_a_wrong_task_is_named(tmp_path, data, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        _settings(tmp_path, **data)


def test_a_task_trains_from_a_yaml_file(tmp_path, capsys):
    run = {
        "model": {"size": "tiny", "variant": "lmm", "num_hidden_layers": 1, "parameters": 400_000},
        "data": {"task": {"name": "needle", "length": 64, "style": "short", "haystack": "words"}},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert load_settings(tmp_path / "run.yaml", []).config().vocab_size == 259
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "run" / "tokenizer.json").is_file()  # that of the task
    assert "parameters" in capsys.readouterr().out


@pytest.mark.usefixtures("unchecked")
def test_mixed_tasks_take_turns(tmp_path):
    tasks = [{"name": "parity"}, {"name": "mqar", "pairs": 2, "vocab_size": 16}]
    task = make_task({"name": "mixed", "tasks": tasks, "length": 12})
    assert (task.vocab_size, task.length, task.tokenizer) == (16, 12, None)
    batches = [task.batch(np.random.default_rng(i), 3) for i in range(40)]
    assert all(batch.input_ids.shape == (3, 12) for batch in batches)
    asked = [int((batch.labels != IGNORED).sum()) // 3 for batch in batches]
    assert set(asked) == {11, 2}
    assert 8 < asked.count(2) < 32
    assert make_task({"name": "mixed", "tasks": [{**t, "length": 8} for t in tasks]}).length == 8
    settings = _settings(tmp_path, task={"name": "mixed", "tasks": tasks, "length": 12}, shortest=8)
    lengths = {len(row["input_ids"]) for row, _ in zip(Rows(task, 2, 0, 8), range(80), strict=False)}
    assert lengths == set(range(8, 13))
    assert settings.config().vocab_size == 16
    for options, words in (
        ({"tasks": tasks[:1]}, "two or more"),
        ({"tasks": ["parity", "s3"]}, "two or more"),
        ({"tasks": [*tasks, {"name": "needle"}]}, "one tokenizer"),
        ({"tasks": [*tasks, {"name": "needl"}]}, "'needl' is not one of"),
        ({}, "task mixed needs tasks"),
    ):
        with pytest.raises(ValueError, match=words):
            make_task({"name": "mixed", **options})
