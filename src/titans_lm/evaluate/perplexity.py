"""`titans evaluate perplexity`: perplexity along a stream, with the same weights and four modes of the memory:

* "on": the memory is read and written;
* "frozen": the memory is read, with the content of the initial state, and not written;
* "reset": the whole state is reset at intervals, also attention's window;
* "off": the memory's output is 0.

All modes predict the same tokens: all but the first. After a reset, "reset" still reads the last token before the next
prediction, so that it never predicts without a context. "off" removes the memory from the sum (LMM, MAL), leaves the
constant gate of an output of 0 (MAG, MAC: sigmoid(0) with the product gate), and gives MAC's attention retrieved tokens
of 0. "off" measures what the memory is worth to this model; a model trained without a memory may do better.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.inference.generate import piece_with_logits
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import memories
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP
from titans_lm.models.model_identity import digests
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode, is_bytes
from titans_lm.tasks import at_least
from titans_lm.utils.corpora import text_files
from titans_lm.utils.deprecation import renamed
from titans_lm.utils.figures import figure_file
from titans_lm.utils.nats import target_nats
from titans_lm.utils.record import check_least, check_output, command_line, provenance, write_json
from titans_lm.utils.terminal import PlainConsole
from titans_lm.utils.text_file import text_pieces

MODES = ("on", "frozen", "reset", "off")
BUCKET, RESET = 1024, 4096
ROWS = 8
"""Stretches between resets that are read as rows of a batch: they are independent."""
__getattr__ = renamed(__name__, {"perplexity": "measure"})


# ------------------------------------------------------------------------------------------------ reading


def measure(
    model: TitansForCausalLM,
    ids: Tensor,
    modes: Sequence[str] = MODES,
    *,
    sizes: Tensor | None = None,
    bucket: int = BUCKET,
    reset_every: int = RESET,
    piece: int = PREFILL_TOKENS,
) -> list[dict[str, Any]]:
    """Read ids `[1, T]`, T >= 2, once per mode, at most `piece` tokens per call. Space does not grow with T, except for
    full attention.

    Returns a row per mode and bucket: the tokens at positions `from` <= t < `to` (`bucket_edges`), `nats` and
    `perplexity` per token, and, given `sizes` `[T]`, the bytes of each token (`token_sizes`), `bits_per_byte` = nats /
    ln 2 * tokens / bytes. Raises ValueError for numbers below 1, an unknown mode, and a mode that needs a memory if the
    model has none.
    """
    check_modes(model, modes)
    at_least(1, bucket=bucket, reset_every=reset_every, piece=piece)
    if ids.dim() != 2 or len(ids) != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be one stream [1, T] of at least 2 tokens, got {list(ids.shape)}")
    rows: list[dict[str, Any]] = []
    for mode in dict.fromkeys(modes):
        sums = Sums(ids.shape[1], bucket, sizes)
        for first, nats in token_nats(model, ids, mode, reset_every, piece):
            sums.add(first, nats)
        rows += sums.rows(mode)
    return rows


def check_modes(model: TitansForCausalLM, modes: Sequence[str]) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"mode {unknown[0]!r} is not one of: {', '.join(MODES)}" if unknown else "give a mode")
    without = [mode for mode in modes if mode not in possible_modes(model)]
    if without:
        raise ValueError(f"mode {without[0]!r} needs a memory, and this model (attention alone) has none")


def possible_modes(model: TitansForCausalLM) -> list[str]:
    """The modes that the model has: attention alone has "on" and "reset"."""
    return [mode for mode in MODES if mode in ("on", "reset") or any(memories(model))]


def token_nats(
    model: TitansForCausalLM, ids: Tensor, mode: str, reset_every: int, piece: int = PREFILL_TOKENS
) -> Iterator[tuple[int, Tensor]]:
    """Read ids `[1, T]` in a mode, at most `piece` tokens a call. Yields `(t, nats)`: the nats `[n]` of the tokens t,
    t + 1, ..., t + n - 1. Each token but the first comes once, in any order."""
    model.eval()
    piece = piece_with_logits(model.config.vocab_size, piece)
    for start, rows, length in _stretches(ids.shape[1] - 1, reset_every if mode == "reset" else None):
        inputs, targets = (ids[0, start + i :][: rows * length].view(rows, length) for i in (0, 1))
        state = model.initial_state(rows)
        state.frozen = mode == "frozen"
        width = max(1, piece // rows)
        for first in range(0, length, width):
            part = inputs[:, first : first + width].to(model.device)
            with bypass_memory(model) if mode == "off" else contextlib.nullcontext(), torch.no_grad():
                logits = model(part, past_key_values=state).logits
            nats = target_nats(logits, targets[:, first : first + width]).double().cpu()
            for row in range(rows):
                yield start + row * length + first + 1, nats[row]


def _stretches(tokens: int, reset_every: int | None) -> Iterator[tuple[int, int, int]]:
    """Yields start, number of rows and row length of each batch; the state is reset after a row."""
    length = min(tokens, reset_every or tokens)
    for start in range(0, tokens, ROWS * length):
        rows, rest = divmod(min(ROWS * length, tokens - start), length)
        if rows:
            yield start, rows, length
        if rest:
            yield start + rows * length, 1, rest


def bucket_edges(length: int, bucket: int) -> list[int]:
    """0, `bucket`, twice that, and so on to the stream's end."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, max(bucket, 2 * edges[-1])))
    return edges


