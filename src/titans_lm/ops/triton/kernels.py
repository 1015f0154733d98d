"""Two Triton kernels: chunks forward (`read`) and back (`back`); letters and equations: README.md one folder up.

One program is one row and head, and walks over its chunks. The last layer's inputs are U *units*: the hidden units of a
memory of depth 2, or the K inputs themselves of depth 1. Everything that belongs to a unit (its column of the first
layer's weights, its row of the last's) depends on other units through sums alone, so units go through in blocks, and a
block's weights are all that is on chip at one time. `2` is the last layer and its inputs, `1` the layer below.

Rows of a product are scaled where that is cheapest: sum((x W) * y) by row is also sum(x * (y W^T)), which is wanted
anyway. Weights live in global memory and are written there by one thread and read by another: every read is a barrier
apart from the write before it, and loops must not be pipelined across the barriers (num_stages=1).
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans_lm.ops.triton.kernel_mlp import activate, back_output, curvature, dot, read_output, slope

# ------------------------------------------------------------------------------------------------ forward


@triton.jit
@no_type_check
def read(  # noqa: C901 - a kernel is one function
    q, k, shift,  # [N, R, C, K]
    a, b, e, d, em,  # [N, R, C], d [N, R, C, C]
    gain,  # [R, K], the norm's weight, or None
    anchor1, anchor2,  # [R, K, U], [R, U, K]; given, or written where chunks begin at a boundary
    w1, s1, w2, s2,  # [slots, R, K, U], [slots, R, U, K]: 0 is the state before
    last,  # [R], the last chunk in which the row has a token
    y, loss, norm,  # Y_L [N, R, C, K], [N, R, C]
    chunks, rows,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, EPS: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, EACH: tl.constexpr, SURPRISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read chunks. With EACH slot n of the state is that before chunk n, and nothing else is written; else slot 1 is
    the state after all of them."""
    row = tl.program_id(0)
    t, i = tl.arange(0, C), tl.arange(0, K)
    ti, tt = t[:, None] * K + i[None, :], t[:, None] * C + t[None, :]
    here = row.to(tl.int64) * (K * U)
    gains = tl.load(gain + row * K + i)[None, :] if NORM else 0.0
    for n in tl.range(chunks, disable_licm=True):
        at = (n * rows + row).to(tl.int64) * C
        if EACH:
            before = n
            after = n + 1
        else:
            before = tl.minimum(n, 1)
            after = 1
        old = here + (rows * K * U).to(tl.int64) * before
        new = here + (rows * K * U).to(tl.int64) * after
        x, h0 = tl.load(k + at * K + ti), tl.load(q + at * K + ti)
        a_t, b_t = tl.load(a + at + t)[:, None], tl.load(b + at + t)[:, None]
        em_t, kept = tl.load(em + at + t)[:, None], tl.load(d + at * C + (C - 1) * C + t)[:, None]
        a_c, b_c, e_c = tl.load(a + at + C - 1), tl.load(b + at + C - 1), tl.load(e + at + C - 1)

        # keys forward at the anchor: Z_l = X_l W_l, X_{l+1} = act(Z_l)
        z2 = tl.zeros([C, K], tl.float32)
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            if DEPTH == 2:
                anchor = tl.load(w1 + old + iu) if AT_BOUNDARY else tl.load(anchor1 + here + iu)
                x2 = activate(dot(x, anchor, PRECISION), GELU)
            else:
                x2 = tl.load(k + at * K + tu).to(tl.float32)
            anchor = tl.load(w2 + old + ui) if AT_BOUNDARY else tl.load(anchor2 + here + ui)
            z2 += dot(x2, anchor, PRECISION)

        error, _, _, _, _, g2 = read_output(z2, tl.load(shift + at * K + ti), gains, NORM, CLIP, EPS, K)
        mistake = tl.sum(error * error, 1)[:, None]
        g2_square = tl.sum(g2 * g2, 1)[:, None]
        written = tl.full([C, 1], 1.0, tl.float32)
        if THRESHOLD is not None:
            written = (mistake > THRESHOLD).to(tl.float32)
        scores1 = dot(h0, tl.trans(x), PRECISION) * tl.load(d + at * C + tt)
        y2 = tl.zeros([C, K], tl.float32)
        raw2 = tl.zeros([C, C], tl.float32)
        square = tl.zeros([C, 1], tl.float32)
        x_square = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)[:, None]
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            w_2, s_2 = tl.load(w2 + old + ui), tl.load(s2 + old + ui)
            if DEPTH == 2:
                # the first layer's keys back: G_1 = (G_2 W_2^T) * act'(Z_1), and its reads
                w_1, s_1 = tl.load(w1 + old + iu), tl.load(s1 + old + iu)
                z1 = dot(x, w_1 if AT_BOUNDARY else tl.load(anchor1 + here + iu), PRECISION)
                x2 = activate(z1, GELU)
                anchor = w_2 if AT_BOUNDARY else tl.load(anchor2 + here + ui)
                g1 = dot(g2, tl.trans(anchor), PRECISION) * slope(z1, GELU)
                square += tl.sum(g1 * g1, 1)[:, None] * x_square
                g1 = g1 * written
                y1 = a_t * dot(h0, w_1, PRECISION) + b_t * dot(h0, s_1, PRECISION) - dot(scores1, g1, PRECISION)
                h2 = activate(y1, GELU)
            else:
                x2, h2 = tl.load(k + at * K + tu).to(tl.float32), tl.load(q + at * K + tu).to(tl.float32)
            square += tl.sum(x2 * x2, 1)[:, None] * g2_square
            y2 += dot(a_t * h2, w_2, PRECISION)
            y2 += dot(b_t * h2, s_2, PRECISION)
            raw2 += dot(h2, tl.trans(x2), PRECISION)

            # what follows: W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)
            tl.debug_barrier()  # all have read this block
            if DEPTH == 2:
                keys = tl.trans(x.to(tl.float32))
                tl.store(w1 + new + iu, a_c * w_1 + b_c * s_1 - dot(keys, kept * g1, PRECISION))
                tl.store(s1 + new + iu, e_c * s_1 - dot(keys, em_t * g1, PRECISION))
            keys = tl.trans(x2)
            g = g2 * written
            tl.store(w2 + new + ui, a_c * w_2 + b_c * s_2 - dot(keys, kept * g, PRECISION))
            tl.store(s2 + new + ui, e_c * s_2 - dot(keys, em_t * g, PRECISION))
            if AT_BOUNDARY and not EACH:  # noqa: SIM102 - known to the compiler; what follows is not
                if n == tl.load(last + row):
                    if DEPTH == 2:
                        tl.store(anchor1 + here + iu, w_1)
                    tl.store(anchor2 + here + ui, w_2)
        if not EACH:
            y2 -= dot(raw2 * tl.load(d + at * C + tt), g2 * written, PRECISION)
            tl.store(y + at * K + ti, y2)
            if SURPRISE:
                tl.store(loss + at + t[:, None], mistake)
                tl.store(norm + at + t[:, None], tl.sqrt(square))
        tl.debug_barrier()  # the state is written before the next chunk reads it


