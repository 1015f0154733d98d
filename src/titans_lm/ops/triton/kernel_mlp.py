"""The memory M(x) in Triton, row by row: `mlp.py`, under the same names."""

from typing import no_type_check  # also keeps the tests' shape checker away: Triton compiles source

import triton
import triton.language as tl


@triton.jit
@no_type_check
def dot(x, y, PRECISION: tl.constexpr):
    """x @ y, accumulated in float32. Operands are bfloat16, or float32 with the tensor cores' `PRECISION`."""
    if PRECISION == "bf16":
        product = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    else:
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def anew(x, j):
    """x, as if the loop variable `j`, at least 0, mattered. What is the same in every turn the compiler moves out of a
    loop: of a product's factor that is the copy that each warp needs, many times the registers of x."""
    return tl.where(j >= 0, x, 0.0)


@triton.jit
@no_type_check
def gelu_parts(z):
    """Of GELU: tanh, the derivative of its argument, and that derivative's derivative over z."""
    square = z * z
    scale = 0.7978845608028654  # sqrt(2 / pi)
    t = 2 * tl.sigmoid(2 * scale * z * (1 + 0.044715 * square)) - 1
    return t, scale * (1 + 3 * 0.044715 * square), 3 * scale * 0.044715 * square


@triton.jit
@no_type_check
def activate(z, GELU: tl.constexpr):
    """act(z)"""
    if GELU:
        t, _, _ = gelu_parts(z)
        value = 0.5 * z * (1 + t)
    else:
        value = z * tl.sigmoid(z)
    return value


@triton.jit
@no_type_check
def act_derivative(z, GELU: tl.constexpr):
    """act'(z)"""
    if GELU:
        t, inner, _ = gelu_parts(z)
        value = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner
    else:
        s = tl.sigmoid(z)
        value = s * (1 + z * (1 - s))
    return value


@triton.jit
@no_type_check
def act_second_derivative(z, GELU: tl.constexpr):
    """act''(z)"""
    if GELU:
        t, inner, rest = gelu_parts(z)
        value = (1 - t * t) * (inner - z * t * inner * inner + rest)
    else:
        s = tl.sigmoid(z)
        value = s * (1 - s) * (2 + z * (1 - 2 * s))
    return value


@triton.jit
@no_type_check
def mean(x, WIDTH: tl.constexpr):
    """The mean of each row, as a column."""
    return (tl.sum(x, 1) / WIDTH)[:, None]


@triton.jit
@no_type_check
def layer_norm_backward(gradient, normed, rstd, WIDTH: tl.constexpr):
    """The gradient by z, from that by n(z)."""
    return (gradient - mean(gradient, WIDTH) - normed * mean(gradient * normed, WIDTH)) * rstd


@triton.jit
@no_type_check
def inner_loss(z, shift, norm_weight, NORM: tl.constexpr, CLIP: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """`mlp.inner_loss` -> error, gradient at Z_L, its length, n(Z_L), 1 / std, and G_L; `[C, V]` or `[C, 1]` each."""
    if NORM:
        centred = z - mean(z, WIDTH)
        rstd = 1 / tl.sqrt(mean(centred * centred, WIDTH) + EPS)
        normed = centred * rstd
        error = shift + normed * norm_weight
        gradient = layer_norm_backward(2 * error * norm_weight, normed, rstd, WIDTH)
    else:
        normed, rstd = z, mean(z, WIDTH)  # unused
        error = z + shift
        gradient = 2 * error
    length = tl.sqrt(tl.sum(gradient * gradient, 1))[:, None]
    g = gradient
    if CLIP is not None:
        g = gradient * (CLIP / (length + CLIP))
    return error, gradient, length, normed, rstd, g


@triton.jit
@no_type_check
def inner_loss_backward(
    g, loss, error, gradient, length, normed, rstd, norm_weight,
    NORM: tl.constexpr, CLIP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`mlp.inner_loss_backward`: gradients by z, shift, norm weight from those by G_L `[C, V]`, loss `[C, 1]`."""
    if CLIP is not None:
        s = CLIP / (length + CLIP)
        along = tl.sum(g * gradient, 1)[:, None] * s * s / (CLIP * tl.maximum(length, 1e-30))
        g = g * s - gradient * along
    if NORM:
        u = 2 * norm_weight * error
        du = layer_norm_backward(g, normed, rstd, WIDTH)
        grad_error = 2 * norm_weight * du + 2 * error * loss
        dn = norm_weight * grad_error - rstd * (mean(u * normed, WIDTH) * g + mean(g * normed, WIDTH) * u)
        dz = layer_norm_backward(dn, normed, rstd, WIDTH) - normed * mean(g * gradient, WIDTH) * rstd
        grad_norm_weight = tl.sum(2 * error * du + normed * grad_error, 0)
    else:
        grad_error = 2 * g + 2 * error * loss
        dz = grad_error
        grad_norm_weight = tl.sum(grad_error, 0)  # unused
    return dz, grad_error, grad_norm_weight
