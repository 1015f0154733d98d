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
    place = (0, 0)
    """Of a window: the tokens written since the buffers were made, and the slots before the persistent tokens."""

    def in_buffers(self, tensors: KeyValues, buffers: Pair, place: tuple[int, int] = (0, 0)) -> "OwnedKeyValues":
        """The cache of these tensors, which are parts of `buffers`."""
        cache = OwnedKeyValues(*tensors)
        cache.buffers, cache.place = buffers, place
        return cache


def is_owned(cache: KeyValues, token: Tensor) -> bool:
    """Whether the `token` `[B, heads, T, d]` may be written into the cache: one in each row, without gradients."""
    return (
        isinstance(cache, OwnedKeyValues)
        and token.shape[2] == 1
        and token.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # a graph copies
    )


def append_to_window(
    cache: OwnedKeyValues, persistent: Pair, new: Pair, first: Int[Tensor, " B"]
) -> tuple[Pair, Bool[Tensor, "B 1 1 S"], OwnedKeyValues]:
    """Write a token behind each row's window: keys and values [P, S] for attention, their mask, and the cache after.

    `first` is the first slot of the cache that holds a token of the row. Slots that are empty in all rows lie before
    the persistent tokens, where attention does not read them."""
    size, slots, start, skipped, buffers = persistent[0].shape[2], cache.keys[0].shape[2], *cache.place, cache.buffers
    if buffers is None or start == SPARE or buffers[0].dtype != new[0].dtype:
        start, skipped = 0, int(first.min())
        keys, values = (_with_spare(p, old[0], skipped) for p, old in zip(persistent, cache, strict=True))
        buffers = (keys, values)
    end = size + start + slots
    for buffer, token in zip(buffers, new, strict=True):
        buffer[:, :, end] = token[:, :, 0]
    slot = torch.arange(skipped, end + 1)
    visible = (slot < skipped + size) | (slot >= size + start + first[:, None])
    keys, values = (buffer[:, :, skipped : end + 1] for buffer in buffers)
    after = KeyValues(*((buffer[:, :, end + 1 - slots : end + 1],) for buffer in buffers))
    return (keys, values), visible[:, None, None], cache.in_buffers(after, buffers, (start + 1, skipped))


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
    row = torch.arange(position.shape[0], device=position.device)
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


def _with_spare(persistent: Tensor, window: Tensor, skipped: int) -> Tensor:
    """[the first slots of a window, P, its other slots, spare slots]."""
    window, (batch, heads, _, width) = window.to(persistent.dtype), persistent.shape
    spare = window.new_zeros(batch, heads, SPARE, width)
    return torch.cat([window[:, :, :skipped], persistent, window[:, :, skipped:], spare], 2)


def _alternate(persistent: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """[P, the first slot of each part, the second slot of each part, ...]."""
    return torch.cat([persistent, torch.stack([part.to(persistent.dtype) for part in parts], 3).flatten(2, 3)], 2)
