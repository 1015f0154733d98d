"""The short-term memory: attention in a window or a segment, persistent tokens always visible, rotary positions.

Time and memory are O(T * window): queries go block by block, each block sees its own keys and the block before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from titans_lm.ops import gather_tokens


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
        self.eager = False  # True: attn_implementation="eager", no fused kernel
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
        return torch.cat([torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin)], -1)

    @property
    def product(self) -> "Product":
        """softmax(q k^T) v, by the implementation that is asked for."""
        return eager_attention if self.eager else F.scaled_dot_product_attention

    def _keys_values(self, x: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor]:
        return self._heads(self.k_proj(x), turn), self._heads(self.v_proj(x))

    def persistent(self, prefix: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens `[1 or B, P, D]`, which have no position."""
        keys, values = self._keys_values(prefix, None)
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def _join(self, y: Tensor) -> Tensor:
        return self.o_proj(y.transpose(1, 2).flatten(2))


class WindowAttention(Attention):
    """Each token sees the persistent tokens and the last `window` tokens, itself included (eqs. 27, 31)."""

    def initial_state(self, batch: int, like: Tensor) -> KeyValues:
        """Nothing seen, with the dtype and on the device of `like`."""
        empty = like.new_zeros(batch, self.heads, (self.window or 1) - 1, self.head_dim)
        return KeyValues((empty,), (empty,))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        prefix: Float[Tensor, "#B P D"],
        state: KeyValues,
        position: Int[Tensor, " B"],
        turn: Rotation,
        present: Bool[Tensor, "B T"] | None,
        at: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """`position`: tokens each row has read before; `present` is True for each row's first tokens here. `at` is the
        position of all rows where it is the same: then they need no masks of their own."""
        q, size, cached = self._heads(self.q_proj(x), turn), prefix.shape[1], state.keys[0].shape[2]
        new, persistent = self._keys_values(x, turn), self.persistent(prefix, len(x))
        keys, values = (
            torch.cat([p, old[0].to(n.dtype), n], 2) for p, old, n in zip(persistent, state, new, strict=True)
        )
        first = cached - position.clamp(max=cached)  # [B], the first slot that holds a token
        ragged = first if at is None or at < cached else None
        if self.window is None and cached == 0:
            y = _causal(self.product, q, keys, values)
        elif self.window is None or x.shape[1] <= self.window:
            y = _one_block(self.product, q, keys, values, size, ragged, self.window)
        else:
            y = _blocks(self.product, q, keys, values, size, ragged, self.window)
        return self._join(y), self._remember(keys[:, :, size:], values[:, :, size:], first, present, x.shape[1])

    def _remember(self, keys: Tensor, values: Tensor, first: Tensor, present: Tensor | None, tokens: int) -> KeyValues:
        """The last window - 1 keys and values of each row, at the right; of all tokens, where there is no window."""
        size = keys.shape[2] if self.window is None else self.window - 1
        if present is None:
            keys, values = (x[:, :, x.shape[2] - size :] for x in (keys, values))
            if tokens > 1:  # else they stand in little more than themselves
                keys, values = keys.clone(), values.clone()
            return KeyValues((keys,), (values,))
        end = keys.shape[2] - tokens + present.sum(1, keepdim=True)
        slot = end - size + torch.arange(size, device=keys.device)  # [B, S]
        there = (slot >= first[:, None])[:, None, :, None]
        keys, values = (
            gather_tokens(x.transpose(1, 2), slot.clamp(min=0)).transpose(1, 2) * there for x in (keys, values)
        )
        return KeyValues((keys,), (values,))


Product = Callable[..., Tensor]
"""As `F.scaled_dot_product_attention`."""


