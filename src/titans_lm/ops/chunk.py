"""One chunk, forward and back, as matmuls; its letters and equations: README.md beside this file.

A chunk's rows are `R = B * H`: every row of the batch and head reads its own memory. Per layer the weights and the
momentum lie above one another in one `stack` [W'; S] `[R, 2 in, out]`, so that one product reads both,

    Y = [A * H | B * H] @ [W'; S] - ((H X^T) * D) @ G,

and one product writes both, [W'; S] <- .. - [D[C] * X | Em[C] * X]^T @ G. Buffers are made once for many chunks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.decays import Decays
from titans_lm.ops.mlp import Output, activate, back_output, curvature, read_output, times_slope
from titans_lm.ops.types import MemoryForm

Layers = list[Tensor]
"""One tensor for each layer of the memory."""


class Form(NamedTuple):
    """A `MemoryForm` whose norm weight is laid out for all rows, and what is wanted beside y."""

    form: MemoryForm
    weight: Tensor | None  # of the norm, [R, 1, V]
    surprise: bool  # whether to say how unexpected each token was


@dataclass
class Chunk:
    """What one chunk reads, and all that its forward pass leaves for its backward pass. Layers count from 0.

    The first layer's h, x, reads, writes, raw and scores are made for many chunks at once: they do not touch the state.
    """

    shift: Tensor  # [R, C, V], what `read_output` adds
    decay: Decays  # [R, C, 1], d [R, C, C]
    h: Layers  # H_l, inputs of layer l for the queries          [R, C, in]
    x: Layers  # X_l, the same for the keys                      [R, C, in]
    reads: Layers  # [A * H | B * H]                             [R, C, 2 in]
    writes: Layers  # [D[C] * X | Em[C] * X]                     [R, C, 2 in]
    raw: Layers  # H X^T                                         [R, C, C]
    scores: Layers  # (H X^T) * D                                [R, C, C]
    z: Layers  # Z_l = X_l W_l                                   [R, C, out]
    back: Layers  # G_{l+1} W_{l+1}^T, for all but the last      [R, C, out]
    g: Layers  # G_l; 0 for a token that is not written          [R, C, out]
    y: Layers  # Y_l                                             [R, C, out]
    output: Output | None = None
    written: Tensor | None = None  # [R, C, 1], where there is a threshold
    loss: Tensor | None = None  # [R, C], if asked for or needed
    gradient_norm: Tensor | None = None  # [R, C], if asked for

    def left(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of the state at the chunk's end: A[C], B[C], E[C], each `[R, 1, 1]`."""
        return self.decay.a[:, -1:], self.decay.b[:, -1:], self.decay.e[:, -1:]


def halves(stack: Tensor) -> tuple[Tensor, Tensor]:
    """[W'; S] -> W', S."""
    middle = stack.shape[1] // 2
    return stack[:, :middle], stack[:, middle:]


# ------------------------------------------------------------------------------------------------ forward


def read_chunk(c: Chunk, anchor: Layers, stack: Layers, after: Layers, form: Form) -> None:
    """Read the chunk at `anchor` and `stack`, fill `c`, and put the state that follows into `after`.

    `after` may be `stack` itself.
    """
    key_pass(c, anchor, form)
    last = len(stack) - 1
    for layer, state in enumerate(stack):
        if layer > 0:
            h = activate(c.y[layer - 1], form.form, out=c.h[layer])
            beside(h, c.decay.a, c.decay.b, out=c.reads[layer])
            torch.bmm(h, c.x[layer].mT, out=c.raw[layer])
            torch.mul(c.raw[layer], c.decay.d, out=c.scores[layer])
        torch.bmm(c.reads[layer], state, out=c.y[layer])
        c.y[layer].baddbmm_(c.scores[layer], c.g[layer], alpha=-1)
    a, b, e = c.left()
    for layer in range(last + 1):
        if layer > 0:
            beside(c.x[layer], c.decay.d[:, -1, :, None], c.decay.em, out=c.writes[layer])
        (w, s), (new_w, new_s) = halves(stack[layer]), halves(after[layer])
        torch.mul(w, a, out=new_w).addcmul_(s, b)
        torch.mul(s, e, out=new_s)
        after[layer].baddbmm_(c.writes[layer].mT, c.g[layer], alpha=-1)


def key_pass(c: Chunk, anchor: Layers, form: Form) -> None:
    """The chunk's keys, forward and back at the anchor. The gradient of token s at layer l is X_l[s]^T G_l[s]."""
    last = len(anchor) - 1
    for layer, w in enumerate(anchor):
        if layer > 0:
            activate(c.z[layer - 1], form.form, out=c.x[layer])
        torch.bmm(c.x[layer], w, out=c.z[layer])
    c.output, c.g[last] = read_output(c.z[last], c.shift, form.weight, form.form.clip)
    for layer in range(last, 0, -1):
        torch.bmm(c.g[layer], anchor[layer].mT, out=c.back[layer - 1])
        times_slope(c.back[layer - 1], c.z[layer - 1], form.form, out=c.g[layer - 1])
    if form.surprise or form.form.threshold is not None:
        c.loss = c.output.error.square().sum(-1)
    if form.surprise:
        squares = [x.square().sum(-1) * g.square().sum(-1) for x, g in zip(c.x, c.g, strict=True)]
        c.gradient_norm = torch.stack(squares).sum(0).sqrt_()
    if form.form.threshold is not None:
        assert c.loss is not None
        c.written = (c.loss > form.form.threshold)[..., None]
        c.g = [g * c.written for g in c.g]


