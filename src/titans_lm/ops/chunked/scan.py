"""The matmul form: a chunk's keys run forward and back once, at its anchor; all its tokens are read at once.

Derivation, and which line is which equation: README.md one folder up. One chunk is `chunk.py`; here chunks follow
one another, in groups: for the backward pass a call keeps the state at the start of each group and computes what is
inside again when the group's turn comes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_lm.ops.chunked.chunk import Layers, Weights
from titans_lm.ops.chunked.group import Group, Norm, Seen, Span, Trace, back_group, read_group, seen
from titans_lm.ops.ragged import Layout, lay_out
from titans_lm.ops.types import Answer, Call, MemoryState, Surprise, Tokens, where_rows

KEPT_BYTES = 256 * 2**20
"""A call whose chunks leave no more than this for the backward pass keeps it all, and computes nothing twice."""
GROUP_BYTES = 128 * 2**20
"""Else they are computed again in groups that leave no more than this, or of sqrt(chunks) chunks if that is more."""
LONGEST = 64
"""Tokens of a chunk that are read at once: D and scores grow with their square. A longer chunk is read in parts."""
CACHED_BYTES = 6 * 2**20
"""Where nothing is kept, a group is as large as what is computed for all its chunks at once stays in a core's cache."""


# ------------------------------------------------------------------------------------------------ a span of chunks


class Inputs(NamedTuple):
    """Of a span; the tensors that autograd knows."""

    tokens: Tokens
    norm: Norm | None
    anchor: Layers
    state: Weights

    def flat(self) -> tuple[Tensor | None, ...]:
        return *self.tokens, *(self.norm or (None, None)), *self.anchor, *self.state.w, *self.state.s

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> "Inputs":
        """Undo `flat`."""
        anchor, w, s = thirds(flat[8:])
        return cls(Tokens(*flat[:6]), None if flat[6] is None else (flat[6], flat[7]), anchor, Weights(w, s))

    def slots(self) -> int:
        return self.tokens.q.shape[1]

    def row_bytes(self) -> int:
        """Of what is computed for all chunks at once, for one slot of all rows."""
        return 8 * self.tokens.q[:, 0].numel() * self.anchor[0].element_size()

    def shapes(self) -> list[tuple[int, int]]:
        return [(w.shape[1], w.shape[2]) for w in self.anchor]


def thirds(x: Sequence[Any]) -> tuple[Layers, Layers, Layers]:
    layers = len(x) // 3
    return list(x[:layers]), list(x[layers : 2 * layers]), list(x[2 * layers :])


