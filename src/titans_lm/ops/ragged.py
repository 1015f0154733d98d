"""Rows of different length or chunk position: which tokens are valid, and in which slot of which chunk each lies."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from titans_lm.ops.types import has_values
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"cleared": "masked_zero", "restore": "undo_left_align", "take": "gather_tokens"})


def gather_tokens(x: Tensor, index: Int[Tensor, "B S"]) -> Tensor:
    """Gather x `[B, T, ...]` along T by `index` -> `[B, S, ...]`."""
    shape = index.shape + (1,) * (x.dim() - 2)
    return x.gather(1, index.view(shape).expand(*index.shape, *x.shape[2:]))


def masked_zero(x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """x `[B, T, ...]`, with 0 where `mask` is False. Unlike a product with 0, it also replaces nan and its gradient."""
    return torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, 0)


def left_align(mask: Bool[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """The stable order that puts each row's valid tokens first, for `gather_tokens`; and the number of valid tokens."""
    return torch.argsort(~mask, dim=1, stable=True), mask.sum(1)


def undo_left_align(x: Tensor, mask: Bool[Tensor, "B T"]) -> Tensor:
    """Undo `gather_tokens(x, left_align(mask)[0])`: every token back at its place, 0 where masked."""
    rank = (mask.cumsum(1) - 1).clamp(min=0)
    return masked_zero(gather_tokens(x, rank), mask)


def is_left_aligned(mask: Bool[Tensor, "B T"]) -> bool:
    """Whether each row's valid tokens come first; False where that cannot be looked at."""
    return has_values(mask) and not bool((mask[:, 1:] & ~mask[:, :-1]).any())


class Layout(NamedTuple):
    """The slots of a call's tokens, so that all rows begin their chunks at the same slots.

    The first `lead` slots complete each row's current chunk. Chunks follow that are the same for all rows; the last is
    as long as its longest row. With `token_of_slot` None all rows have all tokens at one position: slots are tokens.
    """

    lead: int
    slots: int
    """S, slots of a row."""
    chunk_size: int
    length: Int[Tensor, " B"]
    """Valid tokens of each row."""
    token_of_slot: Int[Tensor, "B S"] | None = None
    """The index of the token in each slot; any index where the slot is empty."""
    valid: Bool[Tensor, "B S"] | None = None
    """Which slots hold a token."""
    slot_of_token: Int[Tensor, "B T"] | None = None
    """The slot of each token; any slot where the token is masked."""
    mask: Bool[Tensor, "B T"] | None = None

    def to_slots(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[B, S, ...]`"""
        return x if self.token_of_slot is None else gather_tokens(x, self.token_of_slot)

    def from_slots(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[B, T, ...]`, 0 where masked."""
        if self.slot_of_token is None or self.mask is None:
            return x
        return masked_zero(gather_tokens(x, self.slot_of_token), self.mask)

    def runs(self) -> list[tuple[int, int, int]]:
        """(start, end, chunk size) in slots: what completes a chunk, whole chunks, an unfinished chunk; none empty."""
        body = self.lead + (self.slots - self.lead) // self.chunk_size * self.chunk_size
        runs = [(0, self.lead, self.lead), (self.lead, body, self.chunk_size), (body, self.slots, self.slots - body)]
        return [run for run in runs if run[1] > run[0]]


def lay_out(mask: Bool[Tensor, "B T"] | None, position: Int[Tensor, " B"], tokens: int, chunk: int) -> Layout:
    """Lay `tokens` tokens of each row out in chunks of `chunk`, for rows at `position` (>= 0) of a chunk."""
    first = int(position[0]) if len(position) else 0
    if mask is None and bool((position == first).all()):
        return Layout(min(tokens, -first % chunk), tokens, chunk, torch.full_like(position, tokens))
    if mask is None:
        mask = torch.ones(position.shape[0], tokens, dtype=torch.bool, device=position.device)
    order, length = left_align(mask)
    completing = torch.minimum(length, (-position) % chunk)  # tokens until the row's next chunk start
    lead = int(completing.max())
    return _assign(mask, order, (lead, lead + int((length - completing).max())), chunk, completing)


def lay_out_by_shape(
    mask: Bool[Tensor, "B T"] | None, position: Int[Tensor, " B"], tokens: int, chunk: int, *, inside: bool
) -> Layout:
    """`lay_out` without values: all slots are those of whole chunks, also where all tokens are valid.

    `inside`: rows may begin inside a chunk; else they begin at a chunk start."""
    if mask is None:
        mask = torch.ones(position.shape[0], tokens, dtype=torch.bool, device=position.device)
        order, length = torch.arange(tokens, device=position.device).expand(mask.shape), mask.sum(1)
    else:
        order, length = left_align(mask)
    completing = torch.minimum(length, (-position) % chunk)
    lead = chunk if inside else 0
    slots = (lead + tokens + chunk - 1) // chunk * chunk  # one quotient, which symbolic shapes can divide by
    return _assign(mask, order, (lead, slots), chunk, completing)


def _assign(mask: Tensor, order: Tensor, lead_and_slots: tuple[int, int], chunk: int, completing: Tensor) -> Layout:
    """The layout of so many slots, of which the first `lead` are for the tokens that are `completing` a chunk."""
    (lead, slots), tokens, length = lead_and_slots, mask.shape[1], mask.sum(1)
    slot = torch.arange(slots, device=mask.device)
    in_lead = slot < lead
    rank = torch.where(in_lead, slot, slot - lead + completing[:, None])  # [B, S], which token of its row
    valid = (in_lead & (slot < completing[:, None])) | (~in_lead & (rank < length[:, None]))
    token_of_slot = order.gather(1, rank.clamp(max=max(tokens - 1, 0)))
    token_rank = mask.cumsum(1) - 1
    slot_of_token = torch.where(token_rank < completing[:, None], token_rank, token_rank - completing[:, None] + lead)
    return Layout(lead, slots, chunk, length, token_of_slot, valid, slot_of_token.clamp(min=0), mask)
