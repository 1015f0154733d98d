"""How much is left at each token of a chunk, of what was there when it began and of what its tokens wrote; and back.

Eqs. 10 and 13 are linear in the weights, the momentum and the gradients: a row of factors per token, which follows from
the row before it as the state itself does. Columns are what there is to be left: W', S, and each token's gradient.
"""

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
    """What `decays` leaves for `back_decays`: token by token, of all leading dimensions `X` at once."""

    a: Tensor  # [C, X, 1], 1 where no token is, as eta
    eta: Tensor
    in_weights: Tensor  # [C, X, 2 + C], A, B and D
    in_momentum: Tensor  # 0, E and Em
    present: Tensor | None  # [C, X, 1]


def decays(theta: Tensor, eta: Tensor, alpha: Tensor, present: Tensor | None) -> tuple[Decays, Gates]:
    """theta, eta, alpha `[..., C]`. A token not `present` has a = eta = 1, theta = 0, and adds no momentum to M."""
    *lead, c = theta.shape
    if present is not None:
        theta = theta * present
        eta, alpha = torch.where(present, eta, 1), torch.where(present, alpha, 0)
        present = _by_token(present.expand(theta.shape))
    a, eta = 1 - _by_token(alpha), _by_token(eta)
    size, columns = a.shape[1], torch.eye(2, 2 + c, dtype=a.dtype, device=a.device)
    in_momentum = a.new_zeros(c, size, 2 + c)
    in_momentum.diagonal(2, 0, 2).copy_(theta.reshape(-1, c))  # token t writes theta_t at t
    in_weights = torch.empty_like(in_momentum)
    m, s = columns[:, None].expand(-1, size, -1)  # before the first token: W' is all of M, S all of S
    for t, (here, written) in enumerate(zip(in_weights.unbind(0), in_momentum.unbind(0), strict=True)):
        s = written.addcmul_(s, eta[t])  # S_t = eta_t S_{t-1} + what t writes
        added = s if present is None else s * present[t]
        m = torch.addcmul(added, m, a[t], out=here)  # M_t = (1 - alpha_t) M_{t-1} + S_t
    w, s = (x.transpose(0, 1).unflatten(0, lead) for x in (in_weights, in_momentum))  # [..., C, 2 + C]
    left = Decays(a=w[..., :1], b=w[..., 1:2], e=s[..., 1:2], d=w[..., 2:], em=s[..., -1, 2:, None])
    left = Decays(*(x.contiguous() for x in left))  # they are read chunk by chunk
    return left, Gates(a, eta, in_weights, in_momentum, present)


def back_decays(by: Decays, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by theta, eta and alpha, given those `by` what `decays` returned."""
    a, eta, in_weights, in_momentum, present = gates
    lead, c = by.d.shape[:-2], by.d.shape[-1]
    by_weights = torch.cat([by.a, by.b, by.d], -1).reshape(-1, c, 2 + c).transpose(0, 1).contiguous()
    _back_in_time(by_weights, a)
    by_momentum = by_weights.clone() if present is None else by_weights * present
    by_momentum[:, :, 1] += by.e.reshape(-1, c).t()
    by_momentum[-1, :, 2:] += by.em.reshape(-1, c)
    _back_in_time(by_momentum, eta)
    by_a = torch.cat([by_weights[:1, :, 0], (by_weights[1:] * in_weights[:-1]).sum(-1)])
    by_eta = torch.cat([by_momentum[:1, :, 1], (by_momentum[1:] * in_momentum[:-1]).sum(-1)])
    by_theta = by_momentum.diagonal(2, 0, 2).t()  # above it are zeros of `decays`, whatever was asked of them
    if present is not None:
        by_theta, by_eta, by_a = (torch.where(present[..., 0], x, 0) for x in (by_theta, by_eta, by_a))
    by_theta, by_eta, by_a = (x.t().unflatten(0, lead) for x in (by_theta, by_eta, by_a))
    return by_theta, by_eta, -by_a


def _by_token(gate: Tensor) -> Tensor:
    """`[..., C]` -> `[C, X, 1]`"""
    return gate.reshape(-1, gate.shape[-1]).t().contiguous()[..., None]


def _back_in_time(by: Tensor, gate: Tensor) -> None:
    """The gradient by each row also through the row after it, in place: the recurrence, last token first."""
    rows = by.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(rows[t + 1], gate[t + 1])
