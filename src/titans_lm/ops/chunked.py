"""The matmul form: a chunk's keys run forward and back once, at its anchor; all its tokens are read at once.

Derivation, and which line is which equation: README.md beside this file. Letters are the README's: X_l inputs of layer
l for the keys, Z_l = X_l W_l, G_l = dloss/dZ_l, and the decays A, B, E, D, Em.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_lm.ops.ragged import lay_out
from titans_lm.ops.types import NORM_EPS, MemoryForm, MemoryState, Surprise, where_rows

# ------------------------------------------------------------------------------------------------ the memory, M(x)


def activate(z: Tensor, form: MemoryForm) -> Tensor:
    return F.silu(z) if form.activation == "silu" else F.gelu(z, approximate="tanh")


def activation_slope(z: Tensor, form: MemoryForm) -> Tensor:
    """d activate(z) / dz."""
    if form.activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def finish(x: Tensor, z: Tensor, form: MemoryForm) -> Tensor:
    """M(x), given z = MLP(x), both `[..., H, C, V]`: plain z, or x + layer_norm(z)."""
    if form.norm is None:
        return z
    weight, bias = form.norm
    return x + F.layer_norm(z, z.shape[-1:], eps=NORM_EPS) * weight[:, None] + bias[:, None]


def retrieve(q: Tensor, weights: tuple[Tensor, ...], form: MemoryForm) -> Tensor:
    """Eq. 15 for q `[B, T, H, K]` at one set of weights `[B, H, in, out]`: reads, writes nothing. -> `[B, T, H, V]`"""
    dtype = weights[0].dtype
    if form.norm is not None:
        form = form._replace(norm=(form.norm[0].to(dtype), form.norm[1].to(dtype)))
    with torch.autocast(q.device.type, enabled=False):
        x = h = q.to(dtype).transpose(1, 2)
        for layer, w in enumerate(weights):
            h = (activate(h, form) if layer > 0 else h) @ w
        return finish(x, h, form).transpose(1, 2).to(q.dtype)


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


# ------------------------------------------------------------------------------------------------ decays


class Decays(NamedTuple):
    """How much of what is left at each token t of a chunk; leading dimensions [N, B, H]."""

    a: Tensor  # A[t] = a_1 .. a_t                            [..., C, 1], of the weights at the chunk's first token
    b: Tensor  # B[t] = sum_j P_a[t, j] E[j]                  [..., C, 1], of the momentum then
    e: Tensor  # E[t] = eta_1 .. eta_t                        [..., C, 1]
    d: Tensor  # D = P_a @ Em                                 [..., C, C], of token s's gradient in M_t
    em: Tensor  # Em[C] = P_eta[C] * theta                    [..., C, 1], of token s's gradient in S_C


def decays(theta: Tensor, eta: Tensor, alpha: Tensor, present: Tensor | None) -> Decays:
    """theta, eta, alpha `[..., C]`. A token not `present` has a = eta = 1, theta = 0, and adds no momentum to M."""
    a = 1 - alpha
    if present is not None:
        theta = theta * present
        eta, a = (torch.where(present, gate, 1) for gate in (eta, a))
    p_a, p_eta = _products(a), _products(eta)
    e = p_eta[..., :, 0] * eta[..., :1]
    em = p_eta * theta[..., None, :]
    adds = p_a if present is None else p_a * present[..., None, :]
    return Decays(
        a=(p_a[..., :, 0] * a[..., :1])[..., None],
        b=adds @ e[..., None],
        e=e[..., None],
        d=adds @ em,
        em=em[..., -1, :, None],
    )


def _products(gate: Tensor) -> Tensor:
    """P[t, s] = product of gate_i for i = s+1 .. t, lower triangular with ones on the diagonal. gate `[..., C]`.

    A masked sum of logarithms: no differences of cumulative sums, which are inf - inf where a gate is 0. The shift
    keeps log and its gradient finite at 0, and is far below rounding beside any gate that is not.
    """
    c = gate.shape[-1]
    shift = 1e-150 if gate.dtype == torch.float64 else 1e-30
    below = torch.ones(c, c, dtype=torch.bool, device=gate.device).tril(-1)
    logs = torch.log(gate + shift)[..., :, None].expand(*gate.shape, c).masked_fill(~below, 0)  # [..., t, s]
    return torch.exp(logs.cumsum(-2)).tril()


# ------------------------------------------------------------------------------------------------ one chunk, many


def _read_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    decay: Decays,
    state: tuple[tuple[Tensor, ...], ...],
    form: MemoryForm,
) -> tuple[Tensor, KeyPass, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v `[B, H, C, *]` -> y, what the keys gave, and the weights and momentum after the chunk."""
    anchor, weights, momentum = state
    keys = key_pass(k, v, anchor, form)
    h, y = q, q
    for layer, (x, g, w, s) in enumerate(zip(keys.x, keys.g, weights, momentum, strict=True)):
        if layer > 0:
            h = activate(y, form)
            scores = (h @ x.mT) * decay.d
        y = decay.a * (h @ w) + decay.b * (h @ s) - scores @ g
    a, b, e, d = decay.a[..., -1:, :], decay.b[..., -1:, :], decay.e[..., -1:, :], decay.d[..., -1, :, None]
    new_weights, new_momentum = [], []
    for x, g, w, s in zip(keys.x, keys.g, weights, momentum, strict=True):
        new_weights.append(a * w + b * s - x.mT @ (d * g))
        new_momentum.append(e * s - x.mT @ (decay.em * g))
    return finish(q, y, form), keys, tuple(new_weights), tuple(new_momentum)


