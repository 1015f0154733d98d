"""Chunks in C++: the algebra of `chunked/chunk.py`, a row and head at a time, so that its state stays in caches.

The sources are `csrc/`, how they are compiled `build.py`. Layout and spans are those of `chunked/scan.py`, and
so is what a call may keep for its backward pass; one that would keep more is read again in groups of chunks.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_lm.ops.chunked.group import Span
from titans_lm.ops.chunked.scan import CACHED_BYTES, GROUP_BYTES, Inputs, in_spans, thirds
from titans_lm.ops.cpu.compiled import Handed, fields, reason_against, solid, solid_like, threads_for
from titans_lm.ops.decode import Advanced, Layers, one_token, wants_gradients
from titans_lm.ops.types import Answer, Call, MemoryForm, Surprise, Tokens

BLOCK_BYTES = 16 * 2**20
"""What a call keeps is kept in pieces of about this size: larger ones are new each time, for the system to zero."""


def obstacle(call: Call) -> str | None:
    """Why "native" cannot run this call, or None."""
    return reason_against(call.tokens.q, call.state.weights[0].dtype)


class _Call(ctypes.Structure):
    """`Call` of csrc/call.h."""

    _fields_ = (
        *fields(ctypes.c_long, "batch slots heads layers width at_boundary threads group"),
        *fields(ctypes.c_long, "activation has_threshold surprise"),
        *fields(ctypes.c_double, "clip threshold"),
        *fields(ctypes.c_void_p, "widths q k v theta eta alpha present weight bias anchor w s"),
        *fields(ctypes.c_void_p, "last_anchor new_w new_s y loss gradient_norm traces starts by_y by_loss"),
        *fields(ctypes.c_void_p, "by_q by_k by_v by_theta by_eta by_alpha by_weight by_bias by_anchor by_w by_s"),
    )


class Read(Handed):
    """One call's tokens, memories and what is made of them."""

    structure = _Call

    @classmethod
    def of(cls, form: MemoryForm, surprise: bool, tokens: Tokens, weights: Sequence[Tensor], width: int) -> "Read":
        batch, slots, heads, _ = tokens.q.shape
        shapes = [w.shape[-2:] for w in weights]
        work = batch * heads * slots * sum(i * o for i, o in shapes)
        handed = cls(
            weights[0].dtype, batch=batch, slots=slots, heads=heads, layers=len(weights), width=width,
            threads=threads_for(work), activation=form.activation == "gelu", surprise=surprise,
            has_threshold=form.threshold is not None, threshold=form.threshold or 0, clip=form.clip or 0,
        )  # fmt: skip
        handed.give_array("widths", (ctypes.c_long * (len(weights) + 1))(shapes[0][0], *[o for _, o in shapes]))
        handed.give(q=tokens.q, k=tokens.k, v=tokens.v, theta=tokens.theta, eta=tokens.eta, alpha=tokens.alpha)
        return handed


def _handed(inputs: Inputs, span: Span) -> Read:
    dtype = inputs.anchor[0].dtype
    tokens = Tokens(*(solid(x, dtype) for x in inputs.tokens))
    handed = Read.of(span.form, span.surprise, tokens, inputs.anchor, span.width)
    handed.fields["at_boundary"] = span.at_boundary
    anchor, w, s = ([solid(x, dtype) for x in part] for part in (inputs.anchor, *inputs.state))
    weight, bias = (None, None) if inputs.norm is None else (solid(x, dtype) for x in inputs.norm)
    present = None if span.present is None else span.present.contiguous()
    handed.give(anchor=anchor, w=w, s=s, weight=weight, bias=bias, present=present)
    return handed


# ------------------------------------------------------------------------------------------------ a span of chunks


def _read(handed: Read, inputs: Inputs, span: Span) -> tuple[tuple[Tensor | None, ...], list[list[Tensor]]]:
    """y, loss and gradient norm; last anchor, weights and momentum."""
    dtype = inputs.anchor[0].dtype
    y, gate = solid_like(inputs.tokens.v, dtype), inputs.tokens.theta
    seen = [solid_like(gate, dtype) if span.surprise else None for _ in range(2)]
    states = [[solid_like(x, dtype) for x in inputs.anchor] for _ in range(3)]
    handed.give(y=y, loss=seen[0], gradient_norm=seen[1], last_anchor=states[0], new_w=states[1], new_s=states[2])
    handed.run("titans_read")
    return (y.to(inputs.tokens.v.dtype), *seen), states


