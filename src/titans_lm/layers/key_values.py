"""The KV cache of attention: as a value, and in buffers that decoding writes in place.

A token copies more keys and values than it computes with. Who alone holds a cache may keep it in buffers [P, slots], as
attention takes them: the persistent tokens, whose keys and values then are computed once, before the slots.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from titans_lm.ops import gather_tokens, is_traced

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class KeyValues(NamedTuple):
    """The KV cache: keys (with positions) and values of tokens that later ones may see, `[B, heads, S, head_dim]` each.

    An empty slot is 0. A window is aligned right, at its last token; a segment left, at its first. A window has one
    tensor of keys and one of values; a segment has two, of retrieved tokens h and of its own tokens S.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Places(NamedTuple):
    """Where a call's token is written in buffers, row by row."""

    slots: list[int]
    """The first slot of what is written."""
    ends: list[int]
    """The slots in use then."""


class WindowBuffers(NamedTuple):
    """A window that decoding writes in place: token t is in slot t mod W, where no later token sees what it replaces.

    So a value from before a token stays valid until the token after: a call that failed may be repeated."""

    keys: tuple[Tensor]
    values: tuple[Tensor]
    num_persistent: int

    @classmethod
    def of(cls, cache: KeyValues, persistent: Pair, position: Int[Tensor, " B"]) -> "WindowBuffers":
        """A copy of a window whose rows have read `position` tokens."""
        width = cache.keys[0].shape[2] + 1
        slots = [p % width for p in position.tolist()]  # the next token's, which is empty
        keys, values = (_with_own(own, old[0], slots) for own, old in zip(persistent, cache, strict=True))
        return cls((keys,), (values,), persistent[0].shape[2])

    def whole(self, position: Int[Tensor, " B"]) -> KeyValues:
        """The window as a `KeyValues`, in tensors of its own."""
        size, width = self.num_persistent, self.keys[0].shape[2] - self.num_persistent
        if is_traced(position):  # a traced call has no values to slice by
            order = (position[:, None] + 1 + torch.arange(width - 1, device=position.device)) % width  # [B, W - 1]
            return KeyValues(*((_gather_slots(buffer[0][:, :, size:], order),) for buffer in self[:2]))
        slots = [p % width for p in position.tolist()]  # the next token's, before the oldest one's

        def row(own: Tensor, slot: int) -> Tensor:
            return torch.cat([own[:, :, size + slot + 1 :], own[:, :, size : size + slot]], 2)

        keys, values = (_by_row(row, slots, buffer[0]) for buffer in self[:2])
        return KeyValues((keys,), (values,))

    def places(self, position: Int[Tensor, " B"], uniform_position: int | None) -> Places:
        """Where rows at `position` write the next token: all at `uniform_position`, unless it is None."""
        return self.places_at(position.tolist() if uniform_position is None else [uniform_position] * len(position))

    def places_at(self, positions: list[int]) -> Places:
        """`places` of rows that have read so many tokens."""
        size, width = self.num_persistent, self.keys[0].shape[2] - self.num_persistent
        return Places([size + p % width for p in positions], [size + min(p + 1, width) for p in positions])

    def writable(self, dtype: torch.dtype) -> "WindowBuffers":
        """The buffers in `dtype`, themselves if they have it and may be written in place."""
        keys, values = (_writable(buffer[0], dtype) for buffer in self[:2])
        return WindowBuffers((keys,), (values,), self.num_persistent)


class SegmentBuffers(NamedTuple):
    """A segment that decoding writes in place: h and S alternate, so that the slots in use are the first ones."""

    keys: tuple[Tensor]
    values: tuple[Tensor]
    num_persistent: int

    @classmethod
    def of(cls, cache: KeyValues, persistent: Pair) -> "SegmentBuffers":
        """A copy of a segment."""
        keys, values = (_alternate(p, old) for p, old in zip(persistent, cache, strict=True))
        return cls((keys,), (values,), persistent[0].shape[2])

    def whole(self, position: Int[Tensor, " B"]) -> KeyValues:
        """The segment as a `KeyValues`, in tensors of its own. Rows have read `position` tokens."""
        size = self.num_persistent
        slots = (self.keys[0].shape[2] - size) // 2
        used = torch.arange(slots, device=position.device) < (position % slots)[:, None]  # [B, S]
        keys, values = (
            tuple(x[0][:, :, size + i :: 2].where(used[:, None, :, None], 0) for i in range(2)) for x in self[:2]
        )
        return KeyValues(keys, values)

    def places(self, position: Int[Tensor, " B"], uniform_position: int | None) -> Places:
        """As of a window: where h is written, and S behind it. Positions are those in the segment."""
        return self._places(position.tolist() if uniform_position is None else [uniform_position] * len(position))

    def places_at(self, positions: list[int]) -> Places:
        """`places` of rows that have read so many tokens, of this segment and of those before."""
        width = (self.keys[0].shape[2] - self.num_persistent) // 2
        return self._places([position % width for position in positions])

    def _places(self, rows: list[int]) -> Places:
        slots = [self.num_persistent + 2 * p for p in rows]
        return Places(slots, [slot + 2 for slot in slots])

    def writable(self, dtype: torch.dtype) -> "SegmentBuffers":
        """The buffers in `dtype`, themselves if they have it and may be written in place."""
        keys, values = (_writable(buffer[0], dtype) for buffer in self[:2])
        return SegmentBuffers((keys,), (values,), self.num_persistent)


