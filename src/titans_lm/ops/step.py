"""One token: the recurrence itself, as rank-one updates. What decoding runs; no buffer of tokens."""

import torch
from torch import Tensor

from titans_lm.ops.chunked import key_pass, retrieve
from titans_lm.ops.types import MemoryForm, MemoryState, Surprise, where_rows


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    state: MemoryState,
    chunk_size: int,
    form: MemoryForm,
    mask: Tensor | None,
) -> tuple[Tensor, MemoryState, Surprise]:
    """As `naive`, for T = 1: q, k `[B, 1, H, K]`, v `[B, 1, H, V]`, gates `[B, 1, H]`, mask `[B, 1]`."""
    theta, eta, alpha = (gate[:, 0, :, None, None] for gate in gates)  # [B, H, 1, 1]
    anchor = where_rows(state.position == 0, state.weights, state.anchor)
    keys = key_pass(k.transpose(1, 2), v.transpose(1, 2), anchor, form)
    momentum = tuple(eta * s - x.mT @ (theta * g) for s, x, g in zip(state.momentum, keys.x, keys.g, strict=True))
    weights = tuple((1 - alpha) * w + s for w, s in zip(state.weights, momentum, strict=True))
    position = (state.position + 1) % chunk_size
    surprise = Surprise(keys.loss.transpose(1, 2), keys.gradient_norm.transpose(1, 2))
    if mask is not None:
        here = mask[:, 0]
        momentum = where_rows(here, momentum, state.momentum)
        weights = where_rows(here, weights, state.weights)
        position = torch.where(here, position, state.position)
        surprise = Surprise(surprise.loss * here[:, None, None], surprise.gradient_norm * here[:, None, None])
    y = retrieve(q, weights, form)
    if mask is not None:
        y = y * mask[:, :, None, None]
    anchor = where_rows(position == 0, weights, anchor)
    return y, MemoryState(anchor, weights, momentum, position), surprise