def group_size(chunks: int, trace_bytes: int, start_bytes: int) -> int:
    """Chunks that are read again together, before a backward pass: as many as stay near a core, if the states at the
    groups' starts, `start_bytes` each, are then sqrt(chunks) or take no more than GROUP_BYTES."""
    starts = max(math.isqrt(chunks), GROUP_BYTES // start_bytes)
    return max(1, CACHED_BYTES // trace_bytes, -(-chunks // starts))


def _blocks(some: Tensor, rows: int, chunks: int, group: int, trace: int) -> list[Tensor]:
    """For all rows' traces, in groups of chunks: of all rows together if there is one group, else each for itself."""
    if group >= chunks and rows * chunks * trace * some.element_size() <= BLOCK_BYTES:
        return [some.new_empty(rows, chunks * trace)]
    sizes = [min(group, chunks - first) * trace for first in range(0, chunks, group)]
    return [some.new_empty(1, size) for _ in range(rows) for size in sizes]


def _addresses(blocks: Sequence[Tensor]) -> Any:
    """Of each row of each block."""
    found = [b.data_ptr() + row * b.stride(0) * b.element_size() for b in blocks for row in range(len(b))]
    return (ctypes.c_void_p * len(found))(*found)


class _ReadSpan(torch.autograd.Function):
    """`read_span` with a backward pass. Kept for it are the inputs, and what all chunks leave or the state at the start
    of each group of chunks, which are then read once more."""

    @staticmethod
    def forward(ctx: Any, span: Span, kept_bytes: int, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(flat)
        ctx.set_materialize_grads(False)
        handed = _handed(inputs, span)
        some, chunks = inputs.anchor[0], inputs.slots() // span.width
        rows, number = len(some), some.element_size()
        trace = handed.ask("titans_trace")
        ctx.all = rows * chunks * trace * number <= kept_bytes * span.share
        if ctx.all:
            ctx.group = min(chunks, max(1, BLOCK_BYTES // (trace * number)))
            kept = _blocks(some, rows, chunks, ctx.group, trace)
            handed.give_array("traces", _addresses(kept))
        else:
            state = handed.ask("titans_state")
            ctx.group = group_size(chunks, trace * number, rows * state * number)
            kept = [some.new_empty(max(-(-chunks // ctx.group) - 1, 1), rows, state)]
            handed.give(starts=kept[0])
        handed.fields["group"] = ctx.group
        ctx.span, ctx.count = span, len(flat)
        out, states = _read(handed, inputs, span)
        ctx.save_for_backward(*flat, *kept)
        if span.surprise:
            ctx.mark_non_differentiable(out[2])
        return *out, *itertools.chain(*states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        saved, span = ctx.saved_tensors, ctx.span
        inputs, kept = Inputs.of(tuple(saved[: ctx.count])), saved[ctx.count :]
        dtype = inputs.anchor[0].dtype
        handed = _handed(inputs, span)
        handed.fields["group"] = ctx.group
        if ctx.all:
            handed.give_array("traces", _addresses(kept))
        else:
            handed.give(starts=kept[0])
        by_y = torch.zeros_like(inputs.tokens.v) if y is None else y
        handed.give(by_y=solid(by_y, dtype), by_loss=None if loss is None else solid(loss, dtype))
        shapes = (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        by_anchor, by_w, by_s = thirds([
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            if by is None else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip(shapes, states, strict=True)
        ])  # fmt: skip
        handed.give(by_anchor=by_anchor, by_w=by_w, by_s=by_s)
        by_tokens = Tokens(*(solid_like(x, dtype) for x in inputs.tokens))
        handed.give(**{f"by_{name}": x for name, x in by_tokens._asdict().items()})
        by_norm = (None, None) if inputs.norm is None else [solid_like(x, dtype) for x in inputs.norm]
        handed.give(by_weight=by_norm[0], by_bias=by_norm[1])
        handed.run("titans_back")
        found = (by.to(x.dtype) for by, x in zip(by_tokens, inputs.tokens, strict=True))
        return None, None, *found, *by_norm, *by_anchor, *by_w, *by_s


def read_span(span: Span, inputs: Inputs, kept_bytes: int) -> tuple[Any, ...]:
    """As `chunked.read_span`."""
    flat = inputs.flat()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        y, loss, norm, *state = _ReadSpan.apply(span, kept_bytes, *flat)
        return y, loss, norm, *thirds(state)
    out, states = _read(_handed(inputs, span), inputs, span)
    return *out, *states


# ------------------------------------------------------------------------------------------------ the whole call


def native(call: Call) -> Answer:
    """As `naive`, by compiled code."""
    if call.tokens.q.shape[1] == 1 and not wants_gradients(call):
        return one_token(call, _advance)
    return in_spans(call, partial(read_span, kept_bytes=call.kept_bytes))


def _advance(call: Call, anchor: Layers) -> Advanced:
    dtype, batch = call.state.weights[0].dtype, len(call.tokens.q)
    tokens = Tokens(*(solid(x, dtype) for x in call.tokens))
    handed = Read.of(call.form, call.surprise, tokens, anchor, width=1)
    norm = call.form.norm or ()
    handed.give(**dict(zip(("weight", "bias"), (solid(x.expand(batch, *x.shape), dtype) for x in norm), strict=False)))
    old = (anchor, call.state.weights, call.state.momentum)
    handed.give(**{name: [solid(x, dtype) for x in part] for name, part in zip(("anchor", "w", "s"), old, strict=True)})
    y, seen = torch.empty_like(tokens.v), [torch.empty_like(tokens.theta) for _ in range(2 * call.surprise)]
    weights, momentum = (tuple(solid_like(x, dtype) for x in anchor) for _ in range(2))
    handed.give(new_w=weights, new_s=momentum, y=y, **dict(zip(("loss", "gradient_norm"), seen, strict=False)))
    handed.run("titans_step")
    return y, weights, momentum, Surprise(*seen) if seen else None
