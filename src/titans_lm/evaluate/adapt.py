"""`titans evaluate adapt`: how fast a model learns a stream (prequential code length), compared with alternatives.

Each file is a stream, read from its first byte. Measures the bits of each byte given those before it, in buckets of
doubling ends, for these predictors:

* the model with its memory "on", "frozen", "reset" every so many tokens, "off" (as `titans evaluate perplexity`);
* "dynamic RATE": the same model without memory, all its weights trained on what it reads (`dynamic`);
* compressors: "zlib", "bz2", "lzma", and "ppmd" where pyppmd is installed.

Then reads passages of each stream a second time, after other text (`rereading`). Rows of the result file are written
one by one, and an interrupted run resumes after the last.
"""

import argparse
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans_lm.evaluate import perplexity
from titans_lm.evaluate.compressors import compressed_bits, installed
from titans_lm.evaluate.dynamic import dynamic_nats
from titans_lm.evaluate.rereading import LAGS, PASSAGE, PASSAGES, reread
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP
from titans_lm.models.model_identity import digests
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import is_bytes
from titans_lm.utils.corpora import text_files
from titans_lm.utils.figures import figure_file
from titans_lm.utils.nats import target_nats
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

RATES = (0.01, 0.1)
"""Learning rates of dynamic evaluation. The best one depends on the stream, so all are reported."""
DYNAMIC = "dynamic"
SUFFIXES = (".txt", ".log")
"""File name endings that are read from a folder."""


class Stream(NamedTuple):
    """One file's tokens."""

    name: str
    ids: Tensor
    """`[1, T]`"""
    sizes: Tensor
    """`[T]`, the bytes of each token."""
    data: bytes
    """The bytes of these tokens."""


def read_stream(path: Path, tokenizer: PreTrainedTokenizerBase, most: int | None) -> Stream:
    """Read at most `most` tokens of a file. A byte tokenizer reads any file; others read UTF-8 text.

    Raises ValueError for a file of fewer than four tokens, each half of which would have none that is predicted;
    OSError for one that cannot be read.
    """
    return read_streams([path], tokenizer, most)


def read_streams(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, most: int | None) -> Stream:
    """As `read_stream`, for concatenated files."""
    if is_bytes(tokenizer):
        data = _first_bytes(paths, most)
        ids = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))[None]
        sizes = torch.ones(ids.shape[1], dtype=torch.float64)
    else:
        ids, sizes = perplexity.stream(paths, tokenizer, most)
        data = b"".join(path.read_bytes() for path in paths)[: int(sizes.sum())]
    if ids.shape[1] < 4:
        raise ValueError(f"{paths[0]} has {ids.shape[1]} tokens; give a file with at least 4")
    return Stream(paths[0].name, ids, sizes, data)


def read_each(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, most: int | None) -> list[Stream]:
    """`read_stream` of each file, once. Files with the same name are called by as much of their paths as tells them
    apart."""
    paths = list({path.absolute(): path for path in paths}.values())
    return [read_stream(p, tokenizer, most)._replace(name=name) for p, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    parts = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names):
        parts += 1
        same = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(path.absolute().parts[-parts:]) if name in same else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def _first_bytes(paths: Sequence[Path], most: int | None) -> bytes:
    data = b""
    for path in paths:
        try:
            with path.open("rb") as file:
                data += file.read(-1 if most is None else most - len(data))
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error.strerror}") from error
    return data


# ------------------------------------------------------------------------------------------------ one predictor


