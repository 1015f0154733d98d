"""Training and test of a forecaster that reads the whole series: its memory is carried from the first hour.

Look-backs that begin at successive steps are tokens of different streams. With a stride of 24 hours there are 24
streams for each column, one for each hour of the day, and together they give a forecast at every hour. A forecast sees
rows up to its own time, never later ones.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from titans_lm.evaluate.forecasting.fit import Best, Fitted, Recipe, step, train_epochs
from titans_lm.evaluate.forecasting.metrics import Errors, ErrorSum
from titans_lm.evaluate.forecasting.windows import Data, Windows
from titans_lm.models.time_series import LOSSES, TitansForTimeSeriesPrediction

SEGMENT = 24
"""Tokens through which a gradient flows back (truncated BPTT). The memory is carried on."""
STREAMS = 8
"""Streams of each column that are trained at the same time."""


def fit_stream(
    build: Callable[[], nn.Module], data: Data, recipe: Recipe, seed: int, tell: Callable[[str], None]
) -> Fitted:
    """As `fit`, in the order of time. An epoch reads the training part once in every stream."""

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator) -> Errors:
        assert isinstance(model, TitansForTimeSeriesPrediction)
        for streams in torch.randperm(model.config.patch_stride, generator=order).split(STREAMS):
            _train_streams(model, data.train, streams, optimizer, recipe, order)
        return measure_stream(model, data.val)

    def train(model: nn.Module, rate: float) -> Fitted | None:
        return train_epochs(model, rate, recipe, seed, epoch, tell)

    return Best.of_rates(build, recipe, seed, train)


def _train_streams(
    model: TitansForTimeSeriesPrediction,
    windows: Windows,
    streams: Tensor,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    order: torch.Generator,
) -> None:
    """One reading of the training part. It begins at a random token of the first segment, so that segments differ."""
    state, skipped = None, int(torch.randint(SEGMENT, (), generator=order))
    for look_back, future, counts in _segments(model, windows, streams, windows.look_back, skipped):
        predicted, state = model.stream(look_back, state)
        step(optimizer, LOSSES[recipe.loss](predicted[counts], future))
        state = state.detach()


@torch.no_grad()
def measure_stream(model: nn.Module, windows: Windows, *, carried: bool = True) -> Errors:
    """Errors over all windows of a part, where the memory has read all look-backs from the first row on.

    `carried=False`: each look-back is the first token of a stream, so that nothing older has any effect.
    """
    assert isinstance(model, TitansForTimeSeriesPrediction)
    model.eval()
    total, state = ErrorSum(), None
    streams = torch.arange(model.config.patch_stride)
    for look_back, future, counts in _segments(model, windows, streams, windows.first, 0):
        if carried:
            predicted, state = model.stream(look_back, state)
            predicted = predicted[counts]
        elif bool(counts.any()):
            predicted = model.stream(look_back[counts][:, None])[0][:, 0]
        if bool(counts.any()):
            total.add(predicted, future)
    assert total.windows == len(windows)
    return total.result()


def _segments(
    model: TitansForTimeSeriesPrediction, windows: Windows, streams: Tensor, first: int, skipped: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Look-backs `[S, N, L, C]` of each stream in segments; the futures `[W, H, C]` of those that count, which are
    those with targets from row `first` to the windows' end; and which count, `[S, N]`."""
    stride, length = model.config.patch_stride, windows.look_back
    last = windows.end - windows.horizon  # the first target of the last window
    count = -(-(last - length + 1) // stride)
    tokens = torch.arange(min(skipped, count // 2), count)  # of a short series, at most half is skipped
    for token in tokens.split(SEGMENT):
        target = length + streams[:, None] + stride * token
        counts = (target >= first) & (target <= last)
        if not bool((target <= last).any()):
            return
        target = target.clamp(max=last)  # a stream that has ended repeats its last token, which does not count
        look_back = windows.values[target[..., None] + torch.arange(-length, 0)]
        future = windows.values[target[counts][:, None] + torch.arange(windows.horizon)]
        if first > length or bool(counts.any()):
            yield look_back, future, counts
