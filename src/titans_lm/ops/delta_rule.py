"""A linear memory that takes every token's gradient at its own weights: a block of tokens is one triangular system.

Depth 1, plain form, chunk_size 1: DeltaNet, Gated DeltaNet, Titans whose memory is a matrix. Derivation: README.md
beside this file. Gradients are autograd's.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from titans_lm.ops.chunked.group import Seen, Span
from titans_lm.ops.chunked.scan import Inputs, cached_size, group_size, in_spans, rows_of, to_tokens
from titans_lm.ops.decays import Decays, Gates, back_decays, decays
from titans_lm.ops.types import Answer, Call, MemoryState, Tokens

BLOCK = 32
"""Tokens c of a block: with more there are fewer steps one after another, and more work in triangles."""

# ------------------------------------------------------------------------------------------------ what can run


def obstacle(call: Call) -> str | None:
    """Why this form cannot run `call`; None where it can."""
    depth, form = len(call.state.weights), call.form
    if depth != 1:
        return f"reads memories of depth 1, got {depth}"
    if call.chunk_size != 1:
        return f"reads with chunk_size=1, got {call.chunk_size}"
    if form.norm is not None:
        return "reads the plain form, got the residual form"
    if form.clip is not None or form.threshold is not None:
        return f"reads without clip and threshold, got clip={form.clip}, threshold={form.threshold}"
    return None


# ------------------------------------------------------------------------------------------------ blocks


class _Decays(torch.autograd.Function):
    """`decays`, and `back_decays` for its backward pass."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, eta: Tensor, alpha: Tensor, present: Tensor | None) -> tuple[Tensor, ...]:
        left, gates = decays(theta, eta, alpha, present)
        ctx.save_for_backward(*gates)
        return tuple(left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
        return *back_decays(Decays(*by), Gates(*ctx.saved_tensors)), None


class Errors(NamedTuple):
    """G of all blocks, as functions of the state at a block's start: G = from_w W + from_s S - from_v."""

    from_w: Tensor  # [N, R, c, K]
    from_s: Tensor
    from_v: Tensor  # [N, R, c, V]


def solve(k: Tensor, v: Tensor, left: Decays) -> Errors:
    """G_t = 2 (k_t M_{t-1} - v_t), where M_{t-1} has what the block's tokens before t wrote.

    (I + 2 (K K^T) * D') G = 2 (A' * K W + B' * K S - V), with A', B', D' one token before A, B, D.
    """
    before = ((left.a, 1), (left.b, 0), (left.d, 0))
    a, b, d = (F.pad(x[..., :-1, :], (0, 0, 1, 0), value=at_start) for x, at_start in before)
    twice = 2 * k
    triangle = (twice @ k.mT) * d
    sides = torch.cat([a * twice, b * twice, 2 * v], -1)
    # transposed: so the numbers lie as the solver wants them, and are not copied
    solved = torch.linalg.solve_triangular(triangle.mT, sides.mT, upper=True, left=False, unitriangular=True).mT
    return Errors(*solved.split([k.shape[-1], k.shape[-1], v.shape[-1]], -1))


class Walk(NamedTuple):
    """What going from block to block gives."""

    w: Tensor  # at the start of each block, [N, R, K, V]
    s: Tensor
    g: Tensor  # [N, R, c, V]
    after: tuple[Tensor, Tensor]  # W and S at the end, [R, K, V]


def walk(k: Tensor, left: Decays, errors: Errors, w: Tensor, s: Tensor) -> Walk:
    """W and S from block to block: the only part that is not done for many blocks at once."""
    ends = (x[..., -1:, :] for x in (left.a, left.b, left.e))
    writes = ((kept * k).mT for kept in (left.d[..., -1, :, None], left.em))
    starts_w, starts_s, found = [], [], []
    blocks = zip(*(x.unbind(0) for x in (*errors, *ends, *writes)), strict=True)
    for from_w, from_s, from_v, a, b, e, write_w, write_s in blocks:
        g = torch.baddbmm(torch.baddbmm(from_v, from_w, w, beta=-1), from_s, s)
        starts_w.append(w)
        starts_s.append(s)
        found.append(g)
        w = torch.baddbmm(torch.addcmul(a * w, b, s), write_w, g, alpha=-1)
        s = torch.baddbmm(e * s, write_s, g, alpha=-1)
    return Walk(torch.stack(starts_w), torch.stack(starts_s), torch.stack(found), (w, s))


def read_blocks(tokens: Tokens, span: Span, first: int, w: Tensor, s: Tensor) -> tuple[Seen, Tensor, Tensor]:
    """Read tokens `[B, S, H, *]`, which are blocks of `span` from its slot `first` on: what is seen, W and S after."""
    batch, slots = tokens.q.shape[:2]
    (q, k, v, *gates), span = rows_of(tokens, span, slice(first, first + slots))
    left = Decays(*_Decays.apply(*gates, span.present))
    at = walk(k, left, solve(k, v, left), w, s)
    y = left.a * (q @ at.w) + left.b * (q @ at.s) - ((q @ k.mT) * left.d) @ at.g
    loss = norm = None
    if span.surprise:
        square, key = at.g.square().sum(-1), k.detach().square().sum(-1)
        loss, norm = to_tokens(square / 4, batch), to_tokens((square.detach() * key).sqrt(), batch)
    return (to_tokens(y, batch), loss, norm), *at.after


# ------------------------------------------------------------------------------------------------ spans, the whole call


def read_span(span: Span, inputs: Inputs, kept_bytes: int) -> tuple[Any, ...]:
    """As `chunked.read_span`; its chunks are blocks here."""
    (w,), (s,) = inputs.state
    size, read = cached_size(inputs, span), read_blocks
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs.tokens, w, s)):
        blocks, keep = group_size(inputs.slots() // span.width, _left_bytes(inputs, span), kept_bytes * span.share)
        size = blocks * span.width
        if not keep:
            read = partial(checkpoint, read_blocks, use_reentrant=False, preserve_rng_state=False)
    parts = []
    for i, tokens in enumerate(zip(*(x.split(size, 1) for x in inputs.tokens), strict=True)):
        seen, w, s = read(Tokens(*tokens), span, i * size, w, s)
        parts.append(seen)
    return *(None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True)), inputs.anchor, [w], [s]


def _left_bytes(inputs: Inputs, span: Span) -> int:
    """What a block leaves for its backward pass."""
    ((i, o),), c = inputs.shapes(), span.width
    return (4 * i * o + c * (7 * i + 6 * o + 9 * c)) * len(inputs.anchor[0]) * inputs.tokens.q.element_size()


def linear(call: Call) -> Answer:
    """As `naive`, where there is no `obstacle`."""
    start = torch.zeros_like(call.state.position)
    blocks = call._replace(chunk_size=BLOCK, state=call.state._replace(position=start))  # are laid out as chunks are
    y, state, seen = in_spans(blocks, partial(read_span, kept_bytes=call.kept_bytes))
    return y, MemoryState(state.weights, state.weights, state.momentum, start), seen
