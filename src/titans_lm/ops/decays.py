"""How much is left at each token of a chunk, of what was there when it began and of what its tokens wrote; and back."""

from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """How much of what is left at each token t of a chunk; any leading dimensions."""

    a: Tensor  # A[t] = a_1 .. a_t                            [..., C, 1], of the weights at the chunk's first token
    b: Tensor  # B[t] = sum_j P_a[t, j] E[j]                  [..., C, 1], of the momentum then
    e: Tensor  # E[t] = eta_1 .. eta_t                        [..., C, 1]
    d: Tensor  # D = P_a @ Em                                 [..., C, C], of token s's gradient in M_t
    em: Tensor  # Em[C] = P_eta[C] * theta                    [..., C, 1], of token s's gradient in S_C


class Gates(NamedTuple):
    """What `decays` leaves for `back_decays`."""

    theta: Tensor  # [..., C], 0 where no token is; a and eta are 1 there, and all three above 0
    eta: Tensor
    a: Tensor
    p_eta: Tensor  # [..., C, C]
    p_a: Tensor
    adds: Tensor  # P_a, without the columns of tokens that are not there: they add no momentum to M
    em: Tensor
    present: Tensor | None


def decays(theta: Tensor, eta: Tensor, alpha: Tensor, present: Tensor | None) -> tuple[Decays, Gates]:
    """theta, eta, alpha `[..., C]`. A token not `present` has a = eta = 1, theta = 0, and adds no momentum to M.

    Gates are shifted by a number far below their rounding, so that a product can be divided by each of its factors.
    """
    shift = 1e-150 if theta.dtype == torch.float64 else 1e-30
    eta, a = eta + shift, (1 - alpha) + shift
    if present is not None:
        theta = theta * present
        eta, a = (torch.where(present, gate, 1) for gate in (eta, a))
    p_a, p_eta = products(a), products(eta)
    e = p_eta[..., 0] * eta[..., :1]
    em = p_eta * theta[..., None, :]
    adds = p_a if present is None else p_a * present[..., None, :]
    left = Decays(
        a=(p_a[..., 0] * a[..., :1])[..., None],
        b=(adds * e[..., None, :]).sum(-1, keepdim=True),
        e=e[..., None],
        d=adds @ em,
        em=em[..., -1, :, None],
    )
    return left, Gates(theta, eta, a, p_eta, p_a, adds, em, present)


def products(gate: Tensor) -> Tensor:
    """P[t, s] = product of gate_i for i = s+1 .. t, lower triangular with ones on the diagonal. gate `[..., C]`.

    Each is multiplied out by itself: cumulative products divided by each other are 0 / 0 after a gate of 0.
    """
    c = gate.shape[-1]
    below = torch.ones(c, c, dtype=torch.bool, device=gate.device).tril_(-1)
    return torch.where(below, gate[..., :, None], 1).cumprod(-2).tril_()


def back_decays(by: Decays, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by theta, eta and alpha, given those `by` what `decays` returned."""
    theta, eta, a, p_eta, p_a, adds, em, present = gates
    by_a, by_b, by_e, by_d, by_em_last = by
    e = p_eta[..., 0] * eta[..., :1]
    by_em = adds.mT @ by_d
    by_em[..., -1, :] += by_em_last[..., 0]
    by_adds = torch.addcmul(by_d @ em.mT, by_b, e[..., None, :])
    by_e = by_e[..., 0] + (adds * by_b).sum(-2)
    if present is not None:
        by_adds *= present[..., None, :]
    by_theta = (by_em * p_eta).sum(-2)
    by_p_eta = by_em.mul_(theta[..., None, :])
    by_eta = _back_products(by_p_eta, p_eta, eta, by_e)
    by_gate_a = _back_products(by_adds, p_a, a, by_a[..., 0])
    if present is not None:
        by_theta, by_eta, by_gate_a = (torch.where(present, x, 0) for x in (by_theta, by_eta, by_gate_a))
    return by_theta, by_eta, -by_gate_a


def _back_products(by: Tensor, p: Tensor, gate: Tensor, by_all: Tensor) -> Tensor:
    """From the gradients by P and by gate_1 .. gate_t, which is P[t, 1] gate_1, to that by the gates.

    gate_i is in P[t, s] for s < i <= t, which without it is P[t, s] / gate_i.
    """
    by[..., 0].addcmul_(by_all, gate[..., :1])
    below = by.mul_(p).cumsum(-1).tril_(-1).sum(-2)  # [..., i - 1]: no term without gate_i
    first = (by_all * p[..., 0]).sum(-1, keepdim=True)
    return torch.cat([first, below[..., :-1] / gate[..., 1:]], -1)
