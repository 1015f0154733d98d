"""`titans evaluate adapt`: how fast a model learns each stream, as a prequential code length, beside what a user has.

Each file is a stream of its own, read from its first byte: the bits that each byte takes, given those before it, in
buckets whose ends double. Read by

* the model with its memory "on", "frozen", "reset" every so many tokens, "off" (as `titans evaluate perplexity`);
* "dynamic RATE": the same model without memory, all its weights trained on what it reads (`dynamic`);
* compressors: "zlib", "bz2", "lzma", and "ppmd" where pyppmd is installed.

Then each stream's passages are read a second time, after other text (`rereading`). Each row of the result file is
written as it is found, and an interrupted run goes on after the last.
"""

import argparse
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans_lm.checkpoint import MODEL_HELP, load
from titans_lm.data import is_bytes, text_files
from titans_lm.evaluate import perplexity
from titans_lm.evaluate.compressors import compressed_bits, installed
from titans_lm.evaluate.dynamic import read_dynamically
from titans_lm.evaluate.rereading import LAGS, PASSAGE, PASSAGES, reread
from titans_lm.model import TitansForCausalLM
from titans_lm.record import Lines, command_line
from titans_lm.state import identity
from titans_lm.tasks import at_least
from titans_lm.terminal import PlainConsole

RATES = (0.01, 0.1)
"""Of dynamic evaluation: what is best differs from stream to stream, so each is told."""
DYNAMIC = "dynamic"
SUFFIXES = (".txt", ".log")
"""Which files of a folder."""


class Stream(NamedTuple):
    """One file's tokens."""

    name: str
    ids: Tensor
    """`[1, T]`"""
    sizes: Tensor
    """`[T]`, the bytes of each token."""
    data: bytes
    """The bytes that these tokens stand for."""


def read_stream(path: Path, tokenizer: PreTrainedTokenizerBase, most: int | None) -> Stream:
    """At most `most` tokens of a file. A byte tokenizer takes any file as it is; others take UTF-8 text.

    Raises ValueError for a file of fewer than two tokens, OSError for one that cannot be read.
    """
    return read_streams([path], tokenizer, most)


def read_streams(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, most: int | None) -> Stream:
    """As `read_stream`, of files one after another."""
    if is_bytes(tokenizer):
        data = _first_bytes(paths, most)
        ids = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.int64))[None]
        sizes = torch.ones(ids.shape[1], dtype=torch.float64)
    else:
        ids, sizes = perplexity.stream(paths, tokenizer, most)
        data = b"".join(path.read_bytes() for path in paths)[: int(sizes.sum())]
    if ids.shape[1] < 2:
        raise ValueError(f"{paths[0]} has {ids.shape[1]} tokens; give a file with at least 2")
    return Stream(paths[0].name, ids, sizes, data)


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
    """The bits that `predictor` spends on a stream: `bits_per_byte` of all, of the `first_half` and of the `last_half`,
    and by `buckets`, each `[from, to, bits per byte]` in tokens. `options`: bucket, reset_every."""
    length = stream.ids.shape[1]
    edges = bucket_edges(length, options["bucket"])
    nats = np.zeros(length)

    def tell(first: int, found: Tensor) -> None:
        nats[first : first + len(found)] = found.numpy()

    if predictor in installed():
        ends = np.cumsum(stream.sizes.numpy()).astype(int)
        bits = compressed_bits(predictor, stream.data, [int(ends[edge - 1]) for edge in edges[1:]])
        for (first, end), spent in zip(itertools.pairwise(edges), bits, strict=True):
            nats[first:end] = spent * math.log(2) / (end - first)  # only sums over buckets are told
    elif not isinstance(model, TitansForCausalLM):
        read_at_once(model, stream.ids, tell)
    elif predictor.startswith(DYNAMIC):
        read_dynamically(model, stream.ids, tell, rate=float(predictor.split()[1]))
    else:
        perplexity.read(model, stream.ids, predictor, options["reset_every"], tell)
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
        [first, end, float(nats[first:end].sum() / math.log(2) / sizes[max(first, 1) : end].sum())]
        for first, end in itertools.pairwise(edges)
        if end > 1
    ]
    return {**per_byte, "buckets": buckets}


