"""What is cheap to make is made again by the backward pass: for training, only what it is made of is kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, for anything: what is drawn in it, as by an adapter's dropout, is drawn again. A product
    that it ends with is not computed again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def made_again(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function(*inputs)`, where it knows no parameters but these, draws nothing, and casts what it needs cast itself
    (autocast is not restored). It has a tenth of the overhead, which is much where each of many calls is about few
    tokens."""
    return _MadeAgain.apply(function, *inputs) if torch.is_grad_enabled() else function(*inputs)


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        found = iter(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], by_outputs))
        return None, *(next(found) if need else None for need in needed)
