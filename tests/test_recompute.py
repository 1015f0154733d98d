"""What is made again is the same, and so are its gradients; kept is only what it is made of."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from conftest import Made, tiny_model, tokens
from titans_lm.layers.checkpointing import checkpointed, checkpointed_pure
from tolerance import assert_close

each_way = pytest.mark.parametrize("way", [checkpointed_pure, checkpointed])


def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.tanh(x) * torch.exp(y)
    return z, z.sum(0) * x


def inputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in "xy")
    return x.requires_grad_(), y


@each_way
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("both", [False, True])
def test_gradients_are_the_function_s_own(way, used, both):
    x, y = inputs()
    y.requires_grad_(both)
    asked = [x, y] if both else [x]
    ours, plain = way(function, x, y), function(x, y)
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b)
    found, expected = (torch.autograd.grad(out[used].sin().sum(), asked) for out in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
        assert b.abs().sum() > 0


def test_the_dropout_of_an_adapter_drops_the_same_again():
    x = torch.ones(40, requires_grad=True)
    y = checkpointed(lambda x: torch.dropout(x * x, 0.5, True).sin(), x)
    torch.rand(3)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found == 0, y == 0)
    assert 0 < (y == 0).sum() < 40


def test_only_the_inputs_are_kept():
    x, y = inputs()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: [kept.append(t), t][1], lambda t: t):
        out = checkpointed_pure(function, x, y)
        assert len(kept) == 2
        assert all(any(t is given for given in (x, y)) for t in kept)
        assert out[0].requires_grad


def test_an_input_that_was_written_since_is_refused():
    x, y = inputs()
    out = checkpointed_pure(function, x, y)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[0].sum().backward()


@pytest.mark.parametrize("kind", ["mac", "mag"])
def test_a_training_step_s_work_grows_with_the_length_and_not_with_its_square(kind):
    """A slice for each segment would: its gradient is as long as what it is a slice of."""
    model = tiny_model(kind, torch.float32, window_size=4, segment_size=4, num_hidden_layers=1).train()
    work = []
    for length in (64, 128, 256):
        ids, elements = tokens(1, length), []
        with Made(lambda t, elements=elements: elements.append(t.numel())):
            model(ids, labels=ids, use_cache=False).loss.backward()
        work.append(sum(elements))
    assert work[2] - work[1] < 2.02 * (work[1] - work[0])
