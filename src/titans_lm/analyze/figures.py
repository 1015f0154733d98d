"""Figures of a trace, each as PNG and SVG: along the text, norms, spans, singular values, similarity, layers and heads;
of a probe, what is held of a passage; and of attributions, arcs from sources to answers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_lm.analyze.arrays import BY_HEAD, Trace
from titans_lm.analyze.attribution import Attribution
from titans_lm.analyze.probe import Probe
from titans_lm.utils.figures import figure_file

BINS = 400
"""Points of a curve along the text."""
LONGEST = 10_000_000
"""Tokens after which a span counts as without an end."""


def draw(trace: Trace, folder: Path) -> list[str]:
    """Write all figures of a trace that its arrays allow. Returns their names, without endings."""
    needed = {"along": "surprise", "span": "alpha", "singular_values": "snapshot", "similarity": "snapshot",
              "overview": "surprise"}  # fmt: skip
    written = []
    for name, figure in FIGURES.items():
        if name not in needed or needed[name] in trace:
            figure(trace, folder / f"{name}.png")
            written.append(name)
    return written


def binned(values: NDArray[Any], bins: int = BINS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of up to `bins` stretches of the first axis, and their centres."""
    parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
    with np.errstate(invalid="ignore"):
        means = np.array([np.nanmean(values[p], 0) if np.isfinite(values[p]).any() else np.nan for p in parts], float)
    return np.array([part.mean() for part in parts]), means


def along(trace: Trace, path: Path) -> None:
    """Bits, surprise and gates along the text: means over layers and heads, of stretches."""
    with figure_file(path, 3, 1, svg=True, figsize=(9, 7), sharex=True) as (bits, surprise, gates):
        for name, drawn in (("bits", "-"), ("bits_frozen", "--")):
            if name in trace:
                bits.plot(*binned(trace[name]), drawn, linewidth=1, label=name.replace("_", ", memory "))
        bits.set_ylabel("bits of a token")
        styles: list[Any] = ["-", "--", ":", "-.", (0, (1, 3))]
        surprise.plot(*binned(trace["surprise"].mean((1, 2))), linewidth=1, label="reconstruction loss")
        surprise.set_ylabel("surprise")
        for number, name in enumerate(("theta", "eta", "alpha", "output_gate", "memory_gate")):
            if name in trace:
                values = trace[name].reshape(len(trace), -1).mean(1)
                gates.plot(*binned(values), linestyle=styles[number], label=name.replace("_", " "))
        gates.set(ylabel="gates", xlabel="tokens read")
        for axis in (bits, surprise, gates):
            axis.legend(frameon=False, ncols=5, fontsize="small")
        bits.set_title("Along the text, means over layers and heads")


def norms(trace: Trace, path: Path) -> None:
    """Change of memory, and momentum, at each checkpoint: a line per layer and head."""
    with figure_file(path, 1, 2, svg=True, figsize=(10, 4)) as axes:
        for axis, name, title in zip(
            axes, ("memory_change", "momentum_norm"), ("change of memory", "momentum"), strict=True
        ):
            for layer, head in np.ndindex(trace.layers, trace.heads):
                axis.plot(trace["checkpoint"], trace[name][:, layer, head], label=_name(layer, head), linewidth=1)
            axis.set(title=f"Norm of the {title}", xlabel="tokens read", ylim=(0, None))
        _small_legend(axes[0], trace)


