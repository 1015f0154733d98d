"""Packed rows: a row holds several documents, and the model reads each of them as if it were alone."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from titans_lm.layers.memory_state import LayerSurprise
from titans_lm.models.cache import TitansState
from titans_lm.ops import gather_tokens, left_align
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"Asked": "OutputOptions", "Read": "StackOutput"})

Starts = Bool[Tensor, "B T"]
"""True at the first token of each document, except the first document of a row."""

Expected = list[list[int]]
"""The positions at which each row may continue; an empty list allows any."""


def document_starts(
    mask: Tensor | None,
    shape: tuple[int, int],
    position_ids: Tensor | None,
    expected: Callable[[], Expected],
    packed: dict[str, Any],
) -> Starts | None:
    """Where documents start, by `position_ids`, `cu_seq_lens_q` or `seq_idx`; None where each row is one document.

    `mask` `[B, T]` is True at tokens, False at padding. Raises ValueError for arguments that describe no packing, for
    positions at which a row cannot continue, and for two arguments that differ.
    """
    found: dict[str, Tensor] = {}
    given = [
        key for key, value in {"position_ids": position_ids, **packed}.items() if key in _PACKING and value is not None
    ]
    if given and torch.compiler.is_compiling():
        raise ValueError(f"a compiled call cannot take {given[0]}, whose values say which rows there are: leave it out")
    if given and any(isinstance(value, Tensor) and value.is_meta for value in (position_ids, *packed.values())):
        raise ValueError(f"a call on the meta device cannot take {given[0]}, whose values say which rows there are")
    if position_ids is not None:
        found["position_ids"] = _by_position(_fitting("position_ids", position_ids, shape), mask, expected())
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
_PACKING = ("position_ids", *PACKED)
"""The other arguments by which transformers' data collators describe a packing."""


def _fitting(name: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    if value.dim() != 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
        raise ValueError(f"{name} must be [B, T] = {list(shape)}, got {list(value.shape)}")
    return value.expand(shape)


def _aligned(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`x` `[B, T]` left-aligned, the column of each token, and for all but the first slot whether it holds a token."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    order, length = left_align(mask)
    filled = torch.arange(1, x.shape[1], device=x.device) < length[:, None]
    return gather_tokens(x, order), order, filled


def _at_columns(starts: Tensor, order: Tensor) -> Tensor:
    """`starts` of each row's tokens but the first, moved to the columns of these tokens."""
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, 1:], starts)


def _by_position(position: Tensor, mask: Tensor | None, expected: Expected) -> Tensor:
    """A document starts at position 0. Elsewhere a position is one more than the one before."""
    position, order, filled = _aligned(position, mask)
    steps = position[:, 1:] == position[:, :-1] + 1
    starts = filled & ~steps & (position[:, 1:] == 0)
    wrong = filled & ~steps & ~starts
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        before, here = position[row, token : token + 2].tolist()
        raise ValueError(
            f"position_ids goes from {before} to {here} in row {row}, column {int(order[row, token + 1])}: a memory "
            f"counts each token, so positions go up by 1, or start at 0 with a new document"
        )
    if position.shape[1]:
        has_tokens = [True] * len(expected) if mask is None else mask.any(1).tolist()
        for row, first in enumerate(position[:, 0].tolist()):
            if expected[row] and has_tokens[row] and first not in expected[row]:
                raise ValueError(
                    f"position_ids begins at {first} in row {row}, which has read {expected[row][0]} tokens: leave "
                    f"position_ids out, or reset the row for a new document"
                )
    return _at_columns(starts, order)


def _by_change(index: Tensor, mask: Tensor | None) -> Tensor:
    index, order, filled = _aligned(index, mask)
    return _at_columns(filled & (index[:, 1:] != index[:, :-1]), order)


