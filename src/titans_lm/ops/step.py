"""One token: the recurrence itself, as rank-one updates. What decoding runs; no buffer of tokens."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.mlp import activate, finish, retrieve
from titans_lm.ops.types import NORM_EPS, MemoryForm, MemoryState, Surprise, where_rows


def step(
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
    """As `naive`, for T = 1: q, k `[B, 1, H, K]`, v `[B, 1, H, V]`, gates `[B, 1, H]`, mask `[B, 1]`."""
    theta, eta, alpha = (gate[:, 0, :, None, None] for gate in gates)  # [B, H, 1, 1]
    anchor = where_rows(state.position == 0, state.weights, state.anchor)
    keys = key_pass(k.transpose(1, 2), v.transpose(1, 2), anchor, form)
    momentum = tuple(eta * s - x.mT @ (theta * g) for s, x, g in zip(state.momentum, keys.x, keys.g, strict=True))
    weights = tuple((1 - alpha) * w + s for w, s in zip(state.weights, momentum, strict=True))
    position = (state.position + 1) % chunk_size
    seen = Surprise(keys.loss.transpose(1, 2), keys.gradient_norm.transpose(1, 2))
    if mask is not None:
        here = mask[:, 0]
        momentum = where_rows(here, momentum, state.momentum)
        weights = where_rows(here, weights, state.weights)
        position = torch.where(here, position, state.position)
        seen = Surprise(seen.loss * here[:, None, None], seen.gradient_norm * here[:, None, None])
    y = retrieve(q, weights, form)
    if mask is not None:
        y = y * mask[:, :, None, None]
    anchor = where_rows(position == 0, weights, anchor)
    return y, MemoryState(anchor, weights, momentum, position), seen if surprise else None


class KeyPass(NamedTuple):
    """A chunk's keys, forward and back at the anchor. The gradient of token s at layer l is X_l[s]^T G_l[s]."""

    x: list[Tensor]  # X_l, [B, H, C, in]
    g: list[Tensor]  # G_l, [B, H, C, out]; 0 for a token that is not written
    loss: Tensor  # [B, H, C]
    gradient_norm: Tensor  # [B, H, C]


def key_pass(k: Tensor, v: Tensor, anchor: tuple[Tensor, ...], form: MemoryForm) -> KeyPass:
    """k `[B, H, C, K]`, v `[B, H, C, V]` at `anchor`."""
    x, z = [k], [k @ anchor[0]]
    for w in anchor[1:]:
        x.append(activate(z[-1], form))
        z.append(x[-1] @ w)
    error = finish(k, z[-1], form) - v
    loss = error.square().sum(-1)
    back = _through_norm(2 * error, z[-1], form)
    if form.clip is not None:
        back = back * (form.clip / (torch.linalg.vector_norm(back, dim=-1, keepdim=True) + form.clip))
    g = [back]
    for layer in range(len(anchor) - 1, 0, -1):
        g.insert(0, (g[0] @ anchor[layer].mT) * activation_slope(z[layer - 1], form))
    with torch.no_grad():
        squares = [a.square().sum(-1) * b.square().sum(-1) for a, b in zip(x, g, strict=True)]
        gradient_norm = torch.stack(squares).sum(0).sqrt()
    if form.threshold is not None:
        written = (loss > form.threshold)[..., None]
        g = [a * written for a in g]
    return KeyPass(x, g, loss, gradient_norm)


def _through_norm(gradient: Tensor, z: Tensor, form: MemoryForm) -> Tensor:
    """dloss/dz from dloss/dM(k): the layer norm's backward pass."""
    if form.norm is None:
        return gradient
    centred = z - z.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    normed = centred * inverse
    gradient = gradient * form.norm[0][:, None]
    along = (gradient * normed).mean(-1, keepdim=True)
    return (gradient - gradient.mean(-1, keepdim=True) - normed * along) * inverse


def activation_slope(z: Tensor, form: MemoryForm) -> Tensor:
    """d activate(z) / dz."""
    if form.activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
