"""The Triton kernel of the forward pass of chunks. Letters and equations: README.md one folder up.

One program is one row and head; it processes its chunks in order. The last layer's inputs are U *units*: the hidden
units at depth 2, the K inputs at depth 1. What belongs to a unit (its column of the first layer's weights, its row of
the last layer's) depends on other units through sums alone. So units are processed in blocks, and only one block's
weights are on chip at a time. In names, `2` is the last layer and its inputs, `1` the layer below.

Rows of a product are scaled where that is cheapest: by row, sum((x W) * y) equals sum(x * (y W^T)), which is needed
anyway. Weights are in global memory, where one thread writes what another reads: a barrier stands between, and loops
must not be pipelined across barriers (num_stages=1).

A chunk takes several loops over the blocks: `kernel_parts.py` says why.

Names ending in `_at` are places in global memory, offsets or pointers: of the row, of the chunk's tokens, of the state
before and after. `w_2` points to w2 before the chunk.
"""

from typing import no_type_check

import triton
import triton.language as tl

from titans_lm.ops.triton.kernel_mlp import act_derivative, dot, inner_loss
from titans_lm.ops.triton.kernel_parts import (
    block_offsets,
    first_layer_forward,
    keys_forward,
    last_layer_scores,
    row_products,
    times,
    unit_inputs,
)


