"""The nats of tokens: -ln of the softmax, in at least float32, whatever the shape."""

import pytest
import torch

from titans_lm.utils.nats import target_nats


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_they_are_those_of_the_softmax(shape, dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(*shape, 7).mul(9).to(dtype), torch.randint(0, 7, shape)
    found = target_nats(logits, targets)
    chances = logits.double().softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), -chances.log(), rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-6
    )


def test_they_have_a_gradient_and_take_a_part_of_a_row():
    logits = torch.randn(2, 6, 7, requires_grad=True)
    target_nats(logits[:, :-1], torch.randint(0, 7, (2, 6))[:, 1:]).sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, -1].abs().max() == 0
    assert logits.grad[:, :-1].abs().sum() > 0
