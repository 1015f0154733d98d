"""`titans read`: texts into a memory file."""

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from titans_lm.checkpoint import MODEL_HELP, load
from titans_lm.reader import Mode, Progress, Reader
from titans_lm.terminal import PlainConsole, shown
from titans_lm.text_file import Errors, examine

ERRORS_HELP = "replace: what is not UTF-8 in a file is read as U+FFFD; strict: such a file is refused"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", type=Path, nargs="+", metavar="FILE", help="text files, read in this order; -: standard input"
    )
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, required=True, help="the file to go on from, if it exists, and to write")
    parser.add_argument("--mode", choices=get_args(Mode), default="learning", help="reset: forget before each text")
    parser.add_argument("--save-seconds", type=float, default=30.0, help="at most so much is lost at a kill")
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)
    parser.add_argument("--abandon", action="store_true", help="do not go on with what was interrupted")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.memory.absolute().parent.is_dir():
        raise ValueError(f"--memory {arguments.memory}: its folder does not exist")
    for text in arguments.texts:
        examine(text, arguments.errors)  # before the model is loaded
    console = PlainConsole(stderr=True)
    model, tokenizer = load(arguments.model)
    reader = Reader(
        model, tokenizer, memory=arguments.memory, mode=arguments.mode, save_seconds=arguments.save_seconds,
        errors=arguments.errors,
    )  # fmt: skip
    if arguments.abandon:
        reader.abandon()
        reader.save()
    show(reader, arguments.texts, console)
    state = reader.state
    console.print(f"{int(state.position[0]):,} tokens read; {arguments.memory} holds {state.nbytes / 2**20:.1f} MiB")


def show(reader: Reader, texts: list[Path], console: Console) -> None:
    """Read, with rate, surprise and, where no text is a stream, time left."""
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[told]}", markup=False), TimeElapsedColumn()]  # fmt: skip
    with Bars(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=None, told="")
        with closing(reader.reading(*texts)) as reading:  # saves first, whatever becomes of the screen
            for progress in reading:
                _update(bars, bar, progress)


def _update(bars: Bars, bar: TaskID, progress: Progress) -> None:
    told = f"{progress.tokens:,} tokens, {progress.rate:,.0f} a second"
    if progress.left is not None:
        told += f", {progress.left:,.0f} s left"
        spent = time.monotonic() - (bars.tasks[0].start_time or 0)
        bars.update(bar, total=1.0, completed=spent / max(spent + progress.left, 1e-9))
    if progress.surprise is not None:
        told += f", surprise {progress.surprise:.3f}"
    bars.update(bar, description=shown(progress.source.name), told=told)
