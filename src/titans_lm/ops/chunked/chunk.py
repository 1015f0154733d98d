"""One chunk, forward and back, as matmuls; its letters and equations: README.md one folder up.

A chunk's rows are `R = B * H`: every row of the batch and head reads its own memory. A, B, D and Em scale rows of a
product: in the first layer they scale its inputs, which are known for all chunks before any state is; in later layers
its outputs, which are narrow. Buffers are made once for many chunks.
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
    may_skip: bool  # the gradients of a chunk that writes nothing: no one asks for them


class Weights(NamedTuple):
    """The state beside the anchor, per layer `[R, in, out]`; or the outer loss's gradient by it."""

    w: Layers  # W'
    s: Layers  # S


@dataclass
class Chunk:
    """What one chunk reads, and all that its forward pass leaves for its backward pass. Layers count from 0.

    The first layer's h, x, reads, writes, raw and scores are made for many chunks at once: they do not touch the state.
    """

    shift: Tensor  # [R, C, V], what `read_output` adds
    decay: Decays  # [R, C, 1], d [R, C, C]
    h: Layers  # H_l, inputs of layer l for the queries                   [R, C, in]
    x: Layers  # X_l, the same for the keys                               [R, C, in]
    reads_w: Layers  # A * H in the first layer, H W' in later ones       [R, C, in] or [R, C, out]
    reads_s: Layers  # B * H, H S
    writes_w: Layers  # D[C] * X in the first layer, D[C] * G in later ones
    writes_s: Layers  # Em[C] * X, Em[C] * G
    raw: Layers  # H X^T                                                  [R, C, C]
    scores: Layers  # (H X^T) * D                                         [R, C, C]
    z: Layers  # Z_l = X_l W_l                                            [R, C, out]
    back: Layers  # G_{l+1} W_{l+1}^T, for all but the last               [R, C, out]
    g: Layers  # G_l; 0 for a token that is not written                   [R, C, out]
    y: Layers  # Y_l                                                      [R, C, out]
    output: Output | None = None
    written: Tensor | None = None  # [R, C, 1], where there is a threshold
    loss: Tensor | None = None  # [R, C], if asked for or needed
    gradient_norm: Tensor | None = None  # [R, C], if asked for

    def left(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of the state at the chunk's end: A[C], B[C], E[C], each `[R, 1, 1]`."""
        return self.decay.a[:, -1:], self.decay.b[:, -1:], self.decay.e[:, -1:]

    def kept(self) -> tuple[Tensor, Tensor]:
        """What is left of each token's gradient then, in the weights and in the momentum: D[C], Em[C], `[R, C, 1]`."""
        return self.decay.d[:, -1, :, None], self.decay.em


# ------------------------------------------------------------------------------------------------ forward


def read_chunk(c: Chunk, anchor: Layers, state: Weights, after: Weights, form: Form, writes: bool = True) -> None:
    """Read the chunk at `anchor` and `state`, fill `c`, and put the state that follows into `after`.

    Where nothing is written (`writes` False, or no loss above the threshold), gradients are 0: they are not computed,
    and momentum and forgetting alone go on.
    """
    writes = (writes or form.surprise) and key_pass(c, anchor, form)
    for layer, (w, s) in enumerate(zip(*state, strict=True)):
        y = c.y[layer]
        if layer == 0:
            torch.bmm(c.reads_w[0], w, out=y).baddbmm_(c.reads_s[0], s)
        else:
            h = activate(c.y[layer - 1], form.form, out=c.h[layer])
            if writes:
                torch.bmm(h, c.x[layer].mT, out=c.raw[layer])
                torch.mul(c.raw[layer], c.decay.d, out=c.scores[layer])
            torch.bmm(h, w, out=c.reads_w[layer])
            torch.bmm(h, s, out=c.reads_s[layer])
            torch.mul(c.reads_w[layer], c.decay.a, out=y).addcmul_(c.reads_s[layer], c.decay.b)
        if writes:
            y.baddbmm_(c.scores[layer], c.g[layer], alpha=-1)
    a, b, e = c.left()
    for layer, (w, s, new_w, new_s) in enumerate(zip(*state, *after, strict=True)):
        torch.mul(w, a, out=new_w).addcmul_(s, b)
        torch.mul(s, e, out=new_s)
        if writes:
            _write(c, layer, new_w, new_s)


def _write(c: Chunk, layer: int, new_w: Tensor, new_s: Tensor) -> None:
    if layer == 0:
        new_w.baddbmm_(c.writes_w[0].mT, c.g[0], alpha=-1)
        new_s.baddbmm_(c.writes_s[0].mT, c.g[0], alpha=-1)
    else:
        for new, written, kept in zip((new_w, new_s), (c.writes_w, c.writes_s), c.kept(), strict=True):
            torch.mul(c.g[layer], kept, out=written[layer])
            new.baddbmm_(c.x[layer].mT, written[layer], alpha=-1)


def key_pass(c: Chunk, anchor: Layers, form: Form) -> bool:
    """The chunk's keys, forward and back at the anchor. The gradient of token s at layer l is X_l[s]^T G_l[s].

    False: no loss is above the threshold, and no gradient was asked for or computed.
    """
    last = len(anchor) - 1
    for layer, w in enumerate(anchor):
        if layer > 0:
            activate(c.z[layer - 1], form.form, out=c.x[layer])
        torch.bmm(c.x[layer], w, out=c.z[layer])
    c.output, c.g[last] = read_output(c.z[last], c.shift, form.weight, form.form.clip)
    if form.surprise or form.form.threshold is not None:
        c.loss = c.output.error.square().sum(-1)
    if form.form.threshold is not None:
        assert c.loss is not None
        c.written = (c.loss > form.form.threshold)[..., None]
        if form.may_skip and not bool(c.written.any()):
            return False
    for layer in range(last, 0, -1):
        torch.bmm(c.g[layer], anchor[layer].mT, out=c.back[layer - 1])
        times_slope(c.back[layer - 1], c.z[layer - 1], form.form, out=c.g[layer - 1])
    if form.surprise:
        squares = [x.square().sum(-1) * g.square().sum(-1) for x, g in zip(c.x, c.g, strict=True)]
        c.gradient_norm = torch.stack(squares).sum(0).sqrt_()
    if c.written is not None:
        c.g = [g * c.written for g in c.g]
    return True


# ------------------------------------------------------------------------------------------------ back


def back_chunk(
    c: Chunk,
    d: Chunk,
    anchor: Layers,
    state: Weights,
    by_anchor: Layers,
    by_state: Weights,
    form: Form,
    loss: Tensor | None,
) -> Tensor | None:
    """The chunk's gradients, into `d`: a `Chunk` whose fields hold the outer loss's gradient by those of `c`.

    Given are `d.y[-1]`, by Y_L, `loss` `[R, C, 1]`, by the reconstruction loss, and `by_state`, by the state after
    the chunk, which becomes that by `state`. `by_anchor` is filled; of the first layer's fields reads, writes, scores,
    z and x (through Z_1 alone) are, and what they mean for the decays is left to the caller; `d.decay` is added to.
    Returns the gradient by the norm's weight, `[R, 1, V]`.
    """
    for layer, parts in enumerate(zip(*state, *by_state, strict=True)):
        _back_write(c, d, layer, parts)
    for layer in range(len(anchor) - 1, -1, -1):
        _back_read(c, d, layer, (state.w[layer], state.s[layer]), (by_state.w[layer], by_state.s[layer]))
        if layer > 0:
            times_slope(d.h[layer], c.y[layer - 1], form.form, out=d.y[layer - 1])
    return _back_keys(c, d, anchor, by_anchor, form, loss)


def _back_write(c: Chunk, d: Chunk, layer: int, parts: tuple[Tensor, ...]) -> None:
    """W' <- A[C] W' + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)."""
    w, s, by_w, by_s = parts
    if layer == 0:  # (D[C] * X)^T G
        minus_bmm(c.g[0], by_w.mT, out=d.writes_w[0])
        minus_bmm(c.g[0], by_s.mT, out=d.writes_s[0])
        minus_bmm(c.writes_w[0], by_w, out=d.g[0]).baddbmm_(c.writes_s[0], by_s, alpha=-1)
    else:
        minus_bmm(c.x[layer], by_w, out=d.writes_w[layer])
        minus_bmm(c.x[layer], by_s, out=d.writes_s[layer])
        by = (d.writes_w[layer], d.writes_s[layer])
        back_scales(by, c.g[layer], c.kept(), d.kept(), out=d.g[layer])
        minus_bmm(c.writes_w[layer], by_w.mT, out=d.x[layer]).baddbmm_(c.writes_s[layer], by_s.mT, alpha=-1)
    a, b, e = c.left()
    for total, at, gradient in zip(d.left(), (w, s, s), (by_w, by_w, by_s), strict=True):
        total += (at * gradient).sum((1, 2), keepdim=True)
    by_s.mul_(e).addcmul_(by_w, b)
    by_w.mul_(a)


def _back_read(c: Chunk, d: Chunk, layer: int, state: tuple[Tensor, Tensor], by_state: tuple[Tensor, Tensor]) -> None:
    """Y = A * (H W') + B * (H S) - ((H X^T) * D) G."""
    (w, s), (by_w, by_s), y = state, by_state, d.y[layer]
    minus_bmm(y, c.g[layer].mT, out=d.scores[layer])
    d.g[layer].baddbmm_(c.scores[layer].mT, y, alpha=-1)
    if layer == 0:  # (A * H) W'
        torch.bmm(y, w.mT, out=d.reads_w[0])
        torch.bmm(y, s.mT, out=d.reads_s[0])
        by_w.baddbmm_(c.reads_w[0].mT, y)
        by_s.baddbmm_(c.reads_s[0].mT, y)
        return
    h, x, decay, total = c.h[layer], c.x[layer], c.decay, d.decay
    for read, scale, by_scale, by_read in (
        (c.reads_w[layer], decay.a, total.a, d.reads_w[layer]),
        (c.reads_s[layer], decay.b, total.b, d.reads_s[layer]),
    ):
        by_scale += (read * y).sum(-1, keepdim=True)
        torch.mul(y, scale, out=by_read)
    torch.bmm(d.reads_w[layer], w.mT, out=d.h[layer]).baddbmm_(d.reads_s[layer], s.mT)
    by_w.baddbmm_(h.mT, d.reads_w[layer])
    by_s.baddbmm_(h.mT, d.reads_s[layer])
    total.d.addcmul_(d.scores[layer], c.raw[layer])
    raw = torch.mul(d.scores[layer], decay.d, out=d.raw[layer])
    d.h[layer].baddbmm_(raw, x)
    d.x[layer].baddbmm_(raw.mT, h)


def _back_keys(c: Chunk, d: Chunk, anchor: Layers, by_anchor: Layers, form: Form, loss: Tensor | None) -> Tensor | None:
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


def back_scales(
    by: tuple[Tensor, Tensor],
    x: Tensor,
    scales: tuple[Tensor, Tensor],
    totals: tuple[Tensor, Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """The gradient by x, given those `by` scales[0] * x and scales[1] * x; those by the scales go into `totals`."""
    for scale_total, gradient in zip(totals, by, strict=True):
        scale_total += (x * gradient).sum(-1, keepdim=True)
    out = torch.empty_like(x) if out is None else out
    return torch.mul(by[0], scales[0], out=out).addcmul_(by[1], scales[1])


def minus_bmm(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """-(x @ y), in one call."""
    return torch.baddbmm(out, x, y, beta=0, alpha=-1, out=out)
