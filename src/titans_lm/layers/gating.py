"""Gates: of a memory's step, momentum and forgetting, of a block's MLP, and of what joins attention and memory."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm.layers.checkpointing import checkpointed
from titans_lm.layers.few_rows import few_rows_weights
from titans_lm.layers.module_call import is_plain_linear
from titans_lm.layers.weight_addresses import WeightAddresses
from titans_lm.ops.cpu.compiled import as_contiguous, run_step, thread_count


def sigmoid_gates(x: Tensor, maps: Sequence[nn.Module | None], num_heads: int) -> list[Tensor]:
    """For each of the maps sigmoid(map(x)) `[B, T, H]`, in float32 or float64; 0 for a map that is None. The first map
    is none such."""
    given = [gate for gate in maps if gate is not None]
    linears = [gate for gate in given if isinstance(gate, nn.Linear) and is_plain_linear(gate)]
    linears = [gate for gate in linears if gate.bias is not None]
    if len(linears) == len(given):  # one product for all, because each has few rows
        z = F.linear(x, torch.cat([gate.weight for gate in linears]), torch.cat([gate.bias for gate in linears]))
    else:
        z = torch.cat([gate(x) for gate in given], -1)
    gates = list(torch.sigmoid(z if z.dtype == torch.float64 else z.float()).split(num_heads, -1))
    zero = torch.zeros_like(gates[0])
    return [zero if gate is None else gates.pop(0) for gate in maps]


@runtime_checkable  # the tests check annotations as they run
class ResidualMLP(Protocol):
    """A block's MLP, and the norm before it."""

    mlp: "SwiGLU"
    mlp_norm: nn.RMSNorm


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
        found = few_rows_weights(y, self, _describe_gate)
        if found is not None and m.dtype == y.dtype and m.shape == y.shape:
            return _compiled_gate(y, m, found)
        return checkpointed(lambda y, m: self.y_norm(y) * torch.sigmoid(self.m_norm(m)), y, m)


def _describe_gate(gate: ProductGate, found: WeightAddresses) -> None:
    found.width = found.shape(gate, "y_norm", nn.RMSNorm)[-1]
    found.numbers = [found.norm(gate, name, found.width) for name in ("y_norm", "m_norm")]


def _compiled_gate(y: Tensor, m: Tensor, found: WeightAddresses) -> Tensor:
    y, m = as_contiguous(y, y.dtype), as_contiguous(m, y.dtype)
    room, out = y.new_empty(found.width + 64), torch.empty_like(y)
    addresses = (y.data_ptr(), m.data_ptr(), *found.numbers, room.data_ptr(), out.data_ptr())
    run_step("titans_product_gate", y.dtype, (y.shape[0] * y.shape[1], found.width, *addresses), scalars=found.eps)
    return out


def residual_mlp(x: Tensor, branch: Tensor, block: "ResidualMLP") -> Tensor:
    """z + mlp(mlp_norm(z)) with z = x + branch, `[B, T, D]`: of few rows in one compiled call."""
    found = few_rows_weights(x, block, _describe_mlp) if branch.dtype == x.dtype else None
    if found is None:
        z = x + branch
        return z + block.mlp(block.mlp_norm(z))
    x, branch, rows = as_contiguous(x, x.dtype), as_contiguous(branch, x.dtype), x.shape[0] * x.shape[1]
    hidden, *weights = found.numbers
    z, h, y = x.new_empty(2, rows, found.width), x.new_empty(rows, hidden), torch.empty_like(x)
    addresses = (x.data_ptr(), branch.data_ptr(), *weights, z.data_ptr(), h.data_ptr(), y.data_ptr())
    numbers = (rows, found.width, hidden, thread_count(3 * found.width * hidden), *addresses)
    run_step("titans_residual_mlp", x.dtype, numbers, scalars=found.eps)
    return y


def _describe_mlp(block: "ResidualMLP", found: WeightAddresses) -> None:
    assert isinstance(block, nn.Module)
    mlp = found.module(block, "mlp", SwiGLU)
    assert isinstance(mlp, SwiGLU)
    hidden, width = found.shape(mlp, "gate_proj", nn.Linear)
    shapes = {"gate_proj": (hidden, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}
    addresses = [found.linear(mlp, name, shape) for name, shape in shapes.items()]
    found.width, found.numbers = width, [hidden, found.norm(block, "mlp_norm", width), *addresses]


class ConvexGate(nn.Module):
    """g * y + (1 - g) * m, with g = sigmoid(W_g [y; m] + b_g)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        found = few_rows_weights(y, self, _describe_convex_gate)
        if found is not None and m.dtype == y.dtype and m.shape == y.shape:
            return _compiled_convex_gate(y, m, found)
        g = torch.sigmoid(self.mix(torch.cat([y, m], -1)))
        return g * y + (1 - g) * m


def _describe_convex_gate(gate: ConvexGate, found: WeightAddresses) -> None:
    mix = found.module(gate, "mix", nn.Linear)
    assert isinstance(mix, nn.Linear)
    width = found.width = mix.out_features
    found.numbers = [found.weight(mix, "weight", (width, 2 * width)), found.weight(mix, "bias", (width,))]


def _compiled_convex_gate(y: Tensor, m: Tensor, found: WeightAddresses) -> Tensor:
    y, m, rows = as_contiguous(y, y.dtype), as_contiguous(m, y.dtype), y.shape[0] * y.shape[1]
    both, g = y.new_empty(rows, 2 * found.width), torch.empty_like(y)
    out = torch.empty_like(y)
    addresses = (y.data_ptr(), m.data_ptr(), *found.numbers, both.data_ptr(), g.data_ptr(), out.data_ptr())
    run_step("titans_convex_gate", y.dtype, (rows, found.width, thread_count(2 * found.width**2), *addresses))
    return out


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
