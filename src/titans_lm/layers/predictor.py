"""What a layer's next input is predicted to be: a way to tell which tokens are news."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Predictor(nn.Module):
    """A linear map that predicts the next input: what it cannot predict is news.

    It is trained along with whatever is trained through the memory's output, by its own squared error, and nothing else
    is trained by that.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "B T D"], last: Float[Tensor, "B D"]) -> Float[Tensor, "B T"]:
        """|| f(x_{t-1}) - x_t ||^2, `last` being the input before the first."""
        x = x.detach()
        before = torch.cat([last.detach()[:, None].to(x.dtype), x[:, :-1]], 1)
        error = self.map(before) - x
        return (error if error.dtype == torch.float64 else error.float()).square().sum(-1)


class TrainAlong(torch.autograd.Function):
    """y as it is; what is minimised through it, `loss` is minimised with, at weight 1."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return gradient, gradient.new_ones(())
