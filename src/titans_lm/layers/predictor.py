"""A learned prediction of a layer's next input: its error is one measure of surprise."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"TrainAlong": "AuxiliaryLoss"})


class Predictor(nn.Module):
    """A linear map f that predicts an input from the one before it.

    Its squared error trains it and nothing else (see `AuxiliaryLoss`): the mean over a call's tokens, at weight 1. So
    the gradients of several calls before an update add up, those of MAC's segments and of gradient accumulation too.
    AdamW does not depend on their scale; the norm that `max_grad_norm` bounds includes them.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T D"], prev_input: Float[Tensor, "B D"]) -> Float[Tensor, "B T"]:
        """|| f(x_{t-1}) - x_t ||^2. `prev_input` is the input before the first token of x."""
        x = x.detach()
        before = torch.cat([prev_input.detach()[:, None].to(x.dtype), x], 1)[:, :-1]
        error = self.map(before) - x
        return (error if error.dtype == torch.float64 else error.float()).square().sum(-1)


class AuxiliaryLoss(torch.autograd.Function):
    """Returns y unchanged. The backward pass through y adds the gradient of `loss`, at weight 1."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grad_y, grad_y.new_ones(())
