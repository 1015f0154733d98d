"""`titans evaluate babilong`: questions about bAbI's facts in a long text.

Reports three scores, each the share of right answers:
* "babilong": the rule of BABILong (booydar/babilong, `metrics.py`).
* "substring": the rule of lm-evaluation-harness' `babilong` tasks, looser: "kitchen or garden" is right for both.
* "exact": only the answer, for models trained on the task.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from titans_lm.evaluate.ask import follow
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.models.model_identity import digests
from titans_lm.models.tokenizer import load_tokenizer
from titans_lm.tasks import at_least
from titans_lm.tasks.babilong import Babilong, Example, Tokens, members
from titans_lm.utils.corpora import STDLIB
from titans_lm.utils.deprecation import renamed
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

SCORES = ("babilong", "substring", "exact")
__getattr__ = renamed(__name__, {"babilong": "babilong_rule"})
TOKENS = 32
"""Tokens of the model's output that are scored, at least those of the longest answer."""
_EXAMPLES = ("<context>", "<example>")
"""Texts at which a model starts to invent the next question."""


class Answer(NamedTuple):
    example: Example
    said: str


# ------------------------------------------------------------------------------------------------ scores


def babilong_rule(said: str, example: Example, labels: tuple[str, ...]) -> bool:
    """BABILong's rule: up to the first full stop, in lower case, the labels that occur in the output but not in the
    question are exactly the right ones.

    A label occurs wherever its letters do, as in BABILong: "none" (qa7) contains "one", and is never right.
    """
    said, question = said.lower(), example.question.lower()
    for end in (".", *_EXAMPLES):
        said = said.split(end)[0]
    possible = {label.lower() for label in labels}
    left = {label for label in possible if label in said and label not in question}
    return left == set(members(example.answer.lower()))


def substring(said: str, example: Example) -> bool:
    """The answer occurs anywhere, ignoring case."""
    return example.answer.lower() in said.lower()


def exact(said: str, example: Example) -> bool:
    """The output up to the first full stop or line end is the answer, ignoring case."""
    return said.strip().lower().split("\n")[0].split(".")[0].strip() == example.answer.lower()


# ------------------------------------------------------------------------------------------------ asking


def score(model: PreTrainedModel, task: Babilong, samples: int, seed: int = 0, rows: int = 8) -> dict[str, Any]:
    """Score `samples` questions of the task, `rows` at a time, which changes the speed only.

    Returns the three scores in [0, 1], `samples`, the number of `examples`, and the `answers`. Uses every example once
    before it uses one again in another text. Raises ValueError for numbers below 1.
    """
    return summary(task, list(answers(model, task, samples, seed, rows)))


def answers(model: PreTrainedModel, task: Babilong, samples: int, seed: int, rows: int) -> Iterator[Answer]:
    at_least(1, samples=samples, rows=rows)
    tokenizer, count = load_tokenizer(task.tokenizer), max(TOKENS, task.answer_tokens)
    for group in _groups(_prompts(task, samples, seed), rows):
        ids = torch.from_numpy(np.stack([prompt for _, prompt in group]))
        said = tokenizer.batch_decode(follow(model, ids, count), skip_special_tokens=True)
        yield from map(Answer, (example for example, _ in group), said)


def _prompts(task: Babilong, samples: int, seed: int) -> Iterator[tuple[Example, Tokens]]:
    """Prompts, each with its own random generator. Without a background they are sorted by length."""
    fitting = task.examples
    order = np.random.default_rng(seed).permutation(len(fitting))
    drawn = ((fitting[order[i % len(order)]], np.random.default_rng([seed, i])) for i in range(samples))
    prompts = ((example, task.prompt(example, rng)) for example, rng in drawn)
    return prompts if task.background else iter(sorted(prompts, key=lambda pair: len(pair[1])))


def _groups(prompts: Iterator[tuple[Example, Tokens]], rows: int) -> Iterator[list[tuple[Example, Tokens]]]:
    """Yields lists of at most `rows` prompts of one length."""
    group: list[tuple[Example, Tokens]] = []
    for pair in prompts:
        if group and (len(group) == rows or len(pair[1]) != len(group[0][1])):
            yield group
            group = []
        group.append(pair)
    yield group


def summary(task: Babilong, answers: list[Answer]) -> dict[str, Any]:
    def share(right: Iterator[bool]) -> float:
        return round(sum(right) / len(answers), 4)

    return {
        "babilong": share(babilong_rule(said, example, task.labels) for example, said in answers),
        "substring": share(substring(said, example) for example, said in answers),
        "exact": share(exact(said, example) for example, said in answers),
        "samples": len(answers),
        "examples": len(task.examples),
        "answers": [{"question": e.question, "target": e.answer, "said": said} for e, said in answers],
    }


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--babi", type=Path, required=True, help="folder or archive of bAbI's files")
    parser.add_argument(
        "--background", nargs="+", default=[STDLIB], help='text files, folders of .txt files, or "python-stdlib"'
    )
    parser.add_argument("--tasks", nargs="+", default=["qa1", "qa2", "qa3", "qa4", "qa5"], help="qa1 to qa20")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[0, 1024, 4096], help="tokens of the rows; 0: facts only"
    )
    parser.add_argument("--samples", type=int, default=50, help="questions per task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="questions per batch")
    parser.add_argument(
        "--out", type=Path, default=Path("results/babilong.jsonl"), help="JSON lines; an existing file is continued"
    )


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "samples", "batch")
    check_least(arguments, 0, "seed")
    check_output(arguments.out, ours=False)
    model, _ = load(arguments.model)
    cells = _cells(arguments)
    with Lines(
        arguments.out, _settings(arguments, digests(model)), command_line("evaluate babilong", arguments)
    ) as lines:
        for (name, length), task in cells.items():
            if lines.find(task=name, length=length) is None:
                pending = answers(model, task, arguments.samples, arguments.seed, arguments.batch)
                replies = list(track(pending, f"{name}, {length:,} tokens", total=arguments.samples))
                lines.add({"task": name, "length": length, **summary(task, replies)})
    console = PlainConsole()
    console.print(table(lines, list(cells)))
    console.print(f"Scores and answers are in {arguments.out}.")


def _cells(arguments: argparse.Namespace) -> dict[tuple[str, int], Babilong]:
    """Tasks by name and length."""
    cells: dict[tuple[str, int], Babilong] = {}
    for name in arguments.tasks:
        alone = Babilong(str(arguments.babi), name, 0, "test", (), str(find(arguments.model)))
        for length in arguments.lengths:
            background = tuple(arguments.background)
            cells[name, length] = replace(alone, length=length, background=background) if length else alone
    return cells


def _settings(arguments: argparse.Namespace, model: dict[str, str]) -> dict[str, Any]:
    return {
        "babi": str(arguments.babi),
        "background": arguments.background,
        "samples": arguments.samples,
        "seed": arguments.seed,
        **model,
    }


def table(lines: Lines, cells: list[tuple[str, int]]) -> Table:
    scores = Table("task", "tokens", *SCORES, title="right answers, in %")
    for name, length in cells:
        if (row := lines.find(task=name, length=length)) is not None:
            scores.add_row(name, f"{length:,}", *(f"{100 * row[kind]:.0f}" for kind in SCORES))
    return scores
