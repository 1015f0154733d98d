"""Chunks in C++: the algebra of `chunked/chunk.py`, one row and head after another, so that its state stays in a cache.

The sources are `csrc/`; `build.py` compiles them. Layout and runs are those of `chunked/scan.py`. A call saves what its
chunks computed, or, above `max_saved_bytes`, the state at the start of each group of chunks, and recomputes the groups.
"""

import ctypes
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_lm.ops import grouping
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.chunked.group import ChunkRun, GroupOutput
from titans_lm.ops.chunked.scan import RunInputs, RunOutput, StateLayers, grads_or_zeros, scan_runs, split_outputs
from titans_lm.ops.cpu.compiled import (
    NativeArgs,
    as_contiguous,
    empty_contiguous,
    fields,
    thread_count,
    unsupported_tensor_reason,
)
from titans_lm.ops.decode import Layers, TokenUpdate, decode_token, needs_grad
from titans_lm.ops.types import MemoryForm, ScanInputs, ScanOutput, Surprise, Tokens
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"native": "native_scan"})

SAVED_BLOCK_BYTES = 16 * 2**20
"""About the size of the tensors that hold saved activations: the system maps larger ones anew, zeroed, at each call."""


def unsupported_reason(inputs: ScanInputs) -> str | None:
    """Why "native" cannot run this call; None where it can."""
    return unsupported_tensor_reason(inputs.tokens.q, inputs.state.weights[0].dtype)


class _ScanArgs(ctypes.Structure):
    """`ScanArgs` of csrc/scan_args.h, field by field."""

    _fields_ = (
        *fields(ctypes.c_long, "batch slots heads layers chunk_size at_boundary threads group"),
        *fields(ctypes.c_long, "activation has_threshold surprise"),
        *fields(ctypes.c_double, "clip threshold"),
        *fields(ctypes.c_void_p, "widths q k v theta eta alpha valid weight bias anchor w s"),
        *fields(ctypes.c_void_p, "last_anchor new_w new_s y loss gradient_norm saved starts grad_y grad_loss"),
        *fields(ctypes.c_void_p, "grad_q grad_k grad_v grad_theta grad_eta grad_alpha grad_weight grad_bias"),
        *fields(ctypes.c_void_p, "grad_anchor grad_w grad_s"),
    )


class ScanArgs(NativeArgs):
    """The arguments of a scan: tokens, memories and outputs."""

    structure = _ScanArgs

    @classmethod
    def of(
        cls, form: MemoryForm, surprise: bool, tokens: Tokens, weights: Sequence[Tensor], chunk_size: int
    ) -> "ScanArgs":
        batch, slots, heads, _ = tokens.q.shape
        shapes = [w.shape[-2:] for w in weights]
        work = batch * heads * slots * sum(i * o for i, o in shapes)
        args = cls(
            weights[0].dtype, batch=batch, slots=slots, heads=heads, layers=len(weights), chunk_size=chunk_size,
            threads=thread_count(work), activation=form.activation == "gelu", surprise=surprise,
            has_threshold=form.threshold is not None, threshold=form.threshold or 0, clip=form.clip or 0,
        )  # fmt: skip
        args.set_widths(weights)
        args.set_tensors(**tokens._asdict())
        return args

    def set_widths(self, weights: Sequence[Tensor]) -> None:
        widths = [int(weights[0].shape[-2]), *(int(w.shape[-1]) for w in weights)]
        self.set_array("widths", (ctypes.c_long * len(widths))(*widths))


def _run_args(inputs: RunInputs, run: ChunkRun) -> ScanArgs:
    dtype = inputs.anchor[0].dtype
    tokens = Tokens(*(as_contiguous(x, dtype) for x in inputs.tokens))
    args = ScanArgs.of(run.form, run.surprise, tokens, inputs.anchor, run.chunk_size)
    args.fields["at_boundary"] = run.at_boundary
    anchor, w, s = ([as_contiguous(x, dtype) for x in part] for part in (inputs.anchor, *inputs.state))
    weight, bias = (None, None) if inputs.norm is None else (as_contiguous(x, dtype) for x in inputs.norm)
    valid = None if run.valid is None else run.valid.contiguous()
    args.set_tensors(anchor=anchor, w=w, s=s, weight=weight, bias=bias, valid=valid)
    return args


