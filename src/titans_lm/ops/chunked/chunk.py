"""One chunk, forward and backward, as matrix products. Letters and equations: README.md one folder up.

`R = B * H`: each row of the batch and head has a memory of its own. A, B, D and Em scale rows of a product. In the
first layer they scale its inputs, which are known for all chunks before any state is. In later layers they scale its
outputs, which are narrow. Buffers are allocated once for many chunks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.decays import Decays
from titans_lm.ops.mlp import (
    InnerLoss,
    act_backward,
    act_second_derivative,
    activate,
    inner_loss,
    inner_loss_backward,
)
from titans_lm.ops.types import MemoryForm

Layers = list[Tensor]
"""One tensor for each layer of the memory."""


class ChunkOptions(NamedTuple):
    """A `MemoryForm` with its norm weight expanded to all rows, and what to compute beside y."""

    form: MemoryForm
    weight: Tensor | None  # of the norm, [R, 1, V]
    surprise: bool  # whether to compute each token's loss and gradient norm
    may_skip: bool  # whether a chunk that writes nothing may skip its gradients: no one needs them


class WeightsAndMomentum(NamedTuple):
    """The state beside the anchor, `[R, in, out]` for each layer; or the outer loss's gradient by it."""

    w: Layers  # W'
    s: Layers  # S


@dataclass
class ChunkBuffers:
    """What a chunk reads, and all that its forward pass saves for its backward pass. Layers count from 0.

    The first layer's h, x, reads, writes, raw and scores do not depend on the state: they are computed for many chunks
    at once. A second `ChunkBuffers` holds the outer loss's gradients by these.
    """

    shift: Tensor  # [R, C, V], an input of `inner_loss`
    decay: Decays  # [R, C, 1], d [R, C, C]
    h: Layers  # H_l, inputs of layer l for the queries                   [R, C, in]
    x: Layers  # X_l, inputs of layer l for the keys                      [R, C, in]
    reads_w: Layers  # A * H in the first layer, H W' in later ones       [R, C, in] or [R, C, out]
    reads_s: Layers  # B * H, H S
    writes_w: Layers  # D[C] * X in the first layer, D[C] * G in later ones
    writes_s: Layers  # Em[C] * X, Em[C] * G
    raw: Layers  # H X^T                                                  [R, C, C]
    scores: Layers  # (H X^T) * D                                         [R, C, C]
    z: Layers  # Z_l = X_l W_l                                            [R, C, out]
    dloss_dx: Layers  # G_{l+1} W_{l+1}^T, for all but the last           [R, C, out]
    g: Layers  # G_l; 0 for a token that is not written                   [R, C, out]
    y: Layers  # Y_l                                                      [R, C, out]
    inner_loss: InnerLoss | None = None
    written: Tensor | None = None  # [R, C, 1], where there is a threshold
    loss: Tensor | None = None  # [R, C], if needed
    gradient_norm: Tensor | None = None  # [R, C], if needed

    def state_decays(self) -> tuple[Tensor, Tensor, Tensor]:
        """The factors of the old state in the state after the chunk: A[C], B[C], E[C], each `[R, 1, 1]`."""
        return self.decay.a[:, -1:], self.decay.b[:, -1:], self.decay.e[:, -1:]

    def write_scales(self) -> tuple[Tensor, Tensor]:
        """The factors of each token's gradient in the weights and the momentum after the chunk: D[C], Em[C], each
        `[R, C, 1]`."""
        return self.decay.d[:, -1, :, None], self.decay.em


# ------------------------------------------------------------------------------------------------ forward


def chunk_forward(
    c: ChunkBuffers,
    anchor: Layers,
    state: WeightsAndMomentum,
    after: WeightsAndMomentum,
    options: ChunkOptions,
    writes: bool = True,
) -> None:
    """Process the chunk from `anchor` and `state`: fill `c`, and put the state after the chunk into `after`.

    A chunk that writes nothing (`writes` False, or no loss above the threshold) skips the gradients: they are 0.
    Momentum and forgetting still act.
    """
    writes = (writes or options.surprise) and key_pass(c, anchor, options)
    for layer, (w, s) in enumerate(zip(*state, strict=True)):
        y = c.y[layer]
        if layer == 0:
            torch.bmm(c.reads_w[0], w, out=y).baddbmm_(c.reads_s[0], s)
        else:
            h = activate(c.y[layer - 1], options.form, out=c.h[layer])
            if writes:
                torch.bmm(h, c.x[layer].mT, out=c.raw[layer])
                torch.mul(c.raw[layer], c.decay.d, out=c.scores[layer])
            torch.bmm(h, w, out=c.reads_w[layer])
            torch.bmm(h, s, out=c.reads_s[layer])
            torch.mul(c.reads_w[layer], c.decay.a, out=y).addcmul_(c.reads_s[layer], c.decay.b)
        if writes:
            y.baddbmm_(c.scores[layer], c.g[layer], alpha=-1)
    a, b, e = c.state_decays()
    for layer, (w, s, new_w, new_s) in enumerate(zip(*state, *after, strict=True)):
        torch.mul(w, a, out=new_w).addcmul_(s, b)
        torch.mul(s, e, out=new_s)
        if writes:
            _write(c, layer, new_w, new_s)


