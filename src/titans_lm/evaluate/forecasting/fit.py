"""Training on windows: Adam, early stopping on the validation part."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans_lm.evaluate.forecasting.metrics import Errors, ErrorSum
from titans_lm.evaluate.forecasting.windows import Data, Windows
from titans_lm.models.time_series import LOSSES

EVAL_BATCH = 256


class Recipe(NamedTuple):
    """How a model is trained."""

    rates: tuple[float, ...] = (1e-3,)
    """Learning rates. Each is tried; the validation part chooses."""
    epochs: int = 10
    patience: int = 3
    """Epochs without a lower validation error after which training ends."""
    batch_size: int = 32
    decay: float = 0.5
    """Factor of the learning rate after each epoch."""
    loss: str = "mse"
    weight_decay: float = 0.0
    windows: int | None = None
    """Random windows of an epoch; None: all of the training part."""
    val_stride: int = 1
    """Early stopping looks at every `val_stride`-th window of the validation part."""


class Fitted(NamedTuple):
    """A trained model and how it came about."""

    model: nn.Module
    val: Errors
    rate: float
    epochs: int
    """Epochs until its weights, the best on the validation part."""


class Best:
    """The weights with the lowest MSE on the validation part, and whether training is over."""

    def __init__(self, recipe: Recipe):
        self.patience, self.epoch = recipe.patience, 0
        self.val, self.weights = Errors(math.inf, math.inf, 0), dict[str, Tensor]()

    def is_over(self, model: nn.Module, val: Errors, epoch: int) -> bool:
        """Note the error after `epoch` -> whether it has been higher than the best for too long."""
        if val.mse < self.val.mse:
            self.val, self.weights, self.epoch = val, copy.deepcopy(model.state_dict()), epoch
        return epoch - self.epoch >= self.patience

    def fitted(self, model: nn.Module, rate: float) -> Fitted | None:
        """The model with its best weights; None if no error was finite."""
        if not self.weights:
            return None
        model.load_state_dict(self.weights)
        return Fitted(model, self.val, rate, self.epoch)

    @staticmethod
    def of_rates(
        build: Callable[[], nn.Module], recipe: Recipe, seed: int, train: Callable[[nn.Module, float], Fitted | None]
    ) -> Fitted:
        """`train` a model for each rate, from the same seed -> the one with the lowest MSE on the validation part.

        Raises ValueError if none has a finite error.
        """
        found = []
        for rate in recipe.rates:
            torch.manual_seed(seed)
            found.append(train(build(), rate))
        finite = [fitted for fitted in found if fitted is not None]
        if not finite:
            raise ValueError(f"the validation error was not finite at any learning rate of {list(recipe.rates)}")
        return min(finite, key=lambda fitted: fitted.val.mse)


def fit(build: Callable[[], nn.Module], data: Data, recipe: Recipe, seed: int, tell: Callable[[str], None]) -> Fitted:
    """Train on windows in random order, as `Best.of_rates`. `tell` gets a line of progress after each epoch."""

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator) -> Errors:
        for past, future in _batches(data.train, recipe, order):
            step(optimizer, LOSSES[recipe.loss](model(past), future))
        return measure(model, data.val, recipe.val_stride)

    def train(model: nn.Module, rate: float) -> Fitted | None:
        if not any(p.requires_grad for p in model.parameters()):
            return Fitted(model, measure(model, data.val), 0.0, 0)
        return train_epochs(model, rate, recipe, seed, epoch, tell)

    return Best.of_rates(build, recipe, seed, train)


Epoch = Callable[[nn.Module, torch.optim.Optimizer, torch.Generator], Errors]
"""Trains a model for an epoch, in an order that the generator draws, and returns its errors on the validation part."""


def train_epochs(
    model: nn.Module, rate: float, recipe: Recipe, seed: int, epoch: Epoch, tell: Callable[[str], None]
) -> Fitted | None:
    """Train with AdamW at `rate` until the validation error no longer falls -> the best epoch's weights."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=recipe.weight_decay)
    best = Best(recipe)
    for number in range(1, recipe.epochs + 1):
        model.train()
        val = epoch(model, optimizer, order)
        tell(f"rate {rate:g}, epoch {number} of at most {recipe.epochs}, validation {val.mse:.4f}")
        if best.is_over(model, val, number):
            break
        for group in optimizer.param_groups:
            group["lr"] *= recipe.decay
    return best.fitted(model, rate)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One update, with the gradient's norm clipped at 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def _batches(windows: Windows, recipe: Recipe, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Past and future of an epoch's windows, in random order."""
    for index in torch.randperm(len(windows), generator=order)[: recipe.windows].split(recipe.batch_size):
        yield windows.batch(index)


@torch.no_grad()
def measure(model: nn.Module, windows: Windows, stride: int = 1) -> Errors:
    """Errors over all windows, or over every `stride`-th.

    The last batch, which is smaller, counts: leaving it out changes published numbers (arXiv:2403.20150)."""
    model.eval()
    total = ErrorSum()
    for index in torch.arange(0, len(windows), stride).split(EVAL_BATCH):
        past, future = windows.batch(index)
        total.add(model(past), future)
    return total.result()
