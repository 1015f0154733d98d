"""A memory layer in compiled code equals its own operations: outputs, states and all gradients."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import memory_layer
from titans_lm.layers import compiled_layer
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.compiled_call import LayerStructure
from titans_lm.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans_lm.ops.cpu import compiled
from titans_lm.ops.cpu.build import SOURCES
from tolerance import assert_close

D, CHUNK = 12, 4
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth 1": {"layers": 1},
    "depth 3, plain": {"layers": 3, "form": "plain", "clip": None},
    "no momentum": {"momentum": False},
    "no forgetting": {"forgetting": False},
    "gelu, wide heads": {"activation": "gelu", "head_dim": 10},
    "a threshold": {"surprise_threshold": 12.0},
}


def layer(**options: Any) -> NeuralMemory:
    return memory_layer(D, 2, **{"chunk_size": CHUNK, **options})


def leaves(state: NeuralMemoryState) -> list[Tensor]:
    return [*itertools.chain(*state.memory[:3]), state.memory.position, *state.conv_state]


def inputs(length: int, rows: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, D, generator=draw, dtype=torch.float64).requires_grad_()


def run(memory: NeuralMemory, lengths: list[int]) -> list[Tensor]:
    """Outputs and state of calls of these lengths, and gradients by their inputs and all parameters."""
    state, outputs, xs = None, list[Tensor](), [inputs(length) for length in lengths]
    for x in xs:
        y, state = memory(x, state)
        outputs.append(y)
    assert state is not None
    outputs += leaves(state)
    torch.manual_seed(1)
    total = sum((x * torch.randn_like(x)).sum() for x in outputs if x.requires_grad)
    return [*outputs, *torch.autograd.grad(total, [*xs, *memory.parameters()])]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call took the compiled path; short calls may take it here, in small groups."""
    taken, is_supported = list[bool](), compiled_layer.is_supported
    monkeypatch.setattr(compiled_layer, "MIN_TOKENS", 1)
    monkeypatch.setattr(compiled_layer, "GROUP_TOKENS", 2 * CHUNK)
    monkeypatch.setattr(compiled_layer, "is_supported", lambda *a: taken.append(is_supported(*a)) or taken[-1])
    return taken


def own_operations(memory: NeuralMemory, lengths: list[int]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_layer, "is_supported", lambda *_: False)
        return run(memory, lengths)


@pytest.mark.parametrize("lengths", [[20], [18], [6, 17], [3, 5, 41]], ids=str)
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_compiled_is_the_layer_in_outputs_states_and_all_gradients(options, lengths, calls):
    """Calls begin and end at and inside chunks."""
    memory = layer(**options)
    ours = run(memory, lengths)
    assert calls[-1]
    for a, b in zip(ours, own_operations(memory, lengths), strict=True):
        assert_close(a, b)


def test_without_gradients_it_computes_the_same(calls):
    memory, x = layer(), inputs(30)
    expected, state = memory(x)
    with torch.no_grad():
        y, after = memory(x)
    assert all(calls)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, leaves(after), leaves(state)))


def test_threads_change_nothing(calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "SINGLE_THREAD_WORK", 0)
    monkeypatch.setattr(compiled_layer, "GROUP_TOKENS", 80)
    memory = layer()
    one = run(memory, [5, 170])
    torch.set_num_threads(3)
    try:
        three = run(memory, [5, 170])
    finally:
        torch.set_num_threads(1)
    assert calls[-1]
    for a, b in zip(one, three, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("why", ["few tokens", "rows", "a mask", "surprise", "frozen", "bypass", "half", "a hook"])
def test_else_the_layer_s_own_operations(why: str, calls, monkeypatch: pytest.MonkeyPatch):
    memory, x, options, state = layer(), inputs(20).detach(), dict[str, Any](), None
    if why == "few tokens":
        monkeypatch.setattr(compiled_layer, "MIN_TOKENS", 21)
    if why == "rows":
        mask = torch.ones(2, 3, dtype=torch.bool)
        mask[0, 2] = False
        state = memory(x[:, :3], mask=mask)[1]
    if why == "a mask":
        options["mask"] = torch.ones(2, 20, dtype=torch.bool)
    if why in ("surprise", "frozen"):
        options |= {"surprise": True} if why == "surprise" else {"update": False}
    if why == "half":
        memory, x = memory.bfloat16(), x.bfloat16()
    if why == "a hook":
        memory.o_proj.register_forward_hook(lambda *_: None)
    with bypass_memory(memory if why == "bypass" else torch.nn.Identity()):
        memory(x, state, **options)
    assert not any(calls)


def test_the_structure_is_the_same_in_both_languages():
    text = (SOURCES / "layer_scan.h").read_text().split("struct LayerArgs {")[1].split("    static constexpr")[0]
    declared = " ".join(line.split("//")[0] for line in text.splitlines())
    names = re.findall(r"(\w+)\s*[,;]", declared)
    assert names == [name for name, _ in LayerStructure._fields_]
