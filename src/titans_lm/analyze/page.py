"""The page of `titans analyze`: one HTML file with text, numbers, styles and scripts inside, which needs no network.

No part of a text is markup: numbers and text are base64 in blocks of data, and scripts put text into the page as text
alone. A content security policy allows the page's own script and style, by their digests, and nothing else.
"""

import base64
import hashlib
import html
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_lm.analyze.arrays import BY_HEAD, Trace
from titans_lm.analyze.display import Display, display, label

MAX_BYTES = 14_000_000
"""Of the numbers, in base64. With more, first the heads of a layer become their mean, then the layers."""
LISTED = 40
"""Lines and tokens that the page lists."""
SCRIPTS = ("uPlot.iife.min.js", "data.js", "text.js", "charts.js", "lists.js", "main.js")
STYLES = ("uPlot.min.css", "page.css")


@dataclass
class PageText:
    """One of the texts, read one after another."""

    name: str
    tokens: int


@dataclass
class Series:
    """Bits of each token in another reading of the same text."""

    label: str
    bits: NDArray[np.float32]
    """`[T]`"""
    start: int = 0
    """The first token at which the reading may differ."""


@dataclass
class Sources:
    """Where the prediction of one token comes from."""

    token: int
    method: str
    sources: list[tuple[int, float]]
    """Earlier tokens and their shares, the largest first."""


@dataclass
class PageData:
    """What a page shows."""

    title: str
    trace: Trace
    parts: list[bytes | str]
    """The bytes of each token; the names of special tokens."""
    vocabulary: dict[int, bytes | str]
    """The same of each predicted token."""
    texts: list[PageText]
    facts: dict[str, str]
    """Said at the top: model, date, and so on."""
    others: list[Series] = field(default_factory=list)
    """What-if runs."""
    compared: Series | None = None
    """Another model or mode, whose text stands beside."""
    sources: list[Sources] = field(default_factory=list)


