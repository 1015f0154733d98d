"""The short causal convolutions of queries, keys and values (section 4.4 of the paper)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """A causal convolution along time, one filter for each channel: its filters `[I, size]`."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        size = self.weight.shape[1]
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)


def convolved(past: Float[Tensor, "B S I"], filters: Float[Tensor, "I size"]) -> Float[Tensor, "B T I"]:
    """Each of the last T = S - size + 1 tokens and those before it, weighed: sums take half of conv1d's time."""
    taps = filters.to(past.dtype).t()
    length = past.shape[1] - len(taps) + 1
    if length == 1:
        return (past * taps).sum(1, keepdim=True)
    y = past[:, :length] * taps[0]
    for age in range(1, len(taps)):
        y = torch.addcmul(y, past[:, age : age + length], taps[age])
    return y
