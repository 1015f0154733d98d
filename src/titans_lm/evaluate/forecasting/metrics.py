"""Errors over all windows: mean squared and mean absolute, over windows, steps and columns alike."""

from typing import NamedTuple

import torch
from torch import Tensor


class Errors(NamedTuple):
    """On standardised values, as in every published table."""

    mse: float
    mae: float
    windows: int


class ErrorSum:
    """Adds errors batch by batch, in float64, so that a smaller last batch weighs what it holds."""

    def __init__(self) -> None:
        self.squared = self.absolute = 0.0
        self.values = self.windows = 0

    def add(self, predicted: Tensor, true: Tensor) -> None:
        """Both `[windows, H, C]`."""
        error = (predicted - true).double()
        self.squared += float(error.square().sum())
        self.absolute += float(error.abs().sum())
        self.values += error.numel()
        self.windows += len(error)

    def result(self) -> Errors:
        return Errors(self.squared / self.values, self.absolute / self.values, self.windows)


def finite(errors: Errors) -> bool:
    return bool(torch.tensor([errors.mse, errors.mae]).isfinite().all())
