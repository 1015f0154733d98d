"""Rows of different lengths or positions: which tokens are there, and how they fall into chunks or segments."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def take(x: Tensor, index: Int[Tensor, "B S"]) -> Tensor:
    """x `[B, T, ...]` at `index` `[B, S]` along T."""
    shape = index.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


def cleared(x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """x `[B, T, ...]`, 0 where masked, whatever it is there: 0 * nan would be nan, and so would be gradients."""
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, 0)


def left_align(mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """An order of each row's tokens that puts first those that are there, else unchanged; and how many they are."""
    return torch.argsort(~mask, dim=1, stable=True), mask.sum(1)


def restore(x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """Undo `take(., left_align(mask)[0])`: tokens at their places, 0 where masked."""
    rank = (mask.cumsum(1) - 1).clamp(min=0)
    return cleared(take(x, rank), mask)


class Layout(NamedTuple):
    """Tokens in slots: first `head` slots that complete each row's current chunk, then chunks that are the same for all
    rows, the last as long as its longest row.

    With `source` None every row has all its tokens at the same position, and slots are tokens.
    """

    head: int
    size: int
    chunk: int
    length: Int[Tensor, " B"]
    """Tokens of each row."""
    source: Int[Tensor, "B S"] | None = None
    """The token in each slot (any, where none is)."""
    present: Bool[Tensor, "B S"] | None = None
    slot_of: Int[Tensor, "B T"] | None = None
    """The slot of each token (any, where it is masked)."""
    mask: Bool[Tensor, "B T"] | None = None

    def arrange(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[B, S, ...]`"""
        return x if self.source is None else take(x, self.source)

    def restore(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[B, T, ...]`, 0 where masked."""
        if self.slot_of is None or self.mask is None:
            return x
        return cleared(take(x, self.slot_of), self.mask)

    def spans(self) -> list[tuple[int, int, int]]:
        """(start, end, width): what completes a chunk, whole chunks, what begins one; those that are empty left out."""
        body = self.head + (self.size - self.head) // self.chunk * self.chunk
        spans = [(0, self.head, self.head), (self.head, body, self.chunk), (body, self.size, self.size - body)]
        return [span for span in spans if span[1] > span[0]]


def lay_out(mask: Bool[Tensor, "B T"] | None, position: Int[Tensor, " B"], tokens: int, chunk: int) -> Layout:
    """Where `tokens` tokens of rows that stand at `position` (>= 0, any) fall in a grid of chunks."""
    first = int(position[0]) if len(position) else 0
    if mask is None and bool((position == first).all()):
        return Layout(min(tokens, -first % chunk), tokens, chunk, torch.full_like(position, tokens))
    if mask is None:
        mask = torch.ones(len(position), tokens, dtype=torch.bool, device=position.device)
    order, length = left_align(mask)
    completing = torch.minimum(length, (-position) % chunk)  # tokens until the row's next boundary
    head = int(completing.max())
    slot = torch.arange(head + int((length - completing).max()), device=mask.device)
    in_head = slot < head
    rank = torch.where(in_head, slot, slot - head + completing[:, None])  # [B, S], which token of its row
    present = torch.where(in_head, slot < completing[:, None], rank < length[:, None])
    source = order.gather(1, rank.clamp(max=max(tokens - 1, 0)))
    rank_of = mask.cumsum(1) - 1
    slot_of = torch.where(rank_of < completing[:, None], rank_of, rank_of - completing[:, None] + head)
    return Layout(head, len(slot), chunk, length, source, present, slot_of.clamp(min=0), mask)
