"""The buffers of decoding: a state that its owner alone holds is written in place, where else each token copies it."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from titans_lm.layers import compiled_step
from titans_lm.layers.key_values import KeyValues
from titans_lm.models.block_cache import AttentionCache, BlockCache, LMMCache, MACCache, MALCache
from titans_lm.models.blocks import TitansBlock
from titans_lm.models.cache import TitansState
from titans_lm.models.replay import DecodingReplay


@torch.no_grad()
def begin_decoding(blocks: list[TitansBlock[Any]], state: TitansState) -> None:
    """Copy the caches of `state` to buffers, where its device is a CPU and all of its rows have read a token."""
    if state.position.device.type != "cpu" or not state.layer_caches or 0 in state.positions():
        return
    caches = zip(blocks, state.layer_caches, strict=True)
    state.layer_caches = [_in_buffers(block, cache, state.position, state.frozen) for block, cache in caches]
    state.replay = DecodingReplay() if state.is_decoding else None


def _in_buffers(block: Any, cache: BlockCache, position: Tensor, frozen: bool) -> BlockCache:
    changes: dict[str, Any] = {}
    if not isinstance(cache, AttentionCache) and not frozen:  # a frozen memory is not written
        changes["memory"] = compiled_step.in_factors(block.memory, cache.memory)
    if isinstance(cache, MACCache):  # each token reads them in compiled code, which would copy them
        weights = tuple(w.contiguous() for w in cache.retrieval.weights)
        changes["retrieval"] = cache.retrieval._replace(weights=weights)
    in_place = not isinstance(cache, LMMCache) and isinstance(cache.attention, KeyValues)
    if in_place and isinstance(block, TitansBlock) and _has_weights(block):
        persistent = cache.prefix if isinstance(cache, MALCache) else block.persistent_tokens(block.norm.weight)
        changes["attention"] = block.attention.in_buffers(persistent, cache.attention, position)  # type: ignore[union-attr]
    return cast(BlockCache, cache._replace(**changes))


def _has_weights(block: TitansBlock[Any]) -> bool:
    """Whether its own weights are on the CPU outside its calls too: not sharded, not offloaded."""
    own = [block.norm.weight, *([] if block.persistent is None else [block.persistent])]
    return all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in own)
