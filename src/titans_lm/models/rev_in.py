"""Reversible instance normalisation of a window of a series (RevIN, Kim et al., ICLR 2022)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Scale(NamedTuple):
    """Mean and standard deviation of each row and channel, `[B, 1, C]`."""

    mean: Tensor
    std: Tensor


class RevIN(nn.Module):
    """(x - mean) / std of each row and channel over time, times a learned weight, plus a bias; and its inverse."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "B L C"]) -> tuple[Float[Tensor, "B L C"], Scale]:
        """The normalised window, and the scale that `inverse` needs. No gradient flows through the scale."""
        mean = x.mean(1, keepdim=True).detach()
        std = (x.var(1, keepdim=True, correction=0) + self.eps).sqrt().detach()
        return (x - mean) / std * self.weight + self.bias, Scale(mean, std)

    def inverse(self, y: Float[Tensor, "B H C"], scale: Scale) -> Float[Tensor, "B H C"]:
        """Values in the units of the window that gave `scale`."""
        return (y - self.bias) / (self.weight + self.eps**2) * scale.std + scale.mean
