"""The definition: one token at a time, the inner gradient by autograd. Slow; every other backend is tested against it.

Nothing here is derived by hand. The memory and its loss are written down, and autograd takes the gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.types import NORM_EPS, MemoryForm, MemoryState, ScanInputs, ScanOutput, Surprise, where_rows
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"naive": "naive_scan", "finish": "residual_output"})


def mlp(x: Tensor, weights: tuple[Tensor, ...], form: MemoryForm) -> Tensor:
    """The MLP with `weights` `[B, H, in, out]` applied to x `[B, H, K]` -> `[B, H, V]`."""
    for layer, w in enumerate(weights):
        if layer > 0:
            x = F.silu(x) if form.activation == "silu" else F.gelu(x, approximate="tanh")
        x = torch.einsum("bhi,bhio->bho", x, w)
    return x


def residual_output(x: Tensor, z: Tensor, form: MemoryForm) -> Tensor:
    """M(x) for z = MLP(x): z in the plain form, x + layer_norm(z) in the residual form."""
    if form.norm is None:
        return z
    weight, bias = form.norm
    centred = z - z.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    return x + normed * weight + bias


def inner_gradient(
    k: Tensor, v: Tensor, anchor: tuple[Tensor, ...], form: MemoryForm
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradient of eq. 12 for one token k `[B, H, K]`, v `[B, H, V]`.

    Returns the loss `[B, H]`, the gradient's norm `[B, H]`, and the gradient for each layer `[B, H, in, out]`. Rows and
    heads do not mix, so the gradient of the sum over them holds the gradient of each.
    """
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        if not outer:
            anchor = tuple(w.detach() for w in anchor)
        anchor = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in anchor)
        z = mlp(k, anchor, form)
        loss = (residual_output(k, z, form) - v).square().sum(-1)
        (output_gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=outer)
        if form.clip is not None:
            length = torch.linalg.vector_norm(output_gradient, dim=-1, keepdim=True)
            output_gradient = output_gradient * form.clip / (length + form.clip)
        gradient = torch.autograd.grad(z, anchor, output_gradient, create_graph=outer)
    norm = torch.stack([g.detach().square().sum((-2, -1)) for g in gradient]).sum(0).sqrt()
    return (loss, norm, gradient) if outer else (loss.detach(), norm, gradient)


def naive_scan(inputs: ScanInputs) -> ScanOutput:
    """Equations 10 to 15, token by token.

    Where `mask` `[B, T]` is False the token is skipped: no write, no decay, no step in the chunk, output 0.
    """
    (q, k, v, *gates), (anchor, weights, momentum, position), chunk_size, form, mask, surprise, _ = inputs
    outputs, losses, norms = [], [], []
    for t in range(q.shape[1]):
        theta, eta, alpha = (gate[:, t, :, None, None] for gate in gates)
        valid = torch.ones_like(position, dtype=torch.bool) if mask is None else mask[:, t]
        anchor = where_rows(position == 0, weights, anchor)
        loss, norm, gradient = inner_gradient(k[:, t], v[:, t], anchor, form)
        if form.threshold is not None:
            theta = theta * (loss > form.threshold)[..., None, None]
        new_momentum = tuple(eta * s - theta * g for s, g in zip(momentum, gradient, strict=True))  # eq. 10
        new_weights = tuple((1 - alpha) * w + s for w, s in zip(weights, new_momentum, strict=True))  # eq. 13
        momentum = where_rows(valid, new_momentum, momentum)
        weights = where_rows(valid, new_weights, weights)
        position = torch.where(valid, (position + 1) % chunk_size, position)
        y = residual_output(q[:, t], mlp(q[:, t], weights, form), form)  # eq. 15
        outputs.append(y * valid[:, None, None])
        losses.append(loss * valid[:, None])
        norms.append(norm * valid[:, None])
    anchor = where_rows(position == 0, weights, anchor)
    state = MemoryState(anchor, weights, momentum, position)
    per_token = Surprise(_stack(losses, q[..., 0]), _stack(norms, q[..., 0])) if surprise else None
    return ScanOutput(_stack(outputs, v), state, per_token)


def _stack(tokens: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack(tokens, 1) if tokens else torch.zeros_like(empty)
