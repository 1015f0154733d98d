"""Packed rows: several documents one after another in a row, each read as if it were alone."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from titans_lm.models.cache import TitansState
from titans_lm.ops import Surprise, gather_tokens, left_align

Starts = Bool[Tensor, "B T"]
"""True at the first token of each document but the first of the row."""

Expected = list[list[int]]
"""Positions at which each row may go on; none where any will do."""


def document_starts(
    mask: Tensor | None,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    expected: Expected,
    packed: dict[str, Any],
) -> Starts | None:
    """Where documents start, as `position_ids`, `cu_seq_lens_q` or `seq_idx` say; None where there is one in each row.

    `mask` `[B, T]` is True where a token is there. Raises ValueError for what is not a packing, for positions at which
    a row cannot go on, and where two of these arguments differ.
    """
    found: dict[str, Tensor] = {}
    if position_ids is not None:
        found["position_ids"] = _by_position(_fitting("position_ids", position_ids, shape), mask, expected)
    if packed.get("seq_idx") is not None:
        found["seq_idx"] = _by_change(_fitting("seq_idx", packed["seq_idx"], shape), mask)
    lengths = {key: packed.get(key) for key in LENGTHS}
    if any(value is not None for value in lengths.values()):
        found["cu_seq_lens_q"] = _by_lengths(shape, mask, **lengths)
    if not found:
        return None
    (name, starts), *others = found.items()
    for other, also in others:
        if not torch.equal(starts, also.to(starts.device)):
            raise ValueError(f"{name} and {other} say that documents start at different tokens")
    return starts if bool(starts.any()) else None


LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PACKED = (*LENGTHS, "seq_idx")
"""Keywords beside `position_ids` that transformers' data collators make."""


def _fitting(name: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    if value.dim() != 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
        raise ValueError(f"{name} must be [B, T] = {list(shape)}, got {list(value.shape)}")
    return value.expand(shape)


def _aligned(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`x` `[B, T]` with each row's tokens first, the column of each, and whether each but the first is there."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    order, length = left_align(mask)
    there = torch.arange(1, x.shape[1], device=x.device) < length[:, None]
    return gather_tokens(x, order), order, there


def _at_columns(starts: Tensor, order: Tensor) -> Tensor:
    """`starts` of each row's tokens but the first, at the columns where these stand."""
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, 1:], starts)


def _by_position(position: Tensor, mask: Tensor | None, expected: Expected) -> Tensor:
    """A document starts where the position is 0; elsewhere it is one more than the token's before."""
    position, order, there = _aligned(position, mask)
    steps = position[:, 1:] == position[:, :-1] + 1
    starts = there & ~steps & (position[:, 1:] == 0)
    wrong = there & ~steps & ~starts
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        before, here = position[row, token : token + 2].tolist()
        raise ValueError(
            f"position_ids goes from {before} to {here} in row {row}, column {int(order[row, token + 1])}: a memory "
            f"counts each token, so positions go up by 1, or start at 0 with a new document"
        )
    if position.shape[1]:
        reads = [True] * len(expected) if mask is None else mask.any(1).tolist()
        for row, first in enumerate(position[:, 0].tolist()):
            if expected[row] and reads[row] and first not in expected[row]:
                raise ValueError(
                    f"position_ids begins at {first} in row {row}, which has read {expected[row][0]} tokens: leave "
                    f"position_ids out, or reset the row for a new document"
                )
    return _at_columns(starts, order)


def _by_change(index: Tensor, mask: Tensor | None) -> Tensor:
    index, order, there = _aligned(index, mask)
    return _at_columns(there & (index[:, 1:] != index[:, :-1]), order)