def _writable(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    buffer = buffer.to(dtype)
    if buffer.is_inference() and not torch.is_inference_mode_enabled():  # PyTorch refuses to write those
        return buffer.clone()
    return buffer


def append(
    cache: WindowBuffers | SegmentBuffers, new: KeyValues, places: Places
) -> tuple[Pair, Bool[Tensor, "B 1 1 S"] | None]:
    """Write the new keys and values, `[B, heads, 1, d]` each, one behind another: keys and values for attention after
    it, and their mask; None: all are visible."""
    buffers, last = (cache.keys[0], cache.values[0]), max(places.ends, default=0)
    row, slot = torch.arange(len(places.slots)), torch.tensor(places.slots, dtype=torch.long)
    for buffer, tokens in zip(buffers, new, strict=True):
        for i, token in enumerate(tokens):
            buffer[row, :, slot + i] = token[:, :, 0]
    visible = None if len(set(places.ends)) < 2 else _before(last, torch.tensor(places.ends))
    return (buffers[0][:, :, :last], buffers[1][:, :, :last]), visible


def writes_in_place(x: Tensor, valid: Tensor | None) -> bool:
    """Whether a call with x `[B, T, D]` may write into buffers: a token in each row, on a CPU, without gradients."""
    if torch.is_grad_enabled() or is_traced(x) or valid is not None:
        return False
    return x.shape[1] == 1 and x.is_cpu


def append_to_segment(
    cache: KeyValues, persistent: Pair, new: KeyValues, position: Int[Tensor, " B"]
) -> tuple[Pair, Bool[Tensor, "B 1 1 S"], KeyValues]:
    """Keys and values for attention after a token at each row's `position` in its segment, their mask, and the cache
    after it, which is a part of them: one copy."""
    size, slots = persistent[0].shape[2], cache.keys[0].shape[2]
    keys, values = (_alternate(p, old) for p, old in zip(persistent, cache, strict=True))
    row = torch.arange(position.shape[0], device=position.device)
    for buffer, tokens in zip((keys, values), new, strict=True):
        for i, token in enumerate(tokens):
            buffer[row, :, size + 2 * position + i] = token[:, :, 0]
    visible = _before(size + 2 * slots, size + 2 * (position + 1))
    after = KeyValues(*(tuple(buffer[:, :, size + i :: 2] for i in range(2)) for buffer in (keys, values)))
    return (keys, values), visible, after


def _alternate(persistent: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """[P, the first slot of each part, the second slot of each part, ...]."""
    return torch.cat([persistent, torch.stack([part.to(persistent.dtype) for part in parts], 3).flatten(2, 3)], 2)


def _before(slots: int, end: Int[Tensor, " B"]) -> Bool[Tensor, "B 1 1 S"]:
    """True in each row's slots before its `end`."""
    return (torch.arange(slots, device=end.device) < end[:, None])[:, None, None]


def _with_own(persistent: Tensor, window: Tensor, slots: list[int]) -> Tensor:
    """The persistent tokens `[B, heads, P, d]`, and a window `[B, heads, W - 1, d]`, of each row from the slot after
    the given one on. That slot is empty."""
    empty = persistent.new_zeros(1, persistent.shape[1], 1, persistent.shape[3])

    def row(own: Tensor, old: Tensor, slot: int) -> Tensor:
        old, first = old.to(own.dtype), old.shape[2] - slot
        return torch.cat([own, old[:, :, first:], empty.expand(len(own), -1, -1, -1), old[:, :, :first]], 2)

    return _by_row(row, slots, persistent, window)


def _gather_slots(x: Tensor, slot: Int[Tensor, "B S"]) -> Tensor:
    """Slots of x `[B, heads, S, d]`, of each row its own."""
    return gather_tokens(x.transpose(1, 2), slot).transpose(1, 2).contiguous()


def _by_row(function: Callable[..., Tensor], numbers: list[int], *tensors: Tensor) -> Tensor:
    """function(*tensors `[B, ...]`, number), where each row has a number: one call where all are equal."""
    if len(set(numbers)) < 2:
        return function(*tensors, numbers[0] if numbers else 0)
    return torch.cat([function(*(t[i : i + 1] for t in tensors), number) for i, number in enumerate(numbers)])
