"""Training on windows: Adam, early stopping on the validation part."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm.evaluate.forecasting.metrics import Errors, ErrorSum
from titans_lm.evaluate.forecasting.windows import Data, Windows

EVAL_BATCH = 256
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss}


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


def fit(build: Callable[[], nn.Module], data: Data, recipe: Recipe, seed: int, tell: Callable[[str], None]) -> Fitted:
    """Train a model for each rate, from the same seed -> the one with the lowest MSE on the validation part.

    Raises ValueError if none has a finite error.
    """
    best: Fitted | None = None
    for rate in recipe.rates:
        torch.manual_seed(seed)
        fitted = _train(build(), data, recipe, rate, seed, tell)
        if fitted is not None and (best is None or fitted.val.mse < best.val.mse):
            best = fitted
    if best is None:
        raise ValueError(f"the validation error was not finite at any learning rate of {recipe.rates}")
    return best


def _train(
    model: nn.Module, data: Data, recipe: Recipe, rate: float, seed: int, tell: Callable[[str], None]
) -> Fitted | None:
    """One training. None if its error on the validation part was never finite."""
    if not any(p.requires_grad for p in model.parameters()):
        return Fitted(model, measure(model, data.val), 0.0, 0)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=recipe.weight_decay)
    best, weights, best_epoch = Errors(math.inf, math.inf, 0), {}, 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for past, future in _batches(data.train, recipe, order):
            optimizer.zero_grad(set_to_none=True)
            LOSSES[recipe.loss](model(past), future).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        val = measure(model, data.val, recipe.val_stride)
        tell(f"rate {rate:g}, epoch {epoch} of at most {recipe.epochs}, validation {val.mse:.4f}")
        if val.mse < best.mse:
            best, weights, best_epoch = val, copy.deepcopy(model.state_dict()), epoch
        elif epoch - best_epoch >= recipe.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] *= recipe.decay
    if not weights:
        return None
    model.load_state_dict(weights)
    return Fitted(model, best, rate, best_epoch)


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
