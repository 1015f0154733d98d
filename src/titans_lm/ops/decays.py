"""How much is left at each token of a chunk, of what was there when it began and of what its tokens wrote."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Decays(NamedTuple):
    """How much of what is left at each token t of a chunk; any leading dimensions."""

    a: Tensor  # A[t] = a_1 .. a_t                            [..., C, 1], of the weights at the chunk's first token
    b: Tensor  # B[t] = sum_j P_a[t, j] E[j]                  [..., C, 1], of the momentum then
    e: Tensor  # E[t] = eta_1 .. eta_t                        [..., C, 1]
    d: Tensor  # D = P_a @ Em                                 [..., C, C], of token s's gradient in M_t
    em: Tensor  # Em[C] = P_eta[C] * theta                    [..., C, 1], of token s's gradient in S_C


def decays(theta: Tensor, eta: Tensor, alpha: Tensor, present: Tensor | None) -> Decays:
    """theta, eta, alpha `[..., C]`. A token not `present` has a = eta = 1, theta = 0, and adds no momentum to M."""
    a = 1 - alpha
    if present is not None:
        theta = theta * present
        eta, a = (torch.where(present, gate, 1) for gate in (eta, a))
    p_a, p_eta = _Products.apply(a), _Products.apply(eta)
    e = p_eta[..., :, 0] * eta[..., :1]
    em = p_eta * theta[..., None, :]
    adds = p_a if present is None else p_a * present[..., None, :]
    return Decays(
        a=(p_a[..., :, 0] * a[..., :1])[..., None],
        b=adds @ e[..., None],
        e=e[..., None],
        d=adds @ em,
        em=em[..., -1, :, None],
    )


class _Products(torch.autograd.Function):
    """P[t, s] = product of gate_i for i = s+1 .. t, lower triangular with ones on the diagonal. gate `[..., C]`.

    A masked sum of logarithms: no differences of cumulative sums, which are inf - inf where a gate is 0. The shift
    keeps log and its gradient finite at 0, and is far below rounding beside any gate that is not.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        c = gate.shape[-1]
        shifted = gate + (1e-150 if gate.dtype == torch.float64 else 1e-30)
        logs = shifted.log()[..., :, None].expand(*gate.shape, c)  # [..., t, s]
        below = torch.ones(c, c, dtype=gate.dtype, device=gate.device).tril_(-1)
        products = (logs * below).cumsum(-2).exp_().tril_()
        ctx.save_for_backward(shifted, products)
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """gate_i is in P[t, s] for s < i <= t, as P[t, s] / gate_i of it."""
        shifted, products = ctx.saved_tensors
        by_gate = (gradient * products).cumsum(-1).tril_(-1).sum(-2)  # [..., i - 1]: no term without gate_i
        return torch.nn.functional.pad(by_gate[..., :-1], (1, 0)).div_(shifted)