def code_lengths(model: PreTrainedModel, stream: Stream, predictor: str, options: dict[str, Any]) -> dict[str, Any]:
    """Code lengths of a stream by `predictor`: `bits_per_byte` in total, of `first_half` and `last_half`, and
    `buckets`, each `[from, to, bits per byte]` in tokens. `options`: bucket, reset_every."""
    length = stream.ids.shape[1]
    edges = perplexity.bucket_edges(length, options["bucket"])
    nats = np.zeros(length)
    if predictor in installed():
        ends, cuts = np.cumsum(stream.sizes.numpy()).astype(int), sorted({*edges, length // 2})
        bits = compressed_bits(predictor, stream.data, [int(ends[cut - 1]) for cut in cuts[1:]])
        for (first, end), spent in zip(itertools.pairwise(cuts), bits, strict=True):
            nats[first:end] = spent * math.log(2) / (end - first)  # only sums between cuts are reported
    elif not isinstance(model, TitansForCausalLM):
        nats = nats_of(length, nats_at_once(model, stream.ids))
    elif predictor.startswith(DYNAMIC):
        nats = nats_of(length, dynamic_nats(model, stream.ids, rate=float(predictor.split()[1])))
    else:
        nats = nats_of(length, perplexity.token_nats(model, stream.ids, predictor, options["reset_every"]))
    sizes, half = stream.sizes.numpy(), length // 2
    per_byte = {
        name: float(nats[part].sum() / math.log(2) / sizes[part].sum())
        for name, part in (
            ("bits_per_byte", slice(1, None)),
            ("first_half", slice(1, half)),
            ("last_half", slice(half, None)),
        )
    }
    buckets = [
        [first, end, float(nats[max(first, 1) : end].sum() / math.log(2) / sizes[max(first, 1) : end].sum())]
        for first, end in itertools.pairwise(edges)
        if end > 1
    ]
    return {**per_byte, "buckets": buckets}


def nats_at_once(model: PreTrainedModel, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """As `perplexity.token_nats`, in one call: for a model of transformers, such as Mamba2, whose cache takes one token
    a call after the first."""
    model.eval()
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits[0, :-1]
    yield 1, target_nats(logits, ids[0, 1:]).double().cpu()


def nats_of(length: int, parts: Iterable[tuple[int, Tensor]]) -> NDArray[np.float64]:
    """Parts `(t, nats)` of a stream of `length` tokens -> the nats of each, `[length]`; 0 for the first token."""
    nats = np.zeros(length)
    for first, part in parts:
        nats[first : first + len(part)] = part.numpy()
    return nats


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='files, each one stream; folders; "python-stdlib"')
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--tokens", type=int, help="maximum tokens of each stream (default: all)")
    parser.add_argument(
        "--modes", nargs="+", choices=perplexity.MODES, help="settings of the memory (default: all that the model has)"
    )
    parser.add_argument(
        "--rates",
        nargs="*",
        type=float,
        default=list(RATES),
        help="learning rates of dynamic evaluation; none: skip it",
    )
    parser.add_argument(
        "--compressors",
        nargs="*",
        choices=installed(),
        default=installed(),
        help="compressors to compare with; none: skip them",
    )
    parser.add_argument(
        "--bucket", type=int, default=perplexity.BUCKET, help="tokens of the first bucket; the ends double"
    )
    parser.add_argument("--reset-every", type=int, default=perplexity.RESET, help="tokens between resets of mode reset")
    parser.add_argument(
        "--lags",
        nargs="*",
        type=int,
        default=list(LAGS),
        help="tokens between two readings of a passage; none: skip this",
    )
    parser.add_argument("--passage", type=int, default=PASSAGE, help="tokens of a passage")
    parser.add_argument("--passages", type=int, default=PASSAGES, help="passages per stream")
    parser.add_argument(
        "--suffixes", nargs="+", default=list(SUFFIXES), help="file name endings that are read from a folder"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/adapt.jsonl"), help="JSON lines; the figure is beside them"
    )


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    files = text_files(arguments.files, arguments.suffixes)
    model, tokenizer = load(arguments.model)
    modes = arguments.modes or perplexity.possible_modes(model)
    perplexity.check_modes(model, modes)
    streams = read_each(files, tokenizer, arguments.tokens)
    predictors = [*modes, *(f"{DYNAMIC} {rate:g}" for rate in arguments.rates), *arguments.compressors]
    options = {key: getattr(arguments, key) for key in ("bucket", "reset_every", "passage", "passages")}
    settings = {
        **options,
        **digests(model),
        "streams": {s.name: hashlib.sha256(s.data).hexdigest() for s in streams},
    }
    with Lines(arguments.out, settings, command_line("evaluate adapt", arguments, ["files"])) as lines:
        _measure(model, streams, predictors, arguments.lags, lines)
    plot(lines.rows, arguments.out.with_suffix(".png"))
    console = PlainConsole()
    for table in (code_table(lines.rows), reading_table(lines.rows)):
        if table.row_count:
            console.print(table)
    console.print(f"Results are in {arguments.out}, the figure is {arguments.out.with_suffix('.png')}.")


def _check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "bucket", "reset_every", "passages")
    check_least(arguments, 2, "passage", "tokens")
    check_least(arguments, 0, "lags")
    if not all(0 < rate < math.inf for rate in arguments.rates):
        raise ValueError(f"--rates must be above 0, got {' '.join(map(str, arguments.rates))}")
    check_output(arguments.out, picture=True, ours=False)


def _measure(
    model: TitansForCausalLM, streams: Sequence[Stream], predictors: Sequence[str], lags: Sequence[int], lines: Lines
) -> None:
    """Measure what is not in `lines` yet, with a progress bar."""
    work = list(_work(model, streams, predictors, lags, lines))
    with Progress() as bars:
        bar = bars.add_task("", total=sum(tokens for _, tokens, _ in work))
        for key, tokens, measure in work:
            bars.update(bar, description=" ".join(map(str, key.values())))
            begun = time.monotonic()
            result = measure()
            lines.add({**key, **result, "seconds": round(time.monotonic() - begun, 2)})
            bars.advance(bar, tokens)


def _work(
    model: TitansForCausalLM, streams: Sequence[Stream], predictors: Sequence[str], lags: Sequence[int], lines: Lines
) -> Iterator[tuple[dict[str, Any], int, Callable[[], dict[str, Any]]]]:
    """Yields key, approximate number of tokens, and function of each missing measurement."""
    options = lines.head["settings"]
    for stream in streams:
        for predictor in predictors:
            key: dict[str, Any] = {"stream": stream.name, "predictor": predictor}
            if lines.find(**key) is None:
                yield key, stream.ids.shape[1], partial(code_lengths, model, stream, predictor, options)
        for lag in lags:
            key = {"stream": stream.name, "lag": lag}
            if lines.find(**key) is None and stream.ids.shape[1] >= options["passage"] + lag:
                tokens = (2 * options["passage"] + lag) * options["passages"]
                yield key, tokens, partial(_rereading, model, stream, lag, options)


def _rereading(model: TitansForCausalLM, stream: Stream, lag: int, options: dict[str, Any]) -> dict[str, Any]:
    """Bits per token of the first and the second reading, averaged over passages."""
    rows = list(reread(model, stream.ids, lag, options["passage"], options["passages"]))
    first, second = (sum(row[key] for row in rows) / len(rows) / math.log(2) for key in ("first", "second"))
    return {"first": first, "second": second, "ratio": second / first, "places": len(rows)}


# ------------------------------------------------------------------------------------------------ output


def code_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Bits per byte: a row per stream, a column per predictor, and the mean over streams."""
    bits = {(row["stream"], row["predictor"]): row["bits_per_byte"] for row in rows if "predictor" in row}
    streams, predictors = (list(dict.fromkeys(key[i] for key in bits)) for i in (0, 1))
    table = Table("stream", *predictors, title="bits per byte")
    for stream in streams:
        table.add_row(stream, *(f"{bits[stream, p]:.3f}" if (stream, p) in bits else "-" for p in predictors))
    if len(streams) > 1:
        table.add_section()
        columns = [[bits[stream, p] for stream in streams if (stream, p) in bits] for p in predictors]
        table.add_row("mean", *(f"{sum(c) / len(c):.3f}" if len(c) == len(streams) else "-" for c in columns))
    return table


def reading_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratio of a passage's second reading to its first, by stream and lag."""
    ratios = {(row["stream"], row["lag"]): row for row in rows if "lag" in row}
    lags = sorted({lag for _, lag in ratios})
    table = Table("stream", *(f"after {lag:,}" for lag in lags), title="second reading / first, bits of a passage")
    for stream in dict.fromkeys(name for name, _ in ratios):
        own = (ratios.get((stream, lag)) for lag in lags)
        table.add_row(stream, *("-" if row is None else f"{row['ratio']:.2f} ({row['first']:.2f})" for row in own))
    return table


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte along each stream: a panel per stream, a line per predictor."""
    measured = [row for row in rows if "predictor" in row]
    streams = list(dict.fromkeys(row["stream"] for row in measured))
    columns = min(3, max(len(streams), 1))
    lines = -(-max(len(streams), 1) // columns)
    with figure_file(path, lines, columns, figsize=(4.2 * columns, 3 * lines), squeeze=False, dpi=120) as axes:
        for axis, stream in zip(axes.flat, streams, strict=False):
            for row in (row for row in measured if row["stream"] == stream):
                x = [end for _, end, _ in row["buckets"]]
                style = "-" if row["predictor"] in perplexity.MODES else ":"
                axis.plot(x, [bits for *_, bits in row["buckets"]], style, marker=".", label=row["predictor"])
            axis.set_xscale("log", base=2)
            axis.set_ylim(0, 8.5)
            axis.set_title(stream, fontsize="medium")
        for axis in axes.flat[len(streams) :]:
            axis.axis("off")
        if streams:
            axes.flat[0].legend(frameon=False, fontsize="x-small", ncols=2)
        axes[0, 0].figure.supxlabel("tokens read")
        axes[0, 0].figure.supylabel("bits per byte")
