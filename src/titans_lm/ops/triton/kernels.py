"""Two Triton kernels: the forward and the backward pass of chunks. Letters and equations: README.md one folder up.

One program is one row and head; it processes its chunks in order. The last layer's inputs are U *units*: the hidden
units at depth 2, the K inputs at depth 1. What belongs to a unit (its column of the first layer's weights, its row of
the last layer's) depends on other units through sums alone. So units are processed in blocks, and only one block's
weights are on chip at a time. In names, `2` is the last layer and its inputs, `1` the layer below.

Rows of a product are scaled where that is cheapest: by row, sum((x W) * y) equals sum(x * (y W^T)), which is needed
anyway. Weights are in global memory, where one thread writes what another reads: a barrier stands between, and loops
must not be pipelined across barriers (num_stages=1).

Names ending in `_at` are offsets in global memory: of the row, of the chunk's tokens, of the state before and after.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans_lm.ops.triton.kernel_mlp import (
    act_derivative,
    act_second_derivative,
    activate,
    dot,
    inner_loss,
    inner_loss_backward,
)

# ------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["chunks", "rows"])  # one binary for all lengths and batches
@no_type_check
def forward_kernel(  # noqa: C901 - a kernel is one function
    q, k, shift,  # [N, R, C, K]
    a, b, e, d, em,  # [N, R, C], d [N, R, C, C]
    norm_weight,  # [R, K], or None
    anchor1, anchor2,  # [R, K, U], [R, U, K]; an input, or with AT_BOUNDARY an output
    w1, s1, w2, s2,  # [slots, R, K, U], [slots, R, U, K]: slot 0 is the state before
    last_chunk,  # [R], the last chunk in which the row has a token
    y, loss, gradient_norm,  # Y_L [N, R, C, K], [N, R, C]
    chunks, rows,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, EPS: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, ALL_STATES: tl.constexpr, SURPRISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Process chunks in order. With ALL_STATES, slot n of the state becomes that before chunk n, and nothing else is
    written. Else slot 1 becomes the state after the last chunk."""
    row = tl.program_id(0)
    t, i = tl.arange(0, C), tl.arange(0, K)
    ti, tt = t[:, None] * K + i[None, :], t[:, None] * C + t[None, :]
    row_at = row.to(tl.int64) * (K * U)
    norm_w = tl.load(norm_weight + row * K + i)[None, :] if NORM else 0.0
    for n in tl.range(chunks, disable_licm=True):
        token_at = (n * rows + row).to(tl.int64) * C
        if ALL_STATES:
            slot_in = n
            slot_out = n + 1
        else:
            slot_in = tl.minimum(n, 1)
            slot_out = 1
        in_at = row_at + (rows * K * U).to(tl.int64) * slot_in
        out_at = row_at + (rows * K * U).to(tl.int64) * slot_out
        x, h0 = tl.load(k + token_at * K + ti), tl.load(q + token_at * K + ti)
        a_t, b_t = tl.load(a + token_at + t)[:, None], tl.load(b + token_at + t)[:, None]
        em_t, d_end = tl.load(em + token_at + t)[:, None], tl.load(d + token_at * C + (C - 1) * C + t)[:, None]
        a_c, b_c, e_c = tl.load(a + token_at + C - 1), tl.load(b + token_at + C - 1), tl.load(e + token_at + C - 1)

        # keys forward at the anchor: Z_l = X_l W_l, X_{l+1} = act(Z_l)
        z2 = tl.zeros([C, K], tl.float32)
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            if DEPTH == 2:
                anchor = tl.load(w1 + in_at + iu) if AT_BOUNDARY else tl.load(anchor1 + row_at + iu)
                x2 = activate(dot(x, anchor, PRECISION), GELU)
            else:
                x2 = tl.load(k + token_at * K + tu).to(tl.float32)
            anchor = tl.load(w2 + in_at + ui) if AT_BOUNDARY else tl.load(anchor2 + row_at + ui)
            z2 += dot(x2, anchor, PRECISION)

        error, _, _, _, _, g2 = inner_loss(z2, tl.load(shift + token_at * K + ti), norm_w, NORM, CLIP, EPS, K)
        token_loss = tl.sum(error * error, 1)[:, None]
        g2_square = tl.sum(g2 * g2, 1)[:, None]
        written = tl.full([C, 1], 1.0, tl.float32)
        if THRESHOLD is not None:
            written = (token_loss > THRESHOLD).to(tl.float32)
        scores1 = dot(h0, tl.trans(x), PRECISION) * tl.load(d + token_at * C + tt)
        y2 = tl.zeros([C, K], tl.float32)
        raw2 = tl.zeros([C, C], tl.float32)
        norm_square = tl.zeros([C, 1], tl.float32)
        x_square = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)[:, None]
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            w_2, s_2 = tl.load(w2 + in_at + ui), tl.load(s2 + in_at + ui)
            if DEPTH == 2:
                # the first layer's keys back: G_1 = (G_2 W_2^T) * act'(Z_1), and its reads
                w_1, s_1 = tl.load(w1 + in_at + iu), tl.load(s1 + in_at + iu)
                z1 = dot(x, w_1 if AT_BOUNDARY else tl.load(anchor1 + row_at + iu), PRECISION)
                x2 = activate(z1, GELU)
                anchor = w_2 if AT_BOUNDARY else tl.load(anchor2 + row_at + ui)
                g1 = dot(g2, tl.trans(anchor), PRECISION) * act_derivative(z1, GELU)
                norm_square += tl.sum(g1 * g1, 1)[:, None] * x_square
                g1 = g1 * written
                y1 = a_t * dot(h0, w_1, PRECISION) + b_t * dot(h0, s_1, PRECISION) - dot(scores1, g1, PRECISION)
                h2 = activate(y1, GELU)
            else:
                x2, h2 = tl.load(k + token_at * K + tu).to(tl.float32), tl.load(q + token_at * K + tu).to(tl.float32)
            norm_square += tl.sum(x2 * x2, 1)[:, None] * g2_square
            y2 += dot(a_t * h2, w_2, PRECISION)
            y2 += dot(b_t * h2, s_2, PRECISION)
            raw2 += dot(h2, tl.trans(x2), PRECISION)

            # the state after the chunk: W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)
            tl.debug_barrier()  # all threads have read this block
            if DEPTH == 2:
                keys = tl.trans(x.to(tl.float32))
                tl.store(w1 + out_at + iu, a_c * w_1 + b_c * s_1 - dot(keys, d_end * g1, PRECISION))
                tl.store(s1 + out_at + iu, e_c * s_1 - dot(keys, em_t * g1, PRECISION))
            keys = tl.trans(x2)
            g = g2 * written
            tl.store(w2 + out_at + ui, a_c * w_2 + b_c * s_2 - dot(keys, d_end * g, PRECISION))
            tl.store(s2 + out_at + ui, e_c * s_2 - dot(keys, em_t * g, PRECISION))
            if AT_BOUNDARY and not ALL_STATES:  # noqa: SIM102 - a compile-time condition; the next is not
                if n == tl.load(last_chunk + row):
                    if DEPTH == 2:
                        tl.store(anchor1 + row_at + iu, w_1)
                    tl.store(anchor2 + row_at + ui, w_2)
        if not ALL_STATES:
            y2 -= dot(raw2 * tl.load(d + token_at * C + tt), g2 * written, PRECISION)
            tl.store(y + token_at * K + ti, y2)
            if SURPRISE:
                tl.store(loss + token_at + t[:, None], token_loss)
                tl.store(gradient_norm + token_at + t[:, None], tl.sqrt(norm_square))
        tl.debug_barrier()  # the state is written before the next chunk reads it


