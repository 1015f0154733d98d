"""How the queries of a call attend: all of the past at once, a few after a cache, or blocks of a window."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops import for_all_lengths, is_traced

AttentionFunction = Callable[..., Tensor]
"""softmax(q k^T) v, with the arguments of `F.scaled_dot_product_attention`."""


def attention_function(eager: bool) -> AttentionFunction:
    """PyTorch's fused function, or the `eager` one."""
    return eager_attention if eager else F.scaled_dot_product_attention


def eager_attention(
    q: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention` written out: a product, a softmax in float32 or float64, a product."""
    scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.softmax(-1).to(values.dtype) @ values


# Keys and values `[B, heads, P + S, d]`: of the persistent tokens, of the cache, and of the queries' tokens.


def causal(attention: AttentionFunction, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """All of the past, from an empty cache. The persistent tokens are queries too, so that the mask is plainly causal;
    their outputs are dropped."""
    size = keys.shape[2] - q.shape[2]
    q = torch.cat([keys[:, :, :size], q], 2)
    return attention(q, keys, values, is_causal=True)[:, :, size:]


def one_block(
    attention: AttentionFunction,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    size: int,
    first: Tensor | None,
    window: int | None,
) -> Tensor:
    """A few queries after the cache: one product. With `first`, each row has a mask of its own."""
    tokens, slots = q.shape[2], keys.shape[2] - size
    if tokens == 1 and first is None and (window is None or slots <= window):
        return attention(q, keys, values)  # the token sees all keys
    visible = visible_slots(tokens, slots, window, first, q.device)
    return attention(q, keys, values, attn_mask=F.pad(visible, (size, 0), value=True))


def visible_slots(tokens: int, slots: int, window: int | None, first: Tensor | None, device: torch.device) -> Tensor:
    """Which of the `slots` each of the last `tokens` of them sees, `[T, S]`: those before it and its own, at most
    `window`. With `first` `[B]`, the slot at which each row's tokens begin, `[B, 1, T, S]`."""
    slot = torch.arange(slots, device=device)
    own = slot[slots - tokens :, None]  # [T, 1], the slot of each query's own key
    visible = slot <= own  # [T, S]
    if window is not None:
        visible = visible & (slot > own - window)
    return visible if first is None else (visible & (slot >= first[:, None, None]))[:, None]


def window_blocks(
    attention: AttentionFunction, q: Tensor, keys: Tensor, values: Tensor, size: int, first: Tensor | None, window: int
) -> Tensor:
    """Blocks of `window` queries. Each sees the persistent tokens, the block before it and itself.

    Only the first block sees the cache, whose length may differ between rows; the other blocks share one mask.
    """
    given, exported = q.shape[2], for_all_lengths(q)
    if exported:
        q, keys, values = (F.pad(x, (0, 0, 0, window)) for x in (q, keys, values))
    batch, heads, tokens, width = q.shape
    end = keys.shape[2] - tokens + window
    begin = one_block(attention, q[:, :, :window], keys[:, :, :end], values[:, :, :end], size, first, window)
    count = (tokens + window - 1) // window - 1
    if is_traced(q):  # a block of padding, so that one graph is for one block and for more
        count = (tokens + window - 1) // window
    padding = (count + 1) * window - tokens
    q = F.pad(q[:, :, window:], (0, 0, 0, padding)).unflatten(2, (count, window)).transpose(1, 2)
    keys, values = (_block_pairs(x, size, window, count, padding) for x in (keys, values))
    slot, own = torch.arange(2 * window, device=q.device), window + torch.arange(window, device=q.device)[:, None]
    visible = F.pad((slot <= own) & (slot > own - window), (size, 0), value=True)  # [W, P + 2 W]
    y = attention(q.flatten(0, 1), keys, values, attn_mask=visible)
    y = y.view(batch, count, heads, window, width).transpose(1, 2).flatten(2, 3)
    if exported:  # a slice would have to be shown to fit
        return torch.cat([begin, y], 2).index_select(2, torch.arange(given, device=y.device))
    return torch.cat([begin, y[:, :, : tokens - window]], 2)


def _block_pairs(x: Tensor, size: int, window: int, count: int, padding: int) -> Tensor:
    """The keys or values that each block but the first sees: `[B * N, heads, P + 2 W, d]`."""
    persistent = x[:, None, :, :size].expand(-1, count, -1, -1, -1)
    x = F.pad(x[:, :, x.shape[2] + padding - (count + 1) * window :], (0, 0, 0, padding))  # [B, heads, (N + 1) W, d]
    before, own = (
        part.unflatten(2, (count, window)).transpose(1, 2) for part in (x[:, :, : count * window], x[:, :, window:])
    )
    return torch.cat([persistent, before, own], 3).flatten(0, 1)
