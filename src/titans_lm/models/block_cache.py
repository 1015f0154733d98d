"""What each kind of block remembers between calls, and operations on these trees of tensors."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.layers.key_values import KeyValues, SegmentBuffers, WindowBuffers
from titans_lm.layers.memory_state import NeuralMemoryState
from titans_lm.ops import FactoredMemory
from titans_lm.utils.deprecation import renamed

Tree = TypeVar("Tree")

__getattr__ = renamed(
    __name__,
    {"Retrieval": "SegmentSnapshot", "expand": "expand_rows", "start_rows": "restart_rows", "widened": "pad_left"},
)


class AttentionCache(NamedTuple):
    """The cache of attention alone. It has a constant size, unless the window is unlimited."""

    attention: KeyValues | WindowBuffers


class LMMCache(NamedTuple):
    """The cache of the memory alone."""

    memory: NeuralMemoryState


class MAGCache(NamedTuple):
    """The cache of memory as gate."""

    attention: KeyValues | WindowBuffers
    memory: NeuralMemoryState


class MALCache(NamedTuple):
    """The cache of memory as layer."""

    attention: KeyValues | WindowBuffers
    memory: NeuralMemoryState
    prefix: Tensor
    """The attention's persistent tokens, `[B, P, D]`: those after the memory layer."""


class SegmentSnapshot(NamedTuple):
    """The memory as it was when the segment began: what MAC retrieves from within the segment."""

    weights: tuple[Tensor, ...]
    conv_state: Tensor
    """Of the queries of retrieval, `[B, R, I]`."""


class MACCache(NamedTuple):
    """The cache of memory as context."""

    attention: KeyValues | SegmentBuffers
    memory: NeuralMemoryState
    retrieval: SegmentSnapshot


BlockCache = AttentionCache | LMMCache | MAGCache | MALCache | MACCache
Cache = TypeVar("Cache", bound=BlockCache)


class LayerState:
    """The old type of all caches, with optional fields. It makes the cache of the kind that has these fields, with a
    DeprecationWarning."""

    def __new__(  # type: ignore[misc]
        cls,
        attention: KeyValues | None = None,
        memory: NeuralMemoryState | None = None,
        retrieval: SegmentSnapshot | None = None,
        prefix: Tensor | None = None,
    ) -> BlockCache:
        fields = {"attention": attention, "memory": memory, "prefix": prefix, "retrieval": retrieval}
        given = {name: value for name, value in fields.items() if value is not None}
        kinds: tuple[Any, ...] = (AttentionCache, LMMCache, MAGCache, MALCache, MACCache)
        kind = next((kind for kind in kinds if set(kind._fields) == given.keys()), None)
        if kind is None:
            raise ValueError(f"no block has a cache with the fields {', '.join(given) or 'none'}")
        warnings.warn(f"LayerState is split by kind of block: use {kind.__name__}", DeprecationWarning, stacklevel=2)
        return kind(**given)


def is_in_buffers(cache: BlockCache) -> bool:
    """Whether decoding writes some of it in place."""
    attention = not isinstance(cache, LMMCache) and not isinstance(cache.attention, KeyValues)
    return attention or (not isinstance(cache, AttentionCache) and isinstance(cache.memory.memory, FactoredMemory))


def as_value(cache: Cache, position: Tensor) -> Cache:
    """The cache without buffers, in tensors of its own where it had some. Rows have read `position` tokens `[B]`."""
    changes: dict[str, Any] = {}
    if not isinstance(cache, LMMCache) and not isinstance(cache.attention, KeyValues):
        changes["attention"] = cache.attention.whole(position)
    if not isinstance(cache, AttentionCache) and isinstance(cache.memory.memory, FactoredMemory):
        conv_state = tuple(t.clone() for t in cache.memory.conv_state)  # a replay writes it
        changes["memory"] = cache.memory._replace(memory=cache.memory.memory.whole(), conv_state=conv_state)
    if changes and isinstance(cache, MACCache):
        changes["retrieval"] = cache.retrieval._replace(conv_state=cache.retrieval.conv_state.clone())
    return cast(Cache, cache._replace(**changes)) if changes else cache


def expand_rows(state: NeuralMemoryState, batch: int) -> NeuralMemoryState:
    """The state of one row in each of `batch` rows."""
    return map_tensors(state, lambda t: t.expand(batch, *t.shape[1:]))


def restart_rows(rows: Tensor, first: Cache, cache: Cache) -> Cache:
    """`cache` with the `rows` (`[B]`, True) of `first`, the cache before the first token."""
    slots = max(cache_slots(first), cache_slots(cache))
    first, cache = pad_left(first, slots), pad_left(cache, slots)

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

    return map_tensors(first, choose, cache)


def concat_rows(caches: list[Cache]) -> Cache:
    """The rows of several caches of one block, one after another."""
    slots = max(map(cache_slots, caches))
    first, *others = (pad_left(cache, slots) for cache in caches)
    return map_tensors(first, lambda *parts: torch.cat(parts), *others)


def cache_slots(cache: BlockCache) -> int:
    """The slots of its keys and values; 0 without attention."""
    return 0 if isinstance(cache, LMMCache) else cache.attention.keys[0].shape[2]


def pad_left(cache: Cache, slots: int) -> Cache:
    """The cache with empty slots on the left, as unlimited attention has in rows that have read less than others."""
    if isinstance(cache, LMMCache) or not isinstance(cache.attention, KeyValues) or cache_slots(cache) == slots:
        return cache
    padded = map_tensors(cache.attention, lambda t: F.pad(t, (0, 0, slots - t.shape[2], 0)))
    return cast(Cache, cache._replace(attention=padded))


def keep_right(cache: Cache, slots: int) -> Cache:
    """The cache with at most the last `slots` of its keys and values, in tensors of their own."""
    if isinstance(cache, LMMCache) or not isinstance(cache.attention, KeyValues) or cache_slots(cache) <= slots:
        return cache
    kept = map_tensors(cache.attention, lambda t: t[:, :, t.shape[2] - slots :].clone())
    return cast(Cache, cache._replace(attention=kept))


def map_tensors(tree: Tree, function: Callable[..., Tensor], *others: Tree) -> Tree:
    """The same tree of (named) tuples with `function` applied to each tensor, together with the same tensor of each of
    `others`. None and numbers stay."""
    return _map(tree, function, *others)


def _map(tree: Any, function: Callable[..., Tensor], *others: Any) -> Any:
    if tree is None or isinstance(tree, int):
        return tree
    if isinstance(tree, Tensor):
        return function(tree, *others)
    parts = [_map(part, function, *rest) for part, *rest in zip(tree, *others, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


_STORED_NAMES = {
    (NeuralMemoryState, "conv_state"): "tails",
    (NeuralMemoryState, "prev_input"): "last",
    (SegmentSnapshot, "conv_state"): "tail",
}
"""Fields whose tensors have another name in memory files, so that files of all versions are alike."""


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree, each with its place as its name, as in memory files: ".memory.weights.0"."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        for field, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
            yield from named_tensors(part, f"{name}.{_STORED_NAMES.get((type(tree), field), field)}")
