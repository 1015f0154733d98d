"""The Triton kernel of the backward pass of chunks. Letters and equations: README.md one folder up.

What is said in `kernels.py` of blocks of units, of barriers and of names holds here. `d` before a tensor's name is the
outer loss's gradient by it: `dx2` by x2.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans_lm.ops.triton.kernel_mlp import (
    act_derivative,
    act_second_derivative,
    anew,
    dot,
    inner_loss,
    inner_loss_backward,
)
from titans_lm.ops.triton.kernel_parts import (
    block_offsets,
    first_layer_forward,
    keys_forward,
    last_layer_scores,
    product,
    products,
    row_products,
    times,
    unit_inputs,
)


@triton.jit
@no_type_check
def last_layer_writes(
    keys, queries, grad_w2, grad_s2, dx, d_last, em, g2, draw2, dg2_at, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G): gradients by G_2 (added in memory), D[C]
    and Em[C]. That by X_2, with its part of the scores, is stored."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    dg2 = tl.zeros([C, K], tl.float32)
    dd_end, dem = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        gw, gs = products(g2, grad_w2, grad_s2, j, width, 1, K, K, BLOCK, C, PRECISION)
        x2, d_end, em_t = unit_inputs(keys, tu, DEPTH, GELU), tl.load(d_last + t)[:, None], tl.load(em + t)[:, None]
        dd_end -= tl.sum(x2 * gw, 1)
        dem -= tl.sum(x2 * gs, 1)
        dx2 = dot(tl.trans(anew(draw2, j)), unit_inputs(queries, tu, DEPTH, GELU), PRECISION) - d_end * gw - em_t * gs
        tl.store(dx + tu, dx2)
        tl.debug_barrier()
        x2, d_end = unit_inputs(keys, tu, DEPTH, GELU), tl.load(d_last + t)[:, None]
        dg2 -= dot(d_end * x2, tl.load(grad_w2 + ui), PRECISION)
        tl.debug_barrier()
        x2, em_t = unit_inputs(keys, tu, DEPTH, GELU), tl.load(em + t)[:, None]
        dg2 -= dot(em_t * x2, tl.load(grad_s2 + ui), PRECISION)
    tl.store(dg2_at + ti, tl.load(dg2_at + ti) + dg2)
    tl.debug_barrier()
    return dd_end, dem


@triton.jit
@no_type_check
def last_layer_reads(
    keys, queries, grad_y, w2, s2, grad_w2, grad_s2, dh, a, b, a_c, b_c, e_c, draw2, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = A * (H W) + B * (H S) - ((H X^T) * D) G: gradients by A, B, and by A[C], B[C], E[C] of the state after. Those
    by W_2 and S_2 before the chunk replace those after; that by Y_1 (at depth 1 by the queries) is stored."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    da, db = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    da_c, db_c, de_c = 0.0, 0.0, 0.0
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        yw, ys = products(grad_y, w2, s2, j, width, 1, K, K, BLOCK, C, PRECISION)
        h2, a_t, b_t = unit_inputs(queries, tu, DEPTH, GELU), tl.load(a + t)[:, None], tl.load(b + t)[:, None]
        da += tl.sum(h2 * yw, 1)
        db += tl.sum(h2 * ys, 1)
        dh2 = dot(anew(draw2, j), unit_inputs(keys, tu, DEPTH, GELU), PRECISION) + a_t * yw + b_t * ys
        if DEPTH == 2:
            dh2 *= act_derivative(tl.load(queries + tu), GELU)
        tl.debug_barrier()  # registers are scarce: what is cheap is loaded again
        w, s, dw, ds = tl.load(w2 + ui), tl.load(s2 + ui), tl.load(grad_w2 + ui), tl.load(grad_s2 + ui)
        da_c += tl.sum(w * dw)
        db_c += tl.sum(s * dw)
        de_c += tl.sum(s * ds)
        h2, dy2 = tl.trans(unit_inputs(queries, tu, DEPTH, GELU)), tl.load(grad_y + ti)
        ds = e_c * ds + b_c * dw
        dw = a_c * dw
        ds += dot(h2, tl.load(b + t)[:, None] * dy2, PRECISION)
        tl.debug_barrier()
        h2, dy2 = tl.trans(unit_inputs(queries, tu, DEPTH, GELU)), tl.load(grad_y + ti)
        dw += dot(h2, tl.load(a + t)[:, None] * dy2, PRECISION)
        tl.debug_barrier()  # all threads have read this block
        tl.store(grad_w2 + ui, dw)
        tl.store(grad_s2 + ui, ds)
        tl.store(dh + tu, dh2)
    tl.debug_barrier()
    return da, db, da_c, db_c, de_c


@triton.jit
@no_type_check
def first_layer_gradient(
    k, anchor2, grad_w1, grad_s1, grad_anchor2, z1, dloss_dx1, dy1, dx, d_last, em, g2, scores1, dg2_at, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through G_1 = (G_2 W_2^T) * act'(Z_1), at the anchor: gradients by G_2 and W_2 (added in memory), and by Z_1,
    which replaces that by X_2. Unwritten tokens' G_2 is 0."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    dg2 = tl.zeros([C, K], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        xw, xs = products(k, grad_w1, grad_s1, j, width, U, 1, K, BLOCK, C, PRECISION)
        dg1 = -dot(tl.trans(anew(scores1, j)), tl.load(dy1 + tu), PRECISION)
        dg1 -= tl.load(d_last + t)[:, None] * xw + tl.load(em + t)[:, None] * xs
        z = tl.load(z1 + tu)
        ddloss_dx1 = dg1 * act_derivative(z, GELU)
        dz1 = dg1 * tl.load(dloss_dx1 + tu) * act_second_derivative(z, GELU) + tl.load(dx + tu) * act_derivative(
            z, GELU
        )
        dg2 += dot(ddloss_dx1, tl.load(anchor2 + ui), PRECISION)
        danchor = tl.load(grad_anchor2 + ui) + dot(tl.trans(ddloss_dx1), tl.load(g2 + ti), PRECISION)
        tl.debug_barrier()
        tl.store(dx + tu, dz1)
        tl.store(grad_anchor2 + ui, danchor)
    tl.store(dg2_at + ti, tl.load(dg2_at + ti) + dg2)
    tl.debug_barrier()


@triton.jit
@no_type_check
def first_layer_writes(
    grad_w1, grad_s1, z1, dloss_dx1, dy1, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G_1 dW_1^T and G_1 dS_1^T, of which the gradients by X, D[C] and Em[C] are scales and row sums; and the gradient
    by the scores."""
    gw, gs = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    dscores1 = tl.zeros([C, C], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        iu, _, tu = block_offsets(j, K, U, BLOCK, C)
        g1 = tl.load(dloss_dx1 + tu) * act_derivative(tl.load(z1 + tu), GELU)
        gw += dot(g1, tl.trans(tl.load(grad_w1 + iu)), PRECISION)
        tl.debug_barrier()
        g1 = tl.load(dloss_dx1 + tu) * act_derivative(tl.load(z1 + tu), GELU)
        gs += dot(g1, tl.trans(tl.load(grad_s1 + iu)), PRECISION)
        tl.debug_barrier()
        g1 = tl.load(dloss_dx1 + tu) * act_derivative(tl.load(z1 + tu), GELU)
        dscores1 -= dot(tl.load(dy1 + tu), tl.trans(g1), PRECISION)
        tl.debug_barrier()
    return gw, gs, dscores1


@triton.jit
@no_type_check
def first_layer_reads(
    q, w1, s1, grad_w1, grad_s1, dy1, a, b, a_c, b_c, e_c, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY_1 W_1^T and dY_1 S_1^T, of which the gradients by queries, A and B are scales and row sums; and the gradients
    by A[C], B[C], E[C] of the state after. Those by W_1 and S_1 before the chunk replace those after."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    yw, ys = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    da_c, db_c, de_c = 0.0, 0.0, 0.0
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        iu, _, tu = block_offsets(j, K, U, BLOCK, C)
        dy = tl.load(dy1 + tu)
        yw += dot(dy, tl.trans(tl.load(w1 + iu)), PRECISION)
        tl.debug_barrier()
        dy = tl.load(dy1 + tu)
        ys += dot(dy, tl.trans(tl.load(s1 + iu)), PRECISION)
        tl.debug_barrier()
        w, s, dw, ds = tl.load(w1 + iu), tl.load(s1 + iu), tl.load(grad_w1 + iu), tl.load(grad_s1 + iu)
        da_c += tl.sum(w * dw)
        db_c += tl.sum(s * dw)
        de_c += tl.sum(s * ds)
        queries, dy = tl.trans(tl.load(q + ti).to(tl.float32)), tl.load(dy1 + tu)
        ds = e_c * ds + b_c * dw
        dw = a_c * dw
        ds += dot(queries, tl.load(b + t)[:, None] * dy, PRECISION)
        tl.debug_barrier()
        queries, dy = tl.trans(tl.load(q + ti).to(tl.float32)), tl.load(dy1 + tu)
        dw += dot(queries, tl.load(a + t)[:, None] * dy, PRECISION)
        tl.debug_barrier()
        tl.store(grad_w1 + iu, dw)
        tl.store(grad_s1 + iu, ds)
    tl.debug_barrier()
    return yw, ys, da_c, db_c, de_c


@triton.jit
@no_type_check
def anchor_gradient(
    k, anchor1, anchor2, grad_w1, grad_w2, grad_anchor1, grad_anchor2, z1, dx, grad_k, dz2, is_last, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' backward pass to the anchor, last layer first: Z_l = X_l W_l, X_{l+1} = act(Z_l). With AT_BOUNDARY the
    anchor is W, and in the chunk that the returned anchor was of, `is_last`, its gradient is added."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    dx1 = tl.zeros([C, K], tl.float32)
    by_anchor2 = grad_w2 if AT_BOUNDARY else grad_anchor2
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        iu, ui, tu = block_offsets(j, K, U, BLOCK, C)
        dz1 = tl.load(dx + tu)
        by_x2 = product(dz2, anchor2, j, width, 1, K, K, BLOCK, C, PRECISION)
        danchor2 = dot(tl.trans(unit_inputs(k if DEPTH == 1 else z1, tu, DEPTH, GELU)), tl.load(dz2 + ti), PRECISION)
        danchor2 += tl.load(by_anchor2 + ui)
        if AT_BOUNDARY:
            danchor2 += tl.load(grad_anchor2 + ui, mask=is_last & (ui >= 0), other=0.0)
        if DEPTH == 2:
            by_anchor1 = grad_w1 if AT_BOUNDARY else grad_anchor1
            dz1 += by_x2 * act_derivative(tl.load(z1 + tu), GELU)
            danchor1 = tl.load(by_anchor1 + iu) + dot(tl.trans(tl.load(k + ti).to(tl.float32)), dz1, PRECISION)
            if AT_BOUNDARY:
                danchor1 += tl.load(grad_anchor1 + iu, mask=is_last & (iu >= 0), other=0.0)
            dx1 += dot(dz1, tl.trans(tl.load(anchor1 + iu)), PRECISION)
        tl.debug_barrier()
        if DEPTH == 2:
            tl.store(by_anchor1 + iu, danchor1)
        else:
            tl.store(grad_k + tu, dz1 + by_x2)
        tl.store(by_anchor2 + ui, danchor2)
    tl.debug_barrier()
    return dx1


@triton.jit(do_not_specialize=["chunks", "rows", "width", "units"])  # one binary for all lengths and batches
@no_type_check
def backward_kernel(
    q, k, shift,  # [N, R, C, K]
    a, b, e, d, em,  # [N, R, C], d [N, R, C, C]
    norm_weight,  # [R, K] or None
    anchor1, anchor2,  # [R, K, U], [R, U, K], without AT_BOUNDARY
    w1, s1, w2, s2,  # [slots, R, K, U], [slots, R, U, K]: slot n is the state before chunk n
    last_chunk,  # [R], the last chunk in which the row has a token
    grad_y, grad_loss,  # [N, R, C, K], [N, R, C] or None
    grad_anchor1, grad_anchor2,  # [R, K, U], [R, U, K]: by the last anchor; without AT_BOUNDARY in place, by the anchor
    grad_w1, grad_s1, grad_w2, grad_s2,  # by the state after; in place, by the state before
    grad_q, grad_k, grad_shift, grad_a, grad_b, grad_e, grad_d, grad_em,  # by the inputs
    grad_norm_weight,  # added to
    scratch,  # [R, C (4 U + 2 K)], what the loops over one chunk's units leave for one another
    chunks, rows, width, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, EPS: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go back over chunks, last first."""
    row = tl.program_id(0)
    t, i = tl.arange(0, C), tl.arange(0, K)
    tc, ti, tt = t[:, None], t[:, None] * K + i[None, :], t[:, None] * C + t[None, :]
    row_at = row.to(tl.int64) * (K * U)
    z1 = scratch + row.to(tl.int64) * (C * (4 * U + 2 * K))
    g2_at, dg2_at = z1 + 4 * C * U, z1 + C * (4 * U + K)
    dx, y1, dloss_dx1 = z1 + C * U, z1 + 2 * C * U, z1 + 3 * C * U
    norm_w = tl.load(norm_weight + row * K + i)[None, :] if NORM else 0.0
    for m in tl.range(chunks, disable_licm=True):
        n = chunks - 1 - m
        token_at = (n * rows + row).to(tl.int64) * C
        in_at = row_at + (rows * K * U).to(tl.int64) * n
        x_at, h_at, shift_at, dy_at = k + token_at * K, q + token_at * K, shift + token_at * K, grad_y + token_at * K
        d_at, dd_at, dshift_at = d + token_at * C, grad_d + token_at * C, grad_shift + token_at * K
        w_2, s_2, dw_2, ds_2 = w2 + in_at, s2 + in_at, grad_w2 + row_at, grad_s2 + row_at
        anchor_2 = w_2 if AT_BOUNDARY else anchor2 + row_at
        danchor_2 = grad_anchor2 + row_at
        if DEPTH == 2:
            w_1, s_1, dw_1, ds_1 = w1 + in_at, s1 + in_at, grad_w1 + row_at, grad_s1 + row_at
            anchor_1 = w_1 if AT_BOUNDARY else anchor1 + row_at
            danchor_1 = grad_anchor1 + row_at
            keys, queries, dh_at = z1, y1, y1
        else:
            anchor_1, dw_1, danchor_1 = None, None, None
            keys, queries, dh_at = x_at, h_at, grad_q + token_at * K
        a_at, b_at, em_at, d_last = a + token_at, b + token_at, em + token_at, d_at + (C - 1) * C
        a_c, b_c, e_c = tl.load(a_at + C - 1), tl.load(b_at + C - 1), tl.load(e + token_at + C - 1)

        z2 = keys_forward(x_at, anchor_1, anchor_2, z1, width, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION)
        tl.store(dshift_at + ti, z2)  # holds z2 until the gradient by shift is known
        error, _, _, _, _, g2 = inner_loss(z2, tl.load(shift_at + ti), norm_w, NORM, CLIP, EPS, K)
        if THRESHOLD is not None:
            g2 = g2 * (tl.sum(error * error, 1)[:, None] > THRESHOLD).to(tl.float32)
        tl.store(g2_at + ti, g2)
        tl.debug_barrier()
        if DEPTH == 2:
            scores1 = row_products(h_at, x_at, width, K, BLOCK, C, PRECISION) * tl.load(d_at + tt)
            first_layer_forward(
                h_at, w_1, s_1, anchor_2, z1, dloss_dx1, y1, a_at, b_at, g2_at, scores1,
                width, units, True, K, U, BLOCK, C, GELU, PRECISION,
            )  # fmt: skip
        raw2 = last_layer_scores(keys, queries, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION)
        decay = tl.load(d_at + tt)
        by_scores2 = -row_products(dy_at, g2_at, width, K, BLOCK, C, PRECISION)
        tl.store(dd_at + tt, by_scores2 * raw2)
        draw2 = by_scores2 * decay
        times(tl.trans(-raw2 * decay), dy_at, dg2_at, width, K, BLOCK, C, PRECISION)
        dd_end, dem = last_layer_writes(
            keys, queries, dw_2, ds_2, dx, d_last, em_at, g2_at, draw2, dg2_at, width, units,
            K, U, BLOCK, C, DEPTH, GELU, PRECISION,
        )  # fmt: skip
        da, db, da_c, db_c, de_c = last_layer_reads(
            keys, queries, dy_at, w_2, s_2, dw_2, ds_2, dh_at, a_at, b_at, a_c, b_c, e_c, draw2,
            width, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION,
        )  # fmt: skip
        if DEPTH == 2:
            scores1 = row_products(h_at, x_at, width, K, BLOCK, C, PRECISION) * tl.load(d_at + tt)
            first_layer_gradient(
                x_at, anchor_2, dw_1, ds_1, dw_2 if AT_BOUNDARY else danchor_2, z1, dloss_dx1, y1, dx, d_last, em_at,
                g2_at, scores1, dg2_at, width, units, K, U, BLOCK, C, GELU, PRECISION,
            )  # fmt: skip
            gw, gs, dscores1 = first_layer_writes(dw_1, ds_1, z1, dloss_dx1, y1, units, K, U, BLOCK, C, GELU, PRECISION)
            x, dx_at, dq_at = tl.load(x_at + ti), grad_k + token_at * K, grad_q + token_at * K
            dd_end -= tl.sum(x * gw, 1)
            dem -= tl.sum(x * gs, 1)
            draw1 = dscores1 * tl.load(d_at + tt)
            times(draw1, x_at, dq_at, width, K, BLOCK, C, PRECISION)
            times(tl.trans(draw1), h_at, dx_at, width, K, BLOCK, C, PRECISION)
            tl.store(dx_at + ti, tl.load(dx_at + ti) - tl.load(d_last + tc) * gw - tl.load(em_at + tc) * gs)
            raw1 = row_products(h_at, x_at, width, K, BLOCK, C, PRECISION)
            tl.store(dd_at + tt, tl.load(dd_at + tt) + dscores1 * raw1)
            yw, ys, dw_c, ds_c, dse_c = first_layer_reads(
                h_at, w_1, s_1, dw_1, ds_1, y1, a_at, b_at, a_c, b_c, e_c, units, K, U, BLOCK, C, PRECISION
            )
            h0 = tl.load(h_at + ti)
            da, db = da + tl.sum(h0 * yw, 1), db + tl.sum(h0 * ys, 1)
            da_c, db_c, de_c = da_c + dw_c, db_c + ds_c, de_c + dse_c
            tl.store(dq_at + ti, tl.load(dq_at + ti) + tl.load(a_at + tc) * yw + tl.load(b_at + tc) * ys)

        dd_last = dd_at + (C - 1) * C + t
        tl.store(dd_last, tl.load(dd_last) + dd_end)
        tl.store(grad_a + token_at + t, da + tl.where(t == C - 1, da_c, 0.0))
        tl.store(grad_b + token_at + t, db + tl.where(t == C - 1, db_c, 0.0))
        tl.store(grad_e + token_at + t, tl.where(t == C - 1, de_c, 0.0))
        tl.store(grad_em + token_at + t, dem)

        z2, shifts = tl.load(dshift_at + ti), tl.load(shift_at + ti)
        error, gradient, length, normed, rstd, _ = inner_loss(z2, shifts, norm_w, NORM, CLIP, EPS, K)
        dg2 = tl.load(dg2_at + ti)
        if THRESHOLD is not None:
            dg2 = dg2 * (tl.sum(error * error, 1)[:, None] > THRESHOLD).to(tl.float32)
        dloss = tl.zeros([C, 1], tl.float32) if grad_loss is None else tl.load(grad_loss + token_at + t)[:, None]
        dz2, dshift, dgain = inner_loss_backward(
            dg2, dloss, error, gradient, length, normed, rstd, norm_w, NORM, CLIP, K
        )
        tl.debug_barrier()
        tl.store(dshift_at + ti, dshift)
        tl.store(g2_at + ti, dz2)
        if NORM:
            grad_at = grad_norm_weight + row * K + i
            tl.store(grad_at, tl.load(grad_at) + dgain)
        tl.debug_barrier()
        is_last = n == tl.load(last_chunk + row)  # the returned anchor was this chunk's
        dx1 = anchor_gradient(
            x_at, anchor_1, anchor_2, dw_1, dw_2, danchor_1, danchor_2, z1, dx, grad_k + token_at * K, g2_at, is_last,
            width, units, K, U, BLOCK, C, DEPTH, GELU, AT_BOUNDARY, PRECISION,
        )  # fmt: skip
        if DEPTH == 2:
            tl.store(dx_at + ti, tl.load(dx_at + ti) + dx1)
        tl.debug_barrier()  # gradients are written before the chunk before this one reads them
