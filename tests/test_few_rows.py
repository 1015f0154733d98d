"""Layers of few rows in compiled code equal their modules, wherever it is taken; and hooks and new weights act."""

import copy
import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from titans_lm.layers import attention_step, few_rows, gating
from titans_lm.layers.attention import WindowAttention, rotary_embedding
from titans_lm.layers.few_rows import add, linears, rms_norm
from titans_lm.layers.gating import ConvexGate, ProductGate, SwiGLU, residual_mlp

DTYPE = torch.float64


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def scattered(module: nn.Module) -> nn.Module:
    """With weights of which none is 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight))
    return module.to(DTYPE)


class Tail(nn.Module):
    """A block's MLP."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.mlp, self.mlp_norm = SwiGLU(width, hidden), nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return residual_mlp(x, branch, self)


WIDTHS = ((5, 3), (8, 100), (33, 7), (64, 97))


@pytest.mark.parametrize("rows", range(1, 10))
@torch.no_grad()
def test_linear_layers(rows, monkeypatch):
    for (width, out), bias, threads in itertools.product(WIDTHS, (False, True), (1, 2)):
        layers = [scattered(nn.Linear(width, n, bias)) for n in (out, out + 1)]
        x = torch.randn(rows, 1, width, dtype=DTYPE)
        monkeypatch.setattr(few_rows, "thread_count", lambda _, threads=threads: threads)
        for ours, layer in zip(linears(x, layers), layers, strict=True):
            close(ours, layer(x))
    strided = torch.randn(rows, 1, 2 * width, dtype=DTYPE)[..., ::2]
    close(linears(strided, layers)[0], layers[0](strided))


@pytest.mark.parametrize("rows", [1, 3, 8])
@torch.no_grad()
def test_norms_gates_and_mlps(rows):
    for width, hidden in WIDTHS:
        x, y = (torch.randn(rows, 1, width, dtype=DTYPE) for _ in "xy")
        norm, gate, tail = (scattered(m) for m in (nn.RMSNorm(width), ProductGate(width, 1e-5), Tail(width, hidden)))
        close(rms_norm(x, norm), norm(x))
        close(gate(x, y), gate.y_norm(x) * torch.sigmoid(gate.m_norm(y)))
        z = x + y
        close(tail(x, y), z + tail.mlp(tail.mlp_norm(z)))


@pytest.mark.parametrize("rows", [1, 3, 8])
@torch.no_grad()
def test_convex_gates_and_sums(rows, monkeypatch):
    seen = compiled(monkeypatch, gating)
    for (width, _), threads in itertools.product(WIDTHS, (1, 2)):
        x, y = (torch.randn(rows, 1, width, dtype=DTYPE) for _ in "xy")
        gate = scattered(ConvexGate(width))
        monkeypatch.setattr(gating, "thread_count", lambda _, threads=threads: threads)
        g = torch.sigmoid(gate.mix(torch.cat([x, y], -1)))
        close(gate(x, y), g * x + (1 - g) * y)
        strided = torch.randn(rows, 1, 2 * width, dtype=DTYPE)[..., ::2]
        close(gate(strided, y), gate.mix(torch.cat([strided, y], -1)).sigmoid() * (strided - y) + y)
        assert torch.equal(add(x, strided), x + strided)
        assert seen == ["titans_convex_gate", "titans_convex_gate", "titans_add"]
        seen.clear()
    assert torch.equal(add(x, y[..., :1]), x + y[..., :1])
    assert add(x, y.float()).dtype == DTYPE
    assert seen == []


@torch.no_grad()
def test_float32_and_large_numbers():
    """Where e^-x is inf, a gate is 0."""
    x, m = torch.randn(2, 1, 40), torch.full((2, 1, 40), -1e30)
    gate = ProductGate(40, 1e-6)
    torch.testing.assert_close(gate(x, m), gate.y_norm(x) * torch.sigmoid(gate.m_norm(m)))
    tail = Tail(40, 70)
    torch.testing.assert_close(tail(x, x), 2 * x + tail.mlp(tail.mlp_norm(2 * x)))


