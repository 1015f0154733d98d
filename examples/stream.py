"""A memory that reads measurements as they come: `NeuralMemory` on a continuous multivariate stream.

    python examples/stream.py                    # a series made on the spot, of the shape of ETTh1
    python examples/stream.py --csv ETTh1.csv    # any CSV file: a date, then numbers

A small network forecasts the next hour of seven series. It is trained on the first part in windows, then reads the rest
online, an hour at a time: it forecasts, sees what came, and its memory learns from it. What the memory knows is carried
from call to call as one value, `state`; nothing else remembers. How the seven series that are made on the spot hang
together changes every 200 hours: it has to be learned while reading.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm import NeuralMemory, NeuralMemoryState

WINDOW = 200
"""Hours of a training window."""


class Forecaster(nn.Module):
    """What came -> what comes next, as a change from what came."""

    def __init__(self, series: int, dim: int = 64, heads: int = 2):
        super().__init__()
        self.embed = nn.Linear(series, dim)
        self.norm = nn.RMSNorm(dim)
        self.memory = NeuralMemory(dim, heads, memory_dim=64, chunk_size=8, alpha_bias=-5.0)
        self.head = nn.Linear(dim, series)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, state: NeuralMemoryState | None = None) -> tuple[Tensor, NeuralMemoryState]:
        """x `[B, T, series]` -> a forecast of each next step `[B, T, series]`, and the memory."""
        h = self.embed(x)
        y, state = self.memory(self.norm(h), state)
        return x + self.head(h + y), state


def make_series(hours: int = 40_000, series: int = 7, regime: int = 200, seed: int = 0) -> Tensor:
    """Days, weeks, slow drift and noise, mixed into `series` measurements; every `regime` hours in another way."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(hours)
    day, week = 2 * math.pi * t / 24, 2 * math.pi * t / 168
    drift = torch.randn(hours, generator=generator).cumsum(0) / hours**0.5
    causes = torch.stack([day.sin(), day.cos(), (2 * day).sin(), week.sin(), week.cos(), drift], 1)
    mixes = torch.randn(hours // regime + 1, causes.shape[1], series, generator=generator)
    mixed = torch.einsum("tc,tcs->ts", causes, mixes[t // regime])
    return mixed + 0.05 * torch.randn(hours, series, generator=generator)


def read_csv(path: Path) -> Tensor:
    """`[T, series]`: every column after the first. Raises ValueError for what is not numbers."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    try:
        return torch.tensor([[float(x) for x in row[1:]] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path} is not a table of a date and numbers: {error}") from None


def train(model: Forecaster, x: Tensor, steps: int, batch: int = 16, carried: int = 10) -> None:
    """Windows that follow one another, `carried` of them with one memory, so that it learns to last."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    state, start = None, torch.zeros(0)
    for step in range(steps):
        if step % carried == 0:
            state, start = None, torch.randint(0, len(x) - WINDOW * carried, (batch,))
        window = torch.stack([x[s : s + WINDOW + 1] for s in start + step % carried * WINDOW])
        forecast, state = model(window[:, :-1], state)
        loss = F.mse_loss(forecast, window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = state.detach()  # the memory goes on, its gradients do not
        if step % 50 == 0:
            print(f"step {step:4}  mean squared error {loss.item():.4f}")


@torch.no_grad()
def read_online(model: Forecaster, x: Tensor, forget: int | None = None) -> Tensor:
    """Forecast each step from those before, one call a step -> squared errors `[T - 1]`. `forget`: each so many."""
    state, errors = None, []
    for t in range(len(x) - 1):
        if forget is not None and t % forget == 0:
            state = None
        forecast, state = model(x[None, t : t + 1], state)
        errors.append((forecast[0, 0] - x[t + 1]).square().mean())
    return torch.stack(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="a file with a header, a date column and number columns")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = make_series() if arguments.csv is None else read_csv(arguments.csv)
    seen = len(x) - min(2000, len(x) // 4)
    x = (x - x[:seen].mean(0)) / x[:seen].std(0)  # by what was seen in training alone
    model = Forecaster(x.shape[1])
    train(model, x[:seen], arguments.steps)
    rest = x[seen:]
    for name, errors in (
        ("the last value again", (rest[1:] - rest[:-1]).square().mean(1)),
        ("memory forgotten every hour", read_online(model, rest, forget=1)),
        ("memory forgotten every day", read_online(model, rest, forget=24)),
        ("memory carried", read_online(model, rest)),
    ):
        print(f"{name:28} mean squared error {float(errors.mean()):.4f}")


if __name__ == "__main__":
    main()
