"""What a layer does follows from its configuration and its arguments, and from nothing that was set elsewhere."""

import threading

import pytest
import torch
from torch import Tensor

from conftest import TITANS, each_titan, state_tensors, tiny_model, tokens
from titans_lm import NeuralMemory
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import memories

pytestmark = pytest.mark.usefixtures("unchecked")


def inputs(rows: int = 2) -> Tensor:
    return torch.randn(rows, 6, 12, generator=torch.Generator().manual_seed(1))


OPTIONS = {
    "plain": {},
    "a predictor": {"surprise_threshold": 1.0, "surprise_threshold_on": "prediction"},
    "gates of a chunk": {"gates_of": "chunk"},
    "one layer": {"layers": 1},
    "wider": {"memory_dim": 9},
    "no convolutions": {"conv_size": 1},
    "more heads": {"num_heads": 3},
}


@pytest.mark.parametrize("other", OPTIONS)
@pytest.mark.parametrize("own", OPTIONS)
def test_a_state_of_another_layer_is_refused(own: str, other: str):
    layer, another = (NeuralMemory(**{"dim": 12, "num_heads": 2, **OPTIONS[o]}) for o in (own, other))
    state = another(inputs())[1]
    calls = [
        lambda: layer(inputs(), state),
        lambda: layer(inputs(), state, update=False),
        lambda: layer.retrieve(inputs(), state),
    ]
    for call in calls:
        if own == other:
            call()
        else:
            with pytest.raises(ValueError, match="the state does not fit this memory: its"):
                call()


def test_a_state_of_other_rows_is_refused():
    layer = NeuralMemory(12, 2)
    with pytest.raises(ValueError, match=r"the state does not fit this memory: its memory\.anchor"):
        layer(inputs(3), layer.initial_state(2))


@each_titan
def test_a_state_of_another_variant_is_refused(kind: str):
    state = tiny_model(kind).initial_state(1)
    for other in (*TITANS, "window"):
        if other != kind:
            with pytest.raises(ValueError, match="past_key_values belongs to another model: its layers are 2 x"):
                tiny_model(other)(tokens(1, 3), past_key_values=state)
    with pytest.raises(ValueError, match="belongs to another model"):
        tiny_model(kind, num_hidden_layers=1)(tokens(1, 3), past_key_values=state)


def test_surprise_without_a_write_is_refused():
    with pytest.raises(ValueError, match="surprise=True needs update=True"):
        NeuralMemory(12, 2)(inputs(), update=False, surprise=True)


# ------------------------------------------------------------------------------------------------ bypass


@each_titan
def test_a_bypass_nests_and_ends_with_its_context(kind: str):
    model, ids = tiny_model(kind), tokens(1, 9)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    usual = logits()
    with bypass_memory(model):
        bypassed = logits()
        with bypass_memory(model):
            assert torch.equal(logits(), bypassed)
        assert torch.equal(logits(), bypassed)
        with pytest.raises(KeyError), bypass_memory(model):
            raise KeyError
        assert torch.equal(logits(), bypassed)
    assert not torch.equal(usual, bypassed)
    assert torch.equal(logits(), usual)


def test_a_bypass_is_of_its_model_and_of_its_memories_alone():
    model, other, ids = tiny_model("mag"), tiny_model("mag"), tokens(1, 9)
    first, second = memories(model)
    with torch.no_grad():
        usual = model(ids).logits
        with bypass_memory(first):
            one = model(ids).logits
            assert torch.equal(other(ids).logits, usual)
            with bypass_memory(second):
                both = model(ids).logits
        with bypass_memory(model):
            assert torch.equal(model(ids).logits, both)
    assert not torch.equal(one, both)
    assert not torch.equal(one, usual)


def test_a_bypass_in_one_thread_is_none_in_another():
    model, ids, found = tiny_model("mag"), tokens(1, 9), []

    def elsewhere() -> None:
        with torch.no_grad():
            found.append(model(ids).logits)

    elsewhere()
    with bypass_memory(model):
        elsewhere()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    usual, bypassed, threaded = found
    assert torch.equal(threaded, usual)
    assert not torch.equal(bypassed, usual)


@each_titan
@pytest.mark.parametrize("update", [True, False])
def test_a_bypassed_memory_writes_nothing_and_learns_nothing(kind: str, update: bool):
    model, ids = tiny_model(kind), tokens(2, 9)
    before = model(ids, use_cache=True).past_key_values
    state = before.clone()
    state.frozen = not update
    with bypass_memory(model):
        model(ids, labels=ids, past_key_values=state.detach()).loss.backward()
        model(ids, past_key_values=state)
    for name, tensor in state_tensors(state).items():
        if ".memory.memory" in name:
            assert torch.equal(tensor, state_tensors(before)[name]), name
    assert all(p.grad is None or not p.grad.any() for memory in memories(model) for p in memory.parameters())


@each_titan
def test_a_checkpointed_block_is_bypassed_again_by_its_backward_pass(kind: str):
    """Which may run in another thread, or after the context."""
    grads = []
    for checkpointing in (False, True):
        model, ids = tiny_model(kind).train(), tokens(1, 9)
        if checkpointing:
            model.gradient_checkpointing_enable()
        with bypass_memory(model):
            loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None or not a.any()) if b is None else torch.equal(a, b)


def test_the_implementation_of_attention_is_an_argument():
    """Two calls of one model with different settings, neither of which changes the model's modules."""
    model, ids = tiny_model("mag"), tokens(1, 9)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    model(ids, use_cache=True)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert all(vars(module)[key] is value for key, value in before[name].items()), name
