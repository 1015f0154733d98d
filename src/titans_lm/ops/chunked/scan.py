"""A call as chunks of matrix products: the keys of a chunk run forward and backward once, at its anchor.

Derivation, and which line is which equation: README.md one folder up. One chunk is `chunk.py`, a group of chunks
`group.py`. Here a call becomes runs of chunks of one size, and a run becomes groups.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titans_lm.ops import grouping
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.chunked.chunk import Layers, WeightsAndMomentum
from titans_lm.ops.chunked.group import (
    ChunkGroup,
    ChunkRun,
    GroupOutput,
    NormParams,
    SavedActivations,
    group_backward,
    group_forward,
    group_output,
)
from titans_lm.ops.ragged import Layout, lay_out
from titans_lm.ops.types import MemoryState, ScanInputs, ScanOutput, Surprise, Tokens, where_rows
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"chunked": "chunked_scan", "LONGEST": "MAX_CHUNK"})

MAX_CHUNK = 64
"""Slots of a chunk that are processed at once: D and the scores grow with their square. A longer chunk is cut."""


# ------------------------------------------------------------------------------------------------ a run of chunks


class StateLayers(NamedTuple):
    """The state of a run, `[R, in, out]` for each layer."""

    anchor: Layers
    w: Layers
    s: Layers


class RunInputs(NamedTuple):
    """The tensors of a run that have gradients: tokens `[B, S, H, *]`, norm, anchor and state."""

    tokens: Tokens
    norm: NormParams | None
    anchor: Layers
    state: WeightsAndMomentum

    def flatten(self) -> tuple[Tensor | None, ...]:
        """All of them in one tuple, as autograd takes them."""
        return *self.tokens, *(self.norm or (None, None)), *self.anchor, *self.state.w, *self.state.s

    @classmethod
    def unflatten(cls, flat: Sequence[Any]) -> "RunInputs":
        """Undo `flatten`."""
        anchor, w, s = split_state(flat[8:])
        norm = None if flat[6] is None else (flat[6], flat[7])
        return cls(Tokens(*flat[:6]), norm, anchor, WeightsAndMomentum(w, s))

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.flatten())

    def slots(self) -> int:
        return self.tokens.q.shape[1]

    def slot_bytes(self) -> int:
        """Bytes, for one slot of all rows, of what a group computes for all its chunks at once."""
        return 8 * self.tokens.q[:, 0].numel() * self.anchor[0].element_size()

    def shapes(self) -> list[tuple[int, int]]:
        return [(w.shape[1], w.shape[2]) for w in self.anchor]


class RunOutput(NamedTuple):
    output: GroupOutput
    """y, loss and gradient norm, `[B, S, H, *]`."""
    state: StateLayers
    """The last anchor, and weights and momentum after the run."""


def split_state(tensors: Sequence[Tensor]) -> StateLayers:
    """Anchor, weights and momentum of all layers, one after another, as `StateLayers`."""
    layers = len(tensors) // 3
    parts = (tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :])
    return StateLayers(*(list(part) for part in parts))


def split_outputs(tensors: Sequence[Any]) -> RunOutput:
    """What an autograd function of a run returns, in one tuple, as `RunOutput`."""
    y, loss, norm, *state = tensors
    return RunOutput(GroupOutput(y, loss, norm), split_state(state))


def grads_or_zeros(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> StateLayers:
    """The gradients that autograd gives for a run's last state, as buffers to be written: contiguous, 0 for None."""
    return split_state([
        torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None
        else grad.clone(memory_format=torch.contiguous_format)
        for x, grad in zip(tensors, grads, strict=True)
    ])  # fmt: skip


