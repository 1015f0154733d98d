"""A memory layer's step in compiled code equals the layer's own operations, wherever it is taken; and it is taken."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from titans_lm.layers import compiled_step
from titans_lm.layers.neural_memory import NeuralMemory

DIM, ROWS = 12, 3
LAYERS = {
    "residual": {},
    "plain": {"form": "plain"},
    "one layer": {"layers": 1},
    "three layers, gelu": {"layers": 3, "memory_dim": 10, "lr": 0.9},
    "no clip": {"clip": None},
    "threshold": {"surprise_threshold": 1.0},
    "no momentum": {"momentum": False},
    "no forgetting": {"forgetting": False},
    "neither": {"momentum": False, "forgetting": False},
    "narrow convolution": {"conv_size": 2},
    "wide convolution": {"conv_size": 6, "start": "random"},
    "head width": {"head_dim": 5},
    "chunks of one token": {"chunk_size": 1},
}


def make_layer(**options):
    """A float64 layer with weights of which none is 0, 1 or equal to another."""
    torch.manual_seed(0)
    layer = NeuralMemory(DIM, 2, **{"memory_dim": 8, "chunk_size": 4, **options}).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return layer


def read(layer, tokens=7, cut=(3, 5)):
    """The state after some tokens, of rows at different positions: row 0 has read `tokens`, the others less."""
    x = torch.randn(ROWS, tokens, DIM, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.tensor([tokens, *cut])[:, None]
    return layer(x, None, mask)[1]


def own_operations(layer, x, state, **options):
    """The layer's output by its own operations, token by token: `step` runs no compiled code."""
    layer.backend = "step"
    try:
        return layer(x, state, **options)
    finally:
        layer.backend = "auto"


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_step_equals_the_layers_operations(name):
    layer = make_layer(**LAYERS[name])
    layer.activation = "gelu" if "gelu" in name else "silu"
    state = expected_state = read(layer)
    for token in range(6):  # over the border of a chunk
        x = torch.randn(ROWS, 1, DIM, dtype=torch.float64)
        assert compiled_step.step_weights(layer, x, state.memory.weights, None) is not None
        y, state, surprise = layer(x, state, surprise=True)
        expected, expected_state, expected_surprise = own_operations(layer, x, expected_state, surprise=True)
        assert_close((y, state, surprise), (expected, expected_state, expected_surprise), rtol=1e-9, atol=1e-10)
        h, conv_state = layer.retrieve_next(x, state.conv_state[0], state.memory.weights, None)
        layer.backend = "step"
        assert_close((h, conv_state), layer.retrieve_next(x, state.conv_state[0], state.memory.weights, None))
        layer.backend = "auto"
        assert token or not torch.equal(y, torch.zeros_like(y))


@torch.no_grad()
def test_a_step_in_float32_and_a_batch_of_none():
    layer = make_layer().float()
    x = torch.randn(ROWS, 9, DIM)
    whole, end = layer(x)
    y, state = layer(x[:, :8])
    last, state = layer(x[:, 8:], state)
    assert_close((torch.cat([y, last], 1), state), (whole, end), rtol=1e-4, atol=1e-5)
    assert layer(x[:0, :1], layer.initial_state(0))[0].shape == (0, 1, DIM)


@torch.no_grad()
def test_a_step_leaves_the_state_that_it_was_given():
    layer = make_layer()
    state = read(layer)
    before = [t.clone() for t in tensors(state)]
    layer(torch.randn(ROWS, 1, DIM, dtype=torch.float64), state)
    assert all(map(torch.equal, tensors(state), before))


def tensors(state):
    return [*itertools.chain(*state.memory[:3]), state.memory.position, *state.conv_state]


def test_gradients_do_not_take_the_step():
    layer = make_layer()
    x = torch.randn(ROWS, 1, DIM, dtype=torch.float64)
    assert None is compiled_step.step_weights(layer, x, layer.initial_state(ROWS).memory.weights, None)


def _hook(layer):
    layer.theta.register_forward_hook(lambda *_: None)


def _hooked_norm(layer):
    layer.output_norm.register_forward_pre_hook(lambda *_: None)


def _adapter(layer):
    layer.alpha = nn.Sequential(layer.alpha)


REFUSED = {
    "a hook on a gate": _hook,
    "a hook on the norm": _hooked_norm,
    "a gate that is another module": _adapter,
    "another backend": lambda layer: setattr(layer, "backend", "chunked"),
    "a layer in half precision": lambda layer: layer.bfloat16(),
}


@pytest.mark.parametrize("what", REFUSED)
@torch.no_grad()
def test_what_a_step_would_pass_by_is_run_by_the_layers_operations(what):
    layer = make_layer()
    REFUSED[what](layer)
    dtype = layer.q_proj.weight.dtype
    x = torch.randn(ROWS, 1, DIM, dtype=dtype)
    state = layer.initial_state(ROWS)
    assert None is compiled_step.step_weights(layer, x, state.memory.weights, None)
    assert torch.isfinite(layer(x, state)[0]).all()


@torch.no_grad()
def test_projections_are_called_as_modules():
    """Adapters and hooks of the projections act on a step too."""
    layer, seen = make_layer(), []
    for name in ("q_proj", "k_proj", "v_proj", "output_gate", "o_proj"):
        getattr(layer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(torch.randn(ROWS, 1, DIM, dtype=torch.float64))
    assert sorted(seen) == ["k_proj", "o_proj", "output_gate", "q_proj", "v_proj"]
