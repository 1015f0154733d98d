"""The stages of a run: the core alone, then the memory alone, then all of the model.

Memories are bypassed in the first stage, so that they get no gradient; in the second the gradients of all other weights
are dropped. AdamW passes over a weight without a gradient: neither a step nor weight decay changes a bit of it.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import NeuralMemory


class Stages:
    """`core_steps` in which the memory is bypassed, then `memory_steps` in which only the memory learns."""

    def __init__(self, core_steps: int, memory_steps: int):
        self.core_steps, self.memory_end = core_steps, core_steps + memory_steps

    def forward(self, model: nn.Module, step: int) -> AbstractContextManager[None]:
        """The context of a forward pass after `step` updates."""
        return bypass_memory(model) if step < self.core_steps else nullcontext()

    def drop_gradients(self, model: nn.Module, step: int) -> None:
        """After a backward pass: drop the gradients of weights that this step leaves as they are."""
        if not self.core_steps <= step < self.memory_end:
            return
        learns = {id(p) for module in model.modules() if isinstance(module, NeuralMemory) for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in learns:
                parameter.grad = None
