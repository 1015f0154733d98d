"""`titans bench busy`: training steps on an idle machine and beside processes that compute all the time.

Threads that wait by spinning take the time that the thread they wait for would need. "passive" is how `titans train`
lets them wait, "default" how PyTorch does by itself.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
from rich.table import Table

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.bench.race import Entrant, Heat
from titans_lm.models.presets import SIZES
from titans_lm.utils.machine import WAIT_VARIABLES
from titans_lm.utils.record import check_least, cores
from titans_lm.utils.terminal import red

WAITING: dict[str, dict[str, str | None]] = {
    "passive": {**dict.fromkeys(WAIT_VARIABLES), "OMP_WAIT_POLICY": "PASSIVE"},
    "default": dict.fromkeys(WAIT_VARIABLES),
}
"""The environment of each way to wait; None: without this variable."""
NEIGHBOUR = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**6): pass
"""


def trainer(options: dict[str, Any], setting: Setting) -> Contender:
    """A model that is trained on random tokens. The action is `steps` steps, beside `neighbours` busy processes."""
    model = lm.build(options["variant"], options["size"], setting)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (options["batch_size"], options["tokens"]))
    neighbours: list[subprocess.Popen[bytes]] = []

    def train(steps: int) -> None:
        for _ in range(steps):
            lm.loss(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin() -> None:
        command = [sys.executable, "-c", NEIGHBOUR, str(os.getpid())]
        neighbours[:] = [subprocess.Popen(command) for _ in range(options["neighbours"])]

    def end(_: Any) -> dict[str, Any]:
        for process in neighbours:
            process.kill()
            process.wait()
        return {}

    action = Action(lambda _: train(options["steps"]), begin, end, once=True)
    return Contender({"train": action}, {"parameters": lm.parameters(model)}, lambda: train(2))


BUILD = {"trainer": trainer}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=cores())
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--variant", choices=lm.TITANS, default="mag")
    parser.add_argument("--steps", type=int, default=24, help="training steps per repetition")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--neighbours", type=int, default=2, help="processes that compute all the time")
    parser.add_argument("--waiting", nargs="+", choices=list(WAITING), default=["passive"], help="how threads wait")


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "steps", "batch_size", "tokens", "neighbours")
    if arguments.peers or arguments.device != "cpu":
        raise ValueError("titans bench busy is about the threads of a CPU, without --peers")


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    """One heat, in which the idle and the busy machine take turns."""
    kinds = [(waiting, count) for waiting in arguments.waiting for count in (0, arguments.neighbours)]
    return [Heat("busy", [_entrant(*kind, arguments) for kind in kinds], arguments.runs, warm_up=False)]


def _entrant(waiting: str, neighbours: int, arguments: argparse.Namespace) -> Entrant:
    keys = ("variant", "size", "steps", "batch_size", "tokens")
    options = {"waiting": waiting, "neighbours": neighbours, **{key: getattr(arguments, key) for key in keys}}
    name = f"{waiting}, {neighbours} neighbours"
    return Entrant(name, "busy", "trainer", ["train"], options, WAITING[waiting])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The time beside neighbours over the time alone, of medians."""
    seconds = {
        (row["waiting"], row["neighbours"]): row["actions"]["train"]["seconds"] for row in rows if row["actions"]
    }
    busy = {name: s for (name, count), s in seconds.items() if count and (name, 0) in seconds}
    return {"busy_over_alone": {name: s / seconds[name, 0] for name, s in busy.items()}}


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("threads wait", "busy neighbours", "s", "CPU s", "over alone")
    for row in rows:
        if row["error"]:
            table.add_row(row["waiting"], str(row["neighbours"]), red(row["error"]))
            continue
        m = row["actions"]["train"]
        ratio = results["busy_over_alone"].get(row["waiting"]) if row["neighbours"] else None
        table.add_row(
            row["waiting"], str(row["neighbours"]), f"{m['seconds']:.1f}", f"{m['cpu_seconds']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
        )  # fmt: skip
    return [table]