@triton.jit
@no_type_check
def last_layer_reads(
    queries, w2, s2, a, b, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A * (H W) + B * (H S)"""
    t = tl.arange(0, C)
    y2 = tl.zeros([C, K], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        h2 = unit_inputs(queries, tu, DEPTH, GELU)
        y2 += dot(tl.load(a + t)[:, None] * h2, tl.load(w2 + ui), PRECISION)
        tl.debug_barrier()
        h2 = unit_inputs(queries, tu, DEPTH, GELU)
        y2 += dot(tl.load(b + t)[:, None] * h2, tl.load(s2 + ui), PRECISION)
    tl.debug_barrier()
    return y2


@triton.jit
@no_type_check
def last_layer_writes(
    keys, g2, w2, s2, new_w2, new_s2, anchor2, is_last, d_last, em, written, a_c, b_c, e_c, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, DEPTH: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W and S after the chunk, which may replace those before. Where there is an `anchor2`, it becomes W before if
    `is_last`. Returns the keys' squared lengths."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    square = tl.zeros([C], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        _, ui, tu = block_offsets(j, K, U, BLOCK, C)
        w, s, x2 = tl.load(w2 + ui), tl.load(s2 + ui), unit_inputs(keys, tu, DEPTH, GELU)
        square += tl.sum(x2 * x2, 1)
        if anchor2 is not None:
            tl.store(anchor2 + ui, w, mask=is_last & (ui >= 0))
        w = (
            a_c * w
            + b_c * s
            - dot(tl.trans(x2), (tl.load(d_last + t) * written)[:, None] * tl.load(g2 + ti), PRECISION)
        )
        tl.debug_barrier()
        x2 = unit_inputs(keys, tu, DEPTH, GELU)
        s = e_c * s - dot(tl.trans(x2), (tl.load(em + t) * written)[:, None] * tl.load(g2 + ti), PRECISION)
        tl.debug_barrier()  # all threads have read this block
        tl.store(new_w2 + ui, w)
        tl.store(new_s2 + ui, s)
    tl.debug_barrier()
    return square


@triton.jit
@no_type_check
def first_layer_writes(
    k, z1, dloss_dx1, w1, s1, new_w1, new_s1, anchor1, is_last, d_last, em, written, a_c, b_c, e_c, units,
    K: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `last_layer_writes`. Returns the squared lengths of G_1."""
    t = tl.arange(0, C)
    ti = t[:, None] * K + tl.arange(0, K)[None, :]
    square = tl.zeros([C], tl.float32)
    for j in tl.range(0, units, BLOCK, disable_licm=True):
        iu, _, tu = block_offsets(j, K, U, BLOCK, C)
        w, s = tl.load(w1 + iu), tl.load(s1 + iu)
        g1 = tl.load(dloss_dx1 + tu) * act_derivative(tl.load(z1 + tu), GELU)
        square += tl.sum(g1 * g1, 1)
        if anchor1 is not None:
            tl.store(anchor1 + iu, w, mask=is_last & (iu >= 0))
        keys = tl.trans(tl.load(k + ti).to(tl.float32))
        w = a_c * w + b_c * s - dot(keys, (tl.load(d_last + t) * written)[:, None] * g1, PRECISION)
        tl.debug_barrier()
        g1 = tl.load(dloss_dx1 + tu) * act_derivative(tl.load(z1 + tu), GELU)
        keys = tl.trans(tl.load(k + ti).to(tl.float32))
        s = e_c * s - dot(keys, (tl.load(em + t) * written)[:, None] * g1, PRECISION)
        tl.debug_barrier()
        tl.store(new_w1 + iu, w)
        tl.store(new_s1 + iu, s)
    tl.debug_barrier()
    return square


@triton.jit(do_not_specialize=["chunks", "rows", "width", "units"])  # one binary for all lengths and batches
@no_type_check
def forward_kernel(
    q, k, shift,  # [N, R, C, K]
    a, b, e, d, em,  # [N, R, C], d [N, R, C, C]
    norm_weight,  # [R, K], or None
    anchor1, anchor2,  # [R, K, U], [R, U, K]; an input, or with AT_BOUNDARY an output
    w1, s1, w2, s2,  # [slots, R, K, U], [slots, R, U, K]: slot 0 is the state before
    last_chunk,  # [R], the last chunk in which the row has a token
    y, loss, gradient_norm,  # Y_L [N, R, C, K], [N, R, C]
    scratch,  # [R, C (4 U + 2 K)], what the loops over one chunk's units leave for one another
    chunks, rows, width, units,
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
    z1 = scratch + row.to(tl.int64) * (C * (4 * U + 2 * K))
    y1, dloss_dx1, g2_at = z1 + C * U, z1 + 2 * C * U, z1 + 4 * C * U
    norm_w = tl.load(norm_weight + row * K + i)[None, :] if NORM else 0.0
    KEEPS_ANCHOR: tl.constexpr = AT_BOUNDARY and not ALL_STATES
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
        x_at, h_at, d_at, shift_at = k + token_at * K, q + token_at * K, d + token_at * C, shift + token_at * K
        a_at, b_at, em_at, d_last = a + token_at, b + token_at, em + token_at, d_at + (C - 1) * C
        a_c, b_c, e_c = tl.load(a_at + C - 1), tl.load(b_at + C - 1), tl.load(e + token_at + C - 1)
        w_2, s_2 = w2 + in_at, s2 + in_at
        anchor_2 = w_2 if AT_BOUNDARY else anchor2 + row_at
        if DEPTH == 2:
            w_1, s_1 = w1 + in_at, s1 + in_at
            anchor_1 = w_1 if AT_BOUNDARY else anchor1 + row_at
            keys, queries = z1, y1
        else:
            anchor_1 = None
            keys, queries = x_at, h_at

        z2 = keys_forward(x_at, anchor_1, anchor_2, z1, width, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION)
        error, _, _, _, _, g2 = inner_loss(z2, tl.load(shift_at + ti), norm_w, NORM, CLIP, EPS, K)
        token_loss = tl.sum(error * error, 1)
        written = tl.full([C], 1.0, tl.float32) if THRESHOLD is None else (token_loss > THRESHOLD).to(tl.float32)
        tl.store(g2_at + ti, g2)
        tl.debug_barrier()
        if DEPTH == 2:
            scores1 = None
            if not ALL_STATES:
                scores1 = row_products(h_at, x_at, width, K, BLOCK, C, PRECISION) * tl.load(d_at + tt)
                scores1 *= written[None, :]
            first_layer_forward(
                h_at, w_1, s_1, anchor_2, z1, dloss_dx1, y1, a_at, b_at, g2_at, scores1, width, units, not ALL_STATES,
                K, U, BLOCK, C, GELU, PRECISION,
            )  # fmt: skip
        if not ALL_STATES:
            raw2 = last_layer_scores(keys, queries, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION)
            scores2 = raw2 * tl.load(d_at + tt) * written[None, :]
            y_at = y + token_at * K
            times(-scores2, g2_at, y_at, width, K, BLOCK, C, PRECISION)
            y2 = last_layer_reads(queries, w_2, s_2, a_at, b_at, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION)
            tl.store(y_at + ti, tl.load(y_at + ti) + y2)

        # the state after the chunk: W <- A[C] W + B[C] S - X^T (D[C] * G), S <- E[C] S - X^T (Em[C] * G)
        is_last = (n == tl.load(last_chunk + row)) & KEEPS_ANCHOR
        x2_square = last_layer_writes(
            keys, g2_at, w_2, s_2, w2 + out_at, s2 + out_at, anchor2 + row_at if KEEPS_ANCHOR else None, is_last,
            d_last, em_at, written, a_c, b_c, e_c, units, K, U, BLOCK, C, DEPTH, GELU, PRECISION,
        )  # fmt: skip
        g1_square = tl.zeros([C], tl.float32)
        if DEPTH == 2:
            g1_square = first_layer_writes(
                x_at, z1, dloss_dx1, w_1, s_1, w1 + out_at, s1 + out_at, anchor1 + row_at if KEEPS_ANCHOR else None,
                is_last, d_last, em_at, written, a_c, b_c, e_c, units, K, U, BLOCK, C, GELU, PRECISION,
            )  # fmt: skip
        if SURPRISE and not ALL_STATES:
            x, g2 = tl.load(x_at + ti).to(tl.float32), tl.load(g2_at + ti)
            square = x2_square * tl.sum(g2 * g2, 1) + g1_square * tl.sum(x * x, 1)
            tl.store(loss + token_at + t, token_loss)
            tl.store(gradient_norm + token_at + t, tl.sqrt(square))
        tl.debug_barrier()  # the state is written before the next chunk reads it
