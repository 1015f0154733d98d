"""The KV cache of attention, and how a decoded token is appended to it.

A token of several rows copies more keys and values than it computes with. Who alone holds a cache may own it: tokens
are then written in place, into a buffer [P, S] as attention takes it, the persistent tokens before the slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SPARE = 64
"""Slots after an owned window: as many tokens are appended before it is copied to the front again."""
Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class KeyValues(NamedTuple):
    """The KV cache: keys (with positions) and values of tokens that later ones may see, `[B, heads, S, head_dim]` each.

    An empty slot is 0. A window is aligned right, at its last token; a segment left, at its first. A window has one
    tensor of keys and one of values; a segment has two, of retrieved tokens h and of its own tokens S.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class OwnedKeyValues(KeyValues):
    """Keys and values that decoding writes in place, on a CPU without gradients: nobody else may hold its tensors, and
    a fork is a `clone`. Slots behind a row's last token may hold anything.

    What an operation on its tensors makes of it, such as a selection of rows, gets buffers at its next token."""

    buffers: Pair | None = None
    """What the tensors are parts of: the persistent tokens and slots behind them, some of them spare."""
    start = 0
    """Slots of the buffers that a window has left behind."""

    def in_buffers(self, tensors: KeyValues, buffers: Pair, start: int = 0) -> "OwnedKeyValues":
        """The cache of these tensors, which are parts of `buffers`."""
        cache = OwnedKeyValues(*tensors)
        cache.buffers, cache.start = buffers, start
        return cache


def is_owned(cache: KeyValues, token: Tensor) -> bool:
    """Whether the `token` `[B, heads, T, d]` may be written into the cache: one in each row, without gradients."""
    return (
        isinstance(cache, OwnedKeyValues)
        and token.shape[2] == 1
        and token.device.type == "cpu"
        and not torch.is_grad_enabled()
    )


def append_to_window(
    cache: OwnedKeyValues, persistent: Pair, new: Pair, first: Int[Tensor, " B"]
) -> tuple[Pair, Bool[Tensor, "B 1 1 S"], OwnedKeyValues]:
    """Write a token behind each row's window: keys and values [P, S] for attention, their mask, and the cache after.

    `first` is the first slot of the cache that holds a token of the row."""
    size, slots, start, buffers = persistent[0].shape[2], cache.keys[0].shape[2], cache.start, cache.buffers
    if buffers is None or start == SPARE or buffers[0].dtype != new[0].dtype:
        spare = new[0].new_zeros(*new[0].shape[:2], SPARE, new[0].shape[3])
        keys, values = (_join(p, [*old, spare]) for p, old in zip(persistent, cache, strict=True))
        buffers, start = (keys, values), 0
    end = size + start + slots
    for buffer, token in zip(buffers, new, strict=True):
        buffer[:, :, end] = token[:, :, 0]
    slot = torch.arange(end + 1)
    visible = (slot < size) | (slot >= size + start + first[:, None])
    keys, values = (buffer[:, :, : end + 1] for buffer in buffers)
    after = KeyValues(*((buffer[:, :, end + 1 - slots : end + 1],) for buffer in buffers))
    return (keys, values), visible[:, None, None], cache.in_buffers(after, buffers, start + 1)


def append_to_segment(
    cache: KeyValues, persistent: Pair, new: KeyValues, position: Int[Tensor, " B"]
) -> tuple[Pair, Bool[Tensor, "B 1 1 S"], KeyValues]:
    """Write a token at each row's `position` in its segment: keys and values for attention, their mask, and the cache
    after it, which is a part of them. In place if it is owned, else in one copy.

    h and S alternate behind the persistent tokens, so that the slots in use are the first ones."""
    size, slots, owner = persistent[0].shape[2], cache.keys[0].shape[2], is_owned(cache, new.keys[0])
    buffers = cache.buffers if owner and isinstance(cache, OwnedKeyValues) else None
    if buffers is None or buffers[0].dtype != new.keys[0].dtype:
        keys, values = (_alternate(p, old) for p, old in zip(persistent, cache, strict=True))
        buffers = (keys, values)
    row = torch.arange(len(position), device=position.device)
    for buffer, tokens in zip(buffers, new, strict=True):
        for i, token in enumerate(tokens):
            buffer[row, :, size + len(tokens) * position + i] = token[:, :, 0]
    count = len(new.keys)
    end = size + count * (int(position.max()) + 1 if owner else slots)  # the longest row's
    slot = torch.arange(end, device=position.device)
    visible = slot < size + count * (position[:, None] + 1)
    after = KeyValues(*(tuple(buffer[:, :, size + i :: count] for i in range(count)) for buffer in buffers))
    keys, values = (buffer[:, :, :end] for buffer in buffers)
    after = cache.in_buffers(after, buffers) if isinstance(cache, OwnedKeyValues) else after
    return (keys, values), visible[:, None, None], after


def _join(persistent: Tensor, parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([persistent, *(part.to(persistent.dtype) for part in parts)], 2)


def _alternate(persistent: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """[P, the first slot of each part, the second slot of each part, ...]."""
    return torch.cat([persistent, torch.stack([part.to(persistent.dtype) for part in parts], 3).flatten(2, 3)], 2)
