"""A linear memory with an anchor for every token: a block of tokens is one triangular system.

It is for depth 1, the plain form and chunk_size 1: DeltaNet, Gated DeltaNet, Titans whose memory is a matrix.
Derivation: README.md beside this file. Gradients are autograd's, but for the decays.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_lm.ops import grouping
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.chunked.group import ChunkRun, GroupOutput
from titans_lm.ops.chunked.scan import (
    RunInputs,
    RunOutput,
    StateLayers,
    group_rows,
    scan_runs,
    slots_without_grad,
    to_tokens,
)
from titans_lm.ops.decays import Decays, SavedDecays, chunk_decays, decays_backward
from titans_lm.ops.types import MemoryState, ScanInputs, ScanOutput, Tokens
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"linear": "linear_scan", "BLOCK": "BLOCK_SIZE"})

BLOCK_SIZE = 32
"""Tokens c of a block. A larger block means fewer sequential steps and more work in the triangles."""

# ------------------------------------------------------------------------------------------------ what can run


def unsupported_reason(inputs: ScanInputs) -> str | None:
    """Why "linear" cannot run this call; None where it can."""
    depth, form = len(inputs.state.weights), inputs.form
    if depth != 1:
        return f"runs memories of depth 1, got {depth}"
    if inputs.chunk_size != 1:
        return f"runs with chunk_size=1, got {inputs.chunk_size}"
    if form.norm is not None:
        return "runs the plain form, got the residual form"
    if form.clip is not None or form.threshold is not None:
        return f"runs without clip and threshold, got clip={form.clip}, threshold={form.threshold}"
    return None


# ------------------------------------------------------------------------------------------------ blocks


class _ChunkDecays(torch.autograd.Function):
    """`chunk_decays` with `decays_backward` as its backward pass."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, eta: Tensor, alpha: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        decay, saved = chunk_decays(theta, eta, alpha, valid)
        ctx.save_for_backward(theta, eta, alpha, *saved)
        return tuple(decay)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *decays_backward(Decays(*grads), SavedDecays(*ctx.saved_tensors[3:])), None


class BlockSolution(NamedTuple):
    """G of every block as a function of the state at its start: G = G_W W + G_S S - G_V."""

    g_w: Tensor  # [N, R, c, K]
    g_s: Tensor  # [N, R, c, K]
    g_v: Tensor  # [N, R, c, V]


def solve_blocks(k: Tensor, v: Tensor, decay: Decays) -> BlockSolution:
    """Solve G_t = 2 (k_t M_{t-1} - v_t), where M_{t-1} includes the writes of the block's earlier tokens.

    (I + 2 (K K^T) * D') G = 2 (A' * K W + B' * K S - V), where A', B', D' are A, B, D one token earlier.
    """
    shifted = ((decay.a, 1), (decay.b, 0), (decay.d, 0))
    a, b, d = (F.pad(x[..., :-1, :], (0, 0, 1, 0), value=at_start) for x, at_start in shifted)
    k2 = 2 * k
    triangle = (k2 @ k.mT) * d
    right_sides = torch.cat([a * k2, b * k2, 2 * v], -1)
    # transposed, which is the solver's own memory layout: no copy
    solved = torch.linalg.solve_triangular(triangle.mT, right_sides.mT, upper=True, left=False, unitriangular=True).mT
    return BlockSolution(*solved.split([k.shape[-1], k.shape[-1], v.shape[-1]], -1))


class BlockStates(NamedTuple):
    """The state at the start of each block, each block's G, and the state at the end."""

    w: Tensor  # [N, R, K, V]
    s: Tensor  # [N, R, K, V]
    g: Tensor  # [N, R, c, V]
    end: tuple[Tensor, Tensor]  # W and S, [R, K, V]


