"""The memory operation as a workload: its size, its inputs, and the actions that are measured on any implementation."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_lm.bench.measure import Action, Setting
from titans_lm.ops import MemoryForm, MemoryState, initial_state, memory_scan

HEADS, WIDTH = 6, 64
CLIP = 1.0
"""`memory_clip` of the residual form, as in models by default."""


class Shape(NamedTuple):
    """Size of the operation: `rows` x `heads` memories of `width`, with `depth` layers of hidden width `hidden`."""

    rows: int
    tokens: int
    hidden: int
    chunk: int
    form: str = "plain"
    depth: int = 2
    width: int = WIDTH
    heads: int = HEADS

    def layers(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([self.width, *[self.hidden] * (self.depth - 1), self.width]))

    def operations(self) -> int:
        """Forward (`ops/README.md`, section Cost): a weight has six multiply-adds per token, those of the first
        layer five, because no gradient passes through it."""
        weights = [i * o for i, o in self.layers()]
        scores = sum(2 * self.chunk * (i + o) for i, o in self.layers())
        return self.rows * self.heads * self.tokens * (12 * sum(weights) - 2 * weights[0] + scores)


class Inputs(NamedTuple):
    """Tokens as the layer makes them (unit keys and queries, gates at their initial values), and M_0."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor
    first: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        return [*self[:6], *self.first]

    def trained(self) -> "Inputs":
        """The same values as leaves that require gradients."""
        return Inputs.of([x.detach().requires_grad_() for x in self.flat()])

    @classmethod
    def of(cls, flat: list[Tensor]) -> "Inputs":
        """Undo `flat`."""
        q, k, v, theta, eta, alpha, *first = flat
        return cls(q, k, v, theta, eta, alpha, tuple(first))


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    wide = torch.promote_types(dtype, torch.float32)
    size = (shape.rows, shape.tokens, shape.heads)
    q, k, v = (torch.randn(*size, shape.width, dtype=wide) for _ in "qkv")
    theta, eta, alpha = (torch.sigmoid(torch.randn(size, dtype=wide) + bias) for bias in (-2, 2.5, -6))
    first = [torch.randn(shape.heads, i, o) / i**0.5 for i, o in shape.layers()]
    tokens = (q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v / 8)
    gates = (0.1 * theta, eta, alpha)
    narrow = [x.to(device, dtype) for x in tokens]
    return Inputs.of([*narrow, *(x.to(device) for x in gates), *(w.to(device, wide) for w in first)])


def form(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> MemoryForm:
    if shape.form == "plain":
        return MemoryForm()
    one = torch.ones(shape.heads, shape.width, device=device, dtype=dtype)
    return MemoryForm(norm=(one, torch.zeros_like(one)), clip=CLIP)


Read = Callable[[Inputs], tuple[Tensor, Any]]


def reader(shape: Shape, setting: Setting, scan: Callable[..., Any] = memory_scan) -> Read:
    """A function that runs `memory_scan`, or `scan`, from M_0, and returns y and the state."""
    memory = form(shape, setting.device)

    def read(x: Inputs) -> tuple[Tensor, MemoryState]:
        state = initial_state(x.first, shape.rows)
        y, after = scan(*x[:6], state, chunk_size=shape.chunk, form=memory, backend=setting.backend)
        return y, after

    return read


def both_ways(read: Read, x: Inputs) -> dict[str, Action]:
    """Actions: forward without gradients; forward and backward to every input and M_0."""
    weight = torch.randn(*x.v.shape, dtype=x.v.dtype, device=x.v.device)

    def forward(_: Any) -> None:
        with torch.no_grad():
            read(x)

    def training(leaves: Inputs) -> None:
        y = read(leaves)[0]
        torch.autograd.grad(y, leaves.flat(), weight, allow_unused=True)  # a peer may ignore a gate

    return {"forward": Action(forward), "training": Action(training, x.trained)}
