"""Rows of different lengths: which tokens are there, and where they fall in the chunks."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def left_align(mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """An order of each row's tokens that puts those that are there first, keeping their order; and how many they are."""
    return torch.argsort(~mask, dim=1, stable=True), mask.sum(1)


def take(x: Tensor, index: Int[Tensor, "B S"]) -> Tensor:
    """x `[B, T, ...]` at `index` `[B, S]` along T."""
    shape = index.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


class Slots(NamedTuple):
    """Where each row's tokens stand: first what completes the row's current chunk, then whole chunks from a boundary.

    All rows are at a chunk boundary from slot `head` on, so what follows is a grid of chunks for the whole batch.
    """

    index: Int[Tensor, "B S"]
    """The token in each slot (any, where none is)."""
    present: Bool[Tensor, "B S"]
    head: int
    slot_of: Int[Tensor, "B T"]
    """The slot of each token (any, where the token is masked)."""


def slots(mask: Bool[Tensor, "B T"], position: Int[Tensor, " B"], chunk_size: int) -> Slots:
    """Lay out rows that begin at different positions of a chunk, or hold different numbers of tokens."""
    order, length = left_align(mask)
    completing = torch.minimum(length, (-position) % chunk_size)  # tokens until the row's next boundary
    head = int(completing.max())
    chunks = -(-int((length - completing).max()) // chunk_size)
    slot = torch.arange(head + chunks * chunk_size, device=mask.device)
    in_head = slot < head
    rank = torch.where(in_head, slot, slot - head + completing[:, None])  # [B, S], the how-manieth token of its row
    present = torch.where(in_head, slot < completing[:, None], rank < length[:, None])
    index = order.gather(1, rank.clamp(max=max(mask.shape[1] - 1, 0)))
    rank_of = mask.cumsum(1) - 1
    slot_of = torch.where(rank_of < completing[:, None], rank_of, rank_of - completing[:, None] + head)
    return Slots(index, present, head, slot_of.clamp(min=0))
