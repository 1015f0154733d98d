"""Where the rows of a call begin, and what of it Python knows: a compiled call decides nothing by values."""

from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.models.block_cache import BlockCache, restart_rows
from titans_lm.models.cache import TitansState
from titans_lm.ops import assert_traced


class RowStarts(NamedTuple):
    """The rows of a state at the start of a call."""

    caches: list[BlockCache]
    """None at all: every row is at its first token."""
    position: Tensor
    """`[B]`, the tokens that each row has read before."""
    values: list[int] | None
    """Its values; None in a traced call and on the meta device, where there are none."""
    begun: bool
    """Whether no row is at its first token, as far as is known."""

    @classmethod
    def of(cls, state: TitansState, traced: bool) -> "RowStarts":
        if not traced and state.knows_positions():
            values = state.positions()
            return cls(state.layer_caches, state.position, values, begun=0 not in values)
        if begun := state.has_begun() and bool(state.layer_caches):
            assert_traced((state.position > 0).all(), "a position was set to 0 in place: use state.reset(rows)")
        return cls(state.layer_caches, state.position, None, begun)

    def begin_with(self, begin: "RowStarts") -> "RowStarts":
        """The rows, where those at their first token are at the start of `begin`."""
        new, values = self.position == 0, None
        if self.values is not None and begin.values is not None:
            values = [b if value == 0 else value for b, value in zip(begin.values, self.values, strict=True)]
        caches = [restart_rows(new, b, old) for b, old in zip(begin.caches, self.caches, strict=True)]
        return RowStarts(caches, torch.where(new, begin.position, self.position), values, begin.begun)

    def all_new(self) -> bool:
        """Whether all rows are at their first token."""
        return not self.caches or (self.values is not None and not any(self.values))

    def uniform_position(self) -> int | None:
        """The position of all rows, if they are known to agree."""
        if self.all_new():
            return 0
        return self.values[0] if self.values is not None and len(set(self.values)) == 1 else None

    def new_rows(self, restarts: bool) -> Tensor | None:
        """True in rows at their first token, `[B]`, if others are further; None: else. With `restarts` other rows start
        anew in other processes."""
        return None if self.all_new() or (self.begun and not restarts) else self.position == 0


def check_length(limit: int | None, starts: RowStarts, tokens: Tensor | int) -> None:
    """Raises ValueError for rows that are longer than `limit` after these `tokens`: their number, or that of each row,
    `[B]`. A traced call that has positions raises RuntimeError when it runs."""
    if limit is None:
        return
    if not isinstance(tokens, Tensor) and (starts.values is not None or starts.all_new()):
        most = max(starts.values or [0]) + tokens
    elif starts.values is None:
        message = f"there are more tokens than this model's max_position_embeddings={limit}"
        return assert_traced((starts.position + tokens <= limit).all(), message)
    else:
        most = int((starts.position + tokens).max())
    if most > limit:
        raise ValueError(f"{most} tokens are more than this model's max_position_embeddings={limit}")
