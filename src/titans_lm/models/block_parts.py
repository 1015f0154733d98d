"""How blocks call their attention and their memory."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from titans_lm.layers.attention import WindowAttention
from titans_lm.layers.key_values import KeyValues, WindowBuffers
from titans_lm.layers.memory_state import NeuralMemoryOutput, NeuralMemoryState
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.forward_context import ForwardContext


def attend(
    attention: WindowAttention,
    x: Tensor,
    persistent: Callable[[Tensor], Tensor],
    cache: KeyValues | WindowBuffers,
    context: ForwardContext,
) -> tuple[Tensor, KeyValues | WindowBuffers]:
    """Attend over a window. `persistent` gives the persistent tokens, which buffers have already."""
    c = context
    if isinstance(cache, WindowBuffers):
        return attention.decode(x, cache, c.position, c.rope, c.uniform_position, c.eager)
    return cast(
        tuple[Tensor, KeyValues],
        attention(x, persistent(x), cache, c.position, c.rope, c.valid, c.uniform_position, c.eager),
    )


def write_and_read(
    memory: NeuralMemory, x: Tensor, state: NeuralMemoryState, context: ForwardContext
) -> NeuralMemoryOutput:
    """Write each token, and read the memory after it."""
    c = context
    return memory.forward_aligned(x, state, c.valid, update=c.update, surprise=c.surprise, bypass=c.bypass)
