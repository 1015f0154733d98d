"""The values that go into the memory operation and come out of it: its state, its form, its surprise."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Activation = Literal["silu", "gelu"]


class MemoryState(NamedTuple):
    """All that a memory knows, at any token, also in the middle of a chunk. Its size does not depend on what was read.

    Each tuple has one float32 (or float64) tensor `[B, H, in, out]` per layer of the memory.
    """

    anchor: tuple[Tensor, ...]
    """Weights that held when the current chunk began: every gradient of the chunk is taken at them."""
    weights: tuple[Tensor, ...]
    """M_t, the weights after the last token (equal to the anchor at a chunk start)."""
    momentum: tuple[Tensor, ...]
    """S_t, the decaying sum of past surprise."""
    position: Int[Tensor, " B"]
    """Tokens into the current chunk, 0 <= position < chunk_size; rows whose padding differs differ here."""

    def detach(self) -> "MemoryState":
        """The same memory without its history of gradients."""
        anchor, weights, momentum = (tuple(w.detach() for w in part) for part in self[:3])
        return MemoryState(anchor, weights, momentum, self.position)


class MemoryForm(NamedTuple):
    """What M(k) is, apart from its weights, and which tokens it writes.

    `norm=None` is the paper's plain MLP. `norm=(weight, bias)`, each `[H, V]`, is the residual form
    M(k) = k + layer_norm(MLP(k)) of TTT (arXiv:2407.04620, section 2.7); it needs V == K.
    """

    activation: Activation = "silu"
    """Between the layers; "gelu" is the tanh form."""
    norm: tuple[Float[Tensor, "H V"], Float[Tensor, "H V"]] | None = None
    clip: float | None = None
    """c > 0: each token's gradient G at the MLP's output becomes G c / (|G| + c), so that |G| < c. None: as it is."""
    threshold: float | None = None
    """A token whose reconstruction loss is not above this is not written (its theta is 0). None: all are."""


class Tokens(NamedTuple):
    """What is read: `[B, T, H, *]` of a call; within forms also `[N, R, C, *]`, R = B * H rows, contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor  # without the last dimension; and eta, alpha
    eta: Tensor
    alpha: Tensor


class Call(NamedTuple):
    """What a form of the operation is asked to compute: the arguments of `memory_scan`, checked."""

    tokens: Tokens
    state: MemoryState
    chunk_size: int
    form: MemoryForm
    mask: Bool[Tensor, "B T"] | None
    surprise: bool
    kept_bytes: int


class Surprise(NamedTuple):
    """How unexpected each token was, before it was written; 0 where masked."""

    loss: Float[Tensor, "B T H"]
    """|| M(k) - v ||^2 at the anchor (eq. 12)."""
    gradient_norm: Float[Tensor, "B T H"]
    """Frobenius norm of the gradient of that loss (after the clip) over all weights of the head's memory."""


Answer = tuple[Tensor, MemoryState, Surprise | None]
"""What every form gives for a `Call`: y `[B, T, H, V]`, the state after, and the surprise if it was asked for."""

NORM_EPS = 1e-6
"""Added to the variance in the residual form's layer norm (TTT's value)."""


def initial_state(weights: tuple[Float[Tensor, "H _i _o"], ...], batch: int) -> MemoryState:
    """A memory that has read nothing: M_0 = `weights` in each of `batch` rows, S_0 = 0.

    Gradients flow back to `weights`. Half precision is raised to float32.
    """
    wide = tuple(w if w.dtype == torch.float64 else w.float() for w in weights)
    rows = tuple(w.expand(batch, *w.shape) for w in wide)
    zeros = tuple(torch.zeros_like(w) for w in rows)
    return MemoryState(rows, rows, zeros, torch.zeros(batch, dtype=torch.long, device=wide[0].device))


def where_rows(rows: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per layer `[B, ...]`: `yes` in the rows `[B]` that are True, `no` in the others."""
    return tuple(torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(yes, no, strict=True))
