"""One token: the recurrence itself, as rank-one updates. Decoding runs it: few operations, no buffer of tokens.

`R` = B * H: each row of the batch and head has a memory of its own.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.chunked.scan import chunked_scan
from titans_lm.ops.mlp import act_backward, activate, inner_loss
from titans_lm.ops.types import (
    NORM_EPS,
    MemoryForm,
    MemoryState,
    ScanInputs,
    ScanOutput,
    Surprise,
    is_traced,
    select_rows,
    where_rows,
)
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"step": "step_scan"})

Layers = tuple[Tensor, ...]
"""One tensor for each layer of the memory, `[R, in, out]`, or `[B, H, in, out]`."""


def step_scan(inputs: ScanInputs) -> ScanOutput:
    """`naive_scan` for T = 1. With gradients it runs as a chunk, which has a backward pass of its own."""
    return chunked_scan(inputs) if needs_grad(inputs) else decode_token(inputs, update_token)


def needs_grad(inputs: ScanInputs) -> bool:
    tensors = (*inputs.tokens, *itertools.chain(*inputs.state[:3]), *(inputs.form.norm or ()))
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class TokenUpdate(NamedTuple):
    """The result of one token, as if no row were padding."""

    y: Tensor  # [B, 1, H, V]
    weights: Layers
    momentum: Layers
    surprise: Surprise | None


def decode_token(inputs: ScanInputs, update: Callable[[ScanInputs, Layers], TokenUpdate]) -> ScanOutput:
    """`advance_token` by the tokens of `inputs`."""
    return advance_token(inputs.state, inputs.chunk_size, inputs.mask, lambda anchor: update(inputs, anchor))


def advance_token(
    state: MemoryState, chunk_size: int, mask: Tensor | None, update: Callable[[Layers], TokenUpdate]
) -> ScanOutput:
    """Decode one token: choose the anchor, run `update` at it, leave rows that are padding as they were.

    Where a chunk begins the weights are the anchor, whatever a given state has there."""
    anchor = select_rows(state.position == 0, state.weights, state.anchor)
    y, weights, momentum, surprise = update(anchor)
    position = (state.position + 1) % chunk_size
    if mask is not None:
        valid, y = mask[:, 0], y * mask[:, :, None, None]
        weights, momentum = where_rows(valid, weights, state.weights), where_rows(valid, momentum, state.momentum)
        position = torch.where(valid, position, state.position)
        surprise = None if surprise is None else Surprise(*(x * mask[..., None] for x in surprise))
    new_state = MemoryState(select_rows(position == 0, weights, anchor), weights, momentum, position)
    return ScanOutput(y, new_state, surprise)


def update_token(inputs: ScanInputs, anchor: Layers) -> TokenUpdate:
    """Write one token, whose gradient is taken at `anchor`, and read after it. No row is padding."""
    (q, k, v, *gates), state, form = inputs.tokens, inputs.state, inputs.form
    batch, _, heads, _ = q.shape
    rows = batch * heads
    q, k, v = (x.reshape(rows, 1, -1) for x in (q, k, v))
    theta, eta, a = (gate.reshape(rows, 1, 1) for gate in (gates[0], gates[1], 1 - gates[2]))
    if form.norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(rows, 1, -1) for x in form.norm)
        form = form._replace(norm=(weight, bias))
    key = key_pass(k, v, [w.flatten(0, 1) for w in anchor], form)
    surprise = _surprise(key, batch) if inputs.surprise else None
    if form.threshold is not None:
        theta = theta * (key.loss() > form.threshold)
    new = [
        _write(x.mT, theta * g, (eta, a), w.flatten(0, 1), s.flatten(0, 1))
        for x, g, w, s in zip(key.x, key.g, state.weights, state.momentum, strict=True)
    ]
    y = _retrieve(q, [w for w, _ in new], form).view(batch, 1, heads, -1)
    weights, momentum = (tuple(x.unflatten(0, (batch, heads)) for x in part) for part in zip(*new, strict=True))
    return TokenUpdate(y, weights, momentum, surprise)


def _write(x: Tensor, g: Tensor, decay: tuple[Tensor, Tensor], w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """W and S `[R, in, out]` after a token with gradient x g (eqs. 10, 13). `decay` are eta and 1 - alpha."""
    s = decay[0] * s
    s = s.sub(x * g) if is_traced(s) else s.addcmul_(x, g, value=-1)  # in place, which not all that traces can take
    return torch.addcmul(s, w, decay[1]), s


def _retrieve(q: Tensor, weights: list[Tensor], form: MemoryForm) -> Tensor:
    """Eq. 15, for q `[R, 1, K]`."""
    y = torch.bmm(q, weights[0])
    for w in weights[1:]:
        y = torch.bmm(activate(y, form), w)
    if form.norm is None:
        return y
    return torch.addcmul(q + form.norm[1], F.layer_norm(y, y.shape[-1:], eps=NORM_EPS), form.norm[0])


class KeyPass(NamedTuple):
    """The key's forward and backward pass at the anchor. The gradient at layer l is X_l^T G_l."""

    x: list[Tensor]  # X_l, [R, 1, in]
    g: list[Tensor]  # G_l, [R, 1, out]
    error: Tensor  # M(k) - v, [R, 1, V]

    def loss(self) -> Tensor:
        return self.error.square().sum(-1, keepdim=True)


def key_pass(k: Tensor, v: Tensor, anchor: list[Tensor], form: MemoryForm) -> KeyPass:
    x, z = [k], [torch.bmm(k, anchor[0])]
    for w in anchor[1:]:
        x.append(activate(z[-1], form))
        z.append(torch.bmm(x[-1], w))
    weight, shift = (None, -v) if form.norm is None else (form.norm[0], k - v + form.norm[1])
    loss, g_last = inner_loss(z[-1], shift, weight, form.clip)
    g = [g_last]
    for layer in range(len(anchor) - 1, 0, -1):
        g.insert(0, act_backward(torch.bmm(g[0], anchor[layer].mT), z[layer - 1], form))
    return KeyPass(x, g, loss.error)


def _surprise(key: KeyPass, batch: int) -> Surprise:
    squares = [a.square().sum(-1) * b.square().sum(-1) for a, b in zip(key.x, key.g, strict=True)]
    norm = torch.stack(squares).sum(0).sqrt()
    return Surprise(*(x.view(batch, 1, -1) for x in (key.loss(), norm)))