def eager_attention(
    q: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention` written out: a product, a softmax in float32 at least, a product."""
    scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.softmax(-1).to(values.dtype) @ values


# Keys and values `[B, heads, P + S, d]`: those of the persistent tokens, what is cached, those of the queries.


def _causal(product: Product, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """All of the past, from the beginning. The persistent tokens ask too, in vain, so that a causal mask is right."""
    size = keys.shape[2] - q.shape[2]
    q = torch.cat([keys[:, :, :size], q], 2)
    return product(q, keys, values, is_causal=True)[:, :, size:]


def _one_block(
    product: Product, q: Tensor, keys: Tensor, values: Tensor, size: int, first: Tensor | None, window: int | None
) -> Tensor:
    """Few queries after what is cached: one product, and a mask, for each row where `first` is not 0."""
    tokens, slots = q.shape[2], keys.shape[2] - size
    if tokens == 1 and first is None and (window is None or slots <= window):
        return product(q, keys, values)  # it sees them all
    slot = torch.arange(slots, device=q.device)
    own = slot[slots - tokens :, None]  # [T, 1], where each query's own key stands
    seen = slot <= own  # [T, S]
    if window is not None:
        seen = seen & (slot > own - window)
    if first is not None:
        seen = (seen & (slot >= first[:, None, None]))[:, None]  # [B, 1, T, S]
    return product(q, keys, values, attn_mask=F.pad(seen, (size, 0), value=True))


def _blocks(
    product: Product, q: Tensor, keys: Tensor, values: Tensor, size: int, first: Tensor | None, window: int
) -> Tensor:
    """Blocks of `window` queries; each sees the persistent tokens, the block before it and its own.

    Only the first sees what is cached, which rows may have more or less of; the others all have the same mask.
    """
    batch, heads, tokens, width = q.shape
    end = keys.shape[2] - tokens + window
    begin = _one_block(product, q[:, :, :window], keys[:, :, :end], values[:, :, :end], size, first, window)
    count = -(-tokens // window) - 1
    after = (count + 1) * window - tokens
    q = F.pad(q[:, :, window:], (0, 0, 0, after)).unflatten(2, (count, window)).transpose(1, 2)
    keys, values = (_pairs(x, size, window, count, after) for x in (keys, values))
    slot, own = torch.arange(2 * window, device=q.device), window + torch.arange(window, device=q.device)[:, None]
    seen = F.pad((slot <= own) & (slot > own - window), (size, 0), value=True)  # [W, P + 2 W]
    y = product(q.flatten(0, 1), keys, values, attn_mask=seen)
    y = y.view(batch, count, heads, window, width).transpose(1, 2).flatten(2, 3)
    return torch.cat([begin, y[:, :, : tokens - window]], 2)


def _pairs(x: Tensor, size: int, window: int, count: int, after: int) -> Tensor:
    """Of keys or values, what each block but the first sees: `[B * N, heads, P + 2 W, d]`."""
    persistent = x[:, None, :, :size].expand(-1, count, -1, -1, -1)
    x = F.pad(x[:, :, x.shape[2] + after - (count + 1) * window :], (0, 0, 0, after))
    x = x.unflatten(2, (count + 1, window)).transpose(1, 2)  # [B, N + 1, heads, W, d]
    return torch.cat([persistent, x[:, :-1], x[:, 1:]], 3).flatten(0, 1)


class SegmentAttention(Attention):
    """Attention within a segment over [P, h, S] (eqs. 22, 23): token i sees P, and h_j and S_j for j <= i.

    `window` is the segment's size. h_j depends on token j, so a plain causal mask over [P, h, S] would leak.
    """

    def initial_state(self, batch: int, like: Tensor) -> KeyValues:
        """Nothing seen, with the dtype and on the device of `like`."""
        assert self.window is not None
        empty = like.new_zeros(batch, self.heads, self.window, self.head_dim)
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
        at: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """`position`: tokens of the segment that each row has read; position + its tokens here <= segment size. `at` is
        the position of all rows where it is the same, and they have all tokens: no slot is looked at in vain then."""
        persistent = self.persistent(prefix, len(x))
        return self.attend(self.own(x, turn), retrieved, persistent, state, position, present, at)

    def own(self, x: Tensor, turn: Rotation) -> tuple[Tensor, ...]:
        """Queries, keys and values `[B, heads, T, d]` of the tokens themselves: of any number of segments at once."""
        return self._heads(self.q_proj(x), turn), *self._keys_values(x, turn)

    def attend(
        self,
        own: tuple[Tensor, ...],
        retrieved: Float[Tensor, "B T D"],
        persistent: tuple[Tensor, Tensor],
        state: KeyValues,
        position: Int[Tensor, " B"],
        present: Bool[Tensor, "B T"] | None,
        at: int | None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValues]:
        """The rest of `forward`, given what `own` and `persistent` make."""
        assert self.window is not None
        q, s_keys, s_values = own
        tokens, size = q.shape[2], persistent[0].shape[2]
        h_keys, h_values = self._keys_values(retrieved, None)
        new = ((h_keys, s_keys), (h_values, s_values))
        slot, place = (
            torch.arange(self.window, device=q.device),
            position[:, None] + torch.arange(tokens, device=q.device),
        )
        if at is None:
            target = place if present is None else torch.where(present, place, self.window)
            after = _each(lambda old, n: _place(old, n, target), state, new)
            visible, seen = after, slot <= place[..., None]  # [B, T, S]
            read = position + (tokens if present is None else present.sum(1))
            ongoing = (read % self.window != 0).view(-1, 1, 1, 1)
            after = _each(lambda k, _: k * ongoing, after, after)  # what ended is forgotten
        else:
            end = at + tokens
            visible, after = _continued(state, new, at, self.window)
            seen = slot[:end] <= place[:1, :, None]
        keys, values = (torch.cat([p, *parts], 2) for p, parts in zip(persistent, visible, strict=True))
        mask = None
        if at is None or tokens > 1:
            mask = F.pad(torch.cat([seen, seen], -1), (size, 0), value=True)[:, None]
        return self._join(self.product(q, keys, values, attn_mask=mask)), after


def _continued(state: KeyValues, new: Any, at: int, size: int) -> tuple[KeyValues, KeyValues]:
    """What is visible, and remembered, of a segment of `size` slots whose tokens `at` and after are `new`."""
    end = at + new[0][0].shape[2]
    if at == 0 and end == size:  # the state is that of a segment which has not begun, as it will be again
        return KeyValues(*new), state
    after = _each(lambda old, n: torch.slice_scatter(old.to(n.dtype), n, 2, at, end), state, new)
    visible = _each(lambda k, _: k[:, :, :end], after, after)
    return visible, _each(lambda k, _: torch.zeros_like(k), after, after) if end == size else after


def _each(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> KeyValues:
    """`function` of each tensor of a and b, of keys and of values."""
    return KeyValues(*(tuple(map(function, x, y)) for x, y in zip(a, b, strict=True)))


def _place(old: Tensor, new: Tensor, target: Int[Tensor, "B T"]) -> Tensor:
    """`old` `[B, heads, S, d]` with `new` `[B, heads, T, d]` at slots `target`; slot S is outside."""
    roomy = F.pad(old.to(new.dtype), (0, 0, 0, 1))
    index = target[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return roomy.scatter(2, index, new)[:, :, :-1]
