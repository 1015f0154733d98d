"""The memory M(x), an MLP whose weights are the state: forward, its inner gradient, and the backward pass of both.

A leading `R` is one row of the batch and one head, `[B * H]`, or the two dimensions `[B, H]`.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.types import NORM_EPS, MemoryForm, is_autocast, is_traced

TANH_SCALE, CUBE = math.sqrt(2 / math.pi), 0.044715
"""Constants of GELU's tanh approximation."""


def activate(z: Tensor, form: MemoryForm, out: Tensor | None = None) -> Tensor:
    """act(z), into `out` where given."""
    if out is None:
        return F.silu(z) if form.activation == "silu" else F.gelu(z, approximate="tanh")
    if form.activation == "silu":
        return torch.ops.aten.silu.out(z, out=out)
    return torch.ops.aten.gelu.out(z, approximate="tanh", out=out)


def act_backward(g: Tensor, z: Tensor, form: MemoryForm, out: Tensor | None = None) -> Tensor:
    """g * act'(z), into `out` where given."""
    if is_traced(z):
        return g * act_derivative(z, form)  # in operations that ONNX has
    out = torch.empty_like(g) if out is None else out
    if form.activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(g, z, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out)


def act_derivative(z: Tensor, form: MemoryForm) -> Tensor:
    """act'(z)."""
    if form.activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    square = z * z
    t = torch.tanh(TANH_SCALE * z * (1 + CUBE * square))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * TANH_SCALE * (1 + 3 * CUBE * square)


def act_second_derivative(z: Tensor, form: MemoryForm) -> Tensor:
    """act''(z)."""
    if form.activation == "silu":
        s = torch.sigmoid(z)
        ds = torch.addcmul(s, s, s, value=-1)
        return torch.addcmul(z, z, s, value=-2).add_(2).mul_(ds)
    square = z * z
    t = torch.tanh(TANH_SCALE * z * (1 + CUBE * square))
    inner = TANH_SCALE * (1 + 3 * CUBE * square)  # the derivative of tanh's argument
    return (1 - t * t) * (inner - z * t * inner.square() + 3 * TANH_SCALE * CUBE * square)


def residual_output(x: Tensor, z: Tensor, form: MemoryForm) -> Tensor:
    """M(x) for z = MLP(x), both `[..., H, C, V]`: z in the plain form, x + layer_norm(z) in the residual form."""
    if form.norm is None:
        return z
    weight, bias = form.norm
    return x + F.layer_norm(z, z.shape[-1:], eps=NORM_EPS) * weight[:, None] + bias[:, None]


def retrieve(q: Tensor, weights: tuple[Tensor, ...], form: MemoryForm) -> Tensor:
    """Eq. 15, M(q), for q `[B, T, H, K]` and one set of weights `[B, H, in, out]` -> `[B, T, H, V]`. Writes nothing."""
    dtype = weights[0].dtype
    if form.norm is not None:
        form = form._replace(norm=(form.norm[0].to(dtype), form.norm[1].to(dtype)))
    with torch.autocast(q.device.type, enabled=False) if is_autocast(q) else contextlib.nullcontext():
        x = h = q.to(dtype).transpose(1, 2)
        for layer, w in enumerate(weights):
            h = (activate(h, form) if layer > 0 else h) @ w
        return residual_output(x, h, form).transpose(1, 2).to(q.dtype)


# ------------------------------------------------------------------------- the inner loss, from the MLP's output on


class InnerLoss(NamedTuple):
    """The inner loss || M(k) - v ||^2 of a chunk's tokens, and what `inner_loss_backward` needs.

    Each is `[R, C, V]` or `[R, C, 1]`. The last three are None in the plain form.
    """

    error: Tensor  # M(k) - v
    gradient: Tensor  # dloss/dZ_L before the clip
    length: Tensor | None  # |gradient| of each token, where there is a clip
    normed: Tensor | None  # n(Z_L), Z_L less its mean, over its standard deviation
    mean: Tensor | None
    rstd: Tensor | None  # 1 / sqrt(var Z_L + eps)


def inner_loss(z: Tensor, shift: Tensor, weight: Tensor | None, clip: float | None) -> tuple[InnerLoss, Tensor]:
    """Compute the error and its gradient at Z_L = `z`. Returns them and G_L, the gradient after the clip.

    `shift` is M(k) - v less the MLP's part: -v in the plain form, k + bias - v in the residual form. `weight`
    `[R, 1, V]` is the layer norm's, None in the plain form.
    """
    normed = mean = rstd = length = None
    if weight is None:
        error = z + shift
        gradient = 2 * error
    else:
        normed, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, NORM_EPS)
        error = torch.addcmul(shift, normed, weight)
        gradient = layer_norm_backward(error * (2 * weight), z, mean, rstd)
    clipped = gradient
    if clip is not None:
        length = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        clipped = gradient * (clip / (length + clip))
    return InnerLoss(error, gradient, length, normed, mean, rstd), clipped


class InnerLossGradients(NamedTuple):
    """The outer loss's gradients by the inputs of `inner_loss`; that by the norm's weight is summed over the chunk."""

    z: Tensor
    shift: Tensor
    weight: Tensor | None


def inner_loss_backward(
    g: Tensor, loss: Tensor | None, z: Tensor, saved: InnerLoss, weight: Tensor | None, clip: float | None
) -> InnerLossGradients:
    """The backward pass of `inner_loss`: `g` is the gradient by G_L `[R, C, V]`, `loss` that by the loss `[R, C, 1]`
    (None: 0)."""
    if clip is not None:
        # G = gradient * s, s = clip / (length + clip); d length = gradient / length
        assert saved.length is not None
        s = clip / (saved.length + clip)
        tiny = torch.finfo(s.dtype).tiny
        along = (g * saved.gradient).sum(-1, keepdim=True).div_(saved.length.clamp(min=tiny)).mul_(s * s / clip)
        g = torch.addcmul(g * s, saved.gradient, along, value=-1)
    if weight is None:
        grad_error = 2 * g if loss is None else torch.addcmul(2 * g, saved.error, loss, value=2)
        return InnerLossGradients(grad_error, grad_error, None)
    assert saved.normed is not None
    assert saved.mean is not None
    assert saved.rstd is not None
    u = 2 * weight * saved.error  # the input of the layer norm's backward pass, a function of u, normed and rstd
    grad_u = layer_norm_backward(g, z, saved.mean, saved.rstd)
    grad_error = 2 * weight * grad_u
    if loss is not None:
        grad_error.addcmul_(saved.error, loss, value=2)
    along_u = (u * saved.normed).mean(-1, keepdim=True)
    along_g = (g * saved.normed).mean(-1, keepdim=True)
    grad_normed = weight * grad_error - saved.rstd * (along_u * g + along_g * u)
    grad_rstd = (g * saved.gradient).sum(-1, keepdim=True) * saved.rstd / g.shape[-1]
    grad_z = torch.addcmul(
        layer_norm_backward(grad_normed, z, saved.mean, saved.rstd), saved.normed, grad_rstd, value=-1
    )
    grad_weight = (2 * saved.error * grad_u + saved.normed * grad_error).sum(-2, keepdim=True)
    return InnerLossGradients(grad_z, grad_error, grad_weight)


def layer_norm_backward(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The gradient by z, from that by n(z) = (z - mean) * rstd."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
