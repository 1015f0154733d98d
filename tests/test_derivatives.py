"""Derivatives that the fast forms do not have are refused: second ones, and those of forward mode. None is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from conftest import Made, memory_layer, tiny_model
from titans_lm import NeuralMemory
from titans_lm.layers import compiled_layer
from tolerance import assert_close

DIM = 12
MATRIX = {"layers": 1, "form": "plain", "clip": None, "chunk_size": 1}
LAYERS: dict[str, dict[str, Any]] = {
    "auto": {},
    "no convolution": {"conv_size": 1},
    "delta rule": MATRIX,
    "native": {"backend": "native"},
    "chunked": {"backend": "chunked"},
}


def layer(**options: Any) -> NeuralMemory:
    return memory_layer(DIM, 2, **{"chunk_size": 4, **options})


def inputs(tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, DIM, dtype=torch.float64, generator=draw).requires_grad_()


def gradient(read: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of what is read, to be differentiated once more."""
    return torch.autograd.grad(read(x).sum(), x, create_graph=True)[0]


def assert_refused(read: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A gradient penalty, by the inputs and by what comes before them."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for inner, by in ((x, x), (scale * x, scale)):
        found = gradient(read, inner)
        assert_close(found, torch.autograd.grad(read(x).sum(), x)[0])
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(found.square().sum(), by)


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["one call", "operations", "operators"])
def test_a_memory_refuses_second_derivatives(name: str, tokens: int, how: str, monkeypatch: pytest.MonkeyPatch):
    """As one compiled call, as the layer's operations, and as operators, which a mode sees."""
    monkeypatch.setattr(compiled_layer, "MIN_TOKENS", 1 if how == "one call" else 256)
    memory = layer(**LAYERS[name])

    def read(x: Tensor) -> Tensor:
        return memory(x)[0]

    if how == "operators":
        with Made(lambda _: None):
            assert_refused(read, inputs(tokens))
    else:
        assert_refused(read, inputs(tokens))


@pytest.mark.usefixtures("unchecked")
def test_segments_refuse_second_derivatives():
    model = tiny_model("mac", segment_size=8, num_hidden_layers=1)
    model.config._attn_implementation = "sdpa"
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    assert_refused(lambda x: model(inputs_embeds=x).logits, x)


@pytest.mark.parametrize("options", [{}, MATRIX, {"conv_size": 1}], ids=str)
def test_the_definition_has_second_derivatives(options: dict[str, Any]):
    memory = layer(**options, backend="naive")

    def by_inputs(x: Tensor) -> Tensor:
        return gradient(lambda x: memory(x)[0], x)

    x, step = inputs(9), 1e-5
    along, weight = (torch.randn_like(x) for _ in range(2))
    (second,) = torch.autograd.grad((by_inputs(x) * weight).sum(), x)
    ends = [(by_inputs((x + sign * step * along).detach().requires_grad_()) * weight).sum() for sign in (1, -1)]
    torch.testing.assert_close((second * along).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 21, 300])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_mode_is_right_or_refused(name: str, tokens: int, recorded: bool):
    """It must not lack what comes through the memory."""
    memory, x, step = layer(**LAYERS[name]), inputs(tokens).detach(), 1e-5
    along = torch.randn_like(x)
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        try:
            found = forward_ad.unpack_dual(memory(forward_ad.make_dual(x, along))[0]).tangent
        except (NotImplementedError, ValueError):
            return
    expected = (memory(x + step * along)[0] - memory(x - step * along)[0]) / (2 * step)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