# ------------------------------------------------------------------------------------------------ back


@triton.jit
@no_type_check
def back(  # noqa: C901
    q, k, shift,  # [N, R, C, K]
    a, b, e, d, em,  # [N, R, C], d [N, R, C, C]
    gain,  # [R, K] or None
    anchor1, anchor2,  # [R, K, U], [R, U, K], where chunks do not begin at a boundary
    w1, s1, w2, s2,  # [slots, R, K, U], [slots, R, U, K]: slot n is the state before chunk n
    last,  # [R], the last chunk in which the row has a token
    by_y, by_loss,  # [N, R, C, K], [N, R, C] or None
    by_anchor1, by_anchor2,  # [R, K, U], [R, U, K]: by the last anchor; where it is given, by it, in place
    by_w1, by_s1, by_w2, by_s2,  # by the state after; in place, by the state before
    by_q, by_k, by_shift, by_a, by_b, by_e, by_d, by_em, by_gain,  # of the inputs; by_gain is added to
    kept_z1, kept_part,  # [R, C, U], room for what one chunk's passes leave for each other
    chunks, rows,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr,
    GELU: tl.constexpr, NORM: tl.constexpr, CLIP: tl.constexpr, THRESHOLD: tl.constexpr, EPS: tl.constexpr,
    AT_BOUNDARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks from the last to the first. `dx` is the outer loss's gradient by x."""
    row = tl.program_id(0)
    t, i = tl.arange(0, C), tl.arange(0, K)
    ti, tt = t[:, None] * K + i[None, :], t[:, None] * C + t[None, :]
    here = row.to(tl.int64) * (K * U)
    room = row.to(tl.int64) * (C * U)
    gains = tl.load(gain + row * K + i)[None, :] if NORM else 0.0
    for m in tl.range(chunks, disable_licm=True):
        n = chunks - 1 - m
        at = (n * rows + row).to(tl.int64) * C
        old = here + (rows * K * U).to(tl.int64) * n
        x, h0 = tl.load(k + at * K + ti), tl.load(q + at * K + ti)
        a_t, b_t = tl.load(a + at + t)[:, None], tl.load(b + at + t)[:, None]
        em_t, kept = tl.load(em + at + t)[:, None], tl.load(d + at * C + (C - 1) * C + t)[:, None]
        a_c, b_c, e_c = tl.load(a + at + C - 1), tl.load(b + at + C - 1), tl.load(e + at + C - 1)

        # keys forward, as in `read`
        z2 = tl.zeros([C, K], tl.float32)
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            if DEPTH == 2:
                anchor = tl.load(w1 + old + iu) if AT_BOUNDARY else tl.load(anchor1 + here + iu)
                z1 = dot(x, anchor, PRECISION)
                tl.store(kept_z1 + room + t[:, None] * U + u[None, :], z1)
                x2 = activate(z1, GELU)
            else:
                x2 = tl.load(k + at * K + tu).to(tl.float32)
            anchor = tl.load(w2 + old + ui) if AT_BOUNDARY else tl.load(anchor2 + here + ui)
            z2 += dot(x2, anchor, PRECISION)
        tl.debug_barrier()

        # much is alive from here on: what is cheap to load or to compute again is, rather than held
        tl.store(by_shift + at * K + ti, z2)  # until its own value is there
        error, _, _, _, _, g2 = read_output(z2, tl.load(shift + at * K + ti), gains, NORM, CLIP, EPS, K)
        written = tl.full([C, 1], 1.0, tl.float32)
        if THRESHOLD is not None:
            written = (tl.sum(error * error, 1)[:, None] > THRESHOLD).to(tl.float32)
            g2 = g2 * written
        dy2 = tl.load(by_y + at * K + ti)
        decay = tl.load(d + at * C + tt)
        draw2 = -dot(dy2, tl.trans(g2), PRECISION) * decay
        scores1 = dot(h0, tl.trans(x), PRECISION) * decay
        dscores1, raw2 = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        dq, dx, dg2 = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
        da, db = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        dkept, dem = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        da_c, db_c, de_c = 0.0, 0.0, 0.0
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            in_room = room + t[:, None] * U + u[None, :]
            x, h0, dy2 = tl.load(k + at * K + ti), tl.load(q + at * K + ti), tl.load(by_y + at * K + ti)
            w_2, s_2 = tl.load(w2 + old + ui), tl.load(s2 + old + ui)
            dw_2, ds_2 = tl.load(by_w2 + here + ui), tl.load(by_s2 + here + ui)
            if DEPTH == 2:
                w_1, s_1 = tl.load(w1 + old + iu), tl.load(s1 + old + iu)
                dw_1, ds_1 = tl.load(by_w1 + here + iu), tl.load(by_s1 + here + iu)
                anchor = w_2 if AT_BOUNDARY else tl.load(anchor2 + here + ui)
                z1 = tl.load(kept_z1 + in_room)
                x2 = activate(z1, GELU)
                back1 = dot(g2, tl.trans(anchor), PRECISION)
                g1 = back1 * slope(z1, GELU)
                qw, qs = dot(h0, w_1, PRECISION), dot(h0, s_1, PRECISION)
                y1 = a_t * qw + b_t * qs - dot(scores1, g1, PRECISION)
                h2 = activate(y1, GELU)
            else:
                x2, h2 = tl.load(k + at * K + tu).to(tl.float32), tl.load(q + at * K + tu).to(tl.float32)

            # the last layer's reads: Y = A * (H W) + B * (H S) - ((H X^T) * D) G
            yw, ys = dot(dy2, tl.trans(w_2), PRECISION), dot(dy2, tl.trans(s_2), PRECISION)
            dh2 = a_t * yw + b_t * ys + dot(draw2, x2, PRECISION)
            da += tl.sum(h2 * yw, 1)
            db += tl.sum(h2 * ys, 1)
            raw2 += dot(h2, tl.trans(x2), PRECISION)
            # its writes: W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)
            gw, gs = dot(g2, tl.trans(dw_2), PRECISION), dot(g2, tl.trans(ds_2), PRECISION)
            dx2 = dot(tl.trans(draw2), h2, PRECISION) - kept * gw - em_t * gs
            dkept -= tl.sum(x2 * gw, 1)
            dem -= tl.sum(x2 * gs, 1)
            dg2 -= dot(kept * x2, dw_2, PRECISION)
            dg2 -= dot(em_t * x2, ds_2, PRECISION)
            da_c += tl.sum(w_2 * dw_2)
            db_c += tl.sum(s_2 * dw_2)
            de_c += tl.sum(s_2 * ds_2)
            new_ds2 = e_c * ds_2 + b_c * dw_2 + dot(tl.trans(h2), b_t * dy2, PRECISION)
            new_dw2 = a_c * dw_2 + dot(tl.trans(h2), a_t * dy2, PRECISION)
            part = dx2
            if DEPTH == 2:
                # the first layer's writes and reads
                dy1 = dh2 * slope(y1, GELU)
                xw, xs = dot(x, dw_1, PRECISION), dot(x, ds_1, PRECISION)
                dg1 = -kept * xw - em_t * xs - dot(tl.trans(scores1), dy1, PRECISION)
                dkept -= tl.sum(g1 * xw, 1)
                dem -= tl.sum(g1 * xs, 1)
                dx -= dot(kept * g1, tl.trans(dw_1), PRECISION)
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
                dback = dg1 * slope(z1, GELU)
                dg2 += dot(dback, anchor, PRECISION)
                danchor = dot(tl.trans(dback), g2, PRECISION)
                part = dg1 * back1 * curvature(z1, GELU) + dx2 * slope(z1, GELU)
                if AT_BOUNDARY:
                    new_dw2 += danchor
                else:
                    danchor += tl.load(by_anchor2 + here + ui)
            tl.debug_barrier()  # all have read this block
            tl.store(kept_part + in_room, part)
            tl.store(by_w2 + here + ui, new_dw2)
            tl.store(by_s2 + here + ui, new_ds2)
            if DEPTH == 2:
                tl.store(by_w1 + here + iu, new_dw1)
                tl.store(by_s1 + here + iu, new_ds1)
                if not AT_BOUNDARY:
                    tl.store(by_anchor2 + here + ui, danchor)
            else:
                tl.store(by_q + at * K + tu, dh2)

        # scores, decays, and what is known once all units are through
        x, h0, dy2 = tl.load(k + at * K + ti), tl.load(q + at * K + ti), tl.load(by_y + at * K + ti)
        decay = tl.load(d + at * C + tt)
        dg2 -= dot(tl.trans(raw2 * decay), dy2, PRECISION)
        dd = -dot(dy2, tl.trans(g2), PRECISION) * raw2 + tl.where(t[:, None] == C - 1, dkept[None, :], 0.0)
        if DEPTH == 2:
            draw1 = dscores1 * decay
            dd += dscores1 * dot(h0, tl.trans(x), PRECISION)
            dq += dot(draw1, x, PRECISION)
            dx += dot(tl.trans(draw1), h0, PRECISION)
            tl.store(by_q + at * K + ti, dq)
        tl.store(by_d + at * C + tt, dd)
        tl.store(by_a + at + t, da + tl.where(t == C - 1, da_c, 0.0))
        tl.store(by_b + at + t, db + tl.where(t == C - 1, db_c, 0.0))
        tl.store(by_e + at + t, tl.where(t == C - 1, de_c, 0.0))
        tl.store(by_em + at + t, dem)

        # the keys' way back to the anchor, from the top down: Z_l = X_l W_l, X_{l+1} = act(Z_l)
        z2, shifts = tl.load(by_shift + at * K + ti), tl.load(shift + at * K + ti)
        error, gradient, size, normed, inverse, _ = read_output(z2, shifts, gains, NORM, CLIP, EPS, K)
        dloss = tl.zeros([C, 1], tl.float32) if by_loss is None else tl.load(by_loss + at + t)[:, None]
        dz2, dshift, dgain = back_output(
            dg2 * written, dloss, error, gradient, size, normed, inverse, gains, NORM, CLIP, K
        )
        tl.debug_barrier()
        tl.store(by_shift + at * K + ti, dshift)
        if NORM:
            total = by_gain + row * K + i
            tl.store(total, tl.load(total) + dgain)
        tl.debug_barrier()
        ends = n == tl.load(last + row)  # the anchor returned was this chunk's
        for j in tl.range(0, U, BLOCK, disable_licm=True):
            u = j + tl.arange(0, BLOCK)
            iu, ui, tu = i[:, None] * U + u[None, :], u[:, None] * K + i[None, :], t[:, None] * K + u[None, :]
            in_room = room + t[:, None] * U + u[None, :]
            if AT_BOUNDARY:
                anchor = tl.load(w2 + old + ui)
                danchor = tl.load(by_w2 + here + ui) + tl.load(by_anchor2 + here + ui, mask=ends & (ui >= 0), other=0.0)
            else:
                anchor = tl.load(anchor2 + here + ui)
                danchor = tl.load(by_anchor2 + here + ui)
            part = tl.load(kept_part + in_room)
            dx2 = dot(dz2, tl.trans(anchor), PRECISION)
            if DEPTH == 2:
                z1 = tl.load(kept_z1 + in_room)
                x2 = activate(z1, GELU)
                dz1 = part + dx2 * slope(z1, GELU)
                if AT_BOUNDARY:
                    anchor = tl.load(w1 + old + iu)
                    danchor1 = tl.load(by_w1 + here + iu)
                    danchor1 += tl.load(by_anchor1 + here + iu, mask=ends & (iu >= 0), other=0.0)
                else:
                    anchor = tl.load(anchor1 + here + iu)
                    danchor1 = tl.load(by_anchor1 + here + iu)
                danchor1 += dot(tl.trans(x.to(tl.float32)), dz1, PRECISION)
                dx += dot(dz1, tl.trans(anchor), PRECISION)
            else:
                x2 = tl.load(k + at * K + tu).to(tl.float32)
                tl.store(by_k + at * K + tu, part + dx2)
            danchor += dot(tl.trans(x2), dz2, PRECISION)
            tl.debug_barrier()
            if AT_BOUNDARY:
                tl.store(by_w2 + here + ui, danchor)
            else:
                tl.store(by_anchor2 + here + ui, danchor)
            if DEPTH == 2:
                if AT_BOUNDARY:
                    tl.store(by_w1 + here + iu, danchor1)
                else:
                    tl.store(by_anchor1 + here + iu, danchor1)
        if DEPTH == 2:
            tl.store(by_k + at * K + ti, dx)
        tl.debug_barrier()  # gradients are written before the chunk before this one reads them
