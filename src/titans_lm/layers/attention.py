"""The short-term memory: attention over a window or a segment, with persistent tokens and rotary positions.

A window takes O(T * window) time and memory: each block of queries sees its own keys and those of the block before.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from titans_lm.layers.attention_step import StepInputs, attention_step
from titans_lm.layers.few_rows import linears
from titans_lm.layers.key_values import (
    KeyValues,
    Places,
    SegmentBuffers,
    WindowBuffers,
    append,
    append_to_segment,
)
from titans_lm.layers.module_call import as_call, routes_methods
from titans_lm.layers.query_blocks import AttentionFunction as AttentionFunction  # for its old name
from titans_lm.layers.query_blocks import (
    attention_function,
    causal,
    one_block,
    window_blocks,
)
from titans_lm.ops import for_all_lengths, gather_tokens, is_traced
from titans_lm.utils.deprecation import RenamedAttribute, renamed

__getattr__ = renamed(
    __name__, {"Rotation": "RotaryEmbedding", "rotation": "rotary_embedding", "Product": "AttentionFunction"}
)


B = TypeVar("B", WindowBuffers, SegmentBuffers)


class RotaryEmbedding(NamedTuple):
    """cos and sin of the rotary angles of a call's tokens."""

    cos: Float[Tensor, "B T R"]
    sin: Float[Tensor, "B T R"]


def rotary_embedding(position: Int[Tensor, "B T"], head_dim: int, base: float) -> RotaryEmbedding:
    """R = head_dim / 2 angles for each token (arXiv:2104.09864), in float64: at the two-millionth token, float32 angles
    are off by 0.1."""
    frequency = base ** -(torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float64) / head_dim)
    angle = position[..., None] * frequency
    return RotaryEmbedding(angle.cos(), angle.sin())