def _by_lengths(
    shape: tuple[int, int],
    mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> Tensor:
    """The documents of one row without padding, by the cumulative sums of their lengths."""
    if cu_seq_lens_q is None:
        raise ValueError("cu_seq_lens_k, max_length_q and max_length_k need cu_seq_lens_q")
    ends = [int(end) for end in torch.as_tensor(cu_seq_lens_q).view(-1).tolist()]
    if shape[0] != 1 or mask is not None:
        raise ValueError(f"cu_seq_lens_q describes one row without padding, got {shape[0]} rows, or padding")
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != shape[1] or ends != sorted(ends):
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the row's {shape[1]} tokens, got {ends}")
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
    """Documents of similar lengths, as rows of a batch `[N, L]`."""

    row: Int[Tensor, " N"]
    """The packed row of each document."""
    column: Int[Tensor, "N L"]
    """The column of each token in its packed row; any column where there is no token."""
    valid: Bool[Tensor, "N L"]
    """True at tokens."""
    new: list[bool]
    """Whether each document starts with the first memory; else it continues the row's state."""
    last: list[bool]
    """Whether each document is the last of its row."""

    def unpack(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[N, L, ...]`"""
        return x[self.row[:, None], self.column]

    def flat_index(self, width: int) -> Tensor:
        """The index of each token in the flattened packed rows of `width` columns."""
        return (self.row[:, None] * width + self.column)[self.valid]


def documents(starts: Starts, mask: Tensor | None) -> list[Documents]:
    """All documents, in groups. A group's longest document is less than twice as long as its shortest, so that padding
    stays below half."""
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
    valid, column = column < end[:, None], column.minimum(end[:, None] - 1)
    if mask is not None:
        valid = valid & mask[row[:, None], column]
    return Documents(row, column, valid, [g[3] for g in group], [g[4] for g in group])


class OutputOptions(NamedTuple):
    """What a model returns beside the last hidden states."""

    surprise: bool
    hidden: bool


class StackOutput(NamedTuple):
    """What a model's stack of blocks returns."""

    x: Tensor
    """The last hidden states, `[B, T, D]`."""
    state: TitansState
    hidden: list[Tensor]
    """The input of each layer, if it was asked for."""
    surprise: list[LayerSurprise]
    """Of each layer with a memory, if it was asked for."""


def read_documents(
    starts: Tensor | None,
    mask: Tensor | None,
    x: Tensor,
    state: TitansState,
    initial_state: Callable[[int], TitansState],
    forward: Callable[[Tensor, Tensor | None, TitansState], StackOutput],
) -> StackOutput:
    """Run `forward` on rows whose embeddings are x `[B, T, D]`; on packed rows, where documents begin at `starts`, once
    for each group of documents.

    `initial_state` makes the state of a number of new documents. A row's first document continues `state`. Afterwards a
    row's state is that of its last document.
    """
    if starts is None:
        return forward(x, mask, state)
    groups = documents(starts.to(x.device), mask)
    state = state if state.layer_caches else initial_state(len(x))
    outputs, ends, rows = [], [], []
    for group in groups:
        new = torch.tensor(group.new, device=x.device)
        before = initial_state(len(new)) if bool(new.all()) else state.select(group.row)
        if not bool(new.all()):
            before.reset(new.nonzero()[:, 0])
        before.frozen = state.frozen
        outputs.append(forward(group.unpack(x), group.valid, before))
        last = torch.tensor(group.last, device=x.device).nonzero()[:, 0]
        ends.append(outputs[-1].state.select(last))
        rows.append(group.row[last])

    def pack(parts: tuple[Tensor, ...]) -> Tensor:
        return in_rows(groups, parts, (x.shape[0], x.shape[1]))

    end = TitansState.concat(ends).select(torch.cat(rows).argsort())
    surprises = zip(*(out.surprise for out in outputs), strict=True)
    return StackOutput(
        pack(tuple(out.x for out in outputs)),
        state.advanced(end.layer_caches, end.position, x.shape[1]),
        [pack(layer) for layer in zip(*(out.hidden for out in outputs), strict=True)],
        [LayerSurprise(*map(pack, zip(*layer, strict=True))) for layer in surprises],
    )


def in_rows(groups: list[Documents], parts: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """Undo `unpack`: `parts` `[N, L, ...]` of each group as `[B, T, ...]`, 0 at padding."""
    flat = parts[0].new_zeros(shape[0] * shape[1], *parts[0].shape[2:])
    index = torch.cat([group.flat_index(shape[1]) for group in groups])
    values = torch.cat([part[group.valid] for group, part in zip(groups, parts, strict=True)])
    return flat.index_copy(0, index, values).view(*shape, *flat.shape[1:])
