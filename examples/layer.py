"""The layer in a plain PyTorch network: it remembers which value followed which key.

    python examples/layer.py

A row is a list of pairs: a key vector, then its value vector. Then keys come again in another order, and the network
has to say the value that followed each. The pairs are new in every row, so the weights cannot hold them: the memory has
to learn them while it reads. Beside it, the same network with an LSTM.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm import NeuralMemory

WIDTH = 16
"""Numbers in a key or a value, each -1 or 1."""


class Batch(NamedTuple):
    """Rows of pairs and questions, of `[B, T, WIDTH]` numbers."""

    x: Tensor
    targets: Tensor
    """What comes next, `[B, T, WIDTH]`; counts where `asked` is True."""
    asked: Tensor
    """`[B, T]`, True at each key that comes for the second time."""


class Recall(nn.Module):
    """Linear map, a memory with its residual, linear map: x `[B, T, WIDTH]` -> the next vector `[B, T, WIDTH]`."""

    def __init__(self, memory: nn.Module, dim: int = 64):
        super().__init__()
        self.embed = nn.Linear(WIDTH, dim)
        self.norm = nn.RMSNorm(dim)
        self.memory = memory
        self.out_norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        y, _ = self.memory(self.norm(h))  # NeuralMemory and LSTM both return (output, state)
        return self.head(self.out_norm(h + y))


def make_batch(rows: int, pairs: int, generator: torch.Generator) -> Batch:
    """`pairs` keys and values one after another, then every pair again, in another order."""
    keys, values = (torch.randint(2, (rows, pairs, WIDTH), generator=generator) * 2.0 - 1 for _ in "kv")
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(rows)])[..., None].expand_as(keys)
    again = [part.gather(1, order) for part in (keys, values)]
    first, second = (torch.stack(part, 2).flatten(1, 2) for part in ((keys, values), again))
    x = torch.cat([first, second], 1)
    asked = torch.zeros(x.shape[:2], dtype=torch.bool)
    asked[:, 2 * pairs :: 2] = True
    return Batch(x, x.roll(-1, 1), asked)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross-entropy of the values that are asked for, in nats a number; ln 2 = 0.69 is chance."""
    said, wanted = model(batch.x)[batch.asked], batch.targets[batch.asked]
    return F.binary_cross_entropy_with_logits(said, (wanted + 1) / 2)


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """The part of the asked numbers whose sign is right; 0.5 is chance."""
    said = model(batch.x)[batch.asked]
    return float((said.sign() == batch.targets[batch.asked]).float().mean())


def train(model: nn.Module, steps: int, pairs: int, seed: int = 0) -> None:
    """AdamW on rows made as they are needed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        loss = loss_of(model, make_batch(32, pairs, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument(
        "--pairs", type=int, default=8, help="in a row of training; tested with as many and twice as many"
    )
    arguments = parser.parse_args()
    test = torch.Generator().manual_seed(1)
    for name, make in (
        ("neural memory", lambda: NeuralMemory(64, num_heads=2, chunk_size=2, lr=1.0)),
        ("LSTM", lambda: nn.LSTM(64, 64, batch_first=True)),
    ):
        torch.manual_seed(0)
        model = Recall(make())
        train(model, arguments.steps, arguments.pairs)
        found = [accuracy(model, make_batch(64, n * arguments.pairs, test)) for n in (1, 2)]
        print(
            f"{name:14} right: {found[0]:.2f} of {arguments.pairs} pairs, {found[1]:.2f} of {2 * arguments.pairs} pairs"
        )


if __name__ == "__main__":
    main()
