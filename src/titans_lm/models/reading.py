"""What blocks are told of the tokens at hand (`Reading`), and what each of them remembers (`LayerState`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.layers.attention import KeyValues, Rotation
from titans_lm.layers.memory_state import NeuralMemoryState
from titans_lm.ops import where_rows


class Reading(NamedTuple):
    """What all blocks know of the tokens at hand. Rows are left-aligned."""

    position: Tensor  # [B], tokens each row has read before
    at: int | None  # the same for all rows, where it is, and all have all tokens
    turn: Rotation
    present: Tensor | None  # [B, T], True for each row's first tokens; None: all are there
    frozen: bool  # the memory is read but not written
    surprise: bool  # how surprised the memory was is asked for
    fresh: Tensor | None = None  # [B], True in rows that begin with the block's first state; None: none, of a state

    def place(self) -> tuple[Tensor, Rotation, Tensor | None, int | None]:
        """What attention asks for."""
        return self.position, self.turn, self.present, self.at

    def task(self) -> tuple[Tensor | None, bool, bool]:
        """What a memory asks for."""
        return self.present, self.frozen, self.surprise

    def after(self, tokens: int) -> "Reading":
        """Once these `tokens`, as many of them as are there, have been read."""
        read = tokens if self.present is None else self.present.sum(1)
        return self._replace(position=self.position + read, at=None if self.at is None else self.at + tokens)

    def within(self, size: int) -> "Reading":
        """Positions in segments of `size`."""
        return self._replace(position=self.position % size, at=None if self.at is None else self.at % size)

    def where_at(self, position: int, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`yes` in the rows that stand at `position`, `no` in the others."""
        if self.at is None:
            return where_rows(self.position == position, yes, no)
        return yes if self.at == position else no


class Retrieval(NamedTuple):
    """What MAC reads within a segment: the memory as it was when the segment began."""

    weights: tuple[Tensor, ...]
    tail: Tensor


class LayerState(NamedTuple):
    """What one block remembers; None for a part it does not have. Constant size, but for unlimited attention."""

    attention: KeyValues | None = None
    memory: NeuralMemoryState | None = None
    retrieval: Retrieval | None = None
    prefix: Tensor | None = None
    """MAL: what the memory layer made of the persistent tokens, `[B, P, D]`."""


def expand(state: NeuralMemoryState, batch: int) -> NeuralMemoryState:
    """The memory of one row in each of `batch` rows."""
    return map_tensors(state, lambda t: t.expand(batch, *t.shape[1:]))


def start_rows(fresh: Tensor, begin: LayerState, layer: LayerState) -> LayerState:
    """`layer` with the rows `fresh` `[B]` as in `begin`."""
    if begin.attention is not None and layer.attention is not None:
        slots = max(x.attention.keys[0].shape[2] for x in (begin, layer) if x.attention is not None)
        begin, layer = (x._replace(attention=widened(x.attention, slots)) for x in (begin, layer))

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(fresh.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

    return map_tensors(begin, choose, layer)


def widened(attention: Any, slots: int) -> Any:
    """Keys and values with empty slots on the left, as unlimited attention has them for rows that read less."""
    return map_tensors(attention, lambda t: F.pad(t, (0, 0, slots - t.shape[2], 0)))


def map_tensors(tree: Any, function: Callable[..., Tensor], *others: Any) -> Any:
    """The same tree of (named) tuples with `function` applied to each tensor, and to those of `others` in its place."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree, *others)
    parts = [map_tensors(part, function, *rest) for part, *rest in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
