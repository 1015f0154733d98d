"""Second part of the demo: a model reads an unseen text, and its bits per byte fall.

Compares memory on and memory frozen, with the same weights, and zlib (the algorithm of gzip).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from titans_lm.evaluate import perplexity
from titans_lm.evaluate.adapt import Stream, read_streams
from titans_lm.evaluate.compressors import compressed_bits
from titans_lm.inference.surprising import Line, SurprisingLines
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import is_bytes
from titans_lm.utils.corpora import STDLIB, stdlib_held_out
from titans_lm.utils.figures import figure_file

MODES = ("on", "frozen")
BUCKET, BIN = 1024, 1024
"""Tokens of the table's first row, and of a step of the figure."""
LINES = 3
"""Number of surprising lines shown."""


class Curves(NamedTuple):
    """Bits `[T]` of each token of a text, by memory mode; nan for the first, which nothing predicts."""

    stream: Stream
    bits: dict[str, NDArray[np.float64]]
    lines: list[Line]
    """The most surprising lines, with memory on."""


def text_files_of(files: Sequence[Path]) -> list[Path]:
    """The user's files; else files of the standard library that the model was not trained on."""
    return list(files) or stdlib_held_out()


def read_text(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], tokens: int, console: Console
) -> Curves:
    """Read the first `tokens` tokens of the concatenated files in each mode.

    Raises ValueError for a model whose tokens are not bytes, and for files that cannot be read.
    """
    if not is_bytes(tokenizer):
        raise ValueError("the demo shows bits of each byte: it needs a model whose tokens are bytes")
    name = ", ".join(path.name for path in files) if files else STDLIB
    stream = read_streams(text_files_of(files), tokenizer, tokens)._replace(name=name)
    bits = {mode: np.full(len(stream.data), np.nan) for mode in MODES}
    with Progress(console=console) as bars:
        bar = bars.add_task("", total=len(MODES) * (len(stream.data) - 1))
        for mode in MODES:
            bars.update(bar, description=f"reading, memory {mode}")
            for first, nats in perplexity.token_nats(model, stream.ids, mode, perplexity.RESET):
                bits[mode][first : first + len(nats)] = nats.numpy() / np.log(2)
                bars.advance(bar, len(nats))
    lines = SurprisingLines(LINES)
    lines.add(stream.data, bits["on"])
    lines.end()
    return Curves(stream, bits, lines.most())


def summary(curves: Curves) -> dict[str, Any]:
    """Bits per byte in total and in buckets of doubling ends; the most surprising lines."""
    data, edges = curves.stream.data, perplexity.bucket_edges(len(curves.stream.data), BUCKET)
    zlib = compressed_bits("zlib", data, edges[1:])
    rows = [
        {"from": first, "to": end, **{mode: float(np.nanmean(bits[first:end])) for mode, bits in curves.bits.items()},
         "zlib": spent / (end - first)}
        for first, end, spent in zip(edges, edges[1:], zlib, strict=False)
    ]  # fmt: skip
    whole = {mode: float(np.nanmean(bits)) for mode, bits in curves.bits.items()}
    return {
        "text": curves.stream.name,
        "bytes": len(data),
        "bits_per_byte": {**whole, "zlib": sum(zlib) / len(data)},
        "buckets": rows,
        "surprising": [line._asdict() for line in curves.lines],
    }


def print_summary(results: dict[str, Any], console: Console) -> None:
    """Print the table and the most surprising lines."""
    columns = {"on": "memory on", "frozen": "memory frozen", "zlib": "gzip"}
    table = Table("bytes read", *columns.values(), title=f"bits per byte of {results['bytes']:,} unseen bytes")
    for row in results["buckets"]:
        table.add_row(f"{row['from']:,} to {row['to']:,}", *(f"{row[key]:.2f}" for key in columns))
    table.add_section()
    table.add_row("all", *(f"{results['bits_per_byte'][key]:.2f}" for key in columns))
    console.print(table)
    console.print("Most surprising lines (bits per byte, number, line):")
    for line in results["surprising"]:
        console.print(f"  {line['bits_per_byte']:5.2f}  {line['number']:6,}  {line['text'][:90]}")


def plot(curves: Curves, path: Path) -> None:
    """Bits per byte along the text."""
    data = curves.stream.data
    edges = [*range(0, max(len(data) - BIN // 2, 1), BIN), len(data)]
    with figure_file(path, figsize=(9, 3.6)) as axis:
        for name, bits in curves.bits.items():
            axis.stairs(
                [np.nanmean(bits[a:b]) for a, b in itertools.pairwise(edges)],
                edges,
                baseline=None,
                label=f"memory {name}",
            )
        spent = np.array(compressed_bits("zlib", data, edges[1:])) / np.diff(edges)
        axis.stairs(spent, edges, baseline=None, color="0.6", label="gzip")
        axis.set_ylim(0, None)
        axis.set_xlabel("bytes read")
        axis.set_ylabel("bits per byte")
        axis.set_title("Bits per byte while reading an unseen text")
        axis.legend(frameon=False, ncols=3)
