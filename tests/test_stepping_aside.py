"""Compiled code steps aside where a model does more than it would do, and where inputs or weights do not fit it."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from conftest import Made, memory_layer, state_tensors, tiny_model, tokens
from titans_lm import NeuralMemory, TitansForCausalLM
from titans_lm.layers import compiled_layer
from tolerance import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("unchecked")
DIM, LONG = 12, 300
Change = Callable[[nn.Module, ExitStack], Any]
"""Changes a model or its surroundings; the stack undoes what would outlive a test."""
PROJECTIONS = [
    *(f"memory.{name}" for name in ("q_proj", "v_proj", "o_proj", "output_gate")),
    *(f"attention.{name}" for name in ("q_proj", "k_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("up_proj", "down_proj")),
]
NORMS = ["norm", "mlp_norm", "memory.output_norm", "gate.y_norm", "gate.m_norm"]


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Doubled(TorchFunctionMode):
    """Doubles what linear layers return."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is nn.functional.linear else out


def bias(name: str) -> Change:
    def change(block: nn.Module, _: ExitStack) -> None:
        linear = block.get_submodule(name)
        linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features, dtype=torch.float64))

    return change


def without_weight(name: str) -> Change:
    return lambda block, _: setattr(block.get_submodule(name), "weight", None)


def epsilon(name: str) -> Change:
    return lambda block, _: setattr(block.get_submodule(name), "eps", 1.0)


def parametrized(name: str) -> Change:
    owner, _, own = name.rpartition(".")
    return lambda block, _: parametrize.register_parametrization(block.get_submodule(owner), own, Half())


def without_bias(block: nn.Module, _: ExitStack) -> None:
    block.memory.alpha.bias = None


def pruned(block: nn.Module, _: ExitStack) -> None:
    prune.l1_unstructured(block.memory, "norm_weight", 0.5)


def hooks_of_all(_: nn.Module, stack: ExitStack) -> None:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if type(module) is nn.Linear else None
    )
    stack.callback(hook.remove)


def function_mode(_: nn.Module, stack: ExitStack) -> None:
    stack.enter_context(Doubled())


CHANGES: dict[str, Change] = {
    **{f"a bias: {name}": bias(name) for name in PROJECTIONS},
    **{f"no weight: {name}": without_weight(name) for name in NORMS},
    **{f"another epsilon: {name}": epsilon(name) for name in NORMS},
    **{f"parametrized: memory.{name}": parametrized(f"memory.{name}") for name in ("norm_weight", "norm_bias")},
    "parametrized: memory.convs.1.weight": parametrized("memory.convs.1.weight"),
    "pruned": pruned,
    "a gate without bias": without_bias,
    "hooks of all modules": hooks_of_all,
    "a mode of functions": function_mode,
}
CHANGES_OF_MAC: dict[str, Change] = {
    **{f"no weight: {name}": without_weight(name) for name in ("retrieved_norm", "memory_norm")},
    **{f"another epsilon: {name}": epsilon(name) for name in ("retrieved_norm", "memory_norm")},
}


@pytest.fixture
def many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layer, "MIN_TOKENS", 8)


def read(model: TitansForCausalLM) -> dict[str, Tensor]:
    """Whole segments and a part of one in one call, then single tokens, in buffers."""
    state = model.initial_state(2)
    found = {"prompt": model(tokens(2, 19), past_key_values=state).logits}
    found["gradient"] = torch.autograd.grad(found["prompt"].square().sum(), model.model.embed_tokens.weight)[0]
    state = state.detach()
    with torch.no_grad():
        model.begin_decoding(state)
        for i in range(3):
            found[f"token {i}"] = model(tokens(2, 1, seed=i), past_key_values=state).logits
    state.end_decoding()
    return {**found, **state_tensors(state)}


@contextlib.contextmanager
def own_operations() -> Iterator[None]:
    """No compiled call of a layer runs where a mode looks at the operators."""
    with Made(lambda _: None):
        yield