def _read_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    present: Tensor | None,
    state: tuple[tuple[Tensor, ...], ...],
    form: MemoryForm,
    at_boundary: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[tuple[Tensor, ...], ...]]:
    """Chunks one after another: q, k, v `[N, B, H, C, *]`, gates `[N, B, H, C]`, present `[N, B, C]`.

    What does not depend on the state is computed for all chunks at once.
    """
    decay = decays(*gates, None if present is None else present[:, :, None])
    scores = (q @ k.mT) * decay.d
    anchor, weights, momentum = state
    outputs, losses, norms = [], [], []
    for n in range(q.shape[0]):
        if at_boundary:  # a row that has no token left keeps the anchor of its last chunk
            anchor = weights if present is None else where_rows(present[n].any(1), weights, anchor)
        decay_n = Decays(*(part[n] for part in decay))
        y, keys, weights, momentum = _read_chunk(
            q[n], k[n], v[n], scores[n], decay_n, (anchor, weights, momentum), form
        )
        outputs.append(y)
        losses.append(keys.loss)
        norms.append(keys.gradient_norm)
    return torch.stack(outputs), torch.stack(losses), torch.stack(norms), (anchor, weights, momentum)


def _read_span(
    inputs: tuple[Tensor, ...],
    present: Tensor | None,
    state: tuple[tuple[Tensor, ...], ...],
    width: int,
    form: MemoryForm,
    at_boundary: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[tuple[Tensor, ...], ...]]:
    """`inputs` (q, k, v, theta, eta, alpha) `[B, S, H, *]`, S a multiple of `width`: y like v, loss, norm, state.

    Under autograd the states inside a group of chunks are computed again in the backward pass: what is kept is one
    state for each group, and about as many groups as chunks in a group.
    """
    batch, size = inputs[0].shape[:2]
    count = size // width
    q, k, v, theta, eta, alpha = (
        x.unflatten(1, (count, width)).movedim(0, 1).transpose(2, 3).contiguous() for x in inputs
    )  # [N, B, H, C, *]
    if present is not None:
        present = present.unflatten(1, (count, width)).movedim(0, 1)  # [N, B, C]
    group = max(1, round(math.sqrt(count)))
    parts = []
    for n in range(0, count, group):
        part = slice(n, n + group)
        arguments = (
            q[part], k[part], v[part], (theta[part], eta[part], alpha[part]),
            None if present is None else present[part], state, form, at_boundary,
        )  # fmt: skip
        if torch.is_grad_enabled() and count > 1:
            *part_out, state = checkpoint(_read_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            *part_out, state = _read_group(*arguments)
        parts.append(part_out)
    y, loss, norm = (torch.cat(x).transpose(2, 3).movedim(0, 1).reshape(batch, size, *x[0].shape[2:3], *x[0].shape[4:])
                     for x in zip(*parts, strict=True))  # fmt: skip
    return y, loss, norm, state


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
) -> tuple[Tensor, MemoryState, Surprise]:
    """As `naive`, by matmuls. q, k `[B, T, H, K]`, v `[B, T, H, V]`, gates `[B, T, H]`, mask `[B, T]`."""
    layout = lay_out(mask, state.position, q.shape[1], chunk_size)
    inputs = tuple(layout.arrange(x) for x in (q, k, v, *gates))
    parts: list[list[Tensor]] = []
    now: tuple[tuple[Tensor, ...], ...] = (state.anchor, state.weights, state.momentum)
    for start, end, width in layout.spans():
        here = tuple(x[:, start:end] for x in inputs)
        present = None if layout.present is None else layout.present[:, start:end]
        *part, now = _read_span(here, present, now, width, form, at_boundary=start >= layout.head)
        parts.append(part)
    anchor, weights, momentum = now
    if parts:
        y, loss, norm = (layout.restore(torch.cat(x, 1)) for x in zip(*parts, strict=True))
    else:  # no token, or all masked
        y, loss, norm = torch.zeros_like(v), torch.zeros_like(gates[0]), torch.zeros_like(gates[0])
    position = (state.position + layout.length) % chunk_size
    anchor = where_rows(position == 0, weights, anchor)
    return y, MemoryState(anchor, weights, momentum, position), Surprise(loss, norm)
