"""A memory in factors: its weights some tokens ago, and the outer products written since. Decoding writes it in place.

A token writes an outer product x^T g to each layer. While a chunk goes on, they need not be added to the weights:

    W = kept * W_b + from_s * S_b - sum_k in_w[k] x_k^T g_k
    S = decay * S_b               - sum_k in_s[k] x_k^T g_k

follows from eqs. 10 and 13, with scalars that a token updates. A decoded token then reads W_b and S_b, and writes
vectors alone, where else it reads and writes the whole state. `cpu/csrc/factored.h` computes with it, and adds the
products to W_b and S_b where a chunk begins or no slot is left.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans_lm.ops.types import MemoryState, is_traced, select_rows

SLOTS = 16
"""Products that are held at most: more would take longer to read than the weights."""
COUNT, KEPT, FROM_S, DECAY, ANCHORED, FIRST_SLOT = range(6)
"""Where the coefficients are, as in csrc/factored.h; then those of each slot in S, and those in W."""


class FactoredMemory(NamedTuple):
    """A `MemoryState` in factors. Its tensors belong to it alone: `titans_layer_step` writes them in place.

    It writes so that a value from before the token stays valid until the token after: a call that failed may be
    repeated. The first three fields have the shapes of those of a `MemoryState`. Its `weights`, `momentum` and `anchor`
    are computed when asked for.
    """

    base_anchor: tuple[Tensor, ...]
    """The anchor, where a chunk has not begun since the base was made; elsewhere it is the base."""
    base_weights: tuple[Tensor, ...]
    base_momentum: tuple[Tensor, ...]
    position: Int[Tensor, " B"]
    x: tuple[Float[Tensor, "B H slots _in"], ...]
    g: tuple[Float[Tensor, "B H slots _out"], ...]
    coefficients: Float[Tensor, "B H _n"]

    @classmethod
    def of(cls, state: MemoryState, chunk_size: int) -> "FactoredMemory":
        """`state`, copied, as factors. Where a chunk begins, its weights are the anchor."""
        slots, (batch, heads) = min(SLOTS, chunk_size), state.weights[0].shape[:2]
        begins = state.position == 0
        coefficients = state.weights[0].new_zeros(batch, heads, FIRST_SLOT + 2 * slots)
        coefficients[..., [KEPT, DECAY]] = 1
        coefficients[..., ANCHORED] = begins[:, None].to(coefficients.dtype)
        x, g = (tuple(w.new_zeros(batch, heads, slots, w.shape[side]) for w in state.weights) for side in (2, 3))
        parts = (state.anchor, state.weights, state.momentum)
        anchor, weights, momentum = (tuple(_own(t) for t in part) for part in parts)
        return cls(anchor, weights, momentum, state.position.contiguous(), x, g, coefficients)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """M_t, in tensors of their own."""
        slots = self.x[0].shape[2]
        kept, from_s, in_w = self._part(KEPT), self._part(FROM_S), self.coefficients[..., FIRST_SLOT + slots :]
        return tuple(
            _subtract_products((kept * w).addcmul_(s, from_s), x, in_w, g)
            for w, s, x, g in zip(self.base_weights, self.base_momentum, self.x, self.g, strict=True)
        )

    @property
    def momentum(self) -> tuple[Tensor, ...]:
        """S_t, in tensors of their own."""
        slots = self.x[0].shape[2]
        decay, in_s = self._part(DECAY), self.coefficients[..., FIRST_SLOT : FIRST_SLOT + slots]
        return tuple(
            _subtract_products(decay * s, x, in_s, g)
            for s, x, g in zip(self.base_momentum, self.x, self.g, strict=True)
        )

    @property
    def anchor(self) -> tuple[Tensor, ...]:
        """The anchor, in tensors of their own."""
        return self.whole().anchor

    def whole(self) -> MemoryState:
        """The memory as a `MemoryState`, in tensors of its own."""
        weights, anchored = self.weights, self.coefficients[:, 0, ANCHORED] != 0
        anchor = select_rows(self.position == 0, weights, select_rows(anchored, self.base_weights, self.base_anchor))
        if not is_traced(anchored) and (anchor is self.base_weights or anchor is self.base_anchor):
            anchor = tuple(map(torch.clone, anchor))
        return MemoryState(anchor, weights, self.momentum, self.position.clone())

    def _part(self, index: int) -> Tensor:
        return self.coefficients[..., index, None, None]


def _own(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


def _subtract_products(total: Tensor, x: Tensor, factors: Tensor, g: Tensor) -> Tensor:
    """total `[B, H, in, out]` - sum_k factors[k] x_k^T g_k, in place."""
    left, right = (x * factors[..., None]).flatten(0, 1).mT, g.flatten(0, 1)
    return total.flatten(0, 1).baddbmm_(left, right, alpha=-1).view_as(total)
