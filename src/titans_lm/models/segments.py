"""What goes in and out of a MAC block's reading of one segment."""

from typing import NamedTuple

from torch import Tensor

from titans_lm.layers.memory_state import ProjectedQueries
from titans_lm.models.block_cache import MACCache
from titans_lm.ops import Surprise


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
    """What MAC computes for the tokens of one segment, or for a part of them."""

    y: Tensor
    """Attention's output, `[B, S, D]`."""
    written: Tensor
    """What the memory writes, `[B, S, D]`."""
    retrieved: Tensor
    """What each head retrieves with it, `[B, S, H, V]`."""
    surprise: Surprise | None
    cache: MACCache
