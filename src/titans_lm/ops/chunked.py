"""The matmul form: a chunk's keys run forward and back once, at its anchor; all its tokens are read at once.

Derivation, and which line is which equation: README.md beside this file. One chunk is `chunk.py`; here chunks follow
one another, in groups: for the backward pass a call keeps the state at the start of each group and computes what is
inside again when the group's turn comes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_lm.ops.chunk import Layers, Weights
from titans_lm.ops.group import Gradients, Group, Norm, Seen, Span, Tokens, Trace, back_group, read_group, seen
from titans_lm.ops.ragged import lay_out
from titans_lm.ops.types import MemoryForm, MemoryState, Surprise, where_rows

KEPT_BYTES = 128 * 2**20
"""A group of chunks may leave this much for its backward pass, or hold sqrt(chunks) chunks if that is more. A call
that is one group keeps it all and computes nothing twice."""


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
        anchor, w, s = _thirds(flat[8:])
        return cls(Tokens(*flat[:6]), None if flat[6] is None else (flat[6], flat[7]), anchor, Weights(w, s))

    def shapes(self) -> list[tuple[int, int]]:
        return [(w.shape[1], w.shape[2]) for w in self.anchor]


def _thirds(x: Sequence[Any]) -> tuple[Layers, Layers, Layers]:
    layers = len(x) // 3
    return list(x[:layers]), list(x[layers : 2 * layers]), list(x[2 * layers :])


class _ReadSpan(torch.autograd.Function):
    """`read_span` with a backward pass. Kept for it are the inputs and the state at the start of each group."""

    @staticmethod
    def forward(ctx: Any, span: Span, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(flat)
        ctx.set_materialize_grads(False)
        ctx.span, ctx.count = span, len(flat)
        size = _group_size(inputs)
        parts, starts, trace = [], [], Trace([], [], inputs.anchor, inputs.state)
        for tokens, here in _groups(inputs.tokens, span, size):
            starts.append((*trace.anchor, *trace.state.w, *trace.state.s))
            group = Group(tokens, here, inputs.norm, inputs.shapes(), keep=size >= len(inputs.tokens.q))
            trace = read_group(group, trace.anchor, trace.state)
            parts.append(seen(group, trace))
        # What a call of one group leaves rides on a saved tensor, so that whoever handles those (activation
        # checkpointing drops them) handles it too. Without what is returned, which leads back here.
        whole: Any = inputs.tokens.q.new_empty(0)
        if len(starts) == 1:
            whole.all_chunks = group, trace._replace(anchor=[], state=Weights([], []))
        ctx.save_for_backward(*flat, *(x for start in starts[1:] for x in start), whole)
        y, loss, norm = _joined(parts)
        if norm is not None:
            ctx.mark_non_differentiable(norm)
        return y, loss, norm, *(x.clone() for x in trace.anchor), *trace.state.w, *trace.state.s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        *saved, whole = ctx.saved_tensors
        inputs, starts = Inputs.of(tuple(saved[: ctx.count])), saved[ctx.count :]
        y = torch.zeros_like(inputs.tokens.v) if y is None else y
        shapes = (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        by_anchor, *by_state = _thirds(tuple(
            torch.zeros_like(x) if by is None else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip(shapes, states, strict=True)
        ))  # fmt: skip
        parts: list[Gradients] = []
        size = _group_size(inputs)
        for i, (tokens, here) in reversed(list(enumerate(_groups(inputs.tokens, ctx.span, size)))):
            kept = getattr(whole, "all_chunks", None)
            if kept is None:
                start = shapes if i == 0 else starts[(i - 1) * len(shapes) : i * len(shapes)]
                anchor, *state = _thirds(start)
                group = Group(tokens, here, inputs.norm, inputs.shapes(), keep=True)
                trace = read_group(group, anchor, Weights(*state))
            else:
                group, trace = kept
            part = slice(i * size, (i + 1) * size)
            by_loss = None if loss is None else loss[part, ..., None]
            parts.insert(0, back_group(group, trace, y[part], by_loss, by_anchor, Weights(*by_state)))
            del group, trace  # before the next group's are made
        tokens = Tokens(*(torch.cat(x) for x in zip(*(part.tokens for part in parts), strict=True)))
        norms = [part.norm for part in parts if part.norm is not None]
        norm = (sum(w for w, _ in norms), sum(b for _, b in norms)) if norms else None
        return None, *Inputs(tokens, norm, by_anchor, Weights(*by_state)).flat()  # type: ignore[arg-type]


def read_span(span: Span, inputs: Inputs) -> tuple[Any, ...]:
    """y `[N, R, C, V]`, loss and gradient norm `[N, R, C]` or None, the last anchor, weights and momentum after it."""
    flat = inputs.flat()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        y, loss, norm, *state = _ReadSpan.apply(span, *flat)
        return y, loss, norm, *_thirds(state)
    parts, trace = [], Trace([], [], inputs.anchor, inputs.state)
    for tokens, here in _groups(inputs.tokens, span, _group_size(inputs)):
        group = Group(tokens, here, inputs.norm, inputs.shapes(), keep=False)
        trace = read_group(group, trace.anchor, trace.state)
        parts.append(seen(group, trace))
    return *_joined(parts), trace.anchor, *trace.state


def _group_size(inputs: Inputs) -> int:
    """Chunks of a group: so many that what they leave for the backward pass is not above KEPT_BYTES, or sqrt(N)."""
    n, r, c, _ = inputs.tokens.q.shape
    numbers = sum(2 * i * o + c * (8 * o + 2 * i + 2 * c) for i, o in inputs.shapes())
    return min(n, max(round(math.sqrt(n)), KEPT_BYTES // (numbers * r * inputs.tokens.q.element_size())))


def _groups(tokens: Tokens, span: Span, size: int) -> list[tuple[Tokens, Span]]:
    present = span.present
    return [
        (
            Tokens(*(x[n : n + size] for x in tokens)),
            span._replace(present=None if present is None else present[n : n + size]),
        )
        for n in range(0, len(tokens.q), size)
    ]


def _joined(parts: list[Seen]) -> Seen:
    y, loss, norm = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
    return y, loss, norm  # type: ignore[return-value] # y is always there


# ------------------------------------------------------------------------------------------------ the whole call


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    state: MemoryState,
    chunk_size: int,
    form: MemoryForm,
    mask: Tensor | None,
    surprise: bool = True,
) -> tuple[Tensor, MemoryState, Surprise | None]:
    """As `naive`, by matmuls. q, k `[B, T, H, K]`, v `[B, T, H, V]`, gates `[B, T, H]`, mask `[B, T]`."""
    layout = lay_out(mask, state.position, q.shape[1], chunk_size)
    batch, heads = len(q), q.shape[2]
    inputs = tuple(layout.arrange(x) for x in (q, k, v, *gates))
    norm = None
    if form.norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in form.norm)
        norm = (weight, bias)
    anchor, w, s = ([x.flatten(0, 1) for x in part] for part in state[:3])
    parts = []
    for start, end, width in layout.spans():
        tokens = Tokens(*(_rows(x[:, start:end], width) for x in inputs))
        present = None
        if layout.present is not None:
            present = _rows(layout.present[:, start:end, None].expand(-1, -1, heads), width)
        span = Span(form, surprise, start >= layout.head, present)
        *part, anchor, w, s = read_span(span, Inputs(tokens, norm, anchor, Weights(w, s)))
        parts.append([None if x is None else _tokens(x, batch) for x in part])
    position = (state.position + layout.length) % chunk_size
    at_end = [tuple(x.unflatten(0, (batch, heads)) for x in layers) for layers in (anchor, w, s)]
    after = MemoryState(where_rows(position == 0, at_end[1], at_end[0]), at_end[1], at_end[2], position)
    if not parts:  # no token, or all masked
        nothing = torch.zeros_like(gates[0])
        return torch.zeros_like(v), after, Surprise(nothing, nothing)
    y, loss, gradient_norm = (
        None if x[0] is None else layout.restore(torch.cat(x, 1)) for x in zip(*parts, strict=True)
    )
    assert y is not None
    return y, after, None if loss is None or gradient_norm is None else Surprise(loss, gradient_norm)


def _rows(x: Tensor, width: int) -> Tensor:
    """`[B, N * C, H, *]` -> `[N, B * H, C, *]`, contiguous."""
    x = x.unflatten(1, (-1, width)).movedim(0, 1).transpose(2, 3)
    return x.flatten(1, 2).contiguous()


def _tokens(x: Tensor, batch: int) -> Tensor:
    """Undo `_rows`."""
    return x.unflatten(1, (batch, -1)).transpose(2, 3).movedim(1, 0).flatten(1, 2)
