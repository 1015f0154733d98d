"""Activation checkpointing of cheap functions: training keeps their inputs, and the backward pass runs them again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"recomputed": "checkpointed", "made_again": "checkpointed_pure"})


def checkpointed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, any function: the backward pass restores the random state, so that an adapter's dropout
    drops the same again. It stops before a matrix product at the function's end, which it does not need. In a traced
    call, what traces it decides itself what to recompute."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


def checkpointed_pure(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function(*inputs)`, of a function that uses no parameters but its inputs and no random numbers, and does not
    depend on autocast. It has a tenth of the overhead of `checkpointed`, which counts in many calls of few tokens."""
    return _PureCheckpoint.apply(function, *inputs) if torch.is_grad_enabled() else function(*inputs)


class _PureCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[1:], torch.is_grad_enabled()  # again: it will be differentiated once more
        inputs = list(ctx.saved_tensors)
        if not again:
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=again))
        return None, *(next(grads) if need else None for need in needed)
