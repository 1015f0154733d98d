"""The memory itself in Triton, row by row: what `mlp.py` is to PyTorch, under the same names."""

from typing import no_type_check  # for the shape checker of the tests too: Triton compiles source, not what wraps it

import triton
import triton.language as tl


@triton.jit
@no_type_check
def dot(x, y, PRECISION: tl.constexpr):
    """x @ y, accumulated in float32; the operands in bfloat16, or in float32 by the tensor cores' `PRECISION`."""
    if PRECISION == "bf16":
        product = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    else:
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def gelu_parts(z):
    """tanh, the derivative of what it is of, and that one's derivative less a factor z."""
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
def slope(z, GELU: tl.constexpr):
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
def curvature(z, GELU: tl.constexpr):
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
    """Of each row, as a column."""
    return (tl.sum(x, 1) / WIDTH)[:, None]


@triton.jit
@no_type_check
def through_norm(gradient, n, inverse, WIDTH: tl.constexpr):
    """The layer norm's backward pass: from the gradient by n(z) to that by z."""
    return (gradient - mean(gradient, WIDTH) - n * mean(gradient * n, WIDTH)) * inverse


@triton.jit
@no_type_check
def read_output(z, shift, gain, NORM: tl.constexpr, CLIP: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """`mlp.read_output`: error, gradient at Z_L, its length, n, 1 / std, and G_L; rows `[C, V]`, columns `[C, 1]`."""
    if NORM:
        centred = z - mean(z, WIDTH)
        inverse = 1 / tl.sqrt(mean(centred * centred, WIDTH) + EPS)
        n = centred * inverse
        error = shift + n * gain
        gradient = through_norm(2 * error * gain, n, inverse, WIDTH)
    else:
        n, inverse = z, mean(z, WIDTH)  # not used
        error = z + shift
        gradient = 2 * error
    size = tl.sqrt(tl.sum(gradient * gradient, 1))[:, None]
    g = gradient
    if CLIP is not None:
        g = gradient * (CLIP / (size + CLIP))
    return error, gradient, size, n, inverse, g


@triton.jit
@no_type_check
def back_output(
    g, loss, error, gradient, size, n, inverse, gain,
    NORM: tl.constexpr, CLIP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`mlp.back_output`: from the gradients by G_L `[C, V]` and the loss `[C, 1]` to those by z, shift and gain."""
    if CLIP is not None:
        s = CLIP / (size + CLIP)
        along = tl.sum(g * gradient, 1)[:, None] * s * s / (CLIP * tl.maximum(size, 1e-30))
        g = g * s - gradient * along
    if NORM:
        u = 2 * gain * error
        du = through_norm(g, n, inverse, WIDTH)
        by_error = 2 * gain * du + 2 * error * loss
        dn = gain * by_error - inverse * (mean(u * n, WIDTH) * g + mean(g * n, WIDTH) * u)
        dz = through_norm(dn, n, inverse, WIDTH) - n * mean(g * gradient, WIDTH) * inverse
        by_gain = tl.sum(2 * error * du + n * by_error, 0)
    else:
        by_error = 2 * g + 2 * error * loss
        dz = by_error
        by_gain = tl.sum(by_error, 0)  # not used
    return dz, by_error, by_gain