class Sums:
    """Sums of nats, tokens and bytes by bucket."""

    def __init__(self, length: int, bucket: int, sizes: Tensor | None):
        self.edges = bucket_edges(length, bucket)
        self.borders, self.sizes = torch.tensor(self.edges[1:-1], dtype=torch.long), sizes
        self.tokens, self.nats, self.bytes = torch.zeros(3, len(self.edges) - 1, dtype=torch.float64)

    def add(self, first: int, nats: Tensor) -> None:
        bucket = torch.bucketize(torch.arange(first, first + len(nats)), self.borders, right=True)
        self.nats.index_add_(0, bucket, nats)
        self.tokens.index_add_(0, bucket, torch.ones_like(nats))
        if self.sizes is not None:
            self.bytes.index_add_(0, bucket, self.sizes[first : first + len(nats)].double())

    def rows(self, mode: str) -> list[dict[str, Any]]:
        """Rows of the buckets that were read; partly read ones are not `complete`."""
        rows = []
        for i, (first, end) in enumerate(itertools.pairwise(self.edges)):
            if self.tokens[i]:
                first = max(first, 1)
                figures = _figures(int(self.tokens[i]), float(self.nats[i]), float(self.bytes[i]))
                complete = figures["tokens"] == end - first
                rows.append({"mode": mode, "from": first, "to": end, **figures, "complete": complete})
        return rows


def _figures(tokens: int, nats: float, size: float) -> dict[str, Any]:
    mean = nats / tokens
    figures = {"tokens": tokens, "nats": mean, "perplexity": float(np.exp(mean))}
    return {**figures, "bytes": round(size), "bits_per_byte": nats / math.log(2) / size} if size else figures


def whole(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same figures by mode, over all buckets."""
    by_mode: dict[str, dict[str, Any]] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        tokens, nats = sum(row["tokens"] for row in of_mode), sum(row["tokens"] * row["nats"] for row in of_mode)
        by_mode[mode] = _figures(tokens, nats, float(sum(row.get("bytes", 0) for row in of_mode)))
    return by_mode


# ------------------------------------------------------------------------------------------------ texts


def stream(files: Iterable[Path], tokenizer: PreTrainedTokenizerBase, most: int | None) -> tuple[Tensor, Tensor]:
    """At most `most` tokens of the concatenated files: ids `[1, T]`, and the bytes of each token `[T]`."""
    ids: list[NDArray[np.int64]] = []
    sizes: list[NDArray[np.float64]] = []
    count = 0
    for part in (part for file in files for part in text_pieces(file)):
        if most is not None and count >= most:
            break
        new, size = token_sizes(tokenizer, part)
        ids, sizes, count = [*ids, new], [*sizes, size], count + len(new)
    return torch.from_numpy(np.concatenate(ids)[:most])[None], torch.from_numpy(np.concatenate(sizes)[:most])


def token_sizes(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens of a text, and the number of UTF-8 bytes of each; they add up to the text's bytes.

    If several tokens share a character, the first has all its bytes. With a slow tokenizer, which has no offsets, each
    token has the mean.
    """
    if is_bytes(tokenizer) or not tokenizer.is_fast:
        ids = encode(tokenizer, text)
        return ids, np.full(len(ids), len(text.encode()) / max(len(ids), 1))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code >= 1 << 7) + (code >= 1 << 11) + (code >= 1 << 16).astype(np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in encoded["offset_mapping"]], np.int64))
    ends[-1:] = len(code)  # trailing space without a token
    before = np.concatenate([[0], np.cumsum(widths)])[ends]
    return np.asarray(encoded["input_ids"], np.int64), np.diff(before, prepend=0).astype(np.float64)


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='text files, folders of .txt files, "python-stdlib"')
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="settings of the memory (default: all that the model has)"
    )
    parser.add_argument("--tokens", type=int, help="maximum tokens (default: all)")
    parser.add_argument("--bucket", type=int, default=BUCKET, help="tokens of the first bucket; the ends double")
    parser.add_argument("--reset-every", type=int, default=RESET, help="tokens between resets of mode reset")
    parser.add_argument(
        "--out", type=Path, default=Path("results/perplexity.json"),
        help="JSON file, written after each mode; finished modes of an interrupted run are kept",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "bucket", "reset_every")
    check_least(arguments, 2, "tokens")
    check_output(arguments.out, picture=True, ours=False)
    files = text_files(arguments.files, [".txt"])
    model, tokenizer = load(arguments.model)
    modes = arguments.modes or possible_modes(model)
    check_modes(model, modes)
    ids, sizes = stream(files, tokenizer, arguments.tokens)
    if ids.shape[1] < 2:
        raise ValueError(f"{files[0]} has one token; give a text with more")
    record = {
        **provenance(command_line("evaluate perplexity", arguments, ["files"])),
        "settings": _settings(arguments, model, ids),
    }
    rows = _measure(model, (ids, sizes), modes, record, arguments.out)
    plot(rows, arguments.out.with_suffix(".png"))
    console = PlainConsole()
    console.print(table(rows))
    console.print(f"Results are in {arguments.out}, the figure is {arguments.out.with_suffix('.png')}.")