def scan_blocks(k: Tensor, decay: Decays, solution: BlockSolution, w: Tensor, s: Tensor) -> BlockStates:
    """Carry W and S from block to block. This is the only sequential part."""
    ends = (x[..., -1:, :] for x in (decay.a, decay.b, decay.e))
    writes = ((scale * k).mT for scale in (decay.d[..., -1, :, None], decay.em))
    starts_w, starts_s, gradients = [], [], []
    blocks = zip(*(x.unbind(0) for x in (*solution, *ends, *writes)), strict=True)
    for g_w, g_s, g_v, a, b, e, write_w, write_s in blocks:
        g = torch.baddbmm(torch.baddbmm(g_v, g_w, w, beta=-1), g_s, s)
        starts_w.append(w)
        starts_s.append(s)
        gradients.append(g)
        w = torch.baddbmm(torch.addcmul(a * w, b, s), write_w, g, alpha=-1)
        s = torch.baddbmm(e * s, write_s, g, alpha=-1)
    return BlockStates(torch.stack(starts_w), torch.stack(starts_s), torch.stack(gradients), (w, s))


class BlocksOutput(NamedTuple):
    """What a group of blocks returns: `[B, S, H, *]`, and the state after it, `[R, K, V]`."""

    output: GroupOutput
    w: Tensor
    s: Tensor


def blocks_forward(tokens: Tokens, run: ChunkRun, first: int, w: Tensor, s: Tensor) -> BlocksOutput:
    """Process tokens `[B, S, H, *]`, whole blocks of `run` from its slot `first` on."""
    batch, slots = tokens.q.shape[:2]
    (q, k, v, *gates), run = group_rows(tokens, run, slice(first, first + slots))
    decay = Decays(*_ChunkDecays.apply(*gates, run.valid))
    states = scan_blocks(k, decay, solve_blocks(k, v, decay), w, s)
    y = decay.a * (q @ states.w) + decay.b * (q @ states.s) - ((q @ k.mT) * decay.d) @ states.g
    loss = norm = None
    if run.surprise:
        square, key = states.g.square().sum(-1), k.detach().square().sum(-1)
        loss, norm = to_tokens(square / 4, batch), to_tokens((square.detach() * key).sqrt(), batch)
    return BlocksOutput(GroupOutput(to_tokens(y, batch), loss, norm), *states.end)


# ------------------------------------------------------------------------------------------------ the whole call


def scan_run(run: ChunkRun, inputs: RunInputs, max_saved_bytes: int) -> RunOutput:
    """`chunked.scan.scan_run`, with blocks for chunks."""
    (w,), (s,) = inputs.state
    size, forward = slots_without_grad(inputs, run), blocks_forward
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs.tokens, w, s)):
        blocks = inputs.slots() // run.chunk_size
        group = grouping.group_size(blocks, _block_bytes(inputs, run), max_saved_bytes * run.fraction)
        size = group.chunks * run.chunk_size
        if not group.save:
            forward = partial(checkpoint, blocks_forward, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    for i, tokens in enumerate(zip(*(x.split(size, 1) for x in inputs.tokens), strict=True)):
        output, w, s = forward(Tokens(*tokens), run, i * size, w, s)
        outputs.append(output)
    y, loss, norm = (None if x[0] is None else torch.cat(x, 1) for x in zip(*outputs, strict=True))
    assert y is not None
    return RunOutput(GroupOutput(y, loss, norm), StateLayers(inputs.anchor, [w], [s]))


def _block_bytes(inputs: RunInputs, run: ChunkRun) -> int:
    """What autograd saves of a block."""
    ((i, o),), c = inputs.shapes(), run.chunk_size
    return (4 * i * o + c * (7 * i + 6 * o + 9 * c)) * len(inputs.anchor[0]) * inputs.tokens.q.element_size()


def linear_scan(inputs: ScanInputs) -> ScanOutput:
    """`naive_scan` for calls that have no `unsupported_reason`."""
    start = torch.zeros_like(inputs.state.position)
    blocks = inputs._replace(chunk_size=BLOCK_SIZE, state=inputs.state._replace(position=start))  # laid out as chunks
    y, state, surprise = scan_runs(blocks, partial(scan_run, max_saved_bytes=inputs.max_saved_bytes))
    return ScanOutput(y, MemoryState(state.weights, state.weights, state.momentum, start), surprise)
