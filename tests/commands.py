"""`titans` commands in processes of their own, for tests that send signals to them or take something from them.

They are forked from one process that has imported the package, which takes seconds, and has run nothing.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from titans_lm.cli import main, stability
from titans_lm.training.train import train  # noqa: F401 - imported once, for all
from titans_lm.training.trainer import TitansTrainer


def started(arguments: list[str], said: Path, before: Callable[..., object] | None = None, *with_: int) -> BaseProcess:
    """A running command. Its standard error goes to the file `said`; `before` is called in its process, before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "titans_lm.study.scheduler"])
    process = context.Process(target=_run, args=(arguments, said, before, with_))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """The command's exit status once it has ended; minus the number of the signal that killed it."""
    process.join(120)
    return process.exitcode


def _run(arguments: list[str], said: Path, before: Callable[..., object] | None, with_: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    if before is not None:
        before(*with_)
    sys.exit(main(arguments))


def full_disk(size: int) -> None:
    """No file may have more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed_as_it_saves() -> None:
    TitansTrainer.check_finite = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]  # noqa: ARG005


def few_stability_runs() -> None:
    """`titans stability` has four short runs, in a process group of its own, to which Ctrl-C goes."""
    os.setsid()
    stability.long_runs = lambda steps: [({"memory_chunk_size": c}, steps, 64, "float32") for c in range(8, 12)]
