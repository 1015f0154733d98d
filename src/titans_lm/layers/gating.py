"""Gates: of a memory's step, momentum and forgetting, of a block's MLP, and of what joins attention and memory."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm.layers.checkpointing import checkpointed
from titans_lm.layers.module_call import is_plain_linear


def sigmoid_gates(x: Tensor, maps: Sequence[nn.Module | None], num_heads: int) -> list[Tensor]:
    """For each of the maps sigmoid(map(x)) `[B, T, H]`, in float32 or float64; 0 for a map that is None. The first map
    is none such."""
    given = [gate for gate in maps if gate is not None]
    linears = [gate for gate in given if isinstance(gate, nn.Linear) and is_plain_linear(gate)]
    if len(linears) == len(given):  # one product for all, because each has few rows
        z = F.linear(x, torch.cat([gate.weight for gate in linears]), torch.cat([gate.bias for gate in linears]))
    else:
        z = torch.cat([gate(x) for gate in given], -1)
    gates = list(torch.sigmoid(z if z.dtype == torch.float64 else z.float()).split(num_heads, -1))
    zero = torch.zeros_like(gates[0])
    return [zero if gate is None else gates.pop(0) for gate in maps]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the gated MLP."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpointed(lambda gate, up: self.down_proj(F.silu(gate) * up), self.gate_proj(x), self.up_proj(x))


class ProductGate(nn.Module):
    """y (x) m: norm(y) * sigmoid(norm(m)), both norms with learned weights (eqs. 25, 28)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.y_norm, self.m_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return checkpointed(lambda y, m: self.y_norm(y) * torch.sigmoid(self.m_norm(m)), y, m)


class ConvexGate(nn.Module):
    """g * y + (1 - g) * m, with g = sigmoid(W_g [y; m] + b_g)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        g = torch.sigmoid(self.mix(torch.cat([y, m], -1)))
        return g * y + (1 - g) * m


class ResidualGate(nn.Module):
    """y + scale * sigmoid(W [y; m] + b) * m, for a memory beside an attention that is trained already.

    `scale` `[D]` begins at 0: the gate is closed and returns y, to the bit. Its gradient is not 0: training opens it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        opened = self.scale * torch.sigmoid(self.mix(torch.cat([y.to(m.dtype), m], -1))) * m
        return y + opened.to(y.dtype)
