"""What a run takes on several GPUs, computed from a configuration and not measured: bytes of weights, state and
activations, and bytes sent in a step. `docs/scaling.md` is its output, and tests compare it with real tensors.

`python -m titans_lm.training.arithmetic 760m` prints the tables.
"""

import sys
from dataclasses import dataclass

from titans_lm.models.configuration import TitansConfig
from titans_lm.models.presets import count_parameters, preset

FLOAT = 4
"""Bytes of a weight, of its gradient, of each of AdamW's two moments, and of a number of the memory's state."""


@dataclass(frozen=True)
class Arithmetic:
    """The bytes of a MAG or LMM model with memories of two layers; the state of MAC and MAL has a little more."""

    config: TitansConfig

    def parameters(self) -> int:
        """Number of weights."""
        return count_parameters(self.config)

    def training_state(self, shards: int = 1) -> float:
        """Bytes of weights, gradients and AdamW's moments on each GPU; FSDP2 divides them by `shards`."""
        return 4 * FLOAT * self.parameters() / shards

    def memory_state(self) -> int:
        """Bytes of the memory of one row: weights, momentum and anchor (the weights at the chunk's start) of each
        head's network, and the inputs that the convolutions still need. It does not grow with the length."""
        c = self.config
        heads = c.num_memory_heads or c.hidden_size // c.memory_head_dim
        hidden = c.memory_dim or 4 * c.memory_head_dim
        networks = 3 * heads * 2 * c.memory_head_dim * hidden
        tails = 3 * (c.memory_conv_size - 1) * heads * c.memory_head_dim
        return c.num_hidden_layers * (FLOAT * (networks + tails) + 8) + 8  # and positions

    def window_state(self) -> int:
        """Bytes of the keys and values in the attention's window of one row; 0 in LMM."""
        c = self.config
        if c.variant == "lmm" or c.window_size is None:
            return 0
        return c.num_hidden_layers * FLOAT * 2 * (c.window_size - 1) * c.hidden_size

    def checkpointed_activations(self, tokens: int, width: int = FLOAT) -> int:
        """Bytes that activation checkpointing keeps for a row of `tokens`: the input of each block, `width` bytes a
        number. The block that is recomputed adds its own on top, once."""
        return self.config.num_hidden_layers * tokens * self.config.hidden_size * width

    def logits(self, tokens: int) -> int:
        """Bytes of the logits of a row in float32. Their gradient takes as many again."""
        return tokens * self.config.vocab_size * FLOAT

    def all_reduce(self, gpus: int) -> float:
        """Bytes that each GPU sends in a step of DDP: a ring all-reduce of the gradients."""
        return 2 * (gpus - 1) / gpus * FLOAT * self.parameters()

    def sharded(self, gpus: int) -> float:
        """Bytes that each GPU sends in a step of FSDP2: two all-gathers of the weights and a reduce-scatter."""
        return 3 * (gpus - 1) / gpus * FLOAT * self.parameters()

    def pipeline_idle(self, stages: int, segments: int) -> float:
        """The part of the time in which a stage waits, where groups of layers pass `segments` of a row on in turn."""
        return (stages - 1) / (segments + stages - 1)


def main(size: str) -> None:
    """Print the tables of a named size."""
    a = Arithmetic(preset(size, "mag"))
    gb = 1e9
    print(f"{size}, MAG: {a.parameters():,} weights, state of a row {a.memory_state() / gb:.3f} GB of memory")
    print(f"and {a.window_state() / gb:.3f} GB of attention window\n")
    print("| tokens of a row | inputs of blocks, GB | with bf16 | logits, GB |\n|---|---|---|---|")
    for name, tokens in {"4K": 2**12, "16K": 2**14, "64K": 2**16, "256K": 2**18, "1M": 2**20}.items():
        kept = [a.checkpointed_activations(tokens, width) / gb for width in (4, 2)]
        print(f"| {name} | {kept[0]:.1f} | {kept[1]:.1f} | {a.logits(tokens) / gb:.1f} |")
    print("\n| GPUs | weights, gradients, AdamW with DDP, GB | with FSDP2 | sent in a step by DDP, GB | by FSDP2 |")
    print("|---|---|---|---|---|")
    for gpus in (8, 32, 128, 512):
        held = a.training_state() / gb, a.training_state(gpus) / gb
        sent = a.all_reduce(gpus) / gb, a.sharded(gpus) / gb
        print(f"| {gpus} | {held[0]:.1f} | {held[1]:.3f} | {sent[0]:.2f} | {sent[1]:.2f} |")
    print(f"\nA pipeline of 8 GPUs waits {a.pipeline_idle(8, 64):.0%} of the time with 64 segments")


if __name__ == "__main__":
    main(*sys.argv[1:])
