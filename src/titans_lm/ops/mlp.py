"""The memory itself, M(x), an MLP whose weights are the state: its forward pass, its gradient, and theirs in turn.

Rows everywhere: a leading `R` is a row and head, `[B * H]`, or the two dimensions `[B, H]`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.types import NORM_EPS, MemoryForm

TANH_SCALE, CUBE = math.sqrt(2 / math.pi), 0.044715


def activate(z: Tensor, form: MemoryForm, out: Tensor | None = None) -> Tensor:
    """act(z), into `out` where given."""
    if out is None:
        return F.silu(z) if form.activation == "silu" else F.gelu(z, approximate="tanh")
    if form.activation == "silu":
        return torch.ops.aten.silu.out(z, out=out)
    return torch.ops.aten.gelu.out(z, approximate="tanh", out=out)


def times_slope(g: Tensor, z: Tensor, form: MemoryForm, out: Tensor | None = None) -> Tensor:
    """g * act'(z), into `out` where given."""
    out = torch.empty_like(g) if out is None else out
    if form.activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(g, z, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(g, z, approximate="tanh", grad_input=out)


def curvature(z: Tensor, form: MemoryForm) -> Tensor:
    """act''(z)."""
    if form.activation == "silu":
        s = torch.sigmoid(z)
        slope = torch.addcmul(s, s, s, value=-1)
        return torch.addcmul(z, z, s, value=-2).add_(2).mul_(slope)
    square = z * z
    t = torch.tanh(TANH_SCALE * z * (1 + CUBE * square))
    inner = TANH_SCALE * (1 + 3 * CUBE * square)  # the derivative of what tanh is of
    return (1 - t * t) * (inner - z * t * inner.square() + 3 * TANH_SCALE * CUBE * square)


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


# ------------------------------------------------------------------------------- the gradient at the MLP's output


class Output(NamedTuple):
    """The top of a chunk's key pass, from Z_L to G_L; each `[R, C, V]` or `[R, C, 1]`. Residual form: n = norm(Z_L)."""

    error: Tensor  # M(k) - v
    gradient: Tensor  # dloss/dZ_L before the clip
    size: Tensor | None  # its length |.|, where there is a clip
    n: Tensor | None
    mean: Tensor | None
    inverse: Tensor | None  # 1 / sqrt(var Z_L + eps)


def read_output(z: Tensor, shift: Tensor, weight: Tensor | None, clip: float | None) -> tuple[Output, Tensor]:
    """Error, gradient of the loss at Z_L = `z`, and G_L, that gradient clipped.

    `shift` is what M(k) adds to the MLP (or to w * n), less v: -v, or k + bias - v. `weight` w `[R, 1, V]`.
    """
    n = mean = inverse = size = None
    if weight is None:
        error = z + shift
        gradient = 2 * error
    else:
        n, mean, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, NORM_EPS)
        error = torch.addcmul(shift, n, weight)
        gradient = through_norm((2 * error).mul_(weight), z, mean, inverse)
    clipped = gradient
    if clip is not None:
        size = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        clipped = gradient * (clip / (size + clip))
    return Output(error, gradient, size, n, mean, inverse), clipped


class OutputGradients(NamedTuple):
    """Of the outer loss, by what `read_output` took: z, shift, and the norm's weight (summed over the chunk)."""

    z: Tensor
    shift: Tensor
    weight: Tensor | None


def back_output(
    g: Tensor, loss: Tensor | None, z: Tensor, at: Output, weight: Tensor | None, clip: float | None
) -> OutputGradients:
    """From the gradient `g` by G_L `[R, C, V]` and `loss` by the reconstruction loss `[R, C, 1]` (None: 0)."""
    if clip is not None:
        # G = gradient * s, s = clip / (size + clip); d size = gradient / size
        assert at.size is not None
        s = clip / (at.size + clip)
        tiny = torch.finfo(s.dtype).tiny
        along = (g * at.gradient).sum(-1, keepdim=True).div_(at.size.clamp(min=tiny)).mul_(s * s / clip)
        g = torch.addcmul(g * s, at.gradient, along, value=-1)
    if weight is None:
        error = 2 * g if loss is None else torch.addcmul(2 * g, at.error, loss, value=2)
        return OutputGradients(error, error, None)
    assert at.n is not None
    assert at.mean is not None
    assert at.inverse is not None
    u = 2 * weight * at.error  # what went through the norm's backward pass, a function of u, n and 1 / std
    du = through_norm(g, z, at.mean, at.inverse)
    error = 2 * weight * du
    if loss is not None:
        error.addcmul_(at.error, loss, value=2)
    along_u, along_g = (u * at.n).mean(-1, keepdim=True), (g * at.n).mean(-1, keepdim=True)
    dn = weight * error - at.inverse * (along_u * g + along_g * u)
    by_inverse = (g * at.gradient).sum(-1, keepdim=True) * at.inverse / g.shape[-1]
    dz = torch.addcmul(through_norm(dn, z, at.mean, at.inverse), at.n, by_inverse, value=-1)
    dweight = (2 * at.error * du + at.n * error).sum(-2, keepdim=True)
    return OutputGradients(dz, error, dweight)


def through_norm(gradient: Tensor, z: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The layer norm's backward pass: from the gradient by n(z) to that by z."""
    return torch.ops.aten.native_layer_norm_backward(
        gradient, z, z.shape[-1:], mean, inverse, None, None, [True, False, False]
    )[0]
