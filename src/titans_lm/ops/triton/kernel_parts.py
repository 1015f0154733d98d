"""What both kernels do with a chunk: loops over blocks of units, or of columns, each with few products.

Registers are scarce: README.md one folder up says what each of these measures saves. A loop leaves its results for the
next in scratch memory, and what is cheap is loaded or computed again where it is needed, after a barrier, which the
compiler moves no load across. Loops end at numbers known when the kernel runs, `width` = K and `units` = U: others the
compiler unrolls, or it keeps one loop's addresses for the next. And no product stands alone outside these loops: where
a loop has a single product, Triton 3.7 (tritongpu-prefetch) drops `disable_licm`, and addresses computed before the
loop over chunks stay in registers through all of it.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans_lm.ops.triton.kernel_mlp import act_derivative, activate, anew, dot


@triton.jit
@no_type_check
def block_offsets(j, K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Where the block of units from `j` is, in [K, U], [U, K] and [C, U]."""
    t, i, u = tl.arange(0, C), tl.arange(0, K), j + tl.arange(0, BLOCK)
    return i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * U + u[None, :]


@triton.jit
@no_type_check
def unit_inputs(z, tu, DEPTH: tl.constexpr, GELU: tl.constexpr):
    """The last layer's inputs, from the first layer's outputs. At depth 1 `z` has the inputs themselves."""
    x = tl.load(z + tu).to(tl.float32)
    return activate(x, GELU) if DEPTH == 2 else x


@triton.jit
@no_type_check
def product(
    x, w, j, width,
    OF_K: tl.constexpr, OF_U: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x W for the block of units from `j`, `BLOCK` of K at a time. W has strides `OF_K` and `OF_U`."""
    t, u = tl.arange(0, C)[:, None], (j + tl.arange(0, BLOCK))[None, :]
    xw = tl.zeros([C, BLOCK], tl.float32)
    for first in tl.range(0, width, BLOCK, disable_licm=True):
        i = first + tl.arange(0, BLOCK)
        xw += dot(tl.load(x + t * K + i[None, :]), tl.load(w + i[:, None] * OF_K + u * OF_U), PRECISION)
    return xw


@triton.jit
@no_type_check
def products(
    x, w, s, j, width,
    OF_K: tl.constexpr, OF_U: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x W and x S, as in `product`."""
    t, u = tl.arange(0, C)[:, None], (j + tl.arange(0, BLOCK))[None, :]
    xw, xs = tl.zeros([C, BLOCK], tl.float32), tl.zeros([C, BLOCK], tl.float32)
    for first in tl.range(0, width, BLOCK, disable_licm=True):
        i = first + tl.arange(0, BLOCK)
        part, at = tl.load(x + t * K + i[None, :]), i[:, None] * OF_K + u * OF_U
        xw += dot(part, tl.load(w + at), PRECISION)
        xs += dot(part, tl.load(s + at), PRECISION)
    return xw, xs


@triton.jit
@no_type_check
def keys_forward(
    k, anchor1, anchor2, z1, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Z_2 at the anchor. Z_1 is stored."""
    z2 = tl.zeros([C, K], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        if DEPTH == 2:
            z = product(k, anchor1, j, width, U, 1, K, BLOCK, C, PRECISION)
            tl.store(z1 + tu, z)
            x2 = activate(z, GELU)
        else:
            x2 = tl.load(k + tu)
        z2 += dot(x2, tl.load(anchor2 + ui), PRECISION)
    tl.debug_barrier()
    return z2


@triton.jit
@no_type_check
def row_products(x, y, width, K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T of tokens' rows, `BLOCK` of K at a time."""
    xy = tl.zeros([C, C], tl.float32)
    for j in tl.range(0, width, BLOCK, disable_licm=True):
        tj = tl.arange(0, C)[:, None] * K + j + tl.arange(0, BLOCK)[None, :]
        xy += dot(tl.load(x + tj), tl.trans(tl.load(y + tj)), PRECISION)
    tl.debug_barrier()
    return xy


@triton.jit
@no_type_check
def times(scores, x, y, width, K: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """y becomes scores x, `BLOCK` of K at a time."""
    for j in tl.range(0, width, BLOCK, disable_licm=True):
        tj = tl.arange(0, C)[:, None] * K + j + tl.arange(0, BLOCK)[None, :]
        tl.store(y + tj, dot(anew(scores, j), tl.load(x + tj), PRECISION))
    tl.debug_barrier()


@triton.jit
@no_type_check
def first_layer_forward(
    q, w1, s1, anchor2, z1, dloss_dx1, y1, a, b, g2, scores1, width, units,
    READ: tl.constexpr,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inner loss's gradient by X_2 is stored, and with READ Y_1."""
    t = tl.arange(0, C)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, _, tu = block_offsets(j, K, U, BLOCK, C)
        by_x2 = product(g2, anchor2, j, width, 1, K, K, BLOCK, C, PRECISION)
        tl.store(dloss_dx1 + tu, by_x2)
        if READ:
            g1 = by_x2 * act_derivative(tl.load(z1 + tu), GELU)
            y = -dot(anew(scores1, j), g1, PRECISION)
            qw, qs = products(q, w1, s1, j, width, U, 1, K, BLOCK, C, PRECISION)
            y += tl.load(a + t)[:, None] * qw + tl.load(b + t)[:, None] * qs
            tl.store(y1 + tu, y)
    tl.debug_barrier()


@triton.jit
@no_type_check
def last_layer_scores(
    keys, queries, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """H_2 X_2^T"""
    raw2 = tl.zeros([C, C], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, _, tu = block_offsets(j, K, U, BLOCK, C)
        x2, h2 = unit_inputs(keys, tu, DEPTH, GELU), unit_inputs(queries, tu, DEPTH, GELU)
        raw2 += dot(h2, tl.trans(x2), PRECISION)
    return raw2