def _write(c: ChunkBuffers, layer: int, new_w: Tensor, new_s: Tensor) -> None:
    if layer == 0:
        new_w.baddbmm_(c.writes_w[0].mT, c.g[0], alpha=-1)
        new_s.baddbmm_(c.writes_s[0].mT, c.g[0], alpha=-1)
    else:
        for new, scaled, scale in zip((new_w, new_s), (c.writes_w, c.writes_s), c.write_scales(), strict=True):
            torch.mul(c.g[layer], scale, out=scaled[layer])
            new.baddbmm_(c.x[layer].mT, scaled[layer], alpha=-1)


def key_pass(c: ChunkBuffers, anchor: Layers, options: ChunkOptions) -> bool:
    """Run the chunk's keys forward and backward at the anchor. The gradient of token s at layer l is X_l[s]^T G_l[s].

    Returns False if no loss is above the threshold and the gradients were skipped.
    """
    last = len(anchor) - 1
    for layer, w in enumerate(anchor):
        if layer > 0:
            activate(c.z[layer - 1], options.form, out=c.x[layer])
        torch.bmm(c.x[layer], w, out=c.z[layer])
    c.inner_loss, c.g[last] = inner_loss(c.z[last], c.shift, options.weight, options.form.clip)
    if options.surprise or options.form.threshold is not None:
        c.loss = c.inner_loss.error.square().sum(-1)
    if options.form.threshold is not None:
        assert c.loss is not None
        c.written = (c.loss > options.form.threshold)[..., None]
        if options.may_skip and not bool(c.written.any()):
            return False
    for layer in range(last, 0, -1):
        torch.bmm(c.g[layer], anchor[layer].mT, out=c.dloss_dx[layer - 1])
        act_backward(c.dloss_dx[layer - 1], c.z[layer - 1], options.form, out=c.g[layer - 1])
    if options.surprise:
        squares = [x.square().sum(-1) * g.square().sum(-1) for x, g in zip(c.x, c.g, strict=True)]
        c.gradient_norm = torch.stack(squares).sum(0).sqrt_()
    if c.written is not None:
        c.g = [g * c.written for g in c.g]
    return True


# ------------------------------------------------------------------------------------------------ backward


def chunk_backward(
    c: ChunkBuffers,
    grads: ChunkBuffers,
    anchor: Layers,
    state: WeightsAndMomentum,
    grad_anchor: Layers,
    grad_state: WeightsAndMomentum,
    options: ChunkOptions,
    grad_loss: Tensor | None,
) -> Tensor | None:
    """The backward pass of `chunk_forward`, into `grads`. Returns the gradient by the norm's weight, `[R, 1, V]`.

    Inputs are `grads.y[-1]`, the gradient by Y_L; `grad_loss` `[R, C, 1]`, by the inner loss; and `grad_state`, by the
    state after the chunk, which becomes that by `state` in place. `grad_anchor` is overwritten; `grads.decay` is added
    to. Of the first layer only reads, writes, scores, z and x (through Z_1 alone) are filled: the caller turns them
    into gradients by the tokens and decays.
    """
    for layer, parts in enumerate(zip(*state, *grad_state, strict=True)):
        _write_backward(c, grads, layer, parts)
    for layer in range(len(anchor) - 1, -1, -1):
        grad_layer = (grad_state.w[layer], grad_state.s[layer])
        _read_backward(c, grads, layer, (state.w[layer], state.s[layer]), grad_layer)
        if layer > 0:
            act_backward(grads.h[layer], c.y[layer - 1], options.form, out=grads.y[layer - 1])
    return _key_pass_backward(c, grads, anchor, grad_anchor, options, grad_loss)


def _write_backward(c: ChunkBuffers, grads: ChunkBuffers, layer: int, parts: tuple[Tensor, ...]) -> None:
    """Of W' <- A[C] W' + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)."""
    w, s, grad_w, grad_s = parts
    if layer == 0:  # (D[C] * X)^T G
        minus_bmm(c.g[0], grad_w.mT, out=grads.writes_w[0])
        minus_bmm(c.g[0], grad_s.mT, out=grads.writes_s[0])
        minus_bmm(c.writes_w[0], grad_w, out=grads.g[0]).baddbmm_(c.writes_s[0], grad_s, alpha=-1)
    else:
        minus_bmm(c.x[layer], grad_w, out=grads.writes_w[layer])
        minus_bmm(c.x[layer], grad_s, out=grads.writes_s[layer])
        grad_scaled = (grads.writes_w[layer], grads.writes_s[layer])
        scale_backward(grad_scaled, c.g[layer], c.write_scales(), grads.write_scales(), out=grads.g[layer])
        minus_bmm(c.writes_w[layer], grad_w.mT, out=grads.x[layer]).baddbmm_(c.writes_s[layer], grad_s.mT, alpha=-1)
    a, b, e = c.state_decays()
    for total, x, grad in zip(grads.state_decays(), (w, s, s), (grad_w, grad_w, grad_s), strict=True):
        total += (x * grad).sum((1, 2), keepdim=True)
    grad_s.mul_(e).addcmul_(grad_w, b)
    grad_w.mul_(a)


