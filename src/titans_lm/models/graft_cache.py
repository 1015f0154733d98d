"""The cache of one call of a grafted model: what its base's attention and its memories read and leave.

Between calls a `TitansState` holds both, per row and without padding. For a call they become transformers' own
`DynamicCache`, which the base appends to; the masks are transformers' where no window and no padding needs others.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from titans_lm.layers.attention import last_slots
from titans_lm.layers.key_values import KeyValues
from titans_lm.layers.memory_state import LayerSurprise, NeuralMemoryState
from titans_lm.layers.query_blocks import visible_slots
from titans_lm.models.block_cache import AttentionCache, BlockCache, MAGCache
from titans_lm.models.forward_context import ForwardContext


class BaseShape(NamedTuple):
    """What the base's cache looks like."""

    windows: list[int | None]
    """Of each layer, in tokens."""
    kinds: list[str]
    """The type of each layer's attention; empty where the base does not tell types apart."""
    heads: int
    """Of keys and values."""
    head_dim: int
    eager: bool
    """Whether attention adds its mask to scores, as transformers' "eager" does."""

    @classmethod
    def of(cls, config: PreTrainedConfig, windows: list[int | None]) -> "BaseShape":
        heads = config.num_attention_heads
        return cls(
            windows,
            list(getattr(config, "layer_types", None) or []),
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config._attn_implementation == "eager",
        )

    def empty(self, layer: int, batch: int, like: Tensor) -> KeyValues:
        """A layer's cache before the first token."""
        empty = like.new_zeros(batch, self.heads, (self.windows[layer] or 1) - 1, self.head_dim)
        return KeyValues((empty,), (empty,))


class GraftCall(DynamicCache):
    """What a base is given as its cache in one call. Grafted layers find their memory's state in it, and leave
    the state after the call."""

    def __init__(self, shape: BaseShape, before: list[BlockCache] | list[None], context: ForwardContext):
        super().__init__()
        self.shape, self.context = shape, context
        past = [None if cache is None else _filled(cache.attention, context) for cache in before]  # type: ignore[union-attr, arg-type]
        self.layers = [_layer(kv) for kv in past]
        self.past = [0 if kv is None else kv.keys[0].shape[2] for kv in past]
        self.memories: list[NeuralMemoryState | None] = [getattr(cache, "memory", None) for cache in before]
        self.surprises: list[LayerSurprise] = []

    def masks(self, x: Tensor) -> Any:
        """The base's `attention_mask` for x `[B, T, D]`: None where its own causal mask is right; else `[B, 1, T, S]`,
        or one for each type of layer."""
        c, tokens = self.context, x.shape[1]
        seen = None if c.uniform_position is None else c.uniform_position + tokens
        if seen is not None and all(window is None or seen <= window for window in self.shape.windows):
            return None
        found: dict[tuple[int | None, int], Tensor] = {}
        each = []
        for window, past in zip(self.shape.windows, self.past, strict=True):
            if (window, past) not in found:
                found[window, past] = self._mask(window, past, x)
            each.append(found[window, past])
        if len(found) == 1:
            return each[0]
        return dict(zip(self.shape.kinds, each, strict=True))

    def _mask(self, window: int | None, past: int, x: Tensor) -> Tensor:
        position, tokens = self.context.position, x.shape[1]
        first = None if self.context.uniform_position is not None else past - position.clamp(max=past)
        visible = visible_slots(tokens, past + tokens, window, first, x.device)
        visible = visible.expand(len(x), 1, -1, -1)
        if not self.shape.eager:
            return visible
        return torch.where(visible, 0.0, torch.finfo(x.dtype).min).to(x.dtype)

    def after(self, tokens: int) -> list[BlockCache]:
        """Each layer's cache after the call, whose rows had `tokens` columns."""
        c = self.context
        caches: list[BlockCache] = []
        for i, (layer, window) in enumerate(zip(self.layers, self.shape.windows, strict=True)):
            keys, values = layer.keys, layer.values
            missing = 0 if window is None else max(0, window - 1 - keys.shape[2])
            if missing:  # a window has a constant size from its first token on
                keys, values = (torch.nn.functional.pad(t, (0, 0, missing, 0)) for t in (keys, values))
            slots = keys.shape[2] - tokens
            kv = last_slots(keys, values, slots - c.position.clamp(max=self.past[i]), c.valid, tokens, window)
            memory = self.memories[i]
            caches.append(AttentionCache(kv) if memory is None else MAGCache(kv, memory))
        return caches


def _filled(cache: KeyValues, context: ForwardContext) -> KeyValues:
    """The slots that hold tokens, where all rows have read as many; else all slots."""
    if context.uniform_position is None:
        return cache
    keys, values = cache.keys[0], cache.values[0]
    empty = max(0, keys.shape[2] - context.uniform_position)
    return KeyValues((keys[:, :, empty:],), (values[:, :, empty:],))


def _layer(kv: KeyValues | None) -> DynamicLayer:
    layer = DynamicLayer()
    if kv is not None:
        layer.lazy_initialization(kv.keys[0], kv.values[0])
        layer.keys, layer.values = kv.keys[0], kv.values[0]
    return layer
