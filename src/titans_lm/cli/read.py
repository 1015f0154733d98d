"""`titans read`: read texts into a memory file, and list their most surprising lines."""

import argparse
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import PreTrainedTokenizerBase

from titans_lm.inference.generate import piece_with_logits
from titans_lm.inference.reader import Progress, Reader
from titans_lm.inference.surprising import SurprisingLines
from titans_lm.inference.token_bits import by_bytes
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache_file import Source
from titans_lm.models.hub import load
from titans_lm.utils.terminal import PlainConsole, shown
from titans_lm.utils.text_file import examine


def run(arguments: argparse.Namespace) -> None:
    if arguments.memory is None and arguments.surprising is None:
        raise ValueError("nothing would be left of this reading: give --memory FILE, or --surprising N, or both")
    lines = None if arguments.surprising is None else SurprisingLines(arguments.surprising)
    if arguments.memory is not None and not arguments.memory.absolute().parent.is_dir():
        raise ValueError(f"--memory {arguments.memory}: its folder does not exist")
    for text in arguments.texts:
        examine(text, arguments.errors)  # before the model is loaded
    console = PlainConsole(stderr=True)
    model, tokenizer = load(arguments.model)
    piece = PREFILL_TOKENS if lines is None else piece_with_logits(model.config.vocab_size)
    reader = Reader(
        model, tokenizer, memory=arguments.memory, mode=arguments.mode, save_seconds=arguments.save_seconds,
        errors=arguments.errors, piece=piece, on_tokens=None if lines is None else partial(_watch, tokenizer, lines),
    )  # fmt: skip
    if arguments.abandon:
        reader.abandon()
        reader.save()
    try:
        show(reader, arguments.texts, console)
    finally:  # also after an interruption
        if lines is not None:
            _print_lines(lines, several=len(arguments.texts) > 1)
    state = reader.state
    holds = "" if arguments.memory is None else f"; {arguments.memory} holds {state.nbytes / 2**20:.1f} MiB"
    console.print(f"{int(state.position[0]):,} tokens read{holds}")


def _watch(
    tokenizer: PreTrainedTokenizerBase,
    lines: SurprisingLines,
    source: Source,
    ids: NDArray[np.int64],
    bits: NDArray[np.float64],
) -> None:
    """Add a piece to `lines`. A resumed reading counts lines from where it resumed, and names that place."""
    before = source.tokens - len(ids)
    if before == 0:
        lines.begin(source.name)
    elif not lines.source:
        lines.begin(f"{source.name}, from token {before:,}")
    lines.add(*by_bytes(tokenizer, ids, bits))


def _print_lines(lines: SurprisingLines, several: bool) -> None:
    """Print bits per byte, line number (with several texts also the text), and the line."""
    lines.end()
    for line in lines.most():
        place = f"{shown(line.source)}:{line.number}" if several or ", from token " in line.source else line.number
        print(f"{line.bits_per_byte:.2f}\t{place}\t{shown(line.text)}")


def show(reader: Reader, texts: list[Path], console: Console) -> None:
    """Read with a progress bar: rate, surprise and, unless a text is a stream, the time left."""
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[status]}", markup=False), TimeElapsedColumn()]  # fmt: skip
    with Bars(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=None, status="")
        with closing(reader.reading(*texts)) as reading:  # saves before an error of the console propagates
            for progress in reading:
                _update(bars, bar, progress)


def _update(bars: Bars, bar: TaskID, progress: Progress) -> None:
    status = f"{progress.tokens:,} tokens, {progress.rate:,.0f} a second"
    if progress.left is not None:
        status += f", {progress.left:,.0f} s left"
        spent = time.monotonic() - (bars.tasks[0].start_time or 0)
        bars.update(bar, total=1.0, completed=spent / max(spent + progress.left, 1e-9))
    if progress.surprise is not None:
        status += f", surprise {progress.surprise:.3f}"
    bars.update(bar, description=shown(progress.source.name), status=status)
