"""Muon for the matrices of the blocks, AdamW for all other weights, as one optimizer.

Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; arXiv:2502.16982) replaces a matrix's momentum
by the nearest orthogonal matrix, so that every direction of it learns as fast. `torch.optim.Muon` does the same, one
matrix at a time and in bfloat16, which takes a third of a training step on a CPU without instructions for it. Here
matrices of one shape go through together, in float32.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_lm.layers.neural_memory import NeuralMemory

MOMENTUM = 0.95
STEPS = 5
"""Newton-Schulz iterations."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of X <- a X + (b X X^T + c (X X^T)^2) X, which brings all singular values near 1."""
RMS = 0.2
"""The root mean square of an update, about that of AdamW's, so that both have one learning rate (arXiv:2502.16982)."""


class Muon(torch.optim.AdamW):
    """AdamW, in which groups with `orthogonal=True` get Muon's update with Nesterov momentum. Their parameters must be
    matrices. Weight decay is decoupled in all groups."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Passes over parameters without a gradient."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            loss: float | None = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        same: defaultdict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                same[parameter.shape, parameter.device].append(parameter)
        for (shape, _), parameters in same.items():
            updates = orthogonalized(torch.stack([self._nesterov(parameter) for parameter in parameters]))
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * RMS * math.sqrt(max(shape)))

    def _nesterov(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:  # `step` as AdamW's, which looks for it in what it loads
            state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter, dtype=torch.float32))
        state["step"] += 1
        gradient = parameter.grad.float()
        return gradient.lerp(state["momentum"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices `[N, m, n]` -> matrices with the same singular vectors and singular values near 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def matrices(model: Any) -> set[Tensor]:
    """The weights that Muon updates: those of linear maps below the head. The maps to one theta, eta or alpha for each
    head are vectors rather than matrices, and a predictor has a loss of its own."""
    modules = list(model.base_model.modules())
    others = {
        module
        for memory in modules
        if isinstance(memory, NeuralMemory)
        for module in (memory.theta, memory.eta, memory.alpha, *(memory.predictor or nn.Module()).children())
    }
    return {m.weight for m in modules if isinstance(m, nn.Linear) and m not in others}


def muon(model: Any, decayed: set[str], rate: float, decay: float, betas: tuple[float, float]) -> Muon:
    """The optimizer of a model's trainable weights. `decayed` names those that decay; the last group does not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    orthogonal = matrices(model)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if p in orthogonal], "weight_decay": decay, "orthogonal": True},
        {"params": [p for n, p in named if p not in orthogonal and n in decayed], "weight_decay": decay},
        {"params": [p for n, p in named if p not in orthogonal and n not in decayed], "weight_decay": 0.0},
    ]
    return Muon(groups, lr=rate, betas=betas)
