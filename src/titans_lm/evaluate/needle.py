"""`titans evaluate needle`: retrieval of a needle in a haystack, by length and depth.

Reads through the carried state and decodes greedily. A cell has two scores. "score" is RULER's (arXiv:2404.06654): the
share of answers in which the value occurs, ignoring case, also within a longer word. "exact" is stricter: the answer
begins with the value. Unlike RULER's, an answer always has the reserved number of tokens, without an end token, and
samples begin at many places of the text (`tasks.needle`). For published claims use `titans evaluate harness`.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel

from titans_lm.evaluate.ask import follow
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.tasks import at_least
from titans_lm.tasks.haystack import CODE, NUMBERS, PROSE
from titans_lm.tasks.needle import Kind, Needle
from titans_lm.utils.corpora import STDLIB
from titans_lm.utils.figures import figure_file
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

_ENDS = 300
"""Characters shown of a prompt's beginning and of its end."""


def occurs(value: str, answer: str) -> bool:
    """RULER's rule: the value occurs anywhere, ignoring case, also within a longer number."""
    return value.lower() in answer.lower()


def begins(value: str, answer: str) -> bool:
    """The answer starts with exactly the value, after white space."""
    return answer.lstrip().startswith(value)


def answers(
    model: PreTrainedModel, task: Needle, samples: int, seed: int, rows: int = 8
) -> Iterator[tuple[str, str, str]]:
    """Yields (prompt, value, answer) of `samples` examples, `rows` per batch, which does not change them.

    Raises ValueError for a task with a larger vocabulary than the model's, or too short for the answer.
    """
    at_least(1, samples=samples, rows=rows)
    if task.vocab_size > model.config.vocab_size:
        raise ValueError(f"the task has {task.vocab_size} tokens, the model only {model.config.vocab_size}")
    rng = np.random.default_rng(seed)
    for first in range(0, samples, rows):
        prompts, values = task.examples(rng, min(rows, samples - first))
        answer_ids = follow(model, torch.from_numpy(prompts), task.kept).numpy()
        for prompt, value, answer in zip(prompts, values, answer_ids, strict=True):
            yield task.decode(prompt), value, task.decode(answer)


def score(model: PreTrainedModel, task: Needle, samples: int, seed: int, rows: int = 8) -> dict[str, Any]:
    """One cell: "score" and "exact" in [0, 1], "samples", "length", "depth". Raises as `answers` does."""
    hits = [
        (occurs(value, answer), begins(value, answer)) for _, value, answer in answers(model, task, samples, seed, rows)
    ]
    total, exact = np.mean(hits, axis=0).tolist()
    return {"score": total, "exact": exact, "samples": samples, "length": task.length, "depth": task.depth}


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--kind", nargs="+", default=list(get_args(Kind)), help="passkey, number, uuid (S-NIAH-1, 2, 3)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens, with the answer")
    parser.add_argument(
        "--depths", type=int, default=5, metavar="COUNT", help="number of depths, evenly from 0 to 100 percent"
    )
    parser.add_argument("--samples", type=int, default=20, help="samples per kind, length and depth")
    parser.add_argument("--style", default="ruler", help="ruler: its sentences; short: key=value")
    parser.add_argument("--haystack", nargs="+", metavar="TEXT",
                        help=f"noise or words, for all kinds; or text files, folders, {CODE}, {NUMBERS}, {PROSE}, "
                             f"{STDLIB}, for those that have text (default: the last two)")  # fmt: skip
    parser.add_argument("--digits", type=int, default=7, help="digits of a number")
    parser.add_argument("--keys", type=int, default=1, help="needles of a haystack, of which one is asked for")
    parser.add_argument(
        "--answer", type=int, help="tokens reserved for the answer (default: ruler 128; short: the value's characters)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="samples per batch")
    parser.add_argument("--show", action="store_true", help="print a prompt of each kind, shortened, and the answer")
    parser.add_argument("--out", type=Path, default=Path("results/needle.jsonl"),
                        help="JSON lines, one per cell; an existing file is completed")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    cells, console = _cells(arguments), PlainConsole(stderr=True)
    with Lines(arguments.out, _settings(arguments), command_line("evaluate needle", arguments)) as lines:
        model, _ = load(arguments.model)
        if arguments.show:
            for task in {cell.kind: cell for cell in cells}.values():
                _show(model, task, arguments.seed, console)
        try:
            _fill(lines, model, cells, arguments, console)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command continues with {arguments.out}") from None
    rows = [row for cell in cells if (row := lines.find(**_key_of(cell))) is not None]
    for kind in arguments.kind:
        console.print(_table(kind, [row for row in rows if row["kind"] == kind]))
    plot(rows, arguments.out.with_suffix(".png"))
    print(f"{arguments.out}: {len(rows)} cells; {arguments.out.with_suffix('.png')}")


def _check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "depths", "samples", "batch")
    check_least(arguments, 0, "seed")
    for name in ("kind", "lengths"):
        values = getattr(arguments, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} has a value twice: {' '.join(map(str, values))}")
    check_output(arguments.out, picture=True, ours=False)
    find(arguments.model)


