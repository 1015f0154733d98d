"""The models of the benchmarks: Titans' variants, attention of the same size, and transformers' Mamba2 of about as many
parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from titans_lm.bench.measure import Setting
from titans_lm.config import PARAMETERS, SIZES, preset
from titans_lm.memory import NeuralMemory
from titans_lm.model import TitansForCausalLM

TITANS = ("mag", "mac", "mal", "lmm")
WINDOW, FULL, MAMBA2 = "sliding window", "full attention", "mamba2"
BASELINES = (WINDOW, FULL, MAMBA2)


def build(name: str, size: str, setting: Setting) -> nn.Module:
    """The model of this name: a variant, or a baseline."""
    torch.manual_seed(0)
    if name == MAMBA2:
        return _mamba2(size).to(setting.device)
    if name in TITANS:
        config = preset(size, name)  # type: ignore[arg-type]
    elif name == WINDOW:
        config = preset(size, "attention")
    else:
        config = preset(size, "attention", window_size=None, num_persistent_tokens=0)
    model = TitansForCausalLM(config).to(setting.device)
    for memory in memories(model):
        memory.backend = setting.backend  # type: ignore[assignment]
    return model


def memories(model: nn.Module) -> list[NeuralMemory]:
    return [m for m in model.modules() if isinstance(m, NeuralMemory)]


def _mamba2(size: str) -> nn.Module:
    """Of the size's width, and as many layers as bring it nearest to the size's parameters."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    width = SIZES[size]["hidden_size"]

    def make(layers: int) -> nn.Module:
        return Mamba2ForCausalLM(Mamba2Config(
            vocab_size=SIZES[size].get("vocab_size", 32000), hidden_size=width, num_hidden_layers=layers, expand=2,
            head_dim=64, num_heads=2 * width // 64, n_groups=1, state_size=128, chunk_size=64, tie_word_embeddings=True,
        ))  # fmt: skip

    with torch.device("meta"):
        one, two = (parameters(make(n)) for n in (1, 2))
    return make(max(1, round(1 + (PARAMETERS[size] - one) / (two - one))))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ids(tokens: int, model: nn.Module) -> Tensor:
    """Random tokens: what anything costs does not depend on which they are."""
    device = next(model.parameters()).device
    return torch.randint(256, (1, tokens), device=device)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of a training step."""
    out: Any = model(tokens, labels=tokens, use_cache=False)
    return out.loss


def is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors)