@torch.no_grad()
def read_at_once(model: PreTrainedModel, ids: Tensor, tell: Callable[[int, Tensor], None]) -> None:
    """Tell the nats of a stream `[1, T]` read in one call: for a model of transformers, such as Mamba2, whose cache does
    not take several tokens after the first call."""
    model.eval()
    logits = model(ids.to(model.device), use_cache=False).logits[0, :-1].float()
    tell(1, F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none").double().cpu())


def bucket_edges(length: int, bucket: int) -> list[int]:
    """0, `bucket`, twice that, and so on to the stream's end."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(bucket, 2 * edges[-1])))
    return edges


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='files, each a stream; folders; "python-stdlib"')
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--tokens", type=int, help="read at most so many of each (default: all)")
    parser.add_argument("--modes", nargs="+", choices=perplexity.MODES, help="(default: all that the model has)")
    parser.add_argument(
        "--rates", nargs="*", type=float, default=list(RATES), help="of dynamic evaluation; none: leave it out"
    )
    parser.add_argument(
        "--compressors", nargs="*", choices=installed(), default=installed(), help="none: leave them out"
    )
    parser.add_argument(
        "--bucket", type=int, default=perplexity.BUCKET, help="tokens of the first; each next one ends twice as far"
    )
    parser.add_argument(
        "--reset-every", type=int, default=perplexity.RESET, help="tokens after which mode reset forgets"
    )
    parser.add_argument(
        "--lags",
        nargs="*",
        type=int,
        default=list(LAGS),
        help="other tokens between two readings of a passage; none: leave it out",
    )
    parser.add_argument("--passage", type=int, default=PASSAGE, help="tokens that are read a second time")
    parser.add_argument("--passages", type=int, default=PASSAGES, help="places of each stream where this is tried")
    parser.add_argument("--suffixes", nargs="+", default=list(SUFFIXES), help="which files of a folder")
    parser.add_argument(
        "--out", type=Path, default=Path("results/adapt.jsonl"), help="JSON lines; the figure is beside it"
    )


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    files = text_files(arguments.files, arguments.suffixes)
    model, tokenizer = load(arguments.model)
    modes = arguments.modes or perplexity.possible_modes(model)
    perplexity.check_modes(model, modes)
    streams = [read_stream(path, tokenizer, arguments.tokens) for path in files]
    predictors = [*modes, *(f"{DYNAMIC} {rate:g}" for rate in arguments.rates), *arguments.compressors]
    options = {key: getattr(arguments, key) for key in ("bucket", "reset_every", "passage", "passages")}
    settings = {**options, "weights": identity(model)["weights"], "streams": {s.name: _digest(s) for s in streams}}
    lines = Lines(arguments.out, settings, command_line("evaluate adapt", arguments, ["files"]))
    _measure(model, streams, predictors, arguments.lags, lines)
    picture(lines.rows, arguments.out.with_suffix(".png"))
    console = PlainConsole()
    for made in (code_table(lines.rows), reading_table(lines.rows)):
        if made.row_count:
            console.print(made)
    console.print(f"Figures are in {arguments.out}, the picture is {arguments.out.with_suffix('.png')}.")


def _check(arguments: argparse.Namespace) -> None:
    at_least(
        1, **{f"--{key}": getattr(arguments, key.replace("-", "_")) for key in ("bucket", "reset-every", "passages")}
    )
    at_least(
        2, **{"--passage": arguments.passage}, **{} if arguments.tokens is None else {"--tokens": arguments.tokens}
    )
    at_least(0, **{"--lags": min(arguments.lags, default=0)})
    if not all(0 < rate < math.inf for rate in arguments.rates):
        raise ValueError(f"--rates must be above 0, got {' '.join(map(str, arguments.rates))}")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist")


def _digest(stream: Stream) -> str:
    return hashlib.sha256(stream.data).hexdigest()


def _measure(
    model: TitansForCausalLM, streams: Sequence[Stream], predictors: Sequence[str], lags: Sequence[int], lines: Lines
) -> None:
    """All that is not in `lines` yet, with progress."""
    work = list(_work(model, streams, predictors, lags, lines))
    with Progress() as bars:
        bar = bars.add_task("", total=sum(tokens for _, tokens, _ in work))
        for key, tokens, measure in work:
            bars.update(bar, description=" ".join(map(str, key.values())))
            begun = time.monotonic()
            found = measure()
            lines.add({**key, **found, "seconds": round(time.monotonic() - begun, 2)})
            bars.advance(bar, tokens)


def _work(
    model: TitansForCausalLM, streams: Sequence[Stream], predictors: Sequence[str], lags: Sequence[int], lines: Lines
) -> Iterator[tuple[dict[str, Any], int, Callable[[], dict[str, Any]]]]:
    """Of each measurement: its key, about how many tokens it reads, and what makes it."""
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
    """Bits per token of the first and the second reading, over all places."""
    rows = list(reread(model, stream.ids, lag, options["passage"], options["passages"]))
    first, second = (sum(row[key] for row in rows) / len(rows) / math.log(2) for key in ("first", "second"))
    return {"first": first, "second": second, "ratio": second / first, "places": len(rows)}


# ------------------------------------------------------------------------------------------------ what is shown


def code_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Bits per byte: a line for each stream, a column for each predictor; and the mean over streams."""
    found = {(row["stream"], row["predictor"]): row["bits_per_byte"] for row in rows if "predictor" in row}
    streams, predictors = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    made = Table("stream", *predictors, title="bits per byte")
    for stream in streams:
        made.add_row(stream, *(f"{found[stream, p]:.3f}" if (stream, p) in found else "-" for p in predictors))
    if len(streams) > 1:
        made.add_section()
        columns = [[found[stream, p] for stream in streams if (stream, p) in found] for p in predictors]
        made.add_row("mean", *(f"{sum(c) / len(c):.3f}" if len(c) == len(streams) else "-" for c in columns))
    return made


def reading_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A passage's second reading over its first, by stream and lag."""
    found = {(row["stream"], row["lag"]): row for row in rows if "lag" in row}
    lags = sorted({lag for _, lag in found})
    made = Table("stream", *(f"after {lag:,}" for lag in lags), title="second reading / first, bits of a passage")
    for stream in dict.fromkeys(name for name, _ in found):
        own = (found.get((stream, lag)) for lag in lags)
        made.add_row(stream, *("-" if row is None else f"{row['ratio']:.2f} ({row['first']:.2f})" for row in own))
    return made


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte along each stream: a panel for each, a line for each predictor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    told = [row for row in rows if "predictor" in row]
    streams = list(dict.fromkeys(row["stream"] for row in told))
    columns = min(3, max(len(streams), 1))
    lines = -(-max(len(streams), 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3 * lines), layout="constrained", squeeze=False)
    for axis, stream in zip(axes.flat, streams, strict=False):
        for row in (row for row in told if row["stream"] == stream):
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
    figure.supxlabel("tokens read")
    figure.supylabel("bits per byte")
    beside = path.with_name(f".{path.name}.part")
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(path)
    plt.close(figure)