def _read_backward(
    c: ChunkBuffers,
    grads: ChunkBuffers,
    layer: int,
    state: tuple[Tensor, Tensor],
    grad_state: tuple[Tensor, Tensor],
) -> None:
    """Of Y = A * (H W') + B * (H S) - ((H X^T) * D) G."""
    (w, s), (grad_w, grad_s), grad_y = state, grad_state, grads.y[layer]
    minus_bmm(grad_y, c.g[layer].mT, out=grads.scores[layer])
    grads.g[layer].baddbmm_(c.scores[layer].mT, grad_y, alpha=-1)
    if layer == 0:  # (A * H) W'
        torch.bmm(grad_y, w.mT, out=grads.reads_w[0])
        torch.bmm(grad_y, s.mT, out=grads.reads_s[0])
        grad_w.baddbmm_(c.reads_w[0].mT, grad_y)
        grad_s.baddbmm_(c.reads_s[0].mT, grad_y)
        return
    h, x, decay, grad_decay = c.h[layer], c.x[layer], c.decay, grads.decay
    for product, scale, grad_scale, grad_product in (
        (c.reads_w[layer], decay.a, grad_decay.a, grads.reads_w[layer]),
        (c.reads_s[layer], decay.b, grad_decay.b, grads.reads_s[layer]),
    ):
        grad_scale += (product * grad_y).sum(-1, keepdim=True)
        torch.mul(grad_y, scale, out=grad_product)
    torch.bmm(grads.reads_w[layer], w.mT, out=grads.h[layer]).baddbmm_(grads.reads_s[layer], s.mT)
    grad_w.baddbmm_(h.mT, grads.reads_w[layer])
    grad_s.baddbmm_(h.mT, grads.reads_s[layer])
    grad_decay.d.addcmul_(grads.scores[layer], c.raw[layer])
    grad_raw = torch.mul(grads.scores[layer], decay.d, out=grads.raw[layer])
    grads.h[layer].baddbmm_(grad_raw, x)
    grads.x[layer].baddbmm_(grad_raw.mT, h)


def _key_pass_backward(
    c: ChunkBuffers,
    grads: ChunkBuffers,
    anchor: Layers,
    grad_anchor: Layers,
    options: ChunkOptions,
    grad_loss: Tensor | None,
) -> Tensor | None:
    last = len(anchor) - 1
    if c.written is not None:
        for g in grads.g:
            g.mul_(c.written)
    for layer in range(last):  # G_l = (G_{l+1} W_{l+1}^T) * act'(Z_l), first layer first
        act_backward(grads.g[layer], c.z[layer], options.form, out=grads.dloss_dx[layer])
        grads.g[layer + 1].baddbmm_(grads.dloss_dx[layer], anchor[layer + 1])
        torch.bmm(grads.dloss_dx[layer].mT, c.g[layer + 1], out=grad_anchor[layer + 1])
        second = act_second_derivative(c.z[layer], options.form)
        torch.mul(grads.g[layer], c.dloss_dx[layer], out=grads.z[layer]).mul_(second)
    assert c.inner_loss is not None
    grads_of_loss = inner_loss_backward(
        grads.g[last], grad_loss, c.z[last], c.inner_loss, options.weight, options.form.clip
    )
    grads.shift.copy_(grads_of_loss.shift)
    grad_z = grads_of_loss.z
    for layer in range(last, 0, -1):  # Z_l = X_l W_l, X_l = act(Z_{l-1}), last layer first
        grad_anchor[layer].baddbmm_(c.x[layer].mT, grad_z)
        grads.x[layer].baddbmm_(grad_z, anchor[layer].mT)
        grad_z = grads.z[layer - 1].add_(act_backward(grads.x[layer], c.z[layer - 1], options.form))
    torch.bmm(c.x[0].mT, grad_z, out=grad_anchor[0])
    torch.bmm(grad_z, anchor[0].mT, out=grads.x[0])
    return grads_of_loss.weight


def scale_backward(
    grad_scaled: tuple[Tensor, Tensor],
    x: Tensor,
    scales: tuple[Tensor, Tensor],
    grad_scales: tuple[Tensor, Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """The gradient by x, from those by scales[0] * x and scales[1] * x. Those by the scales are added to
    `grad_scales`."""
    for grad_scale, grad in zip(grad_scales, grad_scaled, strict=True):
        grad_scale += (x * grad).sum(-1, keepdim=True)
    out = torch.empty_like(x) if out is None else out
    return torch.mul(grad_scaled[0], scales[0], out=out).addcmul_(grad_scaled[1], scales[1])


def minus_bmm(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """-(x @ y), in one call."""
    return torch.baddbmm(out, x, y, beta=0, alpha=-1, out=out)
