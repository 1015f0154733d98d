"""A group of chunks: what does not touch the state for all of them at once, the rest one after another; and back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.chunked.chunk import Chunk, Form, Layers, Weights, back_chunk, back_scales, read_chunk
from titans_lm.ops.decays import Decays, back_decays, decays
from titans_lm.ops.mlp import through_norm
from titans_lm.ops.types import NORM_EPS, MemoryForm, Tokens

Norm = tuple[Tensor, Tensor]
"""Weight and bias of the residual form, `[R, 1, V]`."""


class Span(NamedTuple):
    """How to read a span, and in a `Group`, a group."""

    form: MemoryForm
    surprise: bool
    width: int  # C
    at_boundary: bool  # every C slots begin a chunk; else all are parts of the one whose anchor is given
    present: Tensor | None  # [B, S] or [N, R, C], which slots hold a token
    share: float  # of the call's slots


class Group:
    """Chunks one after another: what of them does not touch the state, for all at once. `keep`: for a backward pass."""

    def __init__(self, tokens: Tokens, span: Span, norm: Norm | None, shapes: list[tuple[int, int]], keep: bool):
        self.tokens, self.span, self.norm, self.shapes, self.keep = tokens, span, norm, shapes, keep
        may_skip = not keep and not span.surprise
        self.form = Form(span.form, None if norm is None else norm[0], span.surprise, may_skip)
        self.writes = [True] * len(tokens.q)  # which chunks do
        if may_skip:
            self.writes = tokens.theta.flatten(1).any(1).tolist()
        self.decay, self.gates = decays(*tokens[3:], span.present)
        q, k, v = tokens[:3]
        a, b, _, d, em = self.decay
        self.shift = -v if norm is None else k - v + norm[1]
        self.raw = q @ k.mT
        self.first = (q, k, a * q, b * q, d[..., -1, :, None] * k, em * k, self.raw, self.raw * d)
        self.y = q.new_empty(*q.shape[:3], shapes[-1][1])  # Y_L

    def rows(self) -> Tensor | None:
        """Which rows have a token in a chunk, `[N, R, 1, 1]`; None: all."""
        return None if self.span.present is None else self.span.present.any(-1)[..., None, None]

    def chunks(self) -> list[Chunk]:
        """A `Chunk` for each, with buffers of its own where they are kept, else with the same for all."""
        slots = len(self.y) if self.keep else 1
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
    widths = (in_, in_, out, out, out, out, [c] * len(in_), [c] * len(in_))
    later = [buffers(w[1:]) for w in widths]
    z, back, g, inner_y = buffers(out), buffers(out[:-1]), buffers(out), buffers(out[:-1])
    beginnings = [x.unbind(0) for x in first]
    chunks = []
    for i in range(n):
        h, x, reads_w, reads_s, writes_w, writes_s, raw, scores = (
            [beginning[i], *rest[i]] for beginning, rest in zip(beginnings, later, strict=True)
        )
        here = Decays(*(part[i] for part in decay))
        inputs = (shift[i], here, h, x, reads_w, reads_s, writes_w, writes_s, raw, scores)
        chunks.append(Chunk(*inputs, z=z[i], back=back[i], g=g[i], y=[*inner_y[i], y[i]]))
    return chunks


class Trace(NamedTuple):
    """What reading a group leaves."""

    chunks: list[Chunk]
    starts: list[tuple[Layers, Weights]]  # anchor and state of each chunk, where kept
    anchor: Layers  # of the last chunk
    state: Weights  # after it


def read_group(group: Group, anchor: Layers, state: Weights) -> Trace:
    """Read a group's chunks. `anchor` and `state` stay as they are."""
    n, rows = len(group.y), group.rows()
    chunks, starts = group.chunks(), []
    here = None if group.keep else _like(state)  # overwritten from chunk to chunk
    for i, c in enumerate(chunks):
        if group.span.at_boundary:  # a row that has no token left keeps the anchor of its last chunk
            anchor = state.w if rows is None else _where(rows[i], state.w, anchor)
        after = here if here is not None and i < n - 1 else _like(state)  # the last anchor is still to be returned
        read_chunk(c, anchor, state, after, group.form, group.writes[i])
        if group.keep:
            starts.append((anchor, state))
        state = after
    return Trace(chunks, starts, anchor, state)