def _by_lengths(
    shape: tuple[int, int],
    mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> Tensor:
    """Documents of one row without padding, by the sums of their lengths."""
    if cu_seq_lens_q is None:
        raise ValueError("cu_seq_lens_k, max_length_q and max_length_k need cu_seq_lens_q")
    ends = [int(end) for end in torch.as_tensor(cu_seq_lens_q).view(-1).tolist()]
    if shape[0] != 1 or mask is not None:
        raise ValueError(f"cu_seq_lens_q is of one row without padding; there are {shape[0]} rows, or padding")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != shape[1] or ends != sorted(ends):
        raise ValueError(f"cu_seq_lens_q must go up from 0 to the row's {shape[1]} tokens, got {ends}")
    if cu_seq_lens_k is not None and torch.as_tensor(cu_seq_lens_k).view(-1).tolist() != ends:
        raise ValueError("cu_seq_lens_k must be cu_seq_lens_q: a document's keys are those of its own tokens")
    longest = max(b - a for a, b in itertools.pairwise(ends))
    for name, length in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if length is not None and int(length) < longest:
            raise ValueError(f"{name}={int(length)}, and a document has {longest} tokens")
    starts = torch.zeros(shape, dtype=torch.bool)
    starts[0, [end for end in ends[1:-1] if 0 < end < shape[1]]] = True
    return starts


# ------------------------------------------------------------------------------------------------ documents as rows


class Documents(NamedTuple):
    """Documents of similar lengths as rows of their own, `[N, L]`."""

    row: Int[Tensor, " N"]
    """The packed row of each."""
    column: Int[Tensor, "N L"]
    """The column of each token there (any, where none is)."""
    present: Bool[Tensor, "N L"]
    new: list[bool]
    """Whether each starts anew, and does not go on from the row's state."""
    last: list[bool]
    """Whether each is its row's last."""

    def of(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[N, L, ...]`"""
        return x[self.row[:, None], self.column]

    def places(self, width: int) -> Tensor:
        """Of the tokens that are there, in rows of `width` columns one after another."""
        return (self.row[:, None] * width + self.column)[self.present]


def documents(starts: Starts, mask: Tensor | None) -> list[Documents]:
    """All documents, in groups whose longest is less than twice as long as its shortest: padding stays below half."""
    rows, width = starts.shape
    groups: dict[int, list[tuple[int, int, int, bool, bool]]] = {}
    for row in range(rows):
        cuts = [0, *starts[row].nonzero()[:, 0].tolist(), width]
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            group = (end - begin).bit_length()
            groups.setdefault(group, []).append((row, begin, end, i > 0, end == width))
    return [_group(group, mask, starts.device) for _, group in sorted(groups.items())]


def _group(group: list[tuple[int, int, int, bool, bool]], mask: Tensor | None, device: torch.device) -> Documents:
    row, begin, end = (torch.tensor(part, device=device) for part in zip(*(g[:3] for g in group), strict=True))
    column = begin[:, None] + torch.arange(int((end - begin).max()), device=device)
    present, column = column < end[:, None], column.minimum(end[:, None] - 1)
    if mask is not None:
        present = present & mask[row[:, None], column]
    return Documents(row, column, present, [g[3] for g in group], [g[4] for g in group])


class Asked(NamedTuple):
    """What is asked for beside the last hidden states."""

    surprise: bool
    hidden: bool


class Read(NamedTuple):
    """What a model made of tokens."""

    x: Tensor
    state: TitansState
    hidden: list[Tensor]
    """The input of each layer, where it is asked for."""
    surprise: list[Surprise]


def read_documents(
    groups: list[Documents],
    x: Tensor,
    state: TitansState,
    begin: Callable[[int], TitansState],
    read: Callable[[Tensor, Tensor, TitansState], Read],
) -> Read:
    """Embeddings `[B, T, D]` of packed rows: `read` each group. `begin` makes the state of as many new documents; the
    first of each row goes on from `state`. Afterwards a row's state is that of its last document."""
    parts, ends, rows = [], [], []
    for group in groups:
        new = torch.tensor(group.new, device=x.device)
        before = begin(len(new)) if bool(new.all()) else state.select(group.row)
        if not bool(new.all()):
            before.reset(new.nonzero()[:, 0])
        before.frozen = state.frozen
        parts.append(read(group.of(x), group.present, before))
        last = torch.tensor(group.last, device=x.device).nonzero()[:, 0]
        ends.append(parts[-1].state.select(last))
        rows.append(group.row[last])

    def together(same: tuple[Tensor, ...]) -> Tensor:
        return _unpacked(groups, same, (x.shape[0], x.shape[1]))

    end = TitansState.joined(ends).select(torch.cat(rows).argsort())
    seen = zip(*(part.surprise for part in parts), strict=True)
    return Read(
        together(tuple(part.x for part in parts)),
        state.moved(end.memories, end.position, x.shape[1]),
        [together(same) for same in zip(*(part.hidden for part in parts), strict=True)],
        [Surprise(*map(together, zip(*layer, strict=True))) for layer in seen],
    )


def _unpacked(groups: list[Documents], parts: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """Undo `of`: `parts` `[N, L, ...]` of each group as `[B, T, ...]`, 0 where no token is."""
    flat = parts[0].new_zeros(shape[0] * shape[1], *parts[0].shape[2:])
    places = torch.cat([group.places(shape[1]) for group in groups])
    values = torch.cat([part[group.present] for group, part in zip(groups, parts, strict=True)])
    return flat.index_copy(0, places, values).view(*shape, *flat.shape[1:])