def page(data: PageData) -> str:
    """The HTML of a page, to be written in UTF-8."""
    shown = display(data.parts)
    blocks, about = _columns(data, shown)
    meta = {**about, **_lists(data), **_facts(data)}
    script = "\n".join(map(_asset, SCRIPTS))
    style = "\n".join(map(_asset, STYLES))
    if "</script" in script.lower() or "</style" in style.lower():
        raise ValueError("the page's script or style would end early")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": html.escape(policy),
        "title": html.escape(label(data.title.encode())),
        "style": style,
        "script": script,
        "meta": json.dumps(meta, allow_nan=False).replace("<", "\\u003c"),
        "blocks": "\n".join(_block(name, column) for name, column in blocks.items()),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("titans_lm.analyze") / "assets" / name).read_text("utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _block(name: str, column: NDArray[Any]) -> str:
    kind, content = column.dtype.name, base64.b64encode(np.ascontiguousarray(column).tobytes()).decode()
    return f'<script type="application/octet-stream-base64" data-name="{name}" data-kind="{kind}">{content}</script>'


# ------------------------------------------------------------------------------------------------ columns


def _columns(data: PageData, shown: Display) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The page's columns of numbers, and what describes them."""
    trace = data.trace
    columns: dict[str, NDArray[Any]] = {
        "text": np.frombuffer(shown.text.encode(), np.uint8),
        "units": shown.units,
        "width": np.minimum(shown.width, 255).astype(np.uint8),
        "flags": shown.flags,
        "bits": trace["bits"].astype(np.float16),
    }
    if "bits_frozen" in trace:
        columns["bits_frozen"] = trace["bits_frozen"].astype(np.float16)
    for number, other in enumerate(data.others):
        columns[f"other{number}"] = other.bits.astype(np.float16)
    if data.compared is not None:
        columns["compared"] = data.compared.bits.astype(np.float16)
    for name in ("prediction", "prediction_frozen"):
        if name in trace:
            ids = trace[name]
            columns[name] = np.where(ids < 0, 65535, ids).astype(np.uint16 if ids.max() < 65535 else np.uint32)
            chance = name.replace("prediction", "probability")
            columns[chance] = trace[chance].astype(np.float16)
    if "memory_gate" in trace:
        columns["memory_gate"] = trace["memory_gate"].T.astype(np.float16)
    columns["checkpoint"] = trace["checkpoint"].astype(np.uint32)
    for name in ("memory_norm", "memory_change", "momentum_norm"):
        columns[name] = np.moveaxis(trace[name], 0, -1).astype(np.float32)
    shape, exponents = _add_heads(columns, trace)
    about = {"tokens": len(trace), "layers": shape[0], "heads": shape[1], "exponents": exponents,
             "norm_layers": trace.layers, "norm_heads": trace.heads,
             "top": trace["prediction"].shape[1] if "prediction" in trace else 0}  # fmt: skip
    return columns, about


def _add_heads(columns: dict[str, NDArray[Any]], trace: Trace) -> tuple[tuple[int, int], dict[str, int]]:
    """Add the arrays by layer and head, as `[L, H, T]`, as much of them as fits. Returns L, H and exponents.

    A number is its float16 times 2 to the exponent of its array, so that none is too large or too small."""
    names = [name for name in BY_HEAD if name in trace]
    used, layers, heads = sum(c.nbytes for c in columns.values()), trace.layers, trace.heads
    room = (MAX_BYTES * 3 // 4 - used) // (2 * max(len(names), 1) * len(trace))
    if layers * heads > room:
        heads = 1
    if layers * heads > room:
        layers = 1
    exponents = {}
    for name in names:
        array = trace[name]
        array = array.mean(2, keepdims=True) if heads < array.shape[2] else array
        array = array.mean(1, keepdims=True) if layers < array.shape[1] else array
        most = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
        exponents[name] = 0 if most == 0 else int(np.floor(np.log2(most)))
        columns[name] = (np.moveaxis(array, 0, -1) / 2.0 ** exponents[name]).astype(np.float16)
    return (layers, heads), exponents


# ------------------------------------------------------------------------------------------------ lists


def _facts(data: PageData) -> dict[str, Any]:
    firsts = np.cumsum([0, *(text.tokens for text in data.texts)]).tolist()
    bits = data.trace["bits"]
    return {
        "title": label(data.title.encode()),
        "facts": [[name, label(value.encode())] for name, value in data.facts.items()],
        "texts": [
            {"name": label(t.name.encode(errors="replace")), "start": firsts[i]} for i, t in enumerate(data.texts)
        ],
        "mean_bits": round(float(np.nanmean(bits)), 4) if len(bits) > 1 else None,
        "others": [{"label": label(one.label.encode()), "start": one.start} for one in data.others],
        "compared": None if data.compared is None else label(data.compared.label.encode()),
        "sources": [vars(one) for one in data.sources],
        "vocabulary": {str(token): label(part)[:40] for token, part in data.vocabulary.items()},
    }


def _lists(data: PageData) -> dict[str, Any]:
    """The lines of each text, the most surprising ones, and the tokens that memory helped and hurt most."""
    bits = data.trace["bits"].astype(np.float64)
    starts, numbers = _lines(data)
    known = np.isfinite(bits)  # nothing predicts the first token of a text, so its bytes do not count
    sizes = known * np.array([len(part) if isinstance(part, bytes) else 1 for part in data.parts])
    counted = np.add.reduceat(sizes, starts)
    per_byte = np.add.reduceat(np.where(known, bits, 0), starts) / np.maximum(counted, 1)
    left_out = [
        not count or not b"".join(p for p in data.parts[a:b] if isinstance(p, bytes)).strip()
        for (a, b), count in zip(_spans(starts, len(bits)), counted.tolist(), strict=True)
    ]
    order = np.argsort(-np.where(left_out, -1, per_byte), kind="stable")[:LISTED]
    lines = [[int(starts[i]), int(numbers[i]), round(float(per_byte[i]), 3)] for i in order if not left_out[i]]
    lists: dict[str, Any] = {"lines": lines}
    if "bits_frozen" in data.trace:
        helped = np.nan_to_num(data.trace.helped.astype(np.float64))
        order = np.argsort(helped, kind="stable")
        lists["helped"] = [[int(t), round(float(helped[t]), 3)] for t in order[:LISTED] if helped[t] < 0]
        lists["hurt"] = [[int(t), round(float(helped[t]), 3)] for t in order[::-1][:LISTED] if helped[t] > 0]
        lists["saved"] = round(float(-helped.sum()), 1)
    return lists


def _lines(data: PageData) -> tuple[NDArray[np.int64], list[int]]:
    """The first token of each line, and its number in its text, from 1."""
    begin = np.zeros(len(data.parts), bool)
    ends = [isinstance(part, bytes) and b"\n" in part for part in data.parts]
    begin[1:] = ends[:-1]
    begin[np.cumsum([0, *(text.tokens for text in data.texts)])[:-1]] = True
    starts, numbers, first = np.flatnonzero(begin), list[int](), 0
    for text in data.texts:
        count = int(begin[first : first + text.tokens].sum())
        numbers += range(1, count + 1)
        first += text.tokens
    return starts, numbers


def _spans(starts: NDArray[np.int64], end: int) -> list[tuple[int, int]]:
    return list(zip(starts.tolist(), [*starts[1:].tolist(), end], strict=True))
