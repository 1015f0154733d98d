"""`titans evaluate layers`: what the memory of each layer is worth on a text, and how much its keys are alike.

A text is read with all memories written, with none, and with all but one, for each in turn. A memory that is not
written is read as it is when a stream begins. What a memory is worth is the bits per byte that are lost without its
writes.

Keys that share a direction share what is written at it: a memory whose keys are all alike holds one value, the mean.
So two figures of each layer's keys, means over its heads: `cosine`, the mean over all pairs of tokens, from about 0
(spread evenly) to 1 (all the same); and `rank`, the participation ratio (sum_i s_i)^2 / sum_i s_i^2 of the eigenvalues
s_i of K^T K: along how many directions they are spread, from 1 to the width of a head.
"""

import argparse
import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Column, Table
from torch import Tensor, nn

from titans_lm.evaluate.adapt import SUFFIXES, Stream, read_each
from titans_lm.evaluate.perplexity import RESET, token_nats
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP
from titans_lm.models.model_identity import digests
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.corpora import text_files
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

TOKENS = 16384
"""Tokens of each text, by default."""
KEY_TOKENS = 4096
"""Tokens of a text whose keys are compared, at most."""
ALL, NONE, ALL_BUT = "all", "none", "all but "


# ------------------------------------------------------------------------------------------------ what is measured


def named_memories(model: nn.Module) -> dict[str, NeuralMemory]:
    """The memories of the model by their names in it, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuralMemory)}


@contextlib.contextmanager
def unwritten(layers: Iterable[NeuralMemory]) -> Iterator[None]:
    """Within this context the model's calls of these memories read them and do not write."""
    hooks = [memory.register_forward_pre_hook(_without_update, with_kwargs=True) for memory in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_update(
    _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, {**options, "update": False} if "update" in options else options


def bits_per_byte(model: TitansForCausalLM, stream: Stream, writes: str) -> float:
    """Read the stream while the memories that `writes` says are written: "all", "none", or "all but NAME", with a name
    of `named_memories`. Raises ValueError for other words."""
    own = named_memories(model)
    unwritten_ones = {ALL: [], NONE: list(own.values()), **{ALL_BUT + name: [memory] for name, memory in own.items()}}
    if writes not in unwritten_ones:
        raise ValueError(f"writes must be one of {', '.join(unwritten_ones)}, got {writes!r}")
    with unwritten(unwritten_ones[writes]):
        nats = sum(float(part.sum()) for _, part in token_nats(model, stream.ids, "on", RESET))
    return nats / math.log(2) / float(stream.sizes[1:].sum())


@torch.no_grad()
def key_spread(model: TitansForCausalLM, ids: Tensor) -> dict[str, dict[str, float]]:
    """`cosine` and `rank` of the keys at the tokens of ids `[1, T]`, T >= 2, by the memory's name. Leaves the model in
    evaluation mode."""
    own = named_memories(model)
    inputs: dict[str, list[Tensor]] = {name: [] for name in own}
    hooks = [own[name].theta.register_forward_hook(partial(_note_input, parts)) for name, parts in inputs.items()]
    try:
        model.eval().model(ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _spread(own[name], torch.cat(parts, 1), ids.shape[1]) for name, parts in inputs.items()}


def _note_input(parts: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
    parts.append(inputs[0])


def _spread(memory: NeuralMemory, x: Tensor, tokens: int) -> dict[str, float]:
    """Of the last `tokens` inputs: persistent tokens may be before them."""
    (_, keys, _), _ = memory._features(x, memory.initial_state_like(1, x).conv_state, None)
    k = keys[0, -tokens:].double()  # [T, H, K], each of length 1
    together = k.sum(0).square().sum(-1)
    rank = tokens**2 / torch.einsum("thi,thj->hij", k, k).square().sum((1, 2))
    return {"cosine": float(((together - tokens) / (tokens * (tokens - 1))).mean()), "rank": float(rank.mean())}


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help='files, folders, "python-stdlib"')
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="maximum tokens of each text")
    parser.add_argument(
        "--suffixes", nargs="+", default=list(SUFFIXES), help="file name endings that are read from a folder"
    )
    parser.add_argument("--out", type=Path, default=Path("results/layers.jsonl"), help="JSON lines")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 2, "tokens")
    check_output(arguments.out, ours=False)
    files = text_files(arguments.files, arguments.suffixes)
    model, tokenizer = load(arguments.model)
    if not named_memories(model):
        raise ValueError(f"{arguments.model} is attention alone: it has no memory to measure")
    streams = read_each(files, tokenizer, arguments.tokens)
    settings = {**digests(model), "streams": {s.name: hashlib.sha256(s.data).hexdigest() for s in streams}}
    with Lines(arguments.out, settings, command_line("evaluate layers", arguments, ["files"])) as lines:
        work = [item for stream in streams for item in _work(model, stream) if lines.find(**item[0]) is None]
        with Progress() as bars:
            bar = bars.add_task("", total=sum(tokens for _, tokens, *_ in work))
            for key, tokens, name, measure in work:
                bars.update(bar, description=" ".join(map(str, key.values())))
                lines.add({**key, name: measure()})
                bars.advance(bar, tokens)
    console = PlainConsole()
    console.print(table(lines.rows, list(named_memories(model))))
    console.print(f"Results are in {arguments.out}.")


def _written(names: Sequence[str]) -> list[str]:
    """What is written in each reading. Of one memory, none and all but one is the same."""
    return [ALL, *([NONE] if len(names) > 1 else []), *(ALL_BUT + name for name in names)]


def _work(model: TitansForCausalLM, stream: Stream) -> Iterator[tuple[dict[str, Any], int, str, Callable[[], Any]]]:
    """Yields key, number of tokens, name and function of each measurement."""
    for writes in _written(list(named_memories(model))):
        key, measure = {"stream": stream.name, "writes": writes}, partial(bits_per_byte, model, stream, writes)
        yield key, stream.ids.shape[1], "bits_per_byte", measure
    ids = stream.ids[:, :KEY_TOKENS]
    yield {"stream": stream.name, "of": "keys"}, ids.shape[1], "layers", partial(key_spread, model, ids)


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    """Of each stream: bits per byte without the writes of all, none or one of the memories, what those writes are
    worth, and cosine and rank of its keys."""
    columns = ("bits per byte", "worth", "its keys' cosine", "rank")
    shown = Table("stream", Column("not written", no_wrap=True), *columns)
    for stream in dict.fromkeys(row["stream"] for row in rows):
        own = [row for row in rows if row["stream"] == stream]
        bits = {row["writes"]: row["bits_per_byte"] for row in own if "writes" in row}
        spread: dict[str, dict[str, float]] = next((row["layers"] for row in own if row.get("of") == "keys"), {})
        for writes in (found for found in _written(names) if found in bits):
            worth = "" if writes == ALL or ALL not in bits else f"{bits[writes] - bits[ALL]:.3f}"
            keys = spread.get(writes.removeprefix(ALL_BUT))
            cells = ("", "") if keys is None else (f"{keys['cosine']:.2f}", f"{keys['rank']:.1f}")
            shown.add_row(stream if writes == ALL else "", _not_written(writes), f"{bits[writes]:.3f}", worth, *cells)
        shown.add_section()
    return shown


def _not_written(writes: str) -> str:
    """The layers that `writes` leaves out, counted from 0."""
    if writes in (ALL, NONE):
        return NONE if writes == ALL else ALL
    name = writes.removeprefix(ALL_BUT)
    number = re.search(r"\d+", name)
    return name if number is None else f"layer {number[0]}"
