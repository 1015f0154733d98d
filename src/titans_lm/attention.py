"""The short-term memory: attention in a window or a segment, persistent tokens always visible, rotary positions.

Time and memory are O(T * window): queries go block by block, each block sees its own keys and the block before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from titans_lm.ops import take


class KeyValues(NamedTuple):
    """Keys (positions applied) and values of the tokens that later ones may still see, `[B, heads, S, head_dim]` each;
    0 where there is no token. A window's end stands at its last slot; a segment's beginning at its first."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Rotation(NamedTuple):
    """Rotary positions of this call's tokens."""

    cos: Float[Tensor, "B T R"]
    sin: Float[Tensor, "B T R"]


def rotation(position: Int[Tensor, "B T"], head_dim: int, base: float) -> Rotation:
    """R = head_dim / 2 angles for each token (arXiv:2104.09864). In float64, for float32 angles are off by 0.1 at the
    two-millionth token."""
    frequency = base ** -(torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float64) / head_dim)
    angle = position[..., None] * frequency
    return Rotation(angle.cos(), angle.sin())


class Attention(nn.Module):
    """Projections that windows and segments share. `window` counts the current token; None: all of the past."""

    def __init__(self, dim: int, heads: int, head_dim: int, window: int | None):
        super().__init__()
        self.heads, self.head_dim, self.window = heads, head_dim, window
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def _heads(self, x: Tensor, turn: Rotation | None = None) -> Tensor:
        """`[B, T, heads * d]` -> `[B, heads, T, d]`, turned to its positions if there are any."""
        x = x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        if turn is None:
            return x
        cos, sin = (part[:, None].to(x.dtype) for part in turn)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def _keys_values(self, x: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor]:
        return self._heads(self.k_proj(x), turn), self._heads(self.v_proj(x))

    def _prefix(self, prefix: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens `[1 or B, P, D]`, which have no position."""
        keys, values = self._keys_values(prefix, None)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def _join(self, y: Tensor) -> Tensor:
        return self.o_proj(y.transpose(1, 2).flatten(2))


class WindowAttention(Attention):
    """Each token sees the persistent tokens and the last `window` tokens, itself included (eqs. 27, 31)."""

    def initial_state(self, batch: int) -> KeyValues:
        empty = self.q_proj.weight.new_zeros(batch, self.heads, (self.window or 1) - 1, self.head_dim)
        return KeyValues((empty,), (empty,))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        prefix: Float[Tensor, "#B P D"],
        state: KeyValues,
        position: Int[Tensor, " B"],
        turn: Rotation,
        present: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """`position`: tokens each row has read before; `present` is True for each row's first tokens here."""
        q = self._heads(self.q_proj(x), turn)
        new_keys, new_values = self._keys_values(x, turn)
        keys = torch.cat([state.keys[0].to(new_keys.dtype), new_keys], 2)
        values = torch.cat([state.values[0].to(new_values.dtype), new_values], 2)
        cached = state.keys[0].shape[2]
        first = cached - position.clamp(max=cached)  # [B], the first slot that holds a token
        p_keys, p_values = self._prefix(prefix, len(x))
        if self.window is None and cached == 0:
            y = _causal(q, keys, values, p_keys, p_values)
        elif self.window is None or x.shape[1] <= self.window:
            y = _one_block(q, keys, values, p_keys, p_values, first, self.window)
        else:
            y = _blocks(q, keys, values, p_keys, p_values, first, self.window)
        return self._join(y), self._remember(keys, values, first, present, x.shape[1])

    def _remember(self, keys: Tensor, values: Tensor, first: Tensor, present: Tensor | None, tokens: int) -> KeyValues:
        """The last window - 1 keys and values of each row, at the right; of all tokens, where there is no window."""
        size = keys.shape[2] if self.window is None else self.window - 1
        if present is None:
            kept = slice(keys.shape[2] - size, keys.shape[2])
            return KeyValues((keys[:, :, kept].clone(),), (values[:, :, kept].clone(),))
        end = keys.shape[2] - tokens + present.sum(1, keepdim=True)
        slot = end - size + torch.arange(size, device=keys.device)  # [B, S]
        there = (slot >= first[:, None])[:, None, :, None]
        keys, values = (take(x.transpose(1, 2), slot.clamp(min=0)).transpose(1, 2) * there for x in (keys, values))
        return KeyValues((keys,), (values,))


def _causal(q: Tensor, keys: Tensor, values: Tensor, p_keys: Tensor, p_values: Tensor) -> Tensor:
    """All of the past, from the beginning. The persistent tokens ask too, in vain, so that a causal mask is right."""
    size = p_keys.shape[2]
    q, keys, values = torch.cat([p_keys, q], 2), torch.cat([p_keys, keys], 2), torch.cat([p_values, values], 2)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True)[:, :, size:]