# ------------------------------------------------------------------------------------------------ a run of chunks


def _empty_output(inputs: RunInputs, run: ChunkRun) -> GroupOutput:
    dtype, gate = inputs.anchor[0].dtype, inputs.tokens.theta
    loss, norm = (empty_contiguous(gate, dtype) if run.surprise else None for _ in range(2))
    return GroupOutput(empty_contiguous(inputs.tokens.v, dtype), loss, norm)


def _forward(args: ScanArgs, inputs: RunInputs, run: ChunkRun) -> RunOutput:
    dtype = inputs.anchor[0].dtype
    y, loss, norm = _empty_output(inputs, run)
    end = StateLayers(*([empty_contiguous(x, dtype) for x in inputs.anchor] for _ in range(3)))
    args.set_tensors(y=y, loss=loss, gradient_norm=norm, last_anchor=end.anchor, new_w=end.w, new_s=end.s)
    args.run("titans_forward")
    return RunOutput(GroupOutput(y.to(inputs.tokens.v.dtype), loss, norm), end)


class SavedSize(NamedTuple):
    """How a run's activations are saved: sizes in scalars."""

    rows: int
    chunks: int
    group: int  # chunks
    chunk: int  # scalars that one chunk of one row saves


def _saved_blocks(like: Tensor, size: SavedSize) -> list[Tensor]:
    """Buffers for all rows' activations, group by group: one for all rows if there is one group, else one for each."""
    rows, chunks, group, chunk = size
    if group >= chunks and rows * chunks * chunk * like.element_size() <= SAVED_BLOCK_BYTES:
        return [like.new_empty(rows, chunks * chunk)]
    sizes = [min(group, chunks - first) * chunk for first in range(0, chunks, group)]
    return [like.new_empty(1, size) for _ in range(rows) for size in sizes]


def _addresses(blocks: Sequence[Tensor]) -> Any:
    """The address of each row of each block."""
    rows = [b.data_ptr() + row * b.stride(0) * b.element_size() for b in blocks for row in range(len(b))]
    return (ctypes.c_void_p * len(rows))(*rows)


class FinishedRun(NamedTuple):
    """A run whose forward pass is over: what its backward pass needs of it."""

    blocks: list[Tensor]
    """All activations, as `_saved_blocks` with one group of chunks makes them."""
    end: StateLayers