def half_life(eta: float, alpha: float) -> float:
    """Tokens until what one write adds to the weights is below half of its peak, with these gates; inf: never.

    After n tokens it is the sum of (1 - alpha)^(n - j) eta^j over j = 0 to n, times theta (eqs. 10 and 13).
    """
    keep = 1 - alpha
    if keep >= 1 or (eta >= 1 and alpha < 1e-12):
        return math.inf

    def left(n: float) -> float:
        if abs(keep - eta) < 1e-9:
            return float((n + 1) * keep**n)
        return float((keep ** (n + 1) - eta ** (n + 1)) / (keep - eta))

    peak = 0.0
    if eta > 0 and keep > 0:
        a, b = math.log(keep), math.log(eta)
        peak = -1 / a - 1 if abs(a - b) < 1e-9 else math.log(b / a) / (a - b) - 1
    peak = max(0.0, peak)
    low, high, goal = peak, peak + 1.0, left(peak) / 2
    while left(high) > goal:
        high *= 2
        if high > LONGEST:
            return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > goal else (low, middle)
    return high


def span(trace: Trace, path: Path) -> None:
    """Half-life of a write, from the means of eta and of log(1 - alpha) over the text, by layer and head."""
    keep = np.exp(np.log1p(-np.minimum(trace["alpha"].astype(float), 1 - 1e-9)).mean(0))
    eta = trace["eta"].astype(float).mean(0)
    lives = np.array([half_life(eta[i], 1 - keep[i]) for i in np.ndindex(*keep.shape)]).reshape(keep.shape)
    with figure_file(path, svg=True, figsize=(2.2 + trace.heads, 1.8 + 0.6 * trace.layers)) as axis:
        size = np.log10(np.clip(lives, 1, LONGEST))
        _heat(axis, size, [["never" if math.isinf(x) else f"{x:,.0f}" for x in row] for row in lives])
        axis.set(title="Tokens until half of a write is gone", xlabel="head", ylabel="layer")


def singular_values(trace: Trace, path: Path) -> None:
    """Singular values of each head's first weight matrix, from the first snapshot (light) to the last (dark)."""
    grid = trace.layers, trace.heads
    with figure_file(path, *grid, svg=True, figsize=_grid_size(*grid), sharex=True, squeeze=False) as axes:
        values, last = trace["singular_values"], len(trace["snapshot"]) - 1
        for layer, head in np.ndindex(*grid):
            for number in range(last + 1):
                shade = 0.25 + 0.75 * number / max(last, 1)
                axes[layer, head].plot(values[number, layer, head, 0], color=_cividis(shade), linewidth=1)
            axes[layer, head].set(title=_name(layer, head), yscale="log")
        axes[-1, 0].set(xlabel="number, largest first", ylabel="singular value")


