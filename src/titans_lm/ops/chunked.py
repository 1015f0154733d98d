"""The matmul form: a chunk's keys run forward and back once, at its anchor; all its tokens are read at once.

Derivation, and which line is which equation: README.md beside this file. One chunk is `chunk.py`; here chunks follow
one another, in groups: for the backward pass a call keeps the state at the start of each group and computes what is
inside again when the group's turn comes.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch.autograd.function import once_differentiable

from titans_lm.ops.chunk import Chunk, Form, Layers, back_beside, back_chunk, beside, halves, read_chunk
from titans_lm.ops.decays import Decays, decays
from titans_lm.ops.mlp import through_norm
from titans_lm.ops.ragged import lay_out
from titans_lm.ops.types import NORM_EPS, MemoryForm, MemoryState, Surprise, where_rows

KEPT_BYTES = 64 * 2**20
"""A group of chunks may leave this much for its backward pass, or hold sqrt(chunks) chunks if that is more. A call
that is one group keeps it all and computes nothing twice."""


class Tokens(NamedTuple):
    """What a span of chunks reads: `[N, R, C, *]`, N chunks, R = B * H rows, all contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor  # [N, R, C], and eta, alpha
    eta: Tensor
    alpha: Tensor


class Span(NamedTuple):
    """How to read a span."""

    form: MemoryForm
    surprise: bool
    at_boundary: bool  # every chunk begins here; else the span completes one chunk that an earlier call began
    present: Tensor | None  # [N, R, C], which slots hold a token


# ------------------------------------------------------------------------------------------------ a group of chunks


