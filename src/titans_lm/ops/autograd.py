"""Backward passes that have no derivatives of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `backward` of an autograd function that saves its inputs: whoever differentiates the gradients once
    more gets a RuntimeError.

    torch's own decorator gives gradients without a history where those by the outputs have none. A second derivative,
    as of a gradient penalty, would then silently lack what comes through them.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grad_outputs)
        read_once = _Context(ctx, ctx.saved_tensors)
        with torch.no_grad():
            grads = backward(read_once, *grad_outputs)
        history = [x for x in (*read_once.saved_tensors, *grad_outputs) if x is not None and x.requires_grad]
        given = iter(_Refused.apply(len(history), *history, *(grad for grad in grads if grad is not None)))
        return tuple(None if grad is None else next(given) for grad in grads)

    return run


class _Context:
    """A context whose saved tensors were read: activation checkpointing recomputes them for one look alone."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Tensor | None, ...]):
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Refused(torch.autograd.Function):
    """Gradients that depend on the first `count` tensors in a way that is not known."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(grad.detach() for grad in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative(ctx, *grads)


def refuse_second_derivative(*_: Any) -> Any:
    """The backward pass of a backward pass."""
    raise RuntimeError('a memory was differentiated twice: use backend="naive", other forms have no second derivative')