@pytest.mark.usefixtures("many_tokens")
@pytest.mark.parametrize(
    ("kind", "change"), [*(("mag", name) for name in CHANGES), *(("mac", name) for name in CHANGES | CHANGES_OF_MAC)]
)
def test_what_compiled_code_does_not_do_is_done(kind: str, change: str):
    """Also when it is changed after compiled code has run."""
    model = tiny_model(kind, num_hidden_layers=1, segment_size=8)
    before = read(model)
    with ExitStack() as stack:
        (CHANGES | CHANGES_OF_MAC)[change](model.model.layers[0], stack)
        ours = read(model)
        with own_operations():
            expected = read(model)
    for name, tensor in expected.items():
        assert_close(ours[name], tensor, name)
    assert relative_error(ours["token 2"], before["token 2"]) > 1e-6


# ------------------------------------------------------------------------------------------------ what does not fit


def inputs(length: int, width: int = DIM) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(**options: Any) -> NeuralMemory:
    return memory_layer(DIM, 2, chunk_size=4, **options)


@pytest.mark.parametrize("length", [1, 5, LONG])
@torch.no_grad()
def test_inputs_and_states_that_do_not_fit_are_refused(length: int):
    """Compiled code would read or write memory that is not theirs."""
    memory, x = layer(), inputs(length)
    with pytest.raises(ValueError, match="x must be"):
        memory(inputs(length, DIM + 1))
    others = [layer(memory_dim=40), layer(layers=1), layer(conv_size=6, start="random")]
    for state in (memory.initial_state(1), *(other.initial_state(2) for other in others)):
        with pytest.raises(ValueError, match="the state does not fit this memory"):
            memory(x, state)


@torch.no_grad()
def test_the_parts_of_a_state_have_one_dtype():
    memory = layer()
    state = memory(inputs(5))[1]
    anchor = tuple(part.float() for part in state.memory.anchor)
    with pytest.raises(ValueError, match="the state's anchor must be as its weights"):
        memory(inputs(LONG), state._replace(memory=state.memory._replace(anchor=anchor)))


@pytest.mark.parametrize("kind", ["mac", "mag"])
@pytest.mark.parametrize("length", [1, 2, 304])
@torch.no_grad()
def test_a_state_of_another_model_is_refused(kind: str, length: int):
    model, other = (tiny_model(kind, segment_size=8, memory_dim=width) for width in (24, 40))
    state = other(tokens(2, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the state does not fit this memory"):
        model(tokens(2, length), past_key_values=state)


OTHERS: list[dict[str, Any]] = [
    {"head_dim": 8}, {"head_dim": 32}, {"num_attention_heads": 4, "head_dim": 8}, {"memory_dim": 240},
    {"memory_layers": 3}, {"memory_conv_size": 8}, {"hidden_size": 64},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"), [*((kind, x) for kind in ("mac", "mag") for x in OTHERS), ("mac", {"segment_size": 40})]
)
def test_buffers_of_another_model_are_refused(kind: str, changes: dict[str, Any]):
    model, other = tiny_model(kind, **changes), tiny_model(kind)
    with torch.no_grad():
        state = other(tokens(2, 6), use_cache=True).past_key_values
        other.begin_decoding(state)

    def decode() -> None:
        with torch.no_grad():
            for i in range(20):
                model(tokens(2, 1, seed=i), past_key_values=state)

    with pytest.raises((RuntimeError, ValueError, IndexError)):
        decode()


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("length", [1, 5, LONG])
@torch.no_grad()
def test_weights_that_do_not_fit_are_refused(name: str, length: int):
    memory = layer()
    memory(inputs(length))
    old = memory.get_submodule(name)
    wide = name == "o_proj"
    setattr(
        memory, name, nn.Linear(old.in_features + wide, old.out_features + (not wide), old.bias is not None).double()
    )
    with pytest.raises((RuntimeError, ValueError)):
        memory(inputs(length))
