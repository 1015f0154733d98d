"""Windows of a series: what a model sees, and what follows."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.evaluate.forecasting.series import Parts


@dataclasses.dataclass(frozen=True)
class Windows:
    """All windows whose targets lie in rows `[first, end)` of a series."""

    values: Tensor
    """The series, `[T, C]`, standardised."""
    first: int
    """The first row that is a target."""
    end: int
    """The row after the last target."""
    look_back: int
    horizon: int

    def __len__(self) -> int:
        return self.end - self.first - self.horizon + 1

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Past `[B, L, C]` and future `[B, H, C]` of the windows with these numbers."""
        row = index[:, None] + self.first - self.look_back + torch.arange(self.look_back + self.horizon)
        window = self.values[row]
        return window[:, : self.look_back], window[:, self.look_back :]


class Data(NamedTuple):
    """The windows of the three parts."""

    train: Windows
    val: Windows
    test: Windows


def windows_of(values: Tensor, parts: Parts, look_back: int, horizon: int) -> Data:
    """The windows of each part. The look-back of the first windows of validation and test reaches into the part before,
    as in the published code: no target does.

    Raises ValueError if a part is too short.
    """
    begins = (look_back, parts.train, parts.val)
    for name, begin, end in zip(("training", "validation", "test"), begins, parts, strict=True):
        if begin < look_back or end - begin < horizon:
            raise ValueError(
                f"the {name} part ends before row {end} and holds no window of look-back {look_back} and horizon "
                f"{horizon}: give a shorter --look-back or --horizons, or another --split"
            )
    train, val, test = (Windows(values, b, e, look_back, horizon) for b, e in zip(begins, parts, strict=True))
    return Data(train, val, test)


def check_no_leak(data: Data, parts: Parts) -> None:
    """Raises ValueError if a row that training sees, or that early stopping sees, belongs to a later part."""
    for name, windows, end in (("training", data.train, parts.train), ("validation", data.val, parts.val)):
        if windows.end > end:
            raise ValueError(f"leak: {name} windows reach row {windows.end - 1}, and the part ends before row {end}")
