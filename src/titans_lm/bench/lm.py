"""Models of the benchmarks: Titans' variants, attention of the same size, and transformers' Mamba2 of similar size."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from titans_lm.bench.measure import Setting
from titans_lm.layers.neural_memory import memories
from titans_lm.models import baselines
from titans_lm.models.cache_argument import OF_TRANSFORMERS
from titans_lm.models.presets import SIZES, preset

TITANS = ("mag", "mac", "mal", "lmm")
WINDOW, FULL, MAMBA2 = "sliding window", "full attention", "mamba2"
BASELINES = (WINDOW, FULL, MAMBA2)
MAMBA_CACHE = "cache" if OF_TRANSFORMERS == "cache" else "cache_params"
"""The name of Mamba2's cache, as an argument and in its output."""


def build(name: str, size: str, setting: Setting) -> nn.Module:
    """Build a variant or a baseline by name."""
    torch.manual_seed(0)
    if name == MAMBA2:
        config = baselines.mamba2_config({"size": size, "vocab_size": SIZES[size].get("vocab_size", 32000)})
    elif name in TITANS:
        config = preset(size, name)  # type: ignore[arg-type]
    else:
        config = preset(size, **(baselines.BASELINES["full_attention"] if name == FULL else {"variant": "attention"}))
    model = baselines.build(config).to(setting.device)
    for memory in memories(model):
        memory.backend = setting.backend  # type: ignore[assignment]
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ids(tokens: int, model: nn.Module) -> Tensor:
    """Random tokens: costs do not depend on them."""
    device = next(model.parameters()).device
    return torch.randint(256, (1, tokens), device=device)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of a training step."""
    out: Any = model(tokens, labels=tokens, use_cache=False)
    return out.loss


def is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)