class _ScanRun(torch.autograd.Function):
    """`scan_run` with a backward pass. It saves the inputs, and all activations or the state at each group's start."""

    @staticmethod
    def forward(ctx: Any, run: ChunkRun, max_saved_bytes: int, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = RunInputs.unflatten(flat)
        ctx.set_materialize_grads(False)
        size, save = _group_slots(inputs, run, max_saved_bytes)
        ctx.run, ctx.size, ctx.count = run, size, len(flat)
        out, starts, end = _empty_output(inputs, run), [], SavedActivations([], [], inputs.anchor, inputs.state)
        for part in _group_slices(inputs, size):
            anchor = end.state.w if run.at_boundary and run.valid is None else end.anchor  # one copy
            starts.append((*anchor, *end.state.w, *end.state.s))
            group = _make_group(inputs, run, part, save)
            end = group_forward(group, end.anchor, end.state)
            _store_rows(out, part, group_output(group, end), run.chunk_size)
        # The activations are an attribute of a saved tensor, so that what drops saved tensors (activation
        # checkpointing) drops them too. The returned state is left out: it refers back to this node.
        holder: Any = inputs.tokens.q.new_empty(0)
        if save:
            holder.activations = group, end._replace(anchor=[], state=WeightsAndMomentum([], []))
        ctx.save_for_backward(*flat, *(x for start in starts[1:] for x in start), holder)
        if run.surprise:
            ctx.mark_non_differentiable(out.gradient_norm)
        return *out, *(x.clone() for x in end.anchor), *end.state.w, *end.state.s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None, _: None, *grad_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, holder = ctx.saved_tensors
        inputs, starts = RunInputs.unflatten(tensors[: ctx.count]), tensors[ctx.count :]
        run, first = ctx.run, (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        grad_y = torch.zeros_like(inputs.tokens.v) if grad_y is None else grad_y
        grad_anchor, *grad_state = grads_or_zeros(grad_end, first)
        grad_tokens = Tokens(*(torch.empty_like(x) for x in inputs.tokens))
        grad_norm = [torch.zeros_like(x) for x in inputs.norm or ()]
        activations = getattr(holder, "activations", None)
        for i, part in reversed(list(enumerate(_group_slices(inputs, ctx.size)))):
            if activations is None:
                anchor, *state = split_state(first if i == 0 else starts[(i - 1) * len(first) : i * len(first)])
                group = _make_group(inputs, run, part, save=True)
                saved = group_forward(group, anchor, WeightsAndMomentum(*state))
            else:
                group, saved = activations
            y_rows = to_rows(grad_y[:, part], run.chunk_size, group.y.dtype)
            loss_rows = None if grad_loss is None else to_rows(grad_loss[:, part], run.chunk_size)[..., None]
            grads = group_backward(group, saved, y_rows, loss_rows, grad_anchor, WeightsAndMomentum(*grad_state))
            _store_rows(grad_tokens, part, grads.tokens, run.chunk_size)
            if grads.norm is not None:
                grad_norm = [x + y for x, y in zip(grad_norm, grads.norm, strict=True)]
            del group, saved  # frees them before the next group is made
        return None, None, *grad_tokens, *(grad_norm or (None, None)), *grad_anchor, *itertools.chain(*grad_state)


def scan_run(run: ChunkRun, inputs: RunInputs, max_saved_bytes: int) -> RunOutput:
    """Process a run, group after group."""
    if inputs.needs_grad():
        return split_outputs(_ScanRun.apply(run, max_saved_bytes, *inputs.flatten()))
    out, end = _empty_output(inputs, run), SavedActivations([], [], inputs.anchor, inputs.state)
    for part in _group_slices(inputs, slots_without_grad(inputs, run)):
        group = _make_group(inputs, run, part, save=False)
        end = group_forward(group, end.anchor, end.state)
        _store_rows(out, part, group_output(group, end), run.chunk_size)
    return RunOutput(out, StateLayers(end.anchor, *end.state))


def _group_slots(inputs: RunInputs, run: ChunkRun, max_saved_bytes: int) -> tuple[int, bool]:
    """Slots of a group, and whether the run is one group whose activations are saved."""
    c = run.chunk_size
    numbers = sum(2 * i * o + c * (4 * o + 6 * i + 2 * c) for i, o in inputs.shapes())  # the fields of `ChunkBuffers`
    chunk_bytes = numbers * len(inputs.anchor[0]) * inputs.anchor[0].element_size()
    size = grouping.group_size(inputs.slots() // c, chunk_bytes, max_saved_bytes * run.fraction)
    return c * size.chunks, size.save


def slots_without_grad(inputs: RunInputs, run: ChunkRun) -> int:
    """Slots of a group where nothing is saved."""
    return grouping.group_size_without_grad(inputs.slot_bytes() * run.chunk_size) * run.chunk_size


def _group_slices(inputs: RunInputs, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, inputs.slots(), size)]


def _make_group(inputs: RunInputs, run: ChunkRun, part: slice, save: bool) -> ChunkGroup:
    dtype = inputs.anchor[0].dtype
    tokens, run = group_rows(Tokens(*(x[:, part] for x in inputs.tokens)), run, part, dtype)
    return ChunkGroup(tokens, run, inputs.norm, inputs.shapes(), save)


def group_rows(tokens: Tokens, run: ChunkRun, part: slice, dtype: torch.dtype | None = None) -> tuple[Tokens, ChunkRun]:
    """Tokens of the slots `part` of a run, as `[N, R, C, *]` in `dtype`, and `run` with its `valid` alike."""
    heads = tokens.q.shape[2]
    if run.valid is not None:
        run = run._replace(valid=to_rows(run.valid[:, part, None].expand(-1, -1, heads), run.chunk_size))
    return Tokens(*(to_rows(x, run.chunk_size, dtype) for x in tokens)), run


# ------------------------------------------------------------------------------------------------ tokens and rows


def _rows_view(x: Tensor, chunk_size: int) -> Tensor:
    """`[B, N * C, H, *]` as `[N, B, H, C, *]`"""
    return x.unflatten(1, (-1, chunk_size)).movedim(0, 1).transpose(2, 3)


def to_rows(x: Tensor, chunk_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """`[B, N * C, H, *]` -> `[N, B * H, C, *]`, contiguous, in `dtype` if it is given."""
    return _rows_view(x, chunk_size).to(dtype or x.dtype, memory_format=torch.contiguous_format).flatten(1, 2)


def to_tokens(x: Tensor, batch: int) -> Tensor:
    """Undo `to_rows`."""
    return x.unflatten(1, (batch, -1)).transpose(2, 3).movedim(1, 0).flatten(1, 2)


def _empty_output(inputs: RunInputs, run: ChunkRun) -> GroupOutput:
    y, gate = torch.empty_like(inputs.tokens.v), inputs.tokens.theta
    return GroupOutput(y, *(torch.empty_like(gate) if run.surprise else None for _ in range(2)))


def _store_rows(out: tuple[Tensor | None, ...], part: slice, rows: tuple[Tensor | None, ...], chunk_size: int) -> None:
    """Store each of `rows` `[N, B * H, C, *]` in the slots `part` of each of `out` `[B, S, H, *]`."""
    for whole, x in zip(out, rows, strict=True):
        if whole is not None and x is not None:
            _rows_view(whole[:, part], chunk_size).copy_(x.unflatten(1, (whole.shape[0], whole.shape[2])))


# ------------------------------------------------------------------------------------------------ the whole call


def chunked_scan(inputs: ScanInputs) -> ScanOutput:
    """`naive_scan` by matrix products."""
    return scan_runs(inputs, partial(scan_run, max_saved_bytes=inputs.max_saved_bytes))


def scan_runs(inputs: ScanInputs, scan_one: Callable[[ChunkRun, RunInputs], RunOutput]) -> ScanOutput:
    """Process a call as runs of chunks, each by `scan_one`."""
    tokens, state, chunk_size, form, mask, surprise, _ = inputs
    batch, length, heads, _ = tokens.q.shape
    layout = lay_out(mask, state.position, length, chunk_size)
    norm = None
    if form.norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in form.norm)
        norm = (weight, bias)
    anchor, w, s = ([x.flatten(0, 1) for x in part] for part in state[:3])
    plans, outputs = plan_runs(layout), []
    for plan, run_tokens in zip(plans, _split_tokens([layout.to_slots(x) for x in tokens], plans), strict=True):
        valid = None if layout.valid is None else layout.valid[:, plan.start : plan.end]
        if plan.chunk_starts == "first":
            rows = None if valid is None else _expand_heads(valid[:, 0], heads)
            anchor = w if rows is None else list(where_rows(rows, tuple(w), tuple(anchor)))
        fraction = (plan.end - plan.start) / layout.slots
        run = ChunkRun(form, surprise, plan.chunk_size, plan.chunk_starts == "all", valid, fraction)
        output, (anchor, w, s) = scan_one(run, RunInputs(run_tokens, norm, anchor, WeightsAndMomentum(w, s)))
        outputs.append(output)
    position = (state.position + layout.length) % chunk_size
    at_end = [tuple(x.unflatten(0, (batch, heads)) for x in layers) for layers in (anchor, w, s)]
    after = MemoryState(where_rows(position == 0, at_end[1], at_end[0]), at_end[1], at_end[2], position)
    if not outputs:  # no token, or all masked
        zeros = torch.zeros_like(tokens.theta)
        return ScanOutput(torch.zeros_like(tokens.v), after, Surprise(zeros, zeros) if surprise else None)
    y, loss, norm_of_gradient = (
        None if x[0] is None else layout.from_slots(_concat(x)) for x in zip(*outputs, strict=True)
    )
    assert y is not None
    per_token = None if loss is None or norm_of_gradient is None else Surprise(loss, norm_of_gradient)
    return ScanOutput(y, after, per_token)


class RunPlan(NamedTuple):
    """The slots of a run, and which of its chunks, or parts of a chunk, begin at a chunk start."""

    start: int
    end: int
    chunk_size: int
    chunk_starts: Literal["all", "first", "none"]


def plan_runs(layout: Layout) -> list[RunPlan]:
    """The runs of a layout. A chunk longer than `MAX_CHUNK` is cut into equal parts, the last of them shorter."""
    plans = []
    for start, end, size in layout.runs():
        begins_chunk = start >= layout.lead
        if size <= MAX_CHUNK:
            plans.append(RunPlan(start, end, size, "all" if begins_chunk else "none"))
            continue
        part = -(-size // -(-size // MAX_CHUNK))
        for first in range(start, end, size):
            last = first + size // part * part
            plans.append(RunPlan(first, last, part, "first" if begins_chunk else "none"))
            if last < first + size:
                plans.append(RunPlan(last, first + size, first + size - last, "none"))
    return plans


def _expand_heads(rows: Tensor, heads: int) -> Tensor:
    """`[B]` -> `[B * H]`"""
    return rows[:, None].expand(-1, heads).flatten()


def _split_tokens(tokens: list[Tensor], plans: list[RunPlan]) -> list[Tokens]:
    """The tokens of each run."""
    if len(plans) == 1:
        return [Tokens(*tokens)]
    sizes = [plan.end - plan.start for plan in plans]
    return [Tokens(*part) for part in zip(*(x.split(sizes, 1) for x in tokens), strict=True)]


def _concat(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
