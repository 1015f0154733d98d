"""`titans evaluate probes`: what an untrained memory can hold, without momentum and forgetting.

The stream: values are a nonlinear function of their keys, v = |k A|, each read once. Measures the error on the next
value. No linear memory learns such a function; a deep one does; larger chunks cost accuracy.

Capacity: random values at random keys, each written once, one token at a time. Measures the error on all of them at the
end. Keys may share a direction, as those of a trained model do.

An error is || M(k) - v ||^2 / || v ||^2, over all memories. It is reported for every `theta` of a list, and for the
best one, chosen afterwards."""

import argparse
import itertools
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor

from titans_lm.ops import MemoryForm, initial_state, memory_scan, retrieve
from titans_lm.utils.figures import figure_file
from titans_lm.utils.record import check_least, check_output, provenance, write_json
from titans_lm.utils.terminal import PlainConsole

THETAS = (0.003, 0.01, 0.018, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
SHOWN = 0.018
"""The `theta` whose errors are shown beside the best."""
DIVERGES = 10
"""Larger errors count as divergence."""
STREAM_DEPTHS, CHUNKS = (1, 2, 3, 4), (1, 16, 64)
CAPACITY_DEPTHS, CORRELATIONS = (1, 2), (0.0, 0.5, 0.9)
PAIRS_PER_WIDTH = (0.25, 0.5, 1, 2, 4, 8)
HIDDEN_PER_WIDTH = 4
"""Width of the memory's hidden layers, in head widths."""


def stream(depth: int, chunk: int, width: int = 16, heads: int = 32, tokens: int = 1024) -> dict[str, Any]:
    """The error over the last quarter of the stream. Keys are uniform on the unit sphere; A and M_0 are normal, with
    the layers of M_0 scaled by 1 / sqrt(inputs)."""
    torch.manual_seed(0)
    k = _unit(torch.randn(tokens, heads, width))
    v = (k @ torch.randn(width, width)).abs()
    weights = _weights(depth, width, heads)
    _, loss = _write(k, v, weights, chunk)
    late = slice(tokens * 3 // 4, None)
    return {"depth": depth, "chunk": chunk, **_errors(loss[:, late], v[late])}


def capacity(depth: int, correlation: float, pairs: int, width: int = 16, heads: int = 32) -> dict[str, Any]:
    """The error over all pairs after all are written. Values are uniform on the unit sphere. M_0 is that of the stream
    with its last layer 0, so that its output is 0 and its error 1."""
    torch.manual_seed(0)
    k, v = keys(correlation, pairs, width, heads), _unit(torch.randn(pairs, heads, width))
    weights = _weights(depth, width, heads)
    weights[-1].zero_()
    after, _ = _write(k, v, weights, chunk=1)
    retrieved = retrieve(k.expand(len(THETAS), -1, -1, -1), after, MemoryForm())
    errors = _errors((retrieved - v).square().sum(-1), v)
    return {"depth": depth, "correlation": correlation, "pairs": pairs, **errors}


def keys(correlation: float, pairs: int, width: int, heads: int) -> Tensor:
    """Random unit vectors with a direction that all keys of a head share: the mean cosine of two is `correlation`. ->
    `[pairs, heads, width]`"""
    shared, own = _unit(torch.randn(1, heads, width)), _unit(torch.randn(pairs, heads, width))
    return _unit(correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)


def least_of_linear(pairs: int, width: int) -> float:
    """Mean error of the best linear map from keys of this width to `pairs` random values."""
    return max(0.0, 1 - width / pairs)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _weights(depth: int, width: int, heads: int) -> list[Tensor]:
    widths = [width] + [HIDDEN_PER_WIDTH * width] * (depth - 1) + [width]
    return [torch.randn(heads, i, o) / i**0.5 for i, o in pairwise(widths)]


@torch.no_grad()
def _write(k: Tensor, v: Tensor, weights: list[Tensor], chunk: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Write tokens `[T, H, K]` with each `theta` in its own row -> the weights after, the losses `[R, T, H]`."""
    rows = len(THETAS)
    k, v = (x.expand(rows, *x.shape) for x in (k, v))
    theta = torch.tensor(THETAS)[:, None, None].expand(k.shape[:3])
    none, state = torch.zeros_like(theta), initial_state(tuple(weights), rows)
    _, state, *seen = memory_scan(k, k, v, theta, none, none, state, chunk_size=chunk, surprise=True)
    return state.weights, seen[0].loss


def _errors(losses: Tensor, v: Tensor) -> dict[str, Any]:
    """Losses `[R, T, H]` -> errors by `theta`, None if not finite, and the least with its `theta`."""
    errors = (losses.sum((1, 2)) / v.square().sum()).tolist()
    finite = {theta: error for theta, error in zip(THETAS, errors, strict=True) if math.isfinite(error)}
    best = min(finite, key=finite.__getitem__, default=None)
    by_theta = {f"{theta:g}": finite.get(theta) for theta in THETAS}
    return {"error": None if best is None else finite[best], "theta": best, "by_theta": by_theta}


# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", type=int, default=16, help="width of keys and values; hidden layers are 4 times as wide"
    )
    parser.add_argument("--heads", type=int, default=32, help="independent memories, averaged")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the stream")
    parser.add_argument(
        "--out", type=Path, default=Path("results/probes.json"), help="JSON file; the figure is beside it"
    )


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 4, "width", "tokens")
    check_least(arguments, 1, "heads")
    check_output(arguments.out, picture=True)
    width, heads, tokens, out = arguments.width, arguments.heads, arguments.tokens, arguments.out
    pairs = [int(n * width) for n in PAIRS_PER_WIDTH]
    console = PlainConsole(width=None if sys.stdout.isatty() else 120)
    cells = list(itertools.product(STREAM_DEPTHS, CHUNKS))
    streams = [stream(*cell, width, heads, tokens) for cell in track(cells, "a nonlinear stream", console=console)]
    grid = list(itertools.product(CAPACITY_DEPTHS, CORRELATIONS, pairs))
    capacities = [capacity(*cell, width, heads) for cell in track(grid, "capacity", console=console)]
    command = f"titans evaluate probes --width {width} --heads {heads} --tokens {tokens} --out {out}"
    sizes = {"width": width, "hidden": HIDDEN_PER_WIDTH * width, "heads": heads, "tokens": tokens}
    least = {n: least_of_linear(n, width) for n in pairs}
    result = {"settings": sizes, "stream": streams, "capacity": capacities, "least_of_linear": least}
    write_json(out, {**provenance(command), **result})
    plot(streams, capacities, least, out.with_suffix(".png"))
    console.print(_stream_table(streams), _capacity_table(capacities, least))


def _stream_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("depth", "chunk", f"theta {SHOWN:g}", "least (theta)", title="error on v = |k A|, read once")
    for row in rows:
        table.add_row(
            f"{row['depth']}",
            f"{row['chunk']}",
            _format_error(row["by_theta"][f"{SHOWN:g}"]),
            _format_error(row["error"], row["theta"]),
        )
    return table


def _capacity_table(rows: list[dict[str, Any]], least: dict[int, float]) -> Table:
    title = "error (theta) on pairs written once, by depth and correlation of the keys"
    columns = list(itertools.product(CAPACITY_DEPTHS, CORRELATIONS))
    table = Table("pairs", *(f"{depth}, {rho:g}" for depth, rho in columns), "best linear map", title=title)
    errors = {(r["depth"], r["correlation"], r["pairs"]): _format_error(r["error"], r["theta"]) for r in rows}
    for n, floor in least.items():
        table.add_row(f"{n}", *(errors[*column, n] for column in columns), f"{floor:.3f}")
    return table


def _format_error(error: float | None, theta: float | None = None) -> str:
    return (
        "diverges" if error is None or error > DIVERGES else f"{error:.3f}" + ("" if theta is None else f" ({theta:g})")
    )


def plot(streams: list[dict[str, Any]], capacities: list[dict[str, Any]], least: dict[int, float], path: Path) -> None:
    """Left: the stream's error by chunk, a line per depth. Right: capacity by pairs, a colour per correlation."""
    with figure_file(path, 1, 2, figsize=(11, 4.5), dpi=120) as (left, right):
        for depth in STREAM_DEPTHS:
            errors = [row["error"] for row in streams if row["depth"] == depth]
            left.plot(CHUNKS, np.array(errors, float), marker="o", label=f"depth {depth}")
        for depth, (colour, rho) in itertools.product(CAPACITY_DEPTHS, enumerate(CORRELATIONS)):
            errors = [row["error"] for row in capacities if (row["depth"], row["correlation"]) == (depth, rho)]
            style, label = ":" if depth == 1 else "-", f"depth {depth}, correlation {rho:g}"
            right.plot(list(least), np.array(errors, float), style, color=f"C{colour}", marker="o", label=label)
        right.plot(list(least), list(least.values()), "--", color="grey", label="best linear map")
        for axis, title, label, ticks in (
            (left, "v = |k A|, read once", "tokens of a chunk", CHUNKS),
            (right, "random pairs, written once", "pairs", list(least)),
        ):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.set(title=title, xlabel=label, ylabel="error, best theta", ylim=(0, 1.15))
            axis.legend(frameon=False, fontsize="small")