class ScanRun(torch.autograd.Function):
    """`scan_run` with a backward pass. It saves the inputs, and all activations or the state at each group's start."""

    @staticmethod
    def forward(
        ctx: Any, run: ChunkRun, max_saved_bytes: int, finished: FinishedRun | None, *flat: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = RunInputs.unflatten(flat)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.count = run, len(flat)
        if finished is not None:
            ctx.saves_all, ctx.group = True, inputs.slots() // run.chunk_size
            ctx.save_for_backward(*flat, *finished.blocks)
            y, loss, norm = _empty_output(inputs, run)
            return y.to(inputs.tokens.v.dtype), loss, norm, *(x.detach() for x in itertools.chain(*finished.end))
        args = _run_args(inputs, run)
        like, chunks = inputs.anchor[0], inputs.slots() // run.chunk_size
        rows, item_bytes = len(like), like.element_size()
        chunk = args.call("titans_saved_size")
        ctx.saves_all = rows * chunks * chunk * item_bytes <= max_saved_bytes * run.fraction
        if ctx.saves_all:
            ctx.group = min(chunks, max(1, SAVED_BLOCK_BYTES // (chunk * item_bytes)))
            saved = _saved_blocks(like, SavedSize(rows, chunks, ctx.group, chunk))
            args.set_array("saved", _addresses(saved))
        else:
            state = args.call("titans_state_size")
            ctx.group = grouping.group_size_in_cache(chunks, chunk * item_bytes, rows * state * item_bytes)
            saved = [like.new_empty(max(-(-chunks // ctx.group) - 1, 1), rows, state)]
            args.set_tensors(starts=saved[0])
        args.fields["group"] = ctx.group
        out, end = _forward(args, inputs, run)
        ctx.save_for_backward(*flat, *saved)
        if run.surprise:
            ctx.mark_non_differentiable(out.gradient_norm)
        return *out, *itertools.chain(*end)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None, _: None, *grad_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tensors, run = ctx.saved_tensors, ctx.run
        inputs, saved = RunInputs.unflatten(tensors[: ctx.count]), tensors[ctx.count :]
        dtype = inputs.anchor[0].dtype
        args = _run_args(inputs, run)
        args.fields["group"] = ctx.group
        if ctx.saves_all:
            args.set_array("saved", _addresses(saved))
        else:
            args.set_tensors(starts=saved[0])
        grad_y = torch.zeros_like(inputs.tokens.v) if grad_y is None else grad_y
        grad_loss = None if grad_loss is None else as_contiguous(grad_loss, dtype)
        args.set_tensors(grad_y=as_contiguous(grad_y, dtype), grad_loss=grad_loss)
        grads = grads_or_zeros(grad_end, (*inputs.anchor, *inputs.state.w, *inputs.state.s))
        args.set_tensors(grad_anchor=grads.anchor, grad_w=grads.w, grad_s=grads.s)
        grad_tokens = Tokens(*(empty_contiguous(x, dtype) for x in inputs.tokens))
        args.set_tensors(**{f"grad_{name}": x for name, x in grad_tokens._asdict().items()})
        grad_norm = (None, None) if inputs.norm is None else [empty_contiguous(x, dtype) for x in inputs.norm]
        args.set_tensors(grad_weight=grad_norm[0], grad_bias=grad_norm[1])
        args.run("titans_backward")
        tokens = (grad.to(x.dtype) for grad, x in zip(grad_tokens, inputs.tokens, strict=True))
        return None, None, None, *tokens, *grad_norm, *itertools.chain(*grads)


def scan_run(run: ChunkRun, inputs: RunInputs, max_saved_bytes: int) -> RunOutput:
    """`chunked.scan.scan_run` in C++."""
    if inputs.needs_grad():
        return split_outputs(ScanRun.apply(run, max_saved_bytes, None, *inputs.flatten()))
    return _forward(_run_args(inputs, run), inputs, run)


def scan_run_into(run: ChunkRun, inputs: RunInputs, blocks: list[Tensor]) -> RunOutput:
    """`scan_run` without gradients, which saves all activations in `blocks`: one for all rows, or one for each."""
    args = _run_args(inputs, run)
    args.set_array("saved", _addresses(blocks))
    args.fields["group"] = inputs.slots() // run.chunk_size
    return _forward(args, inputs, run)


def saved_size(weights: Sequence[Tensor], chunk_size: int) -> int:
    """Scalars that one chunk of one row saves."""
    args = ScanArgs(weights[0].dtype, layers=len(weights), chunk_size=chunk_size)
    args.set_widths(weights)
    return args.call("titans_saved_size")


# ------------------------------------------------------------------------------------------------ the whole call


def native_scan(inputs: ScanInputs) -> ScanOutput:
    """`naive_scan` by compiled code."""
    if inputs.tokens.q.shape[1] == 1 and not needs_grad(inputs):
        return decode_token(inputs, update_token)
    return scan_runs(inputs, partial(scan_run, max_saved_bytes=inputs.max_saved_bytes))


def update_token(inputs: ScanInputs, anchor: Layers) -> TokenUpdate:
    """`decode.update_token` by compiled code."""
    dtype, batch = inputs.state.weights[0].dtype, len(inputs.tokens.q)
    tokens = Tokens(*(as_contiguous(x, dtype) for x in inputs.tokens))
    args = ScanArgs.of(inputs.form, inputs.surprise, tokens, anchor, chunk_size=1)
    if inputs.form.norm is not None:
        weight, bias = (as_contiguous(x.expand(batch, *x.shape), dtype) for x in inputs.form.norm)
        args.set_tensors(weight=weight, bias=bias)
    old = {"anchor": anchor, "w": inputs.state.weights, "s": inputs.state.momentum}
    args.set_tensors(**{name: [as_contiguous(x, dtype) for x in part] for name, part in old.items()})
    y, surprise = torch.empty_like(tokens.v), None
    weights, momentum = (tuple(empty_contiguous(x, dtype) for x in anchor) for _ in range(2))
    args.set_tensors(new_w=weights, new_s=momentum, y=y)
    if inputs.surprise:
        surprise = Surprise(torch.empty_like(tokens.theta), torch.empty_like(tokens.theta))
        args.set_tensors(**surprise._asdict())
    args.run("titans_decode")
    return TokenUpdate(y, weights, momentum, surprise)
