"""What is found of a needle: the score of answers, of models, and the command that resumes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_config
from titans_lm import TitansForCausalLM
from titans_lm.cli import main
from titans_lm.evaluate.needle import answers, begins, occurs, score
from titans_lm.tasks.needle import Needle


@pytest.mark.parametrize(
    ("value", "answer", "found", "exact"),
    [
        ("1234567", " 1234567.", True, True),
        ("1234567", " is: 1234567", True, False),
        ("1234567", " 12345678", True, True),  # RULER's rule: within a longer number, too
        ("1234567", "91234567", True, False),
        ("1234567", " 123456", False, False),
        ("1234567", " 123 4567", False, False),
        ("1234567", " 1,234,567", False, False),
        ("1234567", "", False, False),
        ("ab12-cd", " AB12-CD", True, False),
        ("ab12-cd", "\n ab12-cd and", True, True),
        ("ab12-cd", " ab12cd", False, False),
    ],
)
def test_right_and_wrong_answers(value, answer, found, exact):
    assert occurs(value, answer) is found
    assert begins(value, answer) is exact


def new_model(vocabulary: int = 260) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config("mag", vocab_size=vocabulary, num_hidden_layers=1, initializer_range=0.05))


def test_a_model_that_was_not_trained_finds_nothing_and_one_that_was_finds_what_it_learned(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text("1 2 3 4 5 6 7 8. " * 50)  # so that the value is always 9
    task = Needle(length=64, kind="number", style="short", digits=1, files=[str(path)], depth=50.0)
    model = new_model()
    nothing = {"score": 0.0, "exact": 0.0, "samples": 5, "length": 64, "depth": 50.0}
    assert score(model, task, samples=5, seed=0, rows=2) == nothing
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rng = np.random.default_rng(0)
    for _ in range(15):
        ids, labels = map(torch.from_numpy, task.batch(rng, 4))
        model.train()(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert score(model, task, samples=5, seed=0, rows=2) == {**nothing, "score": 1.0, "exact": 1.0}
    late = [(begins(v, said), occurs(v, said)) for _, v, said in answers(model, replace(task, answer=4), 5, 0)]
    assert late == [(True, True)] * 5
    with pytest.raises(ValueError, match="the task has 259 tokens, the model only 100"):
        score(new_model(100), task, 1, 0)
    with pytest.raises(ValueError, match="samples must be"):
        score(model, task, 0, 0)


def test_the_figures_are_shares_of_the_samples(tmp_path):
    """A model that can only guess is sometimes right."""
    path = tmp_path / "digits.txt"
    path.write_text("1 2 3 4 5 6 7. " * 50)  # the value is 8 or 9
    task = Needle(length=64, kind="number", style="short", digits=1, files=[str(path)], depth=50.0)
    model = new_model()
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        ids, labels = map(torch.from_numpy, task.batch(rng, 4))
        model.train()(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = score(model, task, 24, 5, rows=7)
    told = list(answers(model, task, 24, 5, rows=24))
    right = sum(value == said for _, value, said in told)
    assert 0 < right < 24
    assert found["score"] == found["exact"] == pytest.approx(right / 24)
    assert [value for _, value, _ in told] == task.examples(np.random.default_rng(5), 24).values


# ------------------------------------------------------------------------------------------------ the command


def arguments(folder: Path, path: Path, **changes: str) -> list[str]:
    options = {
        "model": str(folder), "kind": "passkey uuid", "lengths": "128 150", "depths": "2", "samples": "2",
        "style": "short", "haystack": "words", "answer": "4", "out": str(path),
    }  # fmt: skip
    options.update(changes)
    return ["evaluate", "needle", *(word for k, v in options.items() for word in (f"--{k}", *v.split()))]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_the_command_leaves_a_cell_a_line_and_a_picture_and_goes_on(folder, tmp_path, capsys):
    from matplotlib import image

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert main([*arguments(folder, whole), "--show"]) == 0
    told = capsys.readouterr().err
    assert "passkey, % found" in told
    assert "wanted: '" in told
    cells = rows(whole)
    assert [(cell["kind"], cell["length"], cell["depth"]) for cell in cells] == [
        (kind, length, depth) for kind in ("passkey", "uuid") for length in (128, 150) for depth in (0.0, 100.0)
    ]
    assert all(cell["samples"] == 2 and 0 <= cell["exact"] <= cell["score"] <= 1 for cell in cells)
    head = json.loads(whole.read_text().splitlines()[0])
    assert head["command"].startswith(f"titans evaluate needle --model {folder} --kind passkey uuid --lengths 128 150")
    picture = image.imread(whole.with_suffix(".png"))
    assert picture.shape[1] > picture.shape[0] > 100
    assert picture.std() > 0.1
    lines = whole.read_text().splitlines()
    lines[1] = json.dumps({**cells[0], "score": 0.25})  # to see that it is not computed again
    part.write_text("\n".join(lines[:4]) + "\n")
    assert main(arguments(folder, part, batch="1")) == 0
    assert rows(part) == [{**cells[0], "score": 0.25}, *cells[1:]]
    assert main(arguments(folder, part, lengths="150 170", kind="uuid")) == 0
    assert [cell["length"] for cell in rows(part)[len(cells) :]] == [170, 170]
    before = part.read_text()
    assert main(arguments(folder, part, seed="1")) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert part.read_text() == before


def test_an_interruption_loses_no_cell(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "needle.jsonl"
    forward, calls = TitansForCausalLM.forward, []

    def interrupted(self, *inputs, **options):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return forward(self, *inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TitansForCausalLM, "forward", interrupted)
        assert main(arguments(folder, out)) == 130
    assert f"interrupted: the same command continues with {out}" in capsys.readouterr().err
    done = rows(out)
    assert 0 < len(done) < 8
    assert main(arguments(folder, out)) == 0
    assert main(arguments(folder, tmp_path / "whole.jsonl")) == 0
    assert rows(out) == rows(tmp_path / "whole.jsonl")
    assert rows(out)[: len(done)] == done


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/no/such"}, "/no/such is not a model"),
        ({"kind": "passkey key"}, "kind='key' is not one of: passkey, number, uuid"),
        ({"kind": "uuid uuid"}, "--kind has a value twice"),
        ({"lengths": "128 20"}, "length=20 is too short"),
        ({"lengths": "0"}, "length must be a whole number of at least 1"),
        ({"answer": "100"}, "100 tokens of answer; it must be at least"),
        ({"haystack": "/no/such"}, "/no/such does not exist"),
        ({"kind": "number", "haystack": "EMPTY"}, "is empty; give a file with text in it"),
        ({"style": "long"}, "style='long'"),
        ({"samples": "0"}, "--samples must be at least 1"),
        ({"depths": "0"}, "--depths must be at least 1"),
        ({"batch": "0"}, "--batch must be at least 1"),
        ({"seed": "-1"}, "--seed must be at least 0"),
        ({"out": "/no/such/needle.jsonl"}, "the folder /no/such does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, changes, words):
    (tmp_path / "empty.txt").write_text("")
    changes = {name: value.replace("EMPTY", str(tmp_path / "empty.txt")) for name, value in changes.items()}
    assert main(arguments(folder, tmp_path / "needle.jsonl", **changes)) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("needle*"))


def test_the_haystack_is_what_was_given(folder, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("Forty owls. " * 50)
    for haystack, expected in ((str(book), "owls."), ("noise", "The grass is green")):
        out = tmp_path / f"{Path(haystack).stem}.jsonl"
        options = {"kind": "number", "lengths": "400", "depths": "1", "samples": "1", "haystack": haystack}
        assert main([*arguments(folder, out, **options), "--show"]) == 0
        assert expected in capsys.readouterr().err
        assert json.loads(out.read_text().splitlines()[0])["settings"]["haystack"] == [haystack]
