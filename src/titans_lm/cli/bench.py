"""`titans bench WHAT`: time and memory of the operation, models, the server; with `--peers` also of other projects.

Every contender has a process of its own; they take turns after a warm-up. Reports median, minimum and maximum, seconds
and CPU seconds, and peak memory above that of the process before the action. Uses one thread by default, and refuses
more threads than cores: the memory's matmuls are small, and threads that wait by spinning slow them a hundredfold.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from titans_lm.cli.flags import add_kinds

WHAT = {
    "op": "the memory operation, beside a large matmul; peers: titans-pytorch",
    "model": "training step and prefill at several lengths; peers: attention, Mamba2",
    "decode": "time per token after a long context; peers: full attention, Mamba2",
    "write": "share of tokens written, quality and speed of a trained model, by threshold",
    "serve": "clients of the server, one after another and all at once",
    "busy": "training steps beside other processes that compute",
    "read": "a long text through the carried state; peers: sliding window, Mamba2",
    "gpu": "check and measure a GPU, all of it in one command of at most twelve minutes",
}
"""Each kind is a module of `titans_lm.bench`: `add_arguments`, `check`, `heats`, `summary`, `table`, `BUILD`. `gpu` has
`add_arguments` and `run`."""
QUIET_CORES = 0.25
"""Cores that others may use without a warning."""
WIDTH = 150
"""Width of tables that go to a file."""
OWN = ("gpu",)
"""Kinds with flags and a `run` of their own."""
RUNS = {"op": 7, "model": 3, "decode": 5, "write": 2, "serve": 3, "busy": 1}


def add_arguments(parser: argparse.ArgumentParser, chosen: str | None = None) -> None:
    """Flags of each kind, or of the `chosen` one only."""
    add_kinds(parser, WHAT, chosen, _add_arguments_of)


def _add_arguments_of(parser: argparse.ArgumentParser, name: str) -> None:
    if name in OWN:
        importlib.import_module(f"titans_lm.bench.{name}").add_arguments(parser)
        return
    from titans_lm.ops import Backend

    parser.add_argument("--peers", action="store_true", help="also measure other implementations and architectures")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto", help="form of the memory operation")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender on a CPU, at most the cores")
    if name != "read":  # a text is read once
        parser.add_argument("--runs", type=int, default=RUNS[name], help="repetitions after the warm-up")
    parser.add_argument(
        "--memory-limit", type=float, help="GiB that a contender may allocate on a CPU (default: 0.8 of what is free)"
    )
    parser.add_argument("--out", type=Path, default=Path(f"results/bench_{name}.json"), help="JSON file to write")
    parser.add_argument(
        "--against",
        type=Path,
        help="an earlier result file of this machine: print what got slower; status 1 if any did",
    )
    parser.add_argument("--slower", type=float, default=0.1, help="with --against: by how much, 0.1 for a tenth")
    importlib.import_module(f"titans_lm.bench.{name}").add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write and print. Returns 1 if with `--against` something got slower, else 0."""
    import torch

    from titans_lm.bench import against
    from titans_lm.bench.race import run_heats
    from titans_lm.utils.machine import OtherLoad, other_cores
    from titans_lm.utils.record import command_line, provenance, write_json
    from titans_lm.utils.terminal import PlainConsole

    command = importlib.import_module(f"titans_lm.bench.{arguments.what}")
    if arguments.what in OWN:
        command.run(arguments)
        return 0
    _check(arguments)
    command.check(arguments)
    setting = _setting(arguments)
    console = PlainConsole(width=None if sys.stdout.isatty() else WIDTH)
    here = provenance(command_line(f"bench {arguments.what}", arguments))
    record: dict[str, Any] = {**here, "threads": str(setting.threads), "setting": dataclasses.asdict(setting)}
    if setting.device == "cuda":
        record["device"] = torch.cuda.get_device_name()
    earlier = None if arguments.against is None else against.load_earlier(arguments.against, record, record["setting"])
    others = other_cores(0.5)
    _warn_of_others(others, "")
    rows: list[dict[str, Any]] = []
    load = OtherLoad()
    with _hold_interruption() as interruption:
        run_heats(command.heats(arguments, setting), setting, rows, console)
    results = command.summary(rows)
    others = load.cores()
    record["other_cores"] = None if others is None else round(others, 2)
    write_json(arguments.out, {**record, "complete": not interruption, "summary": results, "rows": rows})
    for table in command.table(rows, results):
        console.print(table)
    if hasattr(command, "plot") and rows:
        command.plot(rows, arguments.out.with_suffix(".png"))
    _warn_of_others(others, " while this ran")
    found = [] if earlier is None else against.changes(rows, earlier)
    if earlier is not None:
        console.print(against.change_table(found, arguments.slower, arguments.against))
    _end(rows, arguments.out, bool(interruption))
    return int(any(change.is_slower(arguments.slower) for change in found))


def _warn_of_others(others: float | None, when: str) -> None:
    """Say so if other processes compute."""
    from titans_lm.utils.record import cores
    from titans_lm.utils.terminal import PlainConsole

    if others is not None and others >= QUIET_CORES:
        text = f"other processes used {others:.1f} of {cores()} cores{when}: times are longer than on an idle machine"
        PlainConsole(stderr=True).print(text, style="yellow")


@contextlib.contextmanager
def _hold_interruption() -> Iterator[list[KeyboardInterrupt]]:
    """Hold Ctrl-C back until the measurements are written."""
    held: list[KeyboardInterrupt] = []
    try:
        yield held
    except KeyboardInterrupt as interruption:
        held.append(interruption)


def _end(rows: list[dict[str, Any]], out: Path, interrupted: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt(f"the measurements so far are in {out}")
    wrong = [row for row in rows if (row["error"] or "").startswith("NotTheSame")]
    if wrong:
        raise ValueError(f"{wrong[0]['heat']}, {wrong[0]['name']}: {wrong[0]['error']}")


def _check(arguments: argparse.Namespace) -> None:
    import torch

    from titans_lm.utils.record import check_least, check_output, cores

    if "runs" in arguments:
        check_least(arguments, 1, "runs")
    if not 1 <= arguments.threads <= cores():
        raise ValueError(f"--threads must be from 1 to {cores()}, the cores of this process, got {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that PyTorch can use")
    if not 0 <= arguments.slower < math.inf:
        raise ValueError(f"--slower must be a number of at least 0, got {arguments.slower}")
    limit = arguments.memory_limit
    if limit is not None and not 0 <= limit < math.inf:
        raise ValueError(f"--memory-limit must be a number of GiB, 0 for no limit, got {limit}")
    check_output(arguments.out, picture=arguments.what == "read")


def _setting(arguments: argparse.Namespace) -> Any:
    from titans_lm.bench.measure import Setting, available_memory

    limit = round(0.8 * available_memory(), 1) if arguments.memory_limit is None else arguments.memory_limit
    return Setting(arguments.device, arguments.dtype, arguments.backend, arguments.threads, limit)