def _cells(arguments: argparse.Namespace) -> list[Needle]:
    """A checked task for each kind, length and depth."""
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("style", "digits", "keys", "answer")}
    haystack = arguments.haystack
    if haystack and len(haystack) == 1 and haystack[0] in ("noise", "words"):
        options["haystack"] = haystack[0]
    elif haystack:
        options["files"] = haystack
    tasks = []
    for kind in arguments.kind:
        for length in arguments.lengths:
            task = Needle(length=length, kind=kind, tokenizer=str(find(arguments.model)), **options)
            task.check_examples()
            tasks += [replace(task, depth=depth) for depth in np.linspace(0, 100, arguments.depths).tolist()]
    return tasks


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings on which results depend, except kind, length and depth."""
    names = ["samples", "style", "haystack", "digits", "answer", "seed"]
    names += ["keys"] if arguments.keys > 1 else []  # so files that were written before --keys are completed
    digest = hashlib.sha256()
    for path in sorted(p for p in find(arguments.model).iterdir() if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "model": str(arguments.model), "digest": digest.hexdigest(),
        **{name: getattr(arguments, name) for name in names},
    }  # fmt: skip


def _key_of(task: Needle) -> dict[str, Any]:
    return {"kind": task.kind, "length": task.length, "depth": task.depth}


def _fill(
    lines: Lines, model: PreTrainedModel, cells: list[Needle], arguments: argparse.Namespace, console: Console
) -> None:
    """Score the missing cells."""
    missing = [cell for cell in cells if lines.find(**_key_of(cell)) is None]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(cell.length for cell in missing))
        for cell in missing:
            progress.update(bar, description=f"{cell.kind}, {cell.length:,} tokens, {cell.depth:.0f} %")
            scores = score(model, cell, arguments.samples, arguments.seed, arguments.batch)
            lines.add({"kind": cell.kind, **scores})
            progress.advance(bar, cell.length)


def _show(model: PreTrainedModel, task: Needle, seed: int, console: Console) -> None:
    prompt, value, answer = next(answers(model, task, 1, seed))
    console.rule(f"{task.kind}, {task.length:,} tokens")
    cut = prompt if len(prompt) <= 2 * _ENDS else f"{prompt[:_ENDS]}\n[...]\n{prompt[-_ENDS:]}"
    console.print(cut)
    console.print(f"wanted: {value!r}\nsaid:   {answer!r}")


def _grid(rows: list[dict[str, Any]]) -> tuple[list[int], list[float], np.ndarray]:
    """Lengths, depths, and scores `[depths, lengths]` in percent of rows of one kind."""
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    scores = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        scores[depths.index(row["depth"]), lengths.index(row["length"])] = 100 * row["score"]
    return lengths, depths, scores


def _table(kind: str, rows: list[dict[str, Any]]) -> Table:
    lengths, depths, scores = _grid(rows)
    table = Table("depth", *(f"{length:,}" for length in lengths), title=f"{kind}, % found")
    for depth, line in zip(depths, scores, strict=True):
        table.add_row(f"{depth:.0f} %", *(f"{share:.1f}" for share in line))
    table.add_section()
    table.add_row("mean", *(f"{share:.1f}" for share in scores.mean(0)))
    exact = [np.mean([100 * row["exact"] for row in rows if row["length"] == length]) for length in lengths]
    table.add_row("exact", *(f"{share:.1f}" for share in exact))
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A heat map per kind: percent found by depth and length."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    grids = [_grid([row for row in rows if row["kind"] == kind]) for kind in kinds]
    width, height = 1.6 + 0.75 * max(len(grid[0]) for grid in grids), 1.6 + 0.45 * len(grids[0][1])
    with figure_file(
        path, 1, len(kinds), figsize=(max(2.8, width) * len(kinds) + 1, height), squeeze=False, dpi=120
    ) as axes:
        for axis, kind, (lengths, depths, scores) in zip(axes[0], kinds, grids, strict=True):
            image = axis.imshow(scores, cmap="viridis", vmin=0, vmax=100, aspect="auto")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
            axis.set_yticks(range(len(depths)), [f"{depth:.0f} %" for depth in depths])
            axis.set_title(kind)
            axis.set_xlabel("tokens")
            for (y, x), share in np.ndenumerate(scores):
                axis.text(x, y, f"{share:.0f}", ha="center", va="center", color="black" if share > 60 else "white")
        axes[0, 0].set_ylabel("depth of the needle")
        axes[0, 0].figure.colorbar(image, ax=axes[0], label="percent found")
