"""The scalar factors A, B, D, E, Em of a chunk: how much of the old state and of each write is left at each token.

Eqs. 10 and 13 are linear in the weights, the momentum and the gradients. So each token has a row of factors, which
follows from the row before it as the state itself does. The columns are W', S, and the gradient of each token.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Decays(NamedTuple):
    """The factors at each token t of a chunk; any leading dimensions. Or the outer loss's gradient by them."""

    a: Tensor  # A[t] = a_1 .. a_t                            [..., C, 1], of the weights at the chunk's first token
    b: Tensor  # B[t] = sum_j P_a[t, j] E[j]                  [..., C, 1], of the momentum at the chunk's first token
    e: Tensor  # E[t] = eta_1 .. eta_t                        [..., C, 1]
    d: Tensor  # D = P_a @ Em                                 [..., C, C], of token s's gradient in M_t
    em: Tensor  # Em[C] = P_eta[C] * theta                    [..., C, 1], of token s's gradient in S_C


class SavedDecays(NamedTuple):
    """What `chunk_decays` saves for `decays_backward`: token by token, all leading dimensions flattened to `X`."""

    a: Tensor  # [C, X, 1], 1 at an empty slot, as eta
    eta: Tensor
    in_weights: Tensor  # [C, X, 2 + C]: A, B and D
    in_momentum: Tensor  # [C, X, 2 + C]: 0, E and Em
    valid: Tensor | None  # [C, X, 1]


def chunk_decays(theta: Tensor, eta: Tensor, alpha: Tensor, valid: Tensor | None) -> tuple[Decays, SavedDecays]:
    """Compute the factors of gates `[..., C]`. A slot that is not `valid` has a = eta = 1, theta = 0, and adds no
    momentum to M."""
    *lead, c = theta.shape
    if valid is not None:
        theta = theta * valid
        eta, alpha = torch.where(valid, eta, 1), torch.where(valid, alpha, 0)
        valid = _time_major(valid.expand(theta.shape))
    a, eta = 1 - _time_major(alpha), _time_major(eta)
    size, unit = a.shape[1], torch.eye(2, 2 + c, dtype=a.dtype, device=a.device)
    in_momentum = a.new_zeros(c, size, 2 + c)
    in_momentum.diagonal(2, 0, 2).copy_(theta.reshape(-1, c))  # token t writes theta_t in column t
    in_weights = torch.empty_like(in_momentum)
    m, s = unit[:, None].expand(-1, size, -1)  # before the first token M is all W', S is all S
    for t, (m_row, s_row) in enumerate(zip(in_weights.unbind(0), in_momentum.unbind(0), strict=True)):
        s = s_row.addcmul_(s, eta[t])  # S_t = eta_t S_{t-1} + what t writes
        added = s if valid is None else s * valid[t]
        m = torch.addcmul(added, m, a[t], out=m_row)  # M_t = (1 - alpha_t) M_{t-1} + S_t
    m, s = (x.transpose(0, 1).unflatten(0, lead) for x in (in_weights, in_momentum))  # [..., C, 2 + C]
    factors = Decays(a=m[..., :1], b=m[..., 1:2], e=s[..., 1:2], d=m[..., 2:], em=s[..., -1, 2:, None])
    factors = Decays(*(x.contiguous() for x in factors))  # chunks read them one after another
    return factors, SavedDecays(a, eta, in_weights, in_momentum, valid)


def decays_backward(grads: Decays, saved: SavedDecays) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by theta, eta and alpha, from the gradients by the factors of `chunk_decays`."""
    a, eta, in_weights, in_momentum, valid = saved
    lead, c = grads.d.shape[:-2], grads.d.shape[-1]
    grad_weights = torch.cat([grads.a, grads.b, grads.d], -1).reshape(-1, c, 2 + c).transpose(0, 1).contiguous()
    _backward_in_time(grad_weights, a)
    grad_momentum = grad_weights.clone() if valid is None else grad_weights * valid
    grad_momentum[:, :, 1] += grads.e.reshape(-1, c).t()
    grad_momentum[-1, :, 2:] += grads.em.reshape(-1, c)
    _backward_in_time(grad_momentum, eta)
    grad_a = torch.cat([grad_weights[:1, :, 0], (grad_weights[1:] * in_weights[:-1]).sum(-1)])
    grad_eta = torch.cat([grad_momentum[:1, :, 1], (grad_momentum[1:] * in_momentum[:-1]).sum(-1)])
    grad_theta = grad_momentum.diagonal(2, 0, 2).t()  # above the diagonal `chunk_decays` is 0, so no gradient counts
    if valid is not None:
        grad_theta, grad_eta, grad_a = (torch.where(valid[..., 0], x, 0) for x in (grad_theta, grad_eta, grad_a))
    grad_theta, grad_eta, grad_a = (x.t().unflatten(0, lead) for x in (grad_theta, grad_eta, grad_a))
    return grad_theta, grad_eta, -grad_a


def _time_major(gate: Tensor) -> Tensor:
    """`[..., C]` -> `[C, X, 1]`"""
    return gate.reshape(-1, gate.shape[-1]).t().contiguous()[..., None]


def _backward_in_time(grads: Tensor, gate: Tensor) -> None:
    """Add to each row's gradient, in place, what flows back through the next row; last token first."""
    rows = grads.unbind(0)
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(rows[t + 1], gate[t + 1])
