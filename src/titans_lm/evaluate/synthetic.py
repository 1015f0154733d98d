"""`titans evaluate synthetic TASK`: train a model on recall or state tracking, and test it, also at other lengths.

This is one cell of a study; `titans study` compares many.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from titans_lm.models.baselines import NAMES
from titans_lm.models.configuration import VARIANTS

_MODEL: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "window_size": 16,
    "segment_size": 16, "num_persistent_tokens": 4, "memory_head_dim": 32, "memory_dim": 64,
}  # fmt: skip
_MEMORY = {"memory_chunk_size": 1, "memory_lr": 1.0, "memory_layers": 1, "memory_form": "plain", "memory_clip": None}
_TRACKING: dict[str, Any] = {"model": _MEMORY}
PARAMETERS = 120_000
"""Parameters of every model without the embedding."""
_TRAINING: dict[str, Any] = {"max_steps": 600, "batch_size": 64, "learning_rate": 3e-3, "warmup": 0.05}

TASKS: dict[str, dict[str, Any]] = {
    "mqar": {"task": {"length": 64, "pairs": 4}, "lengths": [64, 128, 256]},
    "forgetting_mqar": {"task": {"length": 64, "pairs": 4}, "lengths": [64, 128, 256]},
    "blank_gap": {"task": {"length": 116, "pairs": 4}, "lengths": [116, 216, 416]},
    "selective_copying": {"task": {"length": 96, "symbols": 8}, "lengths": [96, 192]},
    "parity": {"task": {"length": 40}, "lengths": [40, 80, 160, 320], **_TRACKING},
    "modular": {"task": {"length": 40, "modulus": 5}, "lengths": [40, 80, 160, 320], **_TRACKING},
    "s3": {"task": {"length": 40}, "lengths": [40, 80, 160, 320], **_TRACKING},
    "s5": {"task": {"length": 40}, "lengths": [40, 80, 160, 320], **_TRACKING},
}
"""Training task, test lengths, and changes of the model. State tracking needs `theta` up to 1 and a gradient at every
token (README of `ops`, chunk 1)."""


_OWN = ("training.output_dir", "training.seed", "training.resume")
"""Keys that the command sets itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--model", choices=[*VARIANTS, *NAMES], default="mag", help="variant or baseline")
    parser.add_argument("--lengths", type=int, nargs="+", help="row lengths of the tests")
    parser.add_argument("--samples", type=int, default=256, help="rows per test")
    parser.add_argument("--seed", type=int, default=0)
    change = (
        "change a value of the run, such as training.max_steps=100 or data.task={length: 128, pairs: 8}; repeatable"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    parser.add_argument("--out", type=Path, help="JSON file to write (default: results/TASK_MODEL.json)")


def run(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from titans_lm.evaluate.cell import check_tests, run_cell
    from titans_lm.training.config import parse_settings
    from titans_lm.utils.record import check_least, check_output, command_line, write_json
    from titans_lm.utils.terminal import PlainConsole

    out = arguments.out or Path(f"results/{arguments.task}_{arguments.model}.json")
    check_output(out)
    check_least(arguments, 1, "samples")
    check_least(arguments, 0, "seed")
    tests = [{"length": arguments.lengths or TASKS[arguments.task]["lengths"], "samples": arguments.samples}]
    with tempfile.TemporaryDirectory() as folder:
        sections = run_of(arguments.task, arguments.model, arguments.changes)
        sections["training"] |= {"output_dir": folder, "seed": arguments.seed}
        settings = parse_settings(sections)
        check_tests(settings, tests)
        row = run_cell(settings, tests, command_line("evaluate synthetic", arguments, ["task"]))
    write_json(out, {"task": arguments.task, "model": arguments.model, "settings": sections, **row})
    if row["status"] != "ok":
        raise ValueError(f"{row['error']} (see {out})")
    table = Table("length", "right", "rows without a mistake", title=f"{arguments.model} on {arguments.task}")
    for score in row["scores"]:
        table.add_row(str(score["length"]), f"{score['score']:.3f}", f"{score['whole']:.3f}")
    console = PlainConsole()
    console.print(table)
    console.print(f"{row['parameters']:,} parameters, {row['steps']} steps, {row['seconds']:.0f} s; {out}")


def run_of(task: str, model: str, changes: list[str]) -> dict[str, dict[str, Any]]:
    """Sections of the run, with `section.key=value` changes; `data.task` adds to the task's options."""
    from titans_lm.tasks import make_task
    from titans_lm.training.config import change_tree

    own = TASKS[task]
    named = {"variant": model} if model in VARIANTS else {"baseline": model}
    memory = own.get("model", {}) if model in VARIANTS else {}  # a baseline keeps the settings of its paper
    sections: dict[str, dict[str, Any]] = copy.deepcopy({"model": _MODEL, "data": {}, "training": _TRAINING})
    sections["model"] |= {**memory, **named}
    for change in changes:
        if change.partition("=")[0] in _OWN:
            raise ValueError(f"--set {change!r}: the folder is temporary, and --seed sets the seed")
        change_tree(sections, change)
    options = sections["data"].get("task", {})
    if not isinstance(options, dict):
        raise ValueError(f"data.task must be options, such as {{length: 128}}, got {options!r}")
    sections["data"]["task"] = {"name": task, **own["task"], **options}
    width = sections["model"].get("hidden_size")
    if isinstance(width, int) and not {"size", "intermediate_size", "parameters"} & sections["model"].keys():
        embedding = make_task(sections["data"]["task"]).vocab_size * width
        sections["model"]["parameters"] = PARAMETERS + embedding
    return sections