def compiled(monkeypatch: pytest.MonkeyPatch, *others: ModuleType) -> list[str]:
    """The compiled functions that few_rows, attention_step and `others` call from now on."""
    seen: list[str] = []
    for module in (few_rows, attention_step, *others):
        run = module.run_step
        noted = lambda name, *a, run=run, **k: seen.append(name) or run(name, *a, **k)  # noqa: E731
        monkeypatch.setattr(module, "run_step", noted)
    return seen


def test_what_compiled_code_does_not_do_is_done_by_the_modules(monkeypatch):
    seen, x = compiled(monkeypatch), torch.randn(1, 1, 8, dtype=DTYPE)
    plain = scattered(nn.Linear(8, 4))
    hooked = copy.deepcopy(plain)
    hooked.register_forward_hook(lambda *_: torch.zeros(1))
    with torch.no_grad():
        assert linears(x, [hooked])[0].tolist() == [0]
        assert linears(x, [nn.Sequential(plain)])[0].shape == (1, 1, 4)
        assert linears(x.float(), [copy.deepcopy(plain).float()])[0].dtype == torch.float32
        assert seen.pop() == "titans_linears"
        many = torch.randn(few_rows.MAX_ROWS + 1, 1, 8, dtype=DTYPE)
        assert linears(many, [plain])[0].shape == (few_rows.MAX_ROWS + 1, 1, 4)
        with torch.autocast("cpu"):
            assert linears(x.float(), [copy.deepcopy(plain).float()])[0].dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linears(torch.randn(1, 1, 9, dtype=DTYPE), [plain])
    assert linears(x, [plain])[0].requires_grad
    assert seen == []


def change_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: torch.zeros(1, 1, 8, dtype=DTYPE))


def change_data(module: nn.Module) -> None:
    module.weight.data = module.weight.data + 1


def change_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.data + 1)


def change_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.add_(1)


def change_forward(module: nn.Module) -> None:
    module.forward = lambda x: x * 0


CHANGES = (change_hook, change_data, change_parameter, change_in_place, change_forward)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_addresses_are_those_of_the_weights_at_hand(change, monkeypatch):
    """Whatever happens to a module after compiled code has used it."""
    seen, x = compiled(monkeypatch), torch.randn(1, 1, 8, dtype=DTYPE)
    tail = scattered(Tail(8, 8))
    for part in (tail.mlp.up_proj, tail.mlp_norm):
        assert tail(x, x).shape == x.shape
        change(part)
        close(tail(x, x), 2 * x + tail.mlp(tail.mlp_norm(2 * x)))
    norm = scattered(nn.RMSNorm(8))
    rms_norm(x, norm)
    assert seen.pop() == "titans_rms_norm"
    change(norm)
    close(rms_norm(x, norm), norm(x))
    assert bool(seen) == (change not in (change_hook, change_forward))


@torch.no_grad()
def test_attention_in_compiled_code_is_attention(monkeypatch):
    """Of rows at different positions, and of an odd width."""
    monkeypatch.setattr(attention_step, "thread_count", lambda _: 2)
    attention = scattered(WindowAttention(9, 3, 6, window_size=5))
    persistent = torch.randn(1, 2, 9, dtype=DTYPE)
    whole = attention.initial_state(2, persistent)
    position, buffers = torch.tensor([0, 3]), None
    for _ in range(12):
        x, rope = torch.randn(2, 1, 9, dtype=DTYPE), rotary_embedding(position[:, None], 6, 100.0)
        if buffers is None:
            buffers = attention.in_buffers(persistent, whole, position)
        eager = buffers._replace(keys=(buffers.keys[0].clone(),), values=(buffers.values[0].clone(),))
        y, whole = attention(x, persistent, whole, position, rope, None)
        seen = compiled(monkeypatch)
        ours, buffers = attention.decode(x, buffers, position, rope, None, False)
        assert seen == ["titans_attention_step"]
        theirs, eager = attention.decode(x, eager, position, rope, None, True)
        close(ours, y)
        close(theirs, y)
        close(buffers.keys[0], eager.keys[0])
        position = position + 1
        for mine, its in zip(buffers.whole(position), whole, strict=True):
            close(mine[0], its[0])