class Attention(nn.Module):
    """The projections that windows and segments share."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    heads = RenamedAttribute("heads", "num_heads")

    def _split_heads(self, x: Tensor, rope: RotaryEmbedding | None = None) -> Tensor:
        """`[B, T, heads * d]` -> `[B, heads, T, d]`, rotated by `rope`."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if rope is None:
            return x
        cos, sin = (part[:, None].to(x.dtype) for part in rope)
        left, right = x.chunk(2, -1)
        return torch.cat([torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)], -1)

    def _project_kv(self, x: Tensor, rope: RotaryEmbedding | None) -> tuple[Tensor, Tensor]:
        k, v = linears(x, (self.k_proj, self.v_proj))
        return self._split_heads(k, rope), self._split_heads(v)

    def project_qkv(self, x: Tensor, rope: RotaryEmbedding) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, heads, T, d]` of the tokens themselves, of any number of segments."""
        q, k, v = linears(x, (self.q_proj, self.k_proj, self.v_proj))
        return self._split_heads(q, rope), self._split_heads(k, rope), self._split_heads(v)

    def project_persistent(self, persistent: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens `[1 or B, P, D]`, which have no position."""
        keys, values = self._project_kv(persistent, None)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def _step(self, inputs: StepInputs, cache: B, places: Places, eager: bool) -> tuple[Tensor, B]:
        """Write a token into the cache, and attend. The cache that is returned is another one in another dtype."""
        y = None if eager else attention_step(self, inputs, cache, places)
        if y is not None:
            return y, cache
        q, *new = self.project_qkv(inputs.x, RotaryEmbedding(inputs.cos, inputs.sin))
        pairs = [] if inputs.before is None else [self._project_kv(inputs.before, None)]
        tokens = KeyValues(*(tuple(parts) for parts in zip(*pairs, new, strict=True)))
        cache = cache.writable(q.dtype)
        (keys, values), visible = append(cache, tokens, places)
        return self._merge_heads(attention_function(eager)(q, keys, values, attn_mask=visible)), cache

    def _merge_heads(self, y: Tensor) -> Tensor:
        return linears(y.transpose(1, 2).flatten(2), (self.o_proj,))[0]


class WindowAttention(Attention):
    """Each token sees the persistent tokens and the last `window_size` tokens, itself included (eqs. 27, 31).

    `window_size` None: all tokens.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, window_size: int | None):
        super().__init__(dim, num_heads, head_dim)
        self.window_size = window_size

    window = RenamedAttribute("window", "window_size")

    def initial_state(self, batch: int, like: Tensor) -> KeyValues:
        """An empty cache, of the dtype and on the device of `like`."""
        empty = like.new_zeros(batch, self.num_heads, (self.window_size or 1) - 1, self.head_dim)
        return KeyValues((empty,), (empty,))

    @routes_methods
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        persistent: Float[Tensor, "#B P D"],
        cache: KeyValues,
        position: Int[Tensor, " B"],
        rope: RotaryEmbedding,
        valid: Bool[Tensor, "B T"] | None,
        uniform_position: int | None = None,
        eager: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """Attend, and advance the cache.

        `position` counts the tokens that each row has read before. `valid` is True for each row's first tokens; None:
        all are valid. `uniform_position` is the position of all rows where they agree; they then share a mask. `eager`
        computes the product in PyTorch operations (attn_implementation="eager"), without a fused kernel.
        """
        q, size, cached = self._split_heads(self.q_proj(x), rope), persistent.shape[1], cache.keys[0].shape[2]
        new, first_tokens = self._project_kv(x, rope), self.project_persistent(persistent, x.shape[0])
        first = cached - position.clamp(max=cached)  # [B], the first slot that holds a token
        keys, values = (
            torch.cat([p, old[0].to(n.dtype), n], 2) for p, old, n in zip(first_tokens, cache, new, strict=True)
        )
        full = _has_none(first > 0) if uniform_position is None else uniform_position >= cached
        ragged = None if full else first
        attention = attention_function(eager)
        if self.window_size is None and cached == 0:
            y = causal(attention, q, keys, values)
        elif self.window_size is None or (not for_all_lengths(x) and x.shape[1] <= self.window_size):
            y = one_block(attention, q, keys, values, size, ragged, self.window_size)
        else:
            y = window_blocks(attention, q, keys, values, size, ragged, self.window_size)
        return self._merge_heads(y), self._advance(keys[:, :, size:], values[:, :, size:], first, valid, x.shape[1])

    @as_call
    def in_buffers(self, persistent: Tensor, cache: KeyValues, position: Tensor) -> WindowBuffers | KeyValues:
        """A copy of the cache in buffers for `decode`, after `position` tokens `[B]`; itself without a window."""
        if self.window_size is None:
            return cache
        return WindowBuffers.of(cache, self.project_persistent(persistent, len(position)), position)

    @as_call
    def decode(
        self,
        x: Float[Tensor, "B 1 D"],
        cache: WindowBuffers,
        position: Int[Tensor, " B"],
        rope: RotaryEmbedding,
        uniform_position: int | None,
        eager: bool,
    ) -> tuple[Float[Tensor, "B 1 D"], WindowBuffers]:
        """`forward` of one token, whose keys and values are written into the cache."""
        return self._step(StepInputs(x, None, *rope), cache, cache.places(position, uniform_position), eager)

    def _advance(self, keys: Tensor, values: Tensor, first: Tensor, valid: Tensor | None, tokens: int) -> KeyValues:
        return last_slots(keys, values, first, valid, tokens, self.window_size)


def last_slots(
    keys: Tensor, values: Tensor, first: Tensor, valid: Tensor | None, tokens: int, window: int | None
) -> KeyValues:
    """The last window - 1 keys and values of each row, aligned right; all of them without a window.

    The last `tokens` slots of `keys` and `values` `[B, heads, S, d]` are of a call's tokens, of which each row's first
    are `valid` `[B, T]`; the slots before are of its cache, and the row's own begin at slot `first` `[B]`.
    """
    size = keys.shape[2] if window is None else window - 1
    if valid is None:
        keys, values = (x[:, :, x.shape[2] - size :] for x in (keys, values))
        if tokens > 1:  # a view would keep all tokens of the call alive
            keys, values = keys.clone(), values.clone()
        return KeyValues((keys,), (values,))
    end = keys.shape[2] - tokens + valid.sum(1, keepdim=True)
    slot = end - size + torch.arange(size, device=keys.device)  # [B, S]
    filled = (slot >= first[:, None])[:, None, :, None]
    keys, values = (
        gather_tokens(x.transpose(1, 2), slot.clamp(min=0)).transpose(1, 2) * filled for x in (keys, values)
    )
    return KeyValues((keys,), (values,))


class SegmentAttention(Attention):
    """Attention within a segment over [P, h, S] (eqs. 22, 23): token i sees P, and h_j and S_j for j <= i.

    h_j depends on token j, so a plain causal mask over [P, h, S] would leak later tokens.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, segment_size: int):
        super().__init__(dim, num_heads, head_dim)
        self.segment_size = segment_size

    window = RenamedAttribute("window", "segment_size")

    def initial_state(self, batch: int, like: Tensor) -> KeyValues:
        """An empty cache, of the dtype and on the device of `like`."""
        empty = like.new_zeros(batch, self.num_heads, self.segment_size, self.head_dim)
        return KeyValues((empty, empty), (empty, empty))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        retrieved: Float[Tensor, "B T D"],
        persistent: Float[Tensor, "#B P D"],
        cache: KeyValues,
        position: Int[Tensor, " B"],
        rope: RotaryEmbedding,
        valid: Bool[Tensor, "B T"] | None,
        uniform_position: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """Attend within one segment: `attend` of the tokens' own and the persistent projections."""
        return self.attend(
            self.project_qkv(x, rope),
            retrieved,
            self.project_persistent(persistent, x.shape[0]),
            cache,
            position,
            valid,
            uniform_position,
        )

    def in_buffers(self, persistent: Tensor, cache: KeyValues, position: Tensor) -> SegmentBuffers:
        """A copy of the cache in buffers for `decode`."""
        return SegmentBuffers.of(cache, self.project_persistent(persistent, len(position)))

    def decode(
        self,
        x: Float[Tensor, "B 1 D"],
        retrieved: Float[Tensor, "B 1 D"],
        cache: SegmentBuffers,
        position: Int[Tensor, " B"],
        rope: RotaryEmbedding,
        uniform_position: int | None,
        eager: bool,
    ) -> tuple[Float[Tensor, "B 1 D"], SegmentBuffers]:
        """`forward` of one token, whose keys and values, and those of `retrieved`, are written into the cache."""
        return self._step(StepInputs(x, retrieved, *rope), cache, cache.places(position, uniform_position), eager)

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        retrieved: Float[Tensor, "B T D"],
        persistent: tuple[Tensor, Tensor],
        cache: KeyValues,
        position: Int[Tensor, " B"],
        valid: Bool[Tensor, "B T"] | None,
        uniform_position: int | None,
        eager: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """Attend, and advance the cache.

        `position` counts the tokens of the segment that each row has read; with the tokens here it is at most the
        segment's size. `uniform_position` is the position of all rows where they agree and all tokens are valid; empty
        slots are left out then. `eager` as for a window.
        """
        q, s_keys, s_values = qkv
        h_keys, h_values = self._project_kv(retrieved, None)
        new = KeyValues((h_keys, s_keys), (h_values, s_values))
        tokens, size = q.shape[2], persistent[0].shape[2]
        if uniform_position is None and tokens == 1 and valid is None:
            seen, visible, cache = append_to_segment(cache, persistent, new, position)
            cache = _without_rows(cache, (position + 1) % self.segment_size == 0)
            return self._merge_heads(attention_function(eager)(q, *seen, attn_mask=visible)), cache
        slot = torch.arange(self.segment_size, device=q.device)
        own = position[:, None] + torch.arange(tokens, device=q.device)  # [B, T], each token's slot
        if uniform_position is None:
            written = _map_pairs(lambda old, n: _scatter(old, n, own, valid), cache, new)
            used, visible = written, slot <= own[..., None]  # [B, T, S]
            count = position + (tokens if valid is None else valid.sum(1))
            cache = _without_rows(written, count % self.segment_size == 0)  # a finished segment leaves no cache
        else:
            used, cache = _append(cache, new, uniform_position, self.segment_size)
            visible = slot[: uniform_position + tokens] <= own[:1, :, None]
        keys, values = (torch.cat([p, *parts], 2) for p, parts in zip(persistent, used, strict=True))
        mask = None
        if uniform_position is None or tokens > 1:
            mask = F.pad(torch.cat([visible, visible], -1), (size, 0), value=True)[:, None]
        return self._merge_heads(attention_function(eager)(q, keys, values, attn_mask=mask)), cache


def _append(cache: KeyValues, new: KeyValues, position: int, size: int) -> tuple[KeyValues, KeyValues]:
    """Keys and values up to the `new` ones at `position`, and the cache after them, of a segment of `size` slots."""
    end = position + new.keys[0].shape[2]
    if position == 0 and end == size:  # a whole segment: the cache was empty, and is so again
        return new, cache
    written = _map_pairs(lambda old, n: torch.slice_scatter(old.to(n.dtype), n, 2, position, end), cache, new)
    used = _map_pairs(lambda k, _: k[:, :, :end], written, written)
    return used, _map_pairs(lambda k, _: torch.zeros_like(k), written, written) if end == size else written


def _map_pairs(function: Callable[[Tensor, Tensor], Tensor], a: KeyValues, b: KeyValues) -> KeyValues:
    """`function` of each tensor of `a` and the same tensor of `b`."""
    return KeyValues(*(tuple(map(function, x, y)) for x, y in zip(a, b, strict=True)))


def _has_none(rows: Bool[Tensor, " B"]) -> bool:
    """Whether it is known that no row is True. On a GPU a look would wait for it, and a traced call has no values."""
    return rows.device.type == "cpu" and not is_traced(rows) and not any(rows.tolist())


def _without_rows(cache: KeyValues, rows: Bool[Tensor, " B"]) -> KeyValues:
    """The cache with 0 in these rows."""
    if _has_none(rows):
        return cache
    kept = ~rows.view(-1, 1, 1, 1)
    return _map_pairs(lambda k, _: k * kept, cache, cache)


def _scatter(old: Tensor, new: Tensor, target: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None) -> Tensor:
    """`old` `[B, heads, S, d]` with the `valid` ones of `new` `[B, heads, T, d]` at slots `target`."""
    old, slots = old.to(new.dtype), old.shape[2]
    if valid is not None:  # slot S drops a token
        old, target = F.pad(old, (0, 0, 0, 1)), torch.where(valid, target, slots)
    index = target[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return old.scatter(2, index, new)[:, :, :slots]