def _settings(arguments: argparse.Namespace, model: TitansForCausalLM, ids: Tensor) -> dict[str, Any]:
    return {
        **digests(model),
        "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "tokens": ids.shape[1],
        "bucket": arguments.bucket,
        "reset_every": arguments.reset_every,
    }


def _finished_rows(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the modes that an interrupted run with the same settings finished."""
    if not out.exists():
        return []
    try:
        old = json.loads(out.read_text())
        same, rows = old["settings"] == settings and not old["complete"], old["rows"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out} is not a result file of this command; give another name") from None
    broken = {row["mode"] for row in rows if not row["complete"]}
    return [row for row in rows if same and row["mode"] not in broken]


def _measure(
    model: TitansForCausalLM, text: tuple[Tensor, Tensor], modes: Sequence[str], record: dict[str, Any], out: Path
) -> list[dict[str, Any]]:
    """Read the text in all modes that are not in `out` yet, and write after each."""
    (ids, sizes), settings = text, record["settings"]
    rows = _finished_rows(out, settings)
    left = [mode for mode in modes if mode not in {row["mode"] for row in rows}]
    with Progress() as bars:
        bar = bars.add_task("", total=(ids.shape[1] - 1) * len(left))
        for mode in left:
            bars.update(bar, description=f"memory {mode}")
            sums = Sums(ids.shape[1], settings["bucket"], sizes)
            try:
                for first, nats in token_nats(model, ids, mode, settings["reset_every"]):
                    sums.add(first, nats)
                    bars.advance(bar, len(nats))
            except KeyboardInterrupt:
                _write(out, record, [*rows, *sums.rows(mode)], False)
                raise KeyboardInterrupt(f"what was measured before is in {out}") from None
            rows += sums.rows(mode)
            _write(out, record, rows, mode == left[-1])
    return rows


def _write(out: Path, record: dict[str, Any], rows: list[dict[str, Any]], complete: bool) -> None:
    write_json(out, {**record, "complete": complete, "summary": whole(rows), "rows": rows})


def table(rows: list[dict[str, Any]]) -> Table:
    """Bits per byte by bucket and mode, in total, and perplexity."""
    modes = whole(rows)
    table = Table("tokens", *modes, title="bits per byte")
    for first, end in dict.fromkeys((row["from"], row["to"]) for row in rows):
        by_mode = {row["mode"]: row for row in rows if row["from"] == first}
        table.add_row(f"{first:,} to {end:,}", *(_bits(by_mode.get(mode, {})) for mode in modes))
    table.add_section()
    table.add_row("all", *map(_bits, modes.values()))
    table.add_row("perplexity a token", *(f"{row['perplexity']:,.2f}" for row in modes.values()))
    return table


def _bits(row: dict[str, Any]) -> str:
    return f"{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "-"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte along the stream, a line per mode."""
    with figure_file(path, figsize=(8, 4.5)) as axis:
        for mode in whole(rows):
            of_mode = [row for row in rows if row["mode"] == mode]
            style = "--" if mode in ("reset", "off") else "-"  # lines may coincide
            ends = [max(of_mode[0]["from"], of_mode[0]["to"] / 2), *(row["to"] for row in of_mode)]
            bits = [row.get("bits_per_byte", math.nan) for row in of_mode]
            axis.stairs(bits, ends, baseline=None, linestyle=style, label=f"memory {mode}")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens read")
        axis.set_ylabel("bits per byte")
        axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))  # clear of the lines
