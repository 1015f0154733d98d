"""Levels of a stream: averages of a series over longer times than a look-back, carried beside the memory."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from titans_lm.models.cache import TitansState


class LevelState(TitansState):
    """A `TitansState` with levels `[R, C, K]`: K averages of each of C channels in each of R rows."""

    levels: Tensor

    @classmethod
    def begin(cls, state: TitansState, levels: Tensor) -> "LevelState":
        """`state` with `levels`."""
        new = object.__new__(cls)
        new.__dict__.update(state.__dict__)
        new.levels = levels
        return new

    @staticmethod
    def concat(states: list[TitansState]) -> "LevelState":
        levels = [state.levels for state in states if isinstance(state, LevelState)]
        return LevelState.begin(TitansState.concat(states), torch.cat(levels))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "levels": self.levels}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().set_tensors(tensors)
        self.levels = tensors["levels"]

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._apply(function)
        self.levels = function(self.levels)


def follow_levels(
    windows: Float[Tensor, "B N L C"],
    levels: Float[Tensor, "B C K"],
    read: Float[Tensor, " B"],
    half_lives: Float[Tensor, " K"],
    stride: int,
) -> Float[Tensor, "B N C K"]:
    """Exponential averages after each of N successive look-backs, `stride` steps apart, from `levels` after `read`
    look-backs. Half-lives are in look-backs.

    Each look-back adds the mean of its newest `stride` steps. An average begins as the mean of the first look-back, and
    weighs all steps alike until there are as many as its half-life asks for.
    """
    newest = windows[:, :, -stride:].mean(2)[..., None]  # [B, N, C, 1]
    first = windows.mean(2)[..., None].expand(-1, -1, -1, len(half_lives))
    share, found = 1 - 0.5 ** (1 / half_lives), []
    before = max(1.0, windows.shape[2] / stride)  # the first look-back holds so many strides
    for token in range(windows.shape[1]):
        count = (read + token)[:, None, None]
        step = torch.maximum(share, 1 / (before + count))
        levels = torch.where(count == 0, first[:, token], levels + step * (newest[:, token] - levels))
        found.append(levels)
    return torch.stack(found, 1)
