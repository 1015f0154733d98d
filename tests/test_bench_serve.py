"""`titans bench serve` and `busy` run end to end on a tiny model, and say what they should. No times are asserted."""

import json
import os

import pytest

from titans_lm.bench import busy, serve
from titans_lm.bench.measure import Setting
from titans_lm.cli import bench, main


@pytest.mark.slow
def test_serve(tmp_path, capsys):
    out = tmp_path / "serve.json"
    sizes = ["--size", "tiny", "--clients", "3", "--prompt-tokens", "20", "--max-tokens", "3", "--runs", "1"]
    assert main(["bench", "serve", *sizes, "--variants", "lmm", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["error"] is None
    for action in ("in_turn", "at_once"):
        assert [(r["answer_tokens"], r["same_answers"]) for r in row["repetitions"][action]] == [(9, 3)] * 2
    ratio = row["actions"]["at_once"]["seconds"] / row["actions"]["in_turn"]["seconds"]
    assert result["summary"] == {"at_once_over_in_turn": {"lmm": ratio}}
    assert "3 of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_busy(tmp_path):
    out = tmp_path / "busy.json"
    sizes = ["--batch-size", "1", "--tokens", "16", "--steps", "2", "--neighbours", "1", "--variant", "lmm"]
    assert main(["bench", "busy", *sizes, "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["waiting"], row["neighbours"], row["error"]) for row in result["rows"]] == [
        ("passive", 0, None),
        ("passive", 1, None),
    ]
    alone, beside = (row["actions"]["train"]["seconds"] for row in result["rows"])
    assert result["summary"] == {"busy_over_alone": {"passive": beside / alone}}
    assert result["other_cores"] is None or result["other_cores"] >= 0


def test_prompts_have_different_lengths():
    assert serve.prompt_lengths(8, 64) == [36, 40, 44, 48, 52, 56, 60, 64]
    assert serve.prompt_lengths(3, 1) == [1, 1, 1]


def test_neighbours_run_while_the_action_does():
    options = {"size": "tiny", "variant": "lmm", "batch_size": 1, "tokens": 4, "steps": 1, "neighbours": 1}
    contender = busy.trainer(options, Setting())
    action = contender.actions["train"]
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"

    def count() -> int:
        with open(children) as file:
            return len(file.read().split())

    before = count()
    action.prepare()
    assert count() == before + 1
    action.report(None)
    assert count() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--clients", "0"], "--clients must be at least 1"),
        (["serve", "--peers"], "--peers: the server has one kind of model"),
        (["serve", "--model", "nowhere"], "nowhere"),
        (["busy", "--neighbours", "0"], "--neighbours must be at least 1"),
        (["busy", "--peers"], "without --peers"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, words, capsys, tmp_path):
    assert main(["bench", *arguments, "--out", str(tmp_path / "out.json")]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_others_that_compute_are_warned_of(capsys):
    bench._warn_of_others(None, "")
    bench._warn_of_others(0.1, "")
    assert capsys.readouterr().err == ""
    bench._warn_of_others(1.3, " while this ran")
    assert "other processes used 1.3 of" in capsys.readouterr().err