# ------------------------------------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=["chunks", "rows"])  # one binary for all lengths and batches
@no_type_check
def backward_kernel(  # noqa: C901
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
    scratch_z1, scratch_dx,  # [R, C, U], scratch between the passes over one chunk's units
    chunks, rows,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, EPS: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go back over chunks, last first. `dx` is the outer loss's gradient by x."""
    row = tl.program_id(0)
    t, i = tl.arange(0, C), tl.arange(0, K)
    ti, tt = t[:, None] * K + i[None, :], t[:, None] * C + t[None, :]
    row_at = row.to(tl.int64) * (K * U)
    scratch_at = row.to(tl.int64) * (C * U)
    norm_w = tl.load(norm_weight + row * K + i)[None, :] if NORM else 0.0
    for m in tl.range(chunks, disable_licm=True):
        n = chunks - 1 - m
        token_at = (n * rows + row).to(tl.int64) * C
        in_at = row_at + (rows * K * U).to(tl.int64) * n
        x, h0 = tl.load(k + token_at * K + ti), tl.load(q + token_at * K + ti)
        a_t, b_t = tl.load(a + token_at + t)[:, None], tl.load(b + token_at + t)[:, None]
        em_t, d_end = tl.load(em + token_at + t)[:, None], tl.load(d + token_at * C + (C - 1) * C + t)[:, None]
        a_c, b_c, e_c = tl.load(a + token_at + C - 1), tl.load(b + token_at + C - 1), tl.load(e + token_at + C - 1)

        # keys forward, as in `forward_kernel`
        z2 = tl.zeros([C, K], tl.float32)
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            if DEPTH == 2:
                anchor = tl.load(w1 + in_at + iu) if AT_BOUNDARY else tl.load(anchor1 + row_at + iu)
                z1 = dot(x, anchor, PRECISION)
                tl.store(scratch_z1 + scratch_at + t[:, None] * U + u[None, :], z1)
                x2 = activate(z1, GELU)
            else:
                x2 = tl.load(k + token_at * K + tu).to(tl.float32)
            anchor = tl.load(w2 + in_at + ui) if AT_BOUNDARY else tl.load(anchor2 + row_at + ui)
            z2 += dot(x2, anchor, PRECISION)
        tl.debug_barrier()

        # registers are scarce from here on: what is cheap is loaded or computed again
        tl.store(grad_shift + token_at * K + ti, z2)  # holds z2 until the gradient by shift is known
        error, _, _, _, _, g2 = inner_loss(z2, tl.load(shift + token_at * K + ti), norm_w, NORM, CLIP, EPS, K)
        written = tl.full([C, 1], 1.0, tl.float32)
        if THRESHOLD is not None:
            written = (tl.sum(error * error, 1)[:, None] > THRESHOLD).to(tl.float32)
            g2 = g2 * written
        dy2 = tl.load(grad_y + token_at * K + ti)
        decay = tl.load(d + token_at * C + tt)
        draw2 = -dot(dy2, tl.trans(g2), PRECISION) * decay
        scores1 = dot(h0, tl.trans(x), PRECISION) * decay
        dscores1, raw2 = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        dq, dx, dg2 = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
        da, db = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        dd_end, dem = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        da_c, db_c, de_c = 0.0, 0.0, 0.0
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            scratch_tu = scratch_at + t[:, None] * U + u[None, :]
            x, h0, dy2 = (
                tl.load(k + token_at * K + ti),
                tl.load(q + token_at * K + ti),
                tl.load(grad_y + token_at * K + ti),
            )
            w_2, s_2 = tl.load(w2 + in_at + ui), tl.load(s2 + in_at + ui)
            dw_2, ds_2 = tl.load(grad_w2 + row_at + ui), tl.load(grad_s2 + row_at + ui)
            if DEPTH == 2:
                w_1, s_1 = tl.load(w1 + in_at + iu), tl.load(s1 + in_at + iu)
                dw_1, ds_1 = tl.load(grad_w1 + row_at + iu), tl.load(grad_s1 + row_at + iu)
                anchor = w_2 if AT_BOUNDARY else tl.load(anchor2 + row_at + ui)
                z1 = tl.load(scratch_z1 + scratch_tu)
                x2 = activate(z1, GELU)
                dloss_dx1 = dot(g2, tl.trans(anchor), PRECISION)
                g1 = dloss_dx1 * act_derivative(z1, GELU)
                qw, qs = dot(h0, w_1, PRECISION), dot(h0, s_1, PRECISION)
                y1 = a_t * qw + b_t * qs - dot(scores1, g1, PRECISION)
                h2 = activate(y1, GELU)
            else:
                x2, h2 = tl.load(k + token_at * K + tu).to(tl.float32), tl.load(q + token_at * K + tu).to(tl.float32)

            # the last layer's reads: Y = A * (H W) + B * (H S) - ((H X^T) * D) G
            yw, ys = dot(dy2, tl.trans(w_2), PRECISION), dot(dy2, tl.trans(s_2), PRECISION)
            dh2 = a_t * yw + b_t * ys + dot(draw2, x2, PRECISION)
            da += tl.sum(h2 * yw, 1)
            db += tl.sum(h2 * ys, 1)
            raw2 += dot(h2, tl.trans(x2), PRECISION)
            # its writes: W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)
            gw, gs = dot(g2, tl.trans(dw_2), PRECISION), dot(g2, tl.trans(ds_2), PRECISION)
            dx2 = dot(tl.trans(draw2), h2, PRECISION) - d_end * gw - em_t * gs
            dd_end -= tl.sum(x2 * gw, 1)
            dem -= tl.sum(x2 * gs, 1)
            dg2 -= dot(d_end * x2, dw_2, PRECISION)
            dg2 -= dot(em_t * x2, ds_2, PRECISION)
            da_c += tl.sum(w_2 * dw_2)
            db_c += tl.sum(s_2 * dw_2)
            de_c += tl.sum(s_2 * ds_2)
            new_ds2 = e_c * ds_2 + b_c * dw_2 + dot(tl.trans(h2), b_t * dy2, PRECISION)
            new_dw2 = a_c * dw_2 + dot(tl.trans(h2), a_t * dy2, PRECISION)
            dx_part = dx2
            if DEPTH == 2:
                # the first layer's writes and reads
                dy1 = dh2 * act_derivative(y1, GELU)
                xw, xs = dot(x, dw_1, PRECISION), dot(x, ds_1, PRECISION)
                dg1 = -d_end * xw - em_t * xs - dot(tl.trans(scores1), dy1, PRECISION)
                dd_end -= tl.sum(g1 * xw, 1)
                dem -= tl.sum(g1 * xs, 1)
                dx -= dot(d_end * g1, tl.trans(dw_1), PRECISION)
                dx -= dot(em_t * g1, tl.trans(ds_1), PRECISION)
                dscores1 -= dot(dy1, tl.trans(g1), PRECISION)
                da += tl.sum(qw * dy1, 1)
                db += tl.sum(qs * dy1, 1)
                dq += dot(a_t * dy1, tl.trans(w_1), PRECISION)
                dq += dot(b_t * dy1, tl.trans(s_1), PRECISION)
                da_c += tl.sum(w_1 * dw_1)
                db_c += tl.sum(s_1 * dw_1)
                de_c += tl.sum(s_1 * ds_1)
                queries = tl.trans(h0.to(tl.float32))
                new_ds1 = e_c * ds_1 + b_c * dw_1 + dot(queries, b_t * dy1, PRECISION)
                new_dw1 = a_c * dw_1 + dot(queries, a_t * dy1, PRECISION)
                # G_1 = (G_2 W_2^T) * act'(Z_1), at the anchor; unwritten tokens' G_2 is 0
                ddloss_dx1 = dg1 * act_derivative(z1, GELU)
                dg2 += dot(ddloss_dx1, anchor, PRECISION)
                danchor = dot(tl.trans(ddloss_dx1), g2, PRECISION)
                dx_part = dg1 * dloss_dx1 * act_second_derivative(z1, GELU) + dx2 * act_derivative(z1, GELU)
                if AT_BOUNDARY:
                    new_dw2 += danchor
                else:
                    danchor += tl.load(grad_anchor2 + row_at + ui)
            tl.debug_barrier()  # all threads have read this block
            tl.store(scratch_dx + scratch_tu, dx_part)
            tl.store(grad_w2 + row_at + ui, new_dw2)
            tl.store(grad_s2 + row_at + ui, new_ds2)
            if DEPTH == 2:
                tl.store(grad_w1 + row_at + iu, new_dw1)
                tl.store(grad_s1 + row_at + iu, new_ds1)
                if not AT_BOUNDARY:
                    tl.store(grad_anchor2 + row_at + ui, danchor)
            else:
                tl.store(grad_q + token_at * K + tu, dh2)

        # scores, decays, and sums over all units
        x, h0, dy2 = tl.load(k + token_at * K + ti), tl.load(q + token_at * K + ti), tl.load(grad_y + token_at * K + ti)
        decay = tl.load(d + token_at * C + tt)
        dg2 -= dot(tl.trans(raw2 * decay), dy2, PRECISION)
        dd = -dot(dy2, tl.trans(g2), PRECISION) * raw2 + tl.where(t[:, None] == C - 1, dd_end[None, :], 0.0)
        if DEPTH == 2:
            draw1 = dscores1 * decay
            dd += dscores1 * dot(h0, tl.trans(x), PRECISION)
            dq += dot(draw1, x, PRECISION)
            dx += dot(tl.trans(draw1), h0, PRECISION)
            tl.store(grad_q + token_at * K + ti, dq)
        tl.store(grad_d + token_at * C + tt, dd)
        tl.store(grad_a + token_at + t, da + tl.where(t == C - 1, da_c, 0.0))
        tl.store(grad_b + token_at + t, db + tl.where(t == C - 1, db_c, 0.0))
        tl.store(grad_e + token_at + t, tl.where(t == C - 1, de_c, 0.0))
        tl.store(grad_em + token_at + t, dem)

        # the keys' backward pass to the anchor, last layer first: Z_l = X_l W_l, X_{l+1} = act(Z_l)
        z2, shifts = tl.load(grad_shift + token_at * K + ti), tl.load(shift + token_at * K + ti)
        error, gradient, length, normed, rstd, _ = inner_loss(z2, shifts, norm_w, NORM, CLIP, EPS, K)
        dloss = tl.zeros([C, 1], tl.float32) if grad_loss is None else tl.load(grad_loss + token_at + t)[:, None]
        dz2, dshift, dgain = inner_loss_backward(
            dg2 * written, dloss, error, gradient, length, normed, rstd, norm_w, NORM, CLIP, K
        )
        tl.debug_barrier()
        tl.store(grad_shift + token_at * K + ti, dshift)
        if NORM:
            grad_at = grad_norm_weight + row * K + i
            tl.store(grad_at, tl.load(grad_at) + dgain)
        tl.debug_barrier()
        is_last = n == tl.load(last_chunk + row)  # the returned anchor was this chunk's
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            scratch_tu = scratch_at + t[:, None] * U + u[None, :]
            if AT_BOUNDARY:
                anchor = tl.load(w2 + in_at + ui)
                danchor = tl.load(grad_w2 + row_at + ui) + tl.load(
                    grad_anchor2 + row_at + ui, mask=is_last & (ui >= 0), other=0.0
                )
            else:
                anchor = tl.load(anchor2 + row_at + ui)
                danchor = tl.load(grad_anchor2 + row_at + ui)
            dx_part = tl.load(scratch_dx + scratch_tu)
            dx2 = dot(dz2, tl.trans(anchor), PRECISION)
            if DEPTH == 2:
                z1 = tl.load(scratch_z1 + scratch_tu)
                x2 = activate(z1, GELU)
                dz1 = dx_part + dx2 * act_derivative(z1, GELU)
                if AT_BOUNDARY:
                    anchor = tl.load(w1 + in_at + iu)
                    danchor1 = tl.load(grad_w1 + row_at + iu)
                    danchor1 += tl.load(grad_anchor1 + row_at + iu, mask=is_last & (iu >= 0), other=0.0)
                else:
                    anchor = tl.load(anchor1 + row_at + iu)
                    danchor1 = tl.load(grad_anchor1 + row_at + iu)
                danchor1 += dot(tl.trans(x.to(tl.float32)), dz1, PRECISION)
                dx += dot(dz1, tl.trans(anchor), PRECISION)
            else:
                x2 = tl.load(k + token_at * K + tu).to(tl.float32)
                tl.store(grad_k + token_at * K + tu, dx_part + dx2)
            danchor += dot(tl.trans(x2), dz2, PRECISION)
            tl.debug_barrier()
            if AT_BOUNDARY:
                tl.store(grad_w2 + row_at + ui, danchor)
            else:
                tl.store(grad_anchor2 + row_at + ui, danchor)
            if DEPTH == 2:
                if AT_BOUNDARY:
                    tl.store(grad_w1 + row_at + iu, danchor1)
                else:
                    tl.store(grad_anchor1 + row_at + iu, danchor1)
        if DEPTH == 2:
            tl.store(grad_k + token_at * K + ti, dx)
        tl.debug_barrier()  # gradients are written before the chunk before this one reads them