def _one_block(
    q: Tensor, keys: Tensor, values: Tensor, p_keys: Tensor, p_values: Tensor, first: Tensor, window: int | None
) -> Tensor:
    """Few queries after what is cached: one product, and a mask for each row."""
    slot = torch.arange(keys.shape[2], device=q.device)
    own = slot[keys.shape[2] - q.shape[2] :, None]  # [T, 1], where each query's own key stands
    seen = (slot <= own) & (slot >= first[:, None, None])  # [B, T, S]
    if window is not None:
        seen = seen & (slot > own - window)
    seen = F.pad(seen, (p_keys.shape[2], 0), value=True)[:, None]
    keys, values = torch.cat([p_keys, keys], 2), torch.cat([p_values, values], 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


def _blocks(
    q: Tensor, keys: Tensor, values: Tensor, p_keys: Tensor, p_values: Tensor, first: Tensor, window: int
) -> Tensor:
    """Blocks of `window` queries; each sees the persistent tokens, the block before it and its own."""
    batch, heads, tokens, width = q.shape
    count = -(-tokens // window)
    after = count * window - tokens
    before = window - (keys.shape[2] - tokens)  # one slot, so that what is cached is a whole block
    q = F.pad(q, (0, 0, 0, after)).view(batch, heads, count, window, width)
    keys, values = (F.pad(x, (0, 0, before, after)).unflatten(2, (count + 1, window)) for x in (keys, values))
    keys, values = (
        torch.cat([p[:, :, None].expand(-1, -1, count, -1, -1), x[:, :, :-1], x[:, :, 1:]], 3)
        for p, x in ((p_keys, keys), (p_values, values))
    )  # [B, heads, N, P + 2 W, d]
    slot, own = torch.arange(2 * window, device=q.device), window + torch.arange(window, device=q.device)[:, None]
    band = (slot <= own) & (slot > own - window)  # [W, 2 W]
    block = torch.arange(count, device=q.device)[:, None] * window
    there = block + slot >= first[:, None, None] + before  # [B, N, 2 W]
    seen = F.pad(band & there[:, :, None], (p_keys.shape[2], 0), value=True)  # [B, N, W, P + 2 W]
    q, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.flatten(0, 1)[:, None])
    return y.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


class SegmentAttention(Attention):
    """Attention within a segment over [P, h, S] (eqs. 22, 23): token i sees P, and h_j and S_j for j <= i.

    `window` is the segment's size. h_j depends on token j, so a plain causal mask over [P, h, S] would leak.
    """

    def initial_state(self, batch: int) -> KeyValues:
        assert self.window is not None
        empty = self.q_proj.weight.new_zeros(batch, self.heads, self.window, self.head_dim)
        return KeyValues((empty, empty), (empty, empty))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        retrieved: Float[Tensor, "B T D"],
        prefix: Float[Tensor, "#B P D"],
        state: KeyValues,
        position: Int[Tensor, " B"],
        turn: Rotation,
        present: Bool[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """`position`: tokens of the segment that each row has read; position + its tokens here <= segment size."""
        assert self.window is not None
        slot = torch.arange(self.window, device=x.device)
        own = position[:, None] + torch.arange(x.shape[1], device=x.device)  # [B, T]
        target = own if present is None else torch.where(present, own, self.window)
        h_keys, h_values = self._keys_values(retrieved, None)
        s_keys, s_values = self._keys_values(x, turn)
        keys = tuple(_place(old, new, target) for old, new in zip(state.keys, (h_keys, s_keys), strict=True))
        values = tuple(_place(old, new, target) for old, new in zip(state.values, (h_values, s_values), strict=True))
        p_keys, p_values = self._prefix(prefix, len(x))
        seen = slot <= own[..., None]  # [B, T, S]
        seen = F.pad(torch.cat([seen, seen], -1), (p_keys.shape[2], 0), value=True)[:, None]
        y = F.scaled_dot_product_attention(
            self._heads(self.q_proj(x), turn),
            torch.cat([p_keys, *keys], 2),
            torch.cat([p_values, *values], 2),
            attn_mask=seen,
        )
        read = x.shape[1] if present is None else present.sum(1)
        ongoing = ((position + read) % self.window != 0)[:, None, None, None]  # what ended is forgotten
        return self._join(y), KeyValues(tuple(k * ongoing for k in keys), tuple(v * ongoing for v in values))


def _place(old: Tensor, new: Tensor, target: Int[Tensor, "B T"]) -> Tensor:
    """`old` `[B, heads, S, d]` with `new` `[B, heads, T, d]` at slots `target`; slot S is outside."""
    roomy = F.pad(old.to(new.dtype), (0, 0, 0, 1))
    index = target[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return roomy.scatter(2, index, new)[:, :, :-1]
