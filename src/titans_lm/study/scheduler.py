"""Runs cells in parallel, each in a process of its own: a crash is a result of its cell and affects no other."""

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from titans_lm.evaluate.cell import run_cell
from titans_lm.study.grid import Cell
from titans_lm.training.run_folder import remove_run
from titans_lm.utils.record import Lines, provenance

LOG = "log.txt"
"""Ending of the file, beside a run's folder, with the run's output."""


class Running(NamedTuple):
    cell: Cell
    process: BaseProcess
    answer: Connection
    begun: float


Job = Callable[[Cell, Path, str], dict[str, Any]]
"""(cell, folder of the runs, command) -> the cell's row. Another process must be able to import it."""


def run_cells(
    cells: list[Cell], job: Job, arguments: argparse.Namespace, command: str, lines: Lines, console: Console
) -> None:
    """Run all cells, `arguments.processes` at a time, in folders of `arguments.runs`. Adds a line for each as it ends.

    Raises KeyboardInterrupt after Ctrl-C, once all have saved a checkpoint from which the next call resumes.
    """
    waiting, running = list(cells), list[Running]()
    processes, runs = arguments.processes, arguments.runs / lines.path.stem
    runs.mkdir(parents=True, exist_ok=True)
    with _bar(console) as bar:
        task = bar.add_task("", total=len(cells), left="")
        seconds: list[float] = []
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    running.append(_start(waiting.pop(0), job, runs, command))
                names = ", ".join(one.cell.name for one in running)
                bar.update(task, description=names, left=_time_left(seconds, len(waiting) + len(running), processes))
                ended = wait([one.answer for one in running])  # ready to read, or closed because the process died
                for one in [one for one in running if one.answer in ended]:
                    running.remove(one)
                    row = _end(one, runs, arguments.keep, command)
                    lines.add({**one.cell.about(), **row})
                    seconds.append(time.monotonic() - one.begun)
                    bar.advance(task)
                    bar.console.print(f"{one.cell.name}: {_outcome(row)}")
        except KeyboardInterrupt:
            for one in running:  # each saves a checkpoint; only Ctrl-C has reached them already
                one.process.terminate()
            for one in running:
                one.process.join()
            raise KeyboardInterrupt(
                f"{len(lines.rows)} results are in {lines.path}; the same command continues"
            ) from None


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[left]}", markup=False),
        TimeElapsedColumn(), TextColumn("{task.description}", markup=False), console=console,
    )  # fmt: skip


def _time_left(seconds: list[float], count: int, processes: int) -> str:
    """Estimated time left; running cells count as half done."""
    if not seconds or not count:
        return ""
    rest = statistics.mean(seconds) * max(count - min(processes, count) / 2, 0.5) / min(processes, count)
    return f"about {rest / 60:.0f} min left"


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    scores = [f"{score['score']:.3f}" for score in row["scores"] if "score" in score]
    return f"loss {row['loss']}, {row['seconds']:.0f} s" + (f", scores {' '.join(scores)}" if scores else "")


def train_and_test(cell: Cell, runs: Path, command: str) -> dict[str, Any]:
    """The job of a study."""
    return run_cell(cell.settings(runs), cell.tests, command)


# ------------------------------------------------------------------------------------------------ one process


def _context() -> Any:
    """Each process is forked from one that has imported what all need, which takes seconds, and has run nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start(cell: Cell, job: Job, runs: Path, command: str) -> Running:
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(cell, job, runs, command, theirs), name=cell.name)
    process.start()
    theirs.close()
    return Running(cell, process, ours, time.monotonic())


def _work(cell: Cell, job: Job, runs: Path, command: str, answer: Connection) -> None:
    """Run a job in the cell's process: one thread, output to a file, the result through the pipe."""
    import torch

    from titans_lm.utils.machine import end_quickly, keep_freed_memory
    from titans_lm.utils.record import on_stop, stop

    torch.set_num_threads(1)
    keep_freed_memory()
    end_quickly()  # the next cell, or a user who has stopped the study, waits for it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (runs / f"{cell.name}.{LOG}").open("a", buffering=1) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            with on_stop(stop):
                answer.send(job(cell, runs, command))
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # any error is the cell's result
            traceback.print_exc()
            answer.send({"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"})


def _end_with_parent() -> None:
    """Exit when the parent dies: nobody would read the result, and the next call resumes from the checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end(one: Running, runs: Path, keep: bool, command: str) -> dict[str, Any]:
    """The row of an ended process."""
    row: dict[str, Any]
    try:
        row = one.answer.recv()
        one.process.join()
    except EOFError:
        one.process.join()
        code = one.process.exitcode
        if code == 130:
            raise KeyboardInterrupt from None
        why = "killed, most likely for want of memory" if code == -9 else f"the process ended with status {code}"
        row = {"status": "failed", "error": why}
    one.answer.close()
    remove_run(runs / one.cell.name, model=not keep)
    seconds = round(time.monotonic() - one.begun, 1)
    return {**provenance(command), "scores": [], "loss": None, "seconds": seconds, **row}