def similarity(trace: Trace, path: Path) -> None:
    """Cosine of what two snapshots have learned since the start, by layer and head."""
    grid, read = (trace.layers, trace.heads), trace["snapshot"][1:]
    with figure_file(path, *grid, svg=True, figsize=_grid_size(*grid), squeeze=False) as axes:
        for layer, head in np.ndindex(*grid):
            axis = axes[layer, head]
            image = axis.imshow(
                trace["similarity"][1:, 1:, layer, head], vmin=-1, vmax=1, cmap="cividis", origin="lower"
            )
            ticks = sorted({0, len(read) // 2, max(len(read) - 1, 0)})
            axis.set_xticks(ticks, [f"{read[i]:,}" for i in ticks] if len(read) else [], fontsize="x-small")
            axis.set_yticks(ticks, [f"{read[i]:,}" for i in ticks] if len(read) else [], fontsize="x-small")
            axis.set_title(_name(layer, head), fontsize="small")
        axes[0, 0].figure.colorbar(image, ax=axes, label="cosine of what was learned")


def overview(trace: Trace, path: Path) -> None:
    """Layers by heads: the mean of each measure, and the change of memory at the end."""
    maps = {name: trace[name].mean(0) for name in BY_HEAD if name in trace}
    maps["memory_change"] = trace["memory_change"][-1]
    rows = -(-len(maps) // 4)
    size = (4 * (1.6 + 0.6 * min(trace.heads, 12)), rows * (1.4 + 0.4 * min(trace.layers, 16)))
    with figure_file(path, rows, 4, svg=True, figsize=size, squeeze=False) as axes:
        for axis, (name, values) in zip(axes.flat, maps.items(), strict=False):
            _heat(axis, values, [[f"{x:.3g}" for x in row] for row in values])
            axis.set_title(name.replace("_", " "), fontsize="small")
        for axis in axes.flat[len(maps) :]:
            axis.set_axis_off()
        axes[0, 0].set(xlabel="head", ylabel="layer")


def held(probe: Probe, path: Path, labels: Sequence[str]) -> None:
    """What is held of a passage: error of each of its tokens at each checkpoint, a map for each layer and head."""
    _, tokens, layers, heads = probe.error.shape
    lives = probe.half_life()
    with figure_file(path, layers, heads, svg=True, figsize=_grid_size(layers, heads), squeeze=False) as axes:
        for layer, head in np.ndindex(layers, heads):
            axis, life = axes[layer, head], lives[layer, head]
            image = axis.imshow(probe.error[:, :, layer, head].T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
            ticks = sorted({0, len(probe.read) // 2, len(probe.read) - 1})
            axis.set_xticks(ticks, [f"{probe.read[i]:,}" for i in ticks], fontsize="x-small")
            if tokens <= 40:
                axis.set_yticks(range(tokens), labels, fontsize="x-small")
            words = "nothing gained" if math.isnan(life) else "held" if math.isinf(life) else f"half-life {life:,.0f}"
            rank = int(np.median(probe.rank[:, layer, head]))
            axis.set_title(f"{_name(layer, head)}: {words},\nrank {rank:,} of {probe.candidates:,}", fontsize="small")
        axes[0, 0].figure.colorbar(image, ax=axes, label="error, || M(k) - v ||^2 / || v ||^2")


def arcs(found: Sequence[Attribution], path: Path, tokens: int, number: int = 5) -> None:
    """Arcs from the top sources to each answer token; above the line where the share is positive, else below."""
    with figure_file(path, svg=True, figsize=(9, 3.4)) as axis:
        for colour, one in enumerate(found):
            top = one.top(number)
            largest = max((abs(share) for _, share in top), default=1.0)
            for source, share in top:
                middle, reach = (source + one.token) / 2, (one.token - source) / 2
                turn = np.linspace(0, math.pi, 60)
                axis.plot(
                    middle + reach * np.cos(turn), math.copysign(1, share) * reach / tokens * np.sin(turn),
                    color=f"C{colour % 10}", linewidth=0.5 + 2.5 * abs(share) / largest, alpha=0.8,
                )  # fmt: skip
        axis.axhline(0, color="0.5", linewidth=0.8)
        method = found[0].method if found else ""
        axis.set(xlim=(0, tokens), yticks=[], xlabel="token", title=f"Sources of the answer's tokens ({method})")


def _heat(axis: Any, values: NDArray[Any], words: Sequence[Sequence[str]]) -> None:
    axis.imshow(values, cmap="cividis", aspect="auto")
    axis.set_xticks(range(values.shape[1]))
    axis.set_yticks(range(values.shape[0]))
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    if values.size <= 200:
        for row, column in np.ndindex(*values.shape):
            colour = "white" if values[row, column] <= middle else "black"
            axis.text(column, row, words[row][column], ha="center", va="center", color=colour, fontsize="small")


def _cividis(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"](1 - share)


def _name(layer: int, head: int) -> str:
    return f"layer {layer}, head {head}"


def _grid_size(layers: int, heads: int) -> tuple[float, float]:
    return min(2.0 + 2.6 * heads, 40), min(1.0 + 2.4 * layers, 40)


def _small_legend(axis: Any, trace: Trace) -> None:
    if trace.layers * trace.heads <= 12:
        axis.legend(frameon=False, fontsize="small")


FIGURES = {"along": along, "norms": norms, "span": span, "singular_values": singular_values,
           "similarity": similarity, "overview": overview}  # fmt: skip
"""The figures that `draw` writes, by name."""