class Group:
    """Chunks one after another: what of them does not touch the state, for all at once."""

    def __init__(self, tokens: Tokens, span: Span, norm: tuple[Tensor, Tensor] | None, stack: Layers):
        self.tokens, self.span = tokens, span
        self.form = Form(span.form, None if norm is None else norm[0], span.surprise)
        with torch.enable_grad():
            self.gates = tuple(gate.detach().requires_grad_() for gate in tokens[3:])
            self.decay_graph = decays(*self.gates, span.present)
        self.decay = Decays(*(part.detach() for part in self.decay_graph))
        q, k, v = tokens[:3]
        self.shift = -v if norm is None else k - v + norm[1]
        self.raw = q @ k.mT
        d = self.decay.d
        first = (q, k, beside(q, self.decay.a, self.decay.b), beside(k, d[..., -1, :, None], self.decay.em))
        self.first = (*first, self.raw, self.raw * d)
        self.shapes = [(state.shape[1] // 2, state.shape[2]) for state in stack]
        self.y = q.new_empty(*q.shape[:3], self.shapes[-1][1])  # Y_L

    def chunks(self, slots: int) -> list[Chunk]:
        """A `Chunk` for each; buffers for `slots` of them: all, or one that they use in turn."""
        return _chunks(self.first, self.shift, self.decay, self.y, self.shapes, slots)

    def gradients(self, by_y: Tensor) -> tuple[list[Chunk], tuple[Tensor, ...], Tensor, Decays]:
        """A `Chunk` to hold the gradients of each, and what holds those of the first layer, shift and decays of all."""
        first = tuple(torch.empty_like(x) for x in self.first)
        shift, decay = torch.empty_like(self.shift), Decays(*(torch.zeros_like(x) for x in self.decay))
        return _chunks(first, shift, decay, by_y, self.shapes, 1), first, shift, decay


def _chunks(
    first: tuple[Tensor, ...], shift: Tensor, decay: Decays, y: Tensor, shapes: list[tuple[int, int]], slots: int
) -> list[Chunk]:
    """`first` are the first layer's h, x, reads, writes, raw, scores `[N, R, C, *]`, `y` is Y_L; the rest is made."""
    n, r, c, _ = y.shape

    def buffers(widths: list[int]) -> list[list[Tensor]]:
        made = [y.new_empty(slots, r, c, width).unbind(0) for width in widths]
        return [[layer[i % slots] for layer in made] for i in range(n)]

    in_, out = [i for i, _ in shapes], [o for _, o in shapes]
    widths = (in_, in_, [2 * i for i in in_], [2 * i for i in in_], [c] * len(in_), [c] * len(in_))
    later = [buffers(w[1:]) for w in widths]
    z, back, g, inner_y = buffers(out), buffers(out[:-1]), buffers(out), buffers(out[:-1])
    beginnings = [x.unbind(0) for x in first]
    return [
        Chunk(
            shift[i],
            Decays(*(part[i] for part in decay)),
            *([beginning[i], *rest[i]] for beginning, rest in zip(beginnings, later, strict=True)),
            z[i], back[i], g[i], [*inner_y[i], y[i]],
        )
        for i in range(n)
    ]  # fmt: skip


class Trace(NamedTuple):
    """What reading a group leaves."""

    chunks: list[Chunk]
    starts: list[Layers]  # the stack before each chunk, where kept
    anchors: list[Layers]
    anchor: Layers  # of the last chunk
    stack: Layers  # after it


def read_group(group: Group, anchor: Layers, stack: Layers, keep: bool) -> Trace:
    """Read a group's chunks; `keep` for a backward pass. `anchor` and `stack` stay as they are."""
    n, present = len(group.y), group.span.present
    rows = None if present is None else present.any(-1)[..., None, None]  # [N, R, 1, 1]
    chunks = group.chunks(n if keep else 1)
    stacks = [[torch.empty_like(state) for state in stack] for _ in range(n if keep else 2)]
    trace = Trace(chunks, [], [], anchor, stack)
    for i, c in enumerate(chunks):
        if group.span.at_boundary:  # a row that has no token left keeps the anchor of its last chunk
            weights = [halves(state)[0] for state in stack]
            anchor = weights if rows is None else [torch.where(rows[i], w, old) for w, old in zip(weights, anchor, strict=True)]
        after = stacks[i % len(stacks)]
        read_chunk(c, anchor, stack, after, group.form)
        if keep:
            trace.starts.append(stack)
            trace.anchors.append(anchor)
        stack = after
    return trace._replace(anchor=anchor, stack=stack)


class Gradients(NamedTuple):
    """Of the outer loss by what a group read: the tokens, and the norm's weight and bias, `[R, 1, V]` each."""

    tokens: Tokens
    norm: tuple[Tensor, Tensor] | None


def back_group(
    group: Group, trace: Trace, by_output: Tensor, loss: Tensor | None, by_anchor: Layers, by_stack: Layers
) -> Gradients:
    """From the gradients by M(q) `[N, R, C, V]`, by the loss `[N, R, C, 1]`, by the last anchor and the state after.

    The last two become, in place, those by the first anchor and by the state before.
    """
    present = group.span.present
    rows = None if present is None else present.any(-1)[..., None, None]
    by_y, by_weight = _back_finish(group, by_output)
    chunks, first, by_shift, by_decay = group.gradients(by_y)
    here = [torch.empty_like(w) for w in by_anchor]
    for i in range(len(chunks) - 1, -1, -1):
        c, anchor, stack = trace.chunks[i], trace.anchors[i], trace.starts[i]
        weight = back_chunk(
            c, chunks[i], anchor, stack, here, by_stack, group.form, None if loss is None else loss[i]
        )
        if by_weight is not None:
            by_weight += weight
        for total, part, state in zip(by_anchor, here, by_stack, strict=True):
            total += part
            if group.span.at_boundary:  # the anchor was the weights, in rows that have a token
                halves(state)[0].add_(total if rows is None else total * rows[i])
                total.mul_(0 if rows is None else ~rows[i])
    return _back_first(group, first, by_shift, by_decay, by_output, by_weight)


def _back_finish(group: Group, by_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients by Y_L and by the norm's weight of `finish`."""
    if group.form.weight is None:
        return by_output, None
    n, mean, inverse = torch.native_layer_norm(group.y, group.y.shape[-1:], None, None, NORM_EPS)
    by_y = through_norm(by_output * group.form.weight, group.y, mean, inverse)
    return by_y, (by_output * n).sum((0, 2)).unsqueeze(1)


def _back_first(
    group: Group, first: tuple[Tensor, ...], by_shift: Tensor, by_decay: Decays, by_output: Tensor, weight: Tensor | None
) -> Gradients:
    """From the gradients by the first layer's reads, writes and scores, by shift and by the decays, to the tokens'."""
    (q, k), decay = group.tokens[:2], group.decay
    _, by_k, reads, writes, _, scores = first
    raw = scores * decay.d
    by_decay.d.addcmul_(scores, group.raw)
    by_q = back_beside(reads, q, (decay.a, decay.b), (by_decay.a, by_decay.b)) + raw @ k
    left, by_left = (x.d[..., -1, :, None] for x in (decay, by_decay))
    by_k += back_beside(writes, k, (left, decay.em), (by_left, by_decay.em)) + raw.mT @ q
    norm = None
    if weight is not None:
        by_q, by_k = by_q + by_output, by_k + by_shift
        norm = (weight, (by_output + by_shift).sum((0, 2)).unsqueeze(1))
    with torch.enable_grad():
        gates = torch.autograd.grad(group.decay_graph, group.gates, by_decay)
    return Gradients(Tokens(by_q, by_k, -by_shift, *gates), norm)


# ------------------------------------------------------------------------------------------------ a span of chunks


class _Inputs(NamedTuple):
    """Of a span, as the tensors that autograd knows."""

    tokens: Tokens
    norm: tuple[Tensor, Tensor] | None
    anchor: Layers
    stack: Layers

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], layers: int) -> "_Inputs":
        norm = None if tensors[6] is None else (tensors[6], tensors[7])
        return cls(Tokens(*tensors[:6]), norm, list(tensors[8 : 8 + layers]), list(tensors[8 + layers :]))


class _ReadSpan(torch.autograd.Function):
    """y `[N, R, C, V]`, loss, gradient norm, the last anchor and the state after it, all differentiable but the norm.

    Kept for the backward pass are the inputs and the state at the start of each group.
    """

    @staticmethod
    def forward(ctx: Any, span: Span, layers: int, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        inputs = _Inputs.of(tensors, layers)
        ctx.set_materialize_grads(False)
        ctx.span, ctx.layers, ctx.kept = span, layers, None
        ctx.size = _group_size(inputs.tokens, inputs.stack)
        whole = ctx.size >= len(inputs.tokens.q)
        seen, starts, anchor, stack = [], [], inputs.anchor, inputs.stack
        for tokens, here in _groups(inputs.tokens, span, ctx.size):
            starts.append([*(anchor if span.present is not None else []), *stack])
            group = Group(tokens, here, inputs.norm, stack)
            trace = read_group(group, anchor, stack, keep=whole)
            anchor, stack = trace.anchor, trace.stack
            seen.append(_seen(group, trace, inputs.norm))
            ctx.kept = (group, trace) if whole else None
        ctx.save_for_backward(*tensors, *(x for start in starts[1:] for x in start))
        y, loss, norm = _joined(seen)
        if norm is not None:
            ctx.mark_non_differentiable(norm)
        return y, loss, norm, *(x.clone() for x in (*anchor, *stack))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        layers, span, saved = ctx.layers, ctx.span, ctx.saved_tensors
        inputs, saved = _Inputs.of(saved[: 8 + 2 * layers], layers), saved[8 + 2 * layers :]
        y = torch.zeros_like(inputs.tokens.v) if y is None else y
        by_state = [
            torch.zeros_like(x) if by is None else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip((*inputs.anchor, *inputs.stack), states, strict=True)
        ]
        by_anchor, by_stack = by_state[:layers], by_state[layers:]
        parts: list[Gradients] = []
        groups = _groups(inputs.tokens, span, ctx.size)
        each = len(saved) // max(len(groups) - 1, 1)
        for i, (tokens, here) in reversed(list(enumerate(groups))):
            start = list(saved[(i - 1) * each : i * each]) if i > 0 else [*inputs.anchor, *inputs.stack]
            if ctx.kept is None:
                group = Group(tokens, here, inputs.norm, inputs.stack)
                trace = read_group(group, start[:layers], start[-layers:], keep=True)
            else:
                group, trace = ctx.kept
            part = slice(i * ctx.size, (i + 1) * ctx.size)
            by_loss = None if loss is None else loss[part, ..., None]
            parts.insert(0, back_group(group, trace, y[part].contiguous(), by_loss, by_anchor, by_stack))
        ctx.kept = None
        tokens = [torch.cat(x) for x in zip(*(part.tokens for part in parts), strict=True)]
        norm = (None, None) if inputs.norm is None else (sum(x) for x in zip(*(part.norm for part in parts), strict=True))
        return None, None, *tokens, *norm, *by_anchor, *by_stack


def _group_size(tokens: Tokens, stack: Layers) -> int:
    """Chunks of a group: so many that what they leave for the backward pass is not above KEPT_BYTES, or sqrt(N)."""
    n, r, c, _ = tokens.q.shape
    numbers = sum(2 * i * o + c * (4 * o + 6 * i + 2 * c) for i, o in ((s.shape[1] // 2, s.shape[2]) for s in stack))
    return min(n, max(round(math.sqrt(n)), KEPT_BYTES // (numbers * r * tokens.q.element_size())))


def _groups(tokens: Tokens, span: Span, size: int) -> list[tuple[Tokens, Span]]:
    present = span.present
    return [
        (
            Tokens(*(x[n : n + size] for x in tokens)),
            span._replace(present=None if present is None else present[n : n + size]),
        )
        for n in range(0, len(tokens.q), size)
    ]


Seen = tuple[Tensor, Tensor | None, Tensor | None]


def _seen(group: Group, trace: Trace, norm: tuple[Tensor, Tensor] | None) -> Seen:
    """y, loss and gradient norm of a group: `[N, R, C, V]`, `[N, R, C]` twice, if asked for."""
    y = group.y
    if norm is not None:
        normed = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
        y = torch.addcmul(group.tokens.q + norm[1], normed, norm[0])
    if not group.span.surprise:
        return y, None, None
    return y, torch.stack([c.loss for c in trace.chunks]), torch.stack([c.gradient_norm for c in trace.chunks])


def _joined(seen: list[Seen]) -> Seen:
    y, loss, norm = zip(*seen, strict=True)
    return torch.cat(y), None if loss[0] is None else torch.cat(loss), None if norm[0] is None else torch.cat(norm)


def _read_span(span: Span, inputs: _Inputs) -> tuple[Tensor | None, ...]:
    """`_ReadSpan`, or what it does where nothing asks for a gradient."""
    norm = (None, None) if inputs.norm is None else inputs.norm
    tensors = (*inputs.tokens, *norm, *inputs.anchor, *inputs.stack)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _ReadSpan.apply(span, len(inputs.stack), *tensors)
    seen, anchor, stack = [], inputs.anchor, inputs.stack
    for tokens, here in _groups(inputs.tokens, span, _group_size(inputs.tokens, stack)):
        group = Group(tokens, here, inputs.norm, stack)
        trace = read_group(group, anchor, stack, keep=False)
        anchor, stack = trace.anchor, trace.stack
        seen.append(_seen(group, trace, inputs.norm))
    return *_joined(seen), *anchor, *stack


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
    batch, heads, layers = len(q), q.shape[2], len(state.weights)
    inputs = tuple(layout.arrange(x) for x in (q, k, v, *gates))
    norm = None
    if form.norm is not None:
        norm = tuple(x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in form.norm)
    anchor = [x.flatten(0, 1) for x in state.anchor]
    stack = [torch.cat(pair, 2).flatten(0, 1) for pair in zip(state.weights, state.momentum, strict=True)]
    seen = []
    for start, end, width in layout.spans():
        tokens = Tokens(*(_rows(x[:, start:end], width) for x in inputs))
        present = None
        if layout.present is not None:
            here = layout.present[:, start:end, None].expand(-1, -1, heads)
            present = _rows(here, width)
        span = Span(form, surprise, start >= layout.head, present)
        *part, = _read_span(span, _Inputs(tokens, norm, anchor, stack))
        anchor, stack = part[3 : 3 + layers], part[3 + layers :]
        seen.append([_tokens(x, batch) for x in part[:3]])
    weights, momentum = zip(*(halves(x) for x in stack), strict=True)
    anchor, weights, momentum = (tuple(x.unflatten(0, (batch, heads)) for x in part) for part in (anchor, weights, momentum))
    position = (state.position + layout.length) % chunk_size
    anchor = where_rows(position == 0, weights, anchor)
    new = MemoryState(anchor, weights, momentum, position)
    if not seen:  # no token, or all masked
        return torch.zeros_like(v), new, Surprise(torch.zeros_like(gates[0]), torch.zeros_like(gates[0]))
    y, loss, norm = (None if x[0] is None else layout.restore(torch.cat(x, 1)) for x in zip(*seen, strict=True))
    return y, new, Surprise(loss, norm) if surprise else None


def _rows(x: Tensor, width: int) -> Tensor:
    """`[B, N * C, H, *]` -> `[N, B * H, C, *]`, contiguous."""
    x = x.unflatten(1, (-1, width)).movedim(0, 1).transpose(2, 3)
    return x.flatten(1, 2).contiguous()


def _tokens(x: Tensor | None, batch: int) -> Tensor | None:
    """Undo `_rows`."""
    if x is None:
        return None
    return x.unflatten(1, (batch, -1)).transpose(2, 3).movedim(1, 0).flatten(1, 2)
