"""Published forecasters, each from `[B, L, C]` to `[B, H, C]`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm.models.rev_in import RevIN


class SeasonalNaive(nn.Module):
    """The last season again and again. It learns nothing."""

    def __init__(self, horizon: int, season: int):
        super().__init__()
        self.horizon, self.season = horizon, season

    def forward(self, past: Tensor) -> Tensor:
        repeats = -(-self.horizon // self.season)
        return past[:, -self.season :].repeat(1, repeats, 1)[:, : self.horizon]


def _along_time(linear: nn.Linear, x: Tensor) -> Tensor:
    """One map from past to future for all columns: `[B, L, C]` -> `[B, H, C]`."""
    return linear(x.transpose(1, 2)).transpose(1, 2)


class NLinear(nn.Module):
    """arXiv:2205.13504: one linear map of what is left when the last value is subtracted, then added again."""

    def __init__(self, look_back: int, horizon: int):
        super().__init__()
        self.linear = nn.Linear(look_back, horizon)

    def forward(self, past: Tensor) -> Tensor:
        last = past[:, -1:]
        return _along_time(self.linear, past - last) + last


class DLinear(nn.Module):
    """arXiv:2205.13504: a moving average of 25 steps is the trend, the rest is the season; a linear map of each."""

    KERNEL = 25

    def __init__(self, look_back: int, horizon: int):
        super().__init__()
        self.trend, self.season = nn.Linear(look_back, horizon), nn.Linear(look_back, horizon)
        for linear in (self.trend, self.season):  # as in its code: both begin as the mean of the look-back
            nn.init.constant_(linear.weight, 1 / look_back)

    def forward(self, past: Tensor) -> Tensor:
        trend = self.moving_average(past)
        return _along_time(self.trend, trend) + _along_time(self.season, past - trend)

    def moving_average(self, past: Tensor) -> Tensor:
        """Of a series whose first and last values are repeated at its ends: `[B, L, C]` -> `[B, L, C]`."""
        side = (self.KERNEL - 1) // 2
        padded = torch.cat([past[:, :1].expand(-1, side, -1), past, past[:, -1:].expand(-1, side, -1)], 1)
        return F.avg_pool1d(padded.transpose(1, 2), self.KERNEL, 1).transpose(1, 2)


class RLinear(nn.Module):
    """arXiv:2305.10721: a linear map between RevIN and its inverse."""

    def __init__(self, look_back: int, horizon: int, columns: int):
        super().__init__()
        self.norm, self.linear = RevIN(columns), nn.Linear(look_back, horizon)

    def forward(self, past: Tensor) -> Tensor:
        x, scale = self.norm(past)
        return self.norm.inverse(_along_time(self.linear, x), scale)