def _like(state: Weights) -> Weights:
    return Weights(*([torch.empty_like(x) for x in part] for part in state))


def _where(rows: Tensor, yes: Layers, no: Layers) -> Layers:
    return [torch.where(rows, a, b) for a, b in zip(yes, no, strict=True)]


class Gradients(NamedTuple):
    """Of the outer loss by what a group read: the tokens, and the norm's weight and bias, `[R, 1, V]` each."""

    tokens: Tokens
    norm: Norm | None


def back_group(
    group: Group, trace: Trace, by_output: Tensor, loss: Tensor | None, by_anchor: Layers, by_state: Weights
) -> Gradients:
    """From the gradients by M(q) `[N, R, C, V]`, by the loss `[N, R, C, 1]`, by the last anchor and the state after.

    The last two become, in place, those by the first anchor and by the state before.
    """
    rows = group.rows()
    by_y, by_weight = _back_finish(group, by_output)
    chunks, first, by_shift, by_decay = group.gradients(by_y)
    here = [torch.empty_like(w) for w in by_anchor]
    for i in range(len(chunks) - 1, -1, -1):
        c, (anchor, state) = trace.chunks[i], trace.starts[i]
        by_loss = None if loss is None else loss[i]
        weight = back_chunk(c, chunks[i], anchor, state, here, by_state, group.form, by_loss)
        if by_weight is not None and weight is not None:
            by_weight += weight
        for total, part, by_w in zip(by_anchor, here, by_state.w, strict=True):
            total += part
            if group.span.at_boundary:  # the anchor was the weights, in rows that have a token
                by_w += total if rows is None else total * rows[i]
                total *= 0 if rows is None else ~rows[i]
    return _back_first(group, first, by_shift, by_decay, by_output, by_weight)


def _back_finish(group: Group, by_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients by Y_L and by the norm's weight of `finish`."""
    if group.form.weight is None:
        return by_output, None
    n, mean, inverse = torch.native_layer_norm(group.y, group.y.shape[-1:], None, None, NORM_EPS)
    by_y = through_norm(by_output * group.form.weight, group.y, mean, inverse)
    return by_y, (by_output * n).sum((0, 2)).unsqueeze(1)


def _back_first(
    group: Group,
    first: tuple[Tensor, ...],
    by_shift: Tensor,
    by_decay: Decays,
    by_output: Tensor,
    weight: Tensor | None,
) -> Gradients:
    """From the gradients by the first layer's reads, writes and scores, by shift and by the decays, to the tokens'."""
    (q, k), (a, b, _, d, em) = group.tokens[:2], group.decay
    _, by_k, reads_w, reads_s, writes_w, writes_s, _, scores = first
    raw = scores * d
    by_decay.d.addcmul_(scores, group.raw)
    by_q = back_scales((reads_w, reads_s), q, (a, b), (by_decay.a, by_decay.b)) + raw @ k
    sides, totals = (d[..., -1, :, None], em), (by_decay.d[..., -1, :, None], by_decay.em)
    by_k += back_scales((writes_w, writes_s), k, sides, totals) + raw.mT @ q
    norm = None
    if weight is not None:
        by_q, by_k = by_q + by_output, by_k + by_shift
        norm = (weight, (by_output + by_shift).sum((0, 2)).unsqueeze(1))
    return Gradients(Tokens(by_q, by_k, -by_shift, *back_decays(by_decay, group.gates)), norm)


Seen = tuple[Tensor, Tensor | None, Tensor | None]


def seen(group: Group, trace: Trace) -> Seen:
    """y, loss and gradient norm of a group: `[N, R, C, V]`, `[N, R, C]` twice, if asked for."""
    y = group.y
    if group.norm is not None:
        normed = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
        y = torch.addcmul(group.tokens.q + group.norm[1], normed, group.norm[0])
    if not group.span.surprise:
        return y, None, None
    loss = [c.loss for c in trace.chunks if c.loss is not None]
    return y, torch.stack(loss), torch.stack([c.gradient_norm for c in trace.chunks if c.gradient_norm is not None])