class _ReadSpan(torch.autograd.Function):
    """`read_span` with a backward pass. Kept for it are the inputs and the state at the start of each group."""

    @staticmethod
    def forward(ctx: Any, span: Span, kept_bytes: int, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(flat)
        ctx.set_materialize_grads(False)
        size, keep = _group_size(inputs, span, kept_bytes)
        ctx.span, ctx.size, ctx.count = span, size, len(flat)
        out, starts, trace = _empty(inputs, span), [], Trace([], [], inputs.anchor, inputs.state)
        for part in _parts(inputs, size):
            anchor = trace.state.w if span.at_boundary and span.present is None else trace.anchor  # kept once
            starts.append((*anchor, *trace.state.w, *trace.state.s))
            group = _group(inputs, span, part, keep)
            trace = read_group(group, trace.anchor, trace.state)
            _put(out, part, seen(group, trace), span.width)
        # What a call of one group leaves rides on a saved tensor, so that whoever handles those (activation
        # checkpointing drops them) handles it too. Without what is returned, which leads back here.
        whole: Any = inputs.tokens.q.new_empty(0)
        if keep:
            whole.all_chunks = group, trace._replace(anchor=[], state=Weights([], []))
        ctx.save_for_backward(*flat, *(x for start in starts[1:] for x in start), whole)
        if span.surprise:
            ctx.mark_non_differentiable(out[2])
        return *out, *(x.clone() for x in trace.anchor), *trace.state.w, *trace.state.s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        *saved, whole = ctx.saved_tensors
        inputs, starts = Inputs.of(tuple(saved[: ctx.count])), saved[ctx.count :]
        span, shapes = ctx.span, (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        y = torch.zeros_like(inputs.tokens.v) if y is None else y
        by_anchor, *by_state = thirds(tuple(
            torch.zeros_like(x) if by is None else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip(shapes, states, strict=True)
        ))  # fmt: skip
        by_tokens = Tokens(*(torch.empty_like(x) for x in inputs.tokens))
        by_norm = [torch.zeros_like(x) for x in inputs.norm or ()]
        kept = getattr(whole, "all_chunks", None)
        for i, part in reversed(list(enumerate(_parts(inputs, ctx.size)))):
            if kept is None:
                anchor, *state = thirds(shapes if i == 0 else starts[(i - 1) * len(shapes) : i * len(shapes)])
                group = _group(inputs, span, part, keep=True)
                trace = read_group(group, anchor, Weights(*state))
            else:
                group, trace = kept
            by_y = to_rows(y[:, part], span.width, group.y.dtype)
            by_loss = None if loss is None else to_rows(loss[:, part], span.width)[..., None]
            found = back_group(group, trace, by_y, by_loss, by_anchor, Weights(*by_state))
            _put(by_tokens, part, found.tokens, span.width)
            if found.norm is not None:
                by_norm = [x + y for x, y in zip(by_norm, found.norm, strict=True)]
            del group, trace  # before the next group's are made
        return None, None, *by_tokens, *(by_norm or (None, None)), *by_anchor, *itertools.chain(*by_state)


def read_span(span: Span, inputs: Inputs, kept_bytes: int) -> tuple[Any, ...]:
    """y `[B, S, H, V]`, loss and gradient norm `[B, S, H]` or None, the last anchor, weights and momentum after it."""
    flat = inputs.flat()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        y, loss, norm, *state = _ReadSpan.apply(span, kept_bytes, *flat)
        return y, loss, norm, *thirds(state)
    out, trace = _empty(inputs, span), Trace([], [], inputs.anchor, inputs.state)
    for part in _parts(inputs, cached_size(inputs, span)):
        group = _group(inputs, span, part, keep=False)
        trace = read_group(group, trace.anchor, trace.state)
        _put(out, part, seen(group, trace), span.width)
    return *out, trace.anchor, *trace.state


def _group_size(inputs: Inputs, span: Span, kept_bytes: int) -> tuple[int, bool]:
    """Slots of a group, and whether the span is one group that keeps what its chunks leave."""
    c = span.width
    numbers = sum(2 * i * o + c * (4 * o + 6 * i + 2 * c) for i, o in inputs.shapes())  # the fields of a `Chunk`
    each = numbers * len(inputs.anchor[0]) * inputs.anchor[0].element_size()
    size, keep = group_size(inputs.slots() // c, each, kept_bytes * span.share)
    return c * size, keep


def group_size(chunks: int, each: int, kept_bytes: float) -> tuple[int, bool]:
    """Chunks of a group, if each leaves `each` bytes for the backward pass, and whether that is kept: then it is one
    group."""
    if chunks * each <= kept_bytes:
        return chunks, True
    return min(chunks, max(round(math.sqrt(chunks)), GROUP_BYTES // each)), False


def cached_size(inputs: Inputs, span: Span) -> int:
    """Slots of a group where nothing is kept."""
    return max(1, CACHED_BYTES // (inputs.row_bytes() * span.width)) * span.width


def _parts(inputs: Inputs, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, inputs.slots(), size)]


def _group(inputs: Inputs, span: Span, part: slice, keep: bool) -> Group:
    dtype = inputs.anchor[0].dtype
    tokens, span = rows_of(Tokens(*(x[:, part] for x in inputs.tokens)), span, part, dtype)
    return Group(tokens, span, inputs.norm, inputs.shapes(), keep)


def rows_of(tokens: Tokens, span: Span, part: slice, dtype: torch.dtype | None = None) -> tuple[Tokens, Span]:
    """`tokens`, slots `part` of a span, in `dtype`, and what the span says of them, chunk by chunk and row by row."""
    heads = tokens.q.shape[2]
    if span.present is not None:
        span = span._replace(present=to_rows(span.present[:, part, None].expand(-1, -1, heads), span.width))
    return Tokens(*(to_rows(x, span.width, dtype) for x in tokens)), span


# ------------------------------------------------------------------------------------------------ tokens and rows


def _view(x: Tensor, width: int) -> Tensor:
    """`[B, N * C, H, *]` as `[N, B, H, C, *]`"""
    return x.unflatten(1, (-1, width)).movedim(0, 1).transpose(2, 3)


def to_rows(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """`[B, N * C, H, *]` -> `[N, B * H, C, *]`, contiguous, in `dtype` if it is given."""
    return _view(x, width).to(dtype or x.dtype, memory_format=torch.contiguous_format).flatten(1, 2)


def to_tokens(x: Tensor, batch: int) -> Tensor:
    """Undo `to_rows`."""
    return x.unflatten(1, (batch, -1)).transpose(2, 3).movedim(1, 0).flatten(1, 2)


def _empty(inputs: Inputs, span: Span) -> Seen:
    """What `_put` fills: y, loss, gradient norm."""
    y, shape = torch.empty_like(inputs.tokens.v), inputs.tokens.theta
    return (y, torch.empty_like(shape), torch.empty_like(shape)) if span.surprise else (y, None, None)


def _put(out: tuple[Tensor | None, ...], part: slice, rows: tuple[Tensor | None, ...], width: int) -> None:
    """`[N, B * H, C, *]` into `out[:, part]`, each `[B, S, H, *]`."""
    for whole, x in zip(out, rows, strict=True):
        if whole is not None and x is not None:
            _view(whole[:, part], width).copy_(x.unflatten(1, (whole.shape[0], whole.shape[2])))


# ------------------------------------------------------------------------------------------------ the whole call


def chunked(call: Call) -> Answer:
    """As `naive`, by matmuls."""
    return in_spans(call, partial(read_span, kept_bytes=call.kept_bytes))


def in_spans(call: Call, read: Callable[[Span, Inputs], tuple[Any, ...]]) -> Answer:
    """`chunked`, with spans read by `read`, which takes and gives what `read_span` does."""
    tokens, state, chunk_size, form, mask, surprise, _ = call
    batch, length, heads, _ = tokens.q.shape
    layout = lay_out(mask, state.position, length, chunk_size)
    norm = None
    if form.norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in form.norm)
        norm = (weight, bias)
    anchor, w, s = ([x.flatten(0, 1) for x in part] for part in state[:3])
    pieces, parts = _pieces(layout), []
    slots = _split([layout.arrange(x) for x in tokens], pieces)
    for piece, here in zip(pieces, slots, strict=True):
        present = None if layout.present is None else layout.present[:, piece.start : piece.end]
        if piece.chunks == "first":
            anchor = w if present is None else list(where_rows(_heads(present[:, 0], heads), tuple(w), tuple(anchor)))
        share = (piece.end - piece.start) / layout.size
        span = Span(form, surprise, piece.width, piece.chunks == "all", present, share)
        *part, anchor, w, s = read(span, Inputs(here, norm, anchor, Weights(w, s)))
        parts.append(part)
    position = (state.position + layout.length) % chunk_size
    at_end = [tuple(x.unflatten(0, (batch, heads)) for x in layers) for layers in (anchor, w, s)]
    after = MemoryState(where_rows(position == 0, at_end[1], at_end[0]), at_end[1], at_end[2], position)
    if not parts:  # no token, or all masked
        nothing = torch.zeros_like(tokens.theta)
        return torch.zeros_like(tokens.v), after, Surprise(nothing, nothing) if surprise else None
    y, loss, gradient_norm = (None if x[0] is None else layout.restore(_joined(x)) for x in zip(*parts, strict=True))
    assert y is not None
    return y, after, None if loss is None or gradient_norm is None else Surprise(loss, gradient_norm)


class Piece(NamedTuple):
    """Slots that make a span: chunks, or parts of one chunk, of `width` slots each."""

    start: int
    end: int
    width: int
    chunks: Literal["all", "first", "none"]  # which begin a chunk


def _pieces(layout: Layout) -> list[Piece]:
    """`Layout.spans`; what of them is longer than LONGEST in parts of equal width, the last of a chunk narrower."""
    pieces = []
    for start, end, width in layout.spans():
        fresh = start >= layout.head
        if width <= LONGEST:
            pieces.append(Piece(start, end, width, "all" if fresh else "none"))
            continue
        part = -(-width // -(-width // LONGEST))
        for first in range(start, end, width):
            last = first + width // part * part
            pieces.append(Piece(first, last, part, "first" if fresh else "none"))
            if last < first + width:
                pieces.append(Piece(last, first + width, first + width - last, "none"))
    return pieces


def _heads(rows: Tensor, heads: int) -> Tensor:
    """`[B]` -> `[B * H]`"""
    return rows[:, None].expand(-1, heads).flatten()


def _split(tokens: list[Tensor], pieces: list[Piece]) -> list[Tokens]:
    """The tokens of each piece."""
    if len(pieces) == 1:
        return [Tokens(*tokens)]
    sizes = [piece.end - piece.start for piece in pieces]
    return [Tokens(*part) for part in zip(*(x.split(sizes, 1) for x in tokens), strict=True)]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
