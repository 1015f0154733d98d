"""MAC's segments, in turn: as a loop of Python, and as one operation of a compiled graph."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.layers.memory_state import LayerSurprise, ProjectedQueries
from titans_lm.models.block_cache import MACCache, map_tensors
from titans_lm.models.forward_context import ForwardContext
from titans_lm.ops import Layout, for_all_lengths, has_values, lay_out, lay_out_by_shape


class SegmentInputs(NamedTuple):
    """What MAC projects for all tokens of a call, `[B, S, ...]` in their slots, before it reads the first segment."""

    s: Tensor
    queries: ProjectedQueries
    qkv: tuple[Tensor, Tensor, Tensor]  # of attention, [B, heads, S, d]
    valid: Tensor | None

    def split(self, sizes: list[int]) -> list["SegmentInputs"]:
        """Successive parts. A slice for each part would be simpler, but the backward pass of each slice would make a
        gradient as large as the whole."""
        s, q, gate = (x.split(sizes, 1) for x in (self.s, *self.queries))
        qkv = zip(*(x.split(sizes, 2) for x in self.qkv), strict=True)
        valid = [None] * len(sizes) if self.valid is None else self.valid.split(sizes, 1)
        return [
            SegmentInputs(s, ProjectedQueries(q, gate), qkv, valid)
            for s, q, gate, qkv, valid in zip(s, q, gate, qkv, valid, strict=True)
        ]


class SegmentOutput(NamedTuple):
    """What MAC computes for the tokens of a segment, a part of one, or several."""

    y: Tensor
    """Attention's output, `[B, S, D]`."""
    written: Tensor
    """What the memory writes, `[B, S, D]`."""
    retrieved: Tensor
    """What is retrieved with it: by each head, `[B, S, H, V]`; of a token read alone `[B, 1, D]`, projected."""
    surprise: LayerSurprise | None
    cache: MACCache


ReadSegment = Callable[[SegmentInputs, MACCache, ForwardContext], SegmentOutput]
"""Reads one segment, or a part of one."""


def lay_out_segments(context: ForwardContext, x: Tensor, size: int) -> Layout:
    """The slots of x `[B, T, D]` in segments of `size`. Without values, as in a traced call, it follows from shapes."""
    valid, position, tokens = context.valid, context.position, x.shape[1]
    if x.is_meta and valid is None and context.uniform_position is not None:
        return Layout(min(tokens, -context.uniform_position % size), tokens, size, torch.full_like(position, tokens))
    if has_values(x):
        return lay_out(valid, position, tokens, size)
    export, start = for_all_lengths(x), context.uniform_position == 0
    if start and not export and tokens <= size:
        return Layout(tokens, tokens, size, torch.full_like(position, tokens))
    return lay_out_by_shape(valid, position, tokens, size, inside=export or not start)


def split_whole(inputs: SegmentInputs, context: ForwardContext, size: int) -> list[SegmentInputs]:
    """The whole segments of all rows, and the tokens after them, if any; none where a row begins inside a segment, or
    rows differ."""
    tokens = inputs.s.shape[1]
    whole = tokens // size * size
    aligned = context.uniform_position is not None and context.uniform_position % size == 0 and inputs.valid is None
    if not aligned or not whole:
        return []
    return inputs.split([whole, tokens - whole] if whole < tokens else [whole])


def read_segments(
    read: ReadSegment, inputs: SegmentInputs, layout: Layout, cache: MACCache, context: ForwardContext, size: int
) -> tuple[SegmentOutput | None, MACCache]:
    """Read all segments; no output for no slot. Returns the cache after them too."""
    here, outputs = context.in_segment(size), []
    widths = [width for start, end, width in layout.runs() for _ in range((end - start) // width)]
    for part in inputs.split(widths):
        here = here._replace(valid=part.valid)
        outputs.append(read(part, cache, here))
        cache = outputs[-1].cache
        here = here.advanced(part.s.shape[1]).in_segment(size)
    if not outputs:
        return None, cache
    y, written, retrieved = (torch.cat(part, 1) for part in zip(*(out[:3] for out in outputs), strict=True))
    return SegmentOutput(y, written, retrieved, concat_surprises([out.surprise for out in outputs]), cache), cache


def read_segments_as_loop(
    read: ReadSegment, inputs: SegmentInputs, layout: Layout, cache: MACCache, context: ForwardContext, size: int
) -> tuple[SegmentOutput, MACCache]:
    """`read_segments` of whole segments, as one operation: a graph does not depend on their number."""
    from torch._higher_order_ops.scan import scan

    s, count = inputs.s, layout.slots // size
    valid = torch.ones(s.shape[:2], dtype=torch.bool, device=s.device) if inputs.valid is None else inputs.valid
    qkv = [x.transpose(1, 2) for x in inputs.qkv]
    parts = [x.unflatten(1, (count, size)).movedim(1, 0) for x in (s, *inputs.queries, *qkv, valid)]
    dtype = inputs.qkv[1].dtype  # of windows and convolutions, which autocast may change
    first = cache._replace(
        attention=map_tensors(cache.attention, lambda t: t.to(dtype)),
        memory=cache.memory._replace(conv_state=tuple(t.to(dtype) for t in cache.memory.conv_state)),
    )

    def step(carry: list[Tensor], part: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        s, q, gate, *qkv, valid = part
        *tensors, position = _from_carry(carry, start)
        qkv_here = (qkv[0].transpose(1, 2), qkv[1].transpose(1, 2), qkv[2].transpose(1, 2))
        here = context._replace(position=position, uniform_position=None, valid=valid)
        out = read(SegmentInputs(s, ProjectedQueries(q, gate), qkv_here, valid), _as_cache(tensors, first), here)
        results = [out.y, out.written, out.retrieved, *(out.surprise or ())]
        after = [*_tensors(out.cache), here.advanced(size).position % size]
        return _to_carry(after, carry), [t.clone() for t in results]

    start = [*_tensors(first), context.position % size]
    last, stacked = scan(step, _to_carry(start, None), parts)
    y, written, retrieved, *surprise = (t.movedim(0, 1).flatten(1, 2) for t in stacked)
    after = _as_cache(_from_carry(last, start)[:-1], first)
    return SegmentOutput(y, written, retrieved, LayerSurprise(*surprise) if surprise else None, after), after


def _to_carry(tensors: list[Tensor], before: list[Tensor] | None) -> list[Tensor]:
    """The tensors as the operation carries them: new, contiguous, and all differentiable, so integers as numbers that
    depend on those `before`."""
    carry = [(t if t.is_floating_point() else t.float()).clone(memory_format=torch.contiguous_format) for t in tensors]
    if before is None:
        return carry
    return [x if t.is_floating_point() else x + 0 * old for t, x, old in zip(tensors, carry, before, strict=True)]


def _from_carry(carry: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Undo `_to_carry`, for tensors of the dtypes of `like`."""
    return [x.to(t.dtype) for x, t in zip(carry, like, strict=True)]


def _as_cache(tensors: list[Tensor], like: MACCache) -> MACCache:
    """Undo `_tensors`."""
    rest = iter(tensors)
    return map_tensors(like, lambda _: next(rest))


def _tensors(cache: MACCache) -> list[Tensor]:
    """All of its tensors, in the order of `map_tensors`."""
    found: list[Tensor] = []
    map_tensors(cache, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def concat_surprises(surprises: Sequence[LayerSurprise | None]) -> LayerSurprise | None:
    """The surprises of successive tokens as one."""
    given = [surprise for surprise in surprises if surprise is not None]
    return LayerSurprise(*(torch.cat(part, 1) for part in zip(*given, strict=True))) if given else None
