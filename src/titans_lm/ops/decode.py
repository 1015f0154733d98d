"""One token: the recurrence itself, as rank-one updates. What decoding runs, in few operations; no buffer of tokens.

Rows are `R` = B * H here, one for each row and head.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.chunked.scan import chunked
from titans_lm.ops.mlp import activate, read_output, times_slope
from titans_lm.ops.types import NORM_EPS, Answer, Call, MemoryForm, MemoryState, Surprise, where_rows

Layers = tuple[Tensor, ...]
"""One tensor for each layer of the memory, `[R, in, out]`, or `[B, H, in, out]`."""


def step(call: Call) -> Answer:
    """As `naive`, for T = 1. Where gradients are asked for it is a chunk: only that has a backward pass of its own."""
    return chunked(call) if wants_gradients(call) else one_token(call, _advance)


def wants_gradients(call: Call) -> bool:
    inputs = (*call.tokens, *itertools.chain(*call.state[:3]), *(call.form.norm or ()))
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


Advanced = tuple[Tensor, Layers, Layers, Surprise | None]
"""y `[B, 1, H, V]`, weights and momentum after the token, and its surprise if asked for; padding is not yet padding."""


def one_token(call: Call, advance: Callable[[Call, Layers], Advanced]) -> Answer:
    """`step`, of which `advance` does what is to be done at the anchor it is given."""
    state, mask = call.state, call.mask
    anchor = _choose(state.position == 0, state.weights, state.anchor)
    y, weights, momentum, seen = advance(call, anchor)
    position = (state.position + 1) % call.chunk_size
    if mask is not None:
        here, y = mask[:, 0], y * mask[:, :, None, None]
        weights, momentum = where_rows(here, weights, state.weights), where_rows(here, momentum, state.momentum)
        position = torch.where(here, position, state.position)
        seen = None if seen is None else Surprise(*(x * mask[..., None] for x in seen))
    return y, MemoryState(_choose(position == 0, weights, anchor), weights, momentum, position), seen


def _advance(call: Call, anchor: Layers) -> Advanced:
    (q, k, v, *gates), state, form = call.tokens, call.state, call.form
    batch, _, heads, _ = q.shape
    rows = batch * heads
    q, k, v = (x.reshape(rows, 1, -1) for x in (q, k, v))
    theta, eta, a = (gate.reshape(rows, 1, 1) for gate in (gates[0], gates[1], 1 - gates[2]))
    if form.norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(rows, 1, -1) for x in form.norm)
        form = form._replace(norm=(weight, bias))
    key = key_pass(k, v, [w.flatten(0, 1) for w in anchor], form)
    seen = _surprise(key, batch) if call.surprise else None
    if form.threshold is not None:
        theta = theta * (key.loss() > form.threshold)
    new = [
        _write(x.mT, theta * g, (eta, a), w.flatten(0, 1), s.flatten(0, 1))
        for x, g, w, s in zip(key.x, key.g, state.weights, state.momentum, strict=True)
    ]
    y = _read(q, [w for w, _ in new], form).view(batch, 1, heads, -1)
    weights, momentum = (tuple(x.unflatten(0, (batch, heads)) for x in part) for part in zip(*new, strict=True))
    return y, weights, momentum, seen


def _choose(rows: Tensor, yes: Layers, no: Layers) -> Layers:
    """As `where_rows`, and on the CPU, where a look costs nothing, without a copy if all rows are alike."""
    if rows.device.type == "cpu":
        values = rows.tolist()
        if all(values) or not any(values):
            return yes if all(values) else no
    return where_rows(rows, yes, no)


def _write(x: Tensor, g: Tensor, keep: tuple[Tensor, Tensor], w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """W and S `[R, in, out]` after the token whose gradient is x g (eqs. 10, 13), each read once and made once."""
    s = (keep[0] * s).addcmul_(x, g, value=-1)
    return torch.addcmul(s, w, keep[1]), s


def _read(q: Tensor, weights: list[Tensor], form: MemoryForm) -> Tensor:
    """Eq. 15, for q `[R, 1, K]`."""
    y = torch.bmm(q, weights[0])
    for w in weights[1:]:
        y = torch.bmm(activate(y, form), w)
    if form.norm is None:
        return y
    return torch.addcmul(q + form.norm[1], F.layer_norm(y, y.shape[-1:], eps=NORM_EPS), form.norm[0])


class KeyPass(NamedTuple):
    """The key, forward and back at the anchor. The gradient at layer l is X_l^T G_l."""

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
    output, last = read_output(z[-1], shift, weight, form.clip)
    g = [last]
    for layer in range(len(anchor) - 1, 0, -1):
        g.insert(0, times_slope(torch.bmm(g[0], anchor[layer].mT), z[layer - 1], form))
    return KeyPass(x, g, output.error)


def _surprise(key: KeyPass, batch: int) -> Surprise:
    squares = [a.square().sum(-1) * b.square().sum(-1) for a, b in zip(key.x, key.g, strict=True)]
    norm = torch.stack(squares).sum(0).sqrt()
    return Surprise(*(x.view(batch, 1, -1) for x in (key.loss(), norm)))