def beside(x: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """[left * x | right * x]: x `[..., C, in]`, left and right `[..., C, 1]` -> `[..., C, 2 in]`."""
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], 2 * width) if out is None else out
    torch.mul(x, left, out=out[..., :width])
    torch.mul(x, right, out=out[..., width:])
    return out


# ------------------------------------------------------------------------------------------------ back


def back_chunk(
    c: Chunk, d: Chunk, anchor: Layers, stack: Layers, by_anchor: Layers, by_stack: Layers, form: Form, loss: Tensor | None
) -> Tensor | None:
    """The chunk's gradients, into `d`: a `Chunk` whose fields hold the outer loss's gradient by those of `c`.

    Given are `d.y[-1]`, by Y_L, `loss` `[R, C, 1]`, by the reconstruction loss, and `by_stack`, by the state after
    the chunk, which becomes that by `stack`. `by_anchor` is filled; of the first layer's fields reads, writes, scores,
    z and x (through Z_1 alone) are, and what they mean for the decays is left to the caller; `d.decay` is added to.
    Returns the gradient by the norm's weight, `[R, 1, V]`.
    """
    _back_writes(c, d, stack, by_stack)
    _back_reads(c, d, stack, by_stack, form)
    return _back_keys(c, d, anchor, by_anchor, form, loss)


def _back_writes(c: Chunk, d: Chunk, stack: Layers, by_stack: Layers) -> None:
    a, b, e = c.left()
    by_a, by_b, by_e = d.left()
    for layer, (state, gradient) in enumerate(zip(stack, by_stack, strict=True)):
        minus_bmm(c.writes[layer], gradient, out=d.g[layer])
        minus_bmm(c.g[layer], gradient.mT, out=d.writes[layer])
        (w, s), (by_w, by_s) = halves(state), halves(gradient)
        for total, x, by in ((by_a, w, by_w), (by_b, s, by_w), (by_e, s, by_s)):
            total += (x * by).sum((1, 2), keepdim=True)
        by_s.mul_(e).addcmul_(by_w, b)
        by_w.mul_(a)


def _back_reads(c: Chunk, d: Chunk, stack: Layers, by_stack: Layers, form: Form) -> None:
    for layer in range(len(stack) - 1, -1, -1):
        y = d.y[layer]
        torch.bmm(y, stack[layer].mT, out=d.reads[layer])
        by_stack[layer].baddbmm_(c.reads[layer].mT, y)
        minus_bmm(y, c.g[layer].mT, out=d.scores[layer])
        d.g[layer].baddbmm_(c.scores[layer].mT, y, alpha=-1)
        if layer > 0:
            decay, total = c.decay, d.decay
            raw = torch.mul(d.scores[layer], decay.d, out=d.raw[layer])
            total.d.addcmul_(d.scores[layer], c.raw[layer])
            back_beside(d.reads[layer], c.h[layer], (decay.a, decay.b), (total.a, total.b), out=d.h[layer])
            left, by_left = (x.d[:, -1, :, None] for x in (decay, total))
            back_beside(d.writes[layer], c.x[layer], (left, decay.em), (by_left, total.em), out=d.x[layer])
            d.h[layer].baddbmm_(raw, c.x[layer])
            d.x[layer].baddbmm_(raw.mT, c.h[layer])
            times_slope(d.h[layer], c.y[layer - 1], form.form, out=d.y[layer - 1])


def _back_keys(
    c: Chunk, d: Chunk, anchor: Layers, by_anchor: Layers, form: Form, loss: Tensor | None
) -> Tensor | None:
    last = len(anchor) - 1
    if c.written is not None:
        for g in d.g:
            g.mul_(c.written)
    for layer in range(last):  # G_l = (G_{l+1} W_{l+1}^T) * act'(Z_l), from the bottom up
        times_slope(d.g[layer], c.z[layer], form.form, out=d.back[layer])
        d.g[layer + 1].baddbmm_(d.back[layer], anchor[layer + 1])
        torch.bmm(d.back[layer].mT, c.g[layer + 1], out=by_anchor[layer + 1])
        torch.mul(d.g[layer], c.back[layer], out=d.z[layer]).mul_(curvature(c.z[layer], form.form))
    assert c.output is not None
    top = back_output(d.g[last], loss, c.z[last], c.output, form.weight, form.form.clip)
    d.shift.copy_(top.shift)
    by_z = top.z
    for layer in range(last, 0, -1):  # Z_l = X_l W_l, X_l = act(Z_{l-1}), from the top down
        by_anchor[layer].baddbmm_(c.x[layer].mT, by_z)
        d.x[layer].baddbmm_(by_z, anchor[layer].mT)
        by_z = d.z[layer - 1].add_(times_slope(d.x[layer], c.z[layer - 1], form.form))
    torch.bmm(c.x[0].mT, by_z, out=by_anchor[0])
    torch.bmm(by_z, anchor[0].mT, out=d.x[0])
    return top.weight


def back_beside(
    gradient: Tensor, x: Tensor, sides: tuple[Tensor, Tensor], totals: tuple[Tensor, Tensor], out: Tensor | None = None
) -> Tensor:
    """The gradient by x of `beside(x, *sides)`; those by the sides are added to `totals`."""
    halves_of_it = gradient.chunk(2, -1)
    for total, by in zip(totals, halves_of_it, strict=True):
        total += (x * by).sum(-1, keepdim=True)
    out = torch.empty_like(x) if out is None else out
    return torch.mul(halves_of_it[0], sides[0], out=out).addcmul_(halves_of_it[1], sides[1])


def minus_bmm(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """-(x @ y), in one call."""
    return torch.baddbmm(out, x, y, beta=0, alpha=-1, out=out)
