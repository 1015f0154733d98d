"""The layers of a block, from its configuration."""

from torch import nn

from titans_lm.layers.attention import WindowAttention
from titans_lm.layers.gating import ConvexGate, ProductGate
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.configuration import TitansConfig


def make_memory(config: TitansConfig) -> NeuralMemory:
    """The memory of a layer."""
    assert config.num_memory_heads is not None
    return NeuralMemory(
        config.hidden_size,
        config.num_memory_heads,
        head_dim=config.memory_head_dim,
        layers=config.memory_layers,
        memory_dim=config.memory_dim,
        chunk_size=config.memory_chunk_size,
        lr=config.memory_lr,
        lr_start=config.memory_lr_start,
        form=config.memory_form,
        activation=config.memory_activation,
        clip=config.memory_clip,
        momentum=config.memory_momentum,
        forgetting=config.memory_forgetting,
        gates_of=config.memory_gates_of,
        alpha_bias=config.memory_alpha_bias,
        conv_size=config.memory_conv_size,
        init=config.memory_init,
        start=config.memory_start,
        lags=config.memory_lags,
        surprise_threshold=config.surprise_threshold,
        surprise_threshold_on=config.surprise_threshold_on,
    )


def make_window(config: TitansConfig) -> WindowAttention:
    """The attention of a layer."""
    assert config.head_dim is not None
    return WindowAttention(config.hidden_size, config.num_attention_heads, config.head_dim, config.window_size)


def make_gate(config: TitansConfig) -> nn.Module:
    """What joins attention and memory."""
    if config.gate == "convex":
        return ConvexGate(config.hidden_size)
    return ProductGate(config.hidden_size, config.rms_norm_eps)
