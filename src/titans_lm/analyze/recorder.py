"""`Recorder`: what happens in a model's memories during forward calls, seen through hooks that change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from titans_lm.layers.gating import ConvexGate, ProductGate
from titans_lm.layers.memory_state import NeuralMemoryState, chunk_gates
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.blocks import TitansBlock
from titans_lm.models.modeling import TitansForCausalLM


class MemoryCall(NamedTuple):
    """A call in which a memory wrote or read the tokens of one stream."""

    memory: NeuralMemory
    x: Tensor
    """The memory's input, `[1, T, D]`."""
    before: NeuralMemoryState
    after: NeuralMemoryState


class Gates(NamedTuple):
    """The gates of a memory's tokens, each `[T, H]`."""

    theta: Tensor
    """The step. A predictor's surprise threshold sets it to 0; a threshold on reconstruction does not show here."""
    eta: Tensor
    alpha: Tensor
    output_gate: Tensor
    """The sigmoid that scales a head's retrieval, mean over its channels."""


class Features(NamedTuple):
    """Queries, keys and values of a memory's tokens, each `[T, H, head_dim]`."""

    q: Tensor
    k: Tensor
    v: Tensor


class Recorder:
    """Lists the calls of each memory, and the mean of each gate that joins attention and memory, until `clear`.

    Use it in `recording(model)`. Persistent tokens, which a stream reads before its first token, are not listed.
    """

    def __init__(self, layers: int):
        self.calls: list[list[MemoryCall]] = [[] for _ in range(layers)]
        """By layer with a memory, in order of the text."""
        self.joins: list[list[Tensor]] = [[] for _ in range(layers)]
        """By layer: means over channels, `[T]`; none in a variant without such a gate."""

    def clear(self) -> None:
        """Forget all calls."""
        for calls, joins in zip(self.calls, self.joins, strict=True):
            calls.clear()
            joins.clear()

    def note_call(
        self, layer: int, memory: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], out: Any
    ) -> None:
        """A memory's forward hook. Blocks pass `surprise` where they read a text, and only there."""
        if "surprise" in options and isinstance(memory, NeuralMemory):
            self.calls[layer].append(MemoryCall(memory, inputs[0], inputs[1], out.state))

    def note_join(self, layer: int, gate: nn.Module, inputs: tuple[Tensor, Tensor], out: Any) -> None:  # noqa: ARG002
        """The forward hook of the gate of attention y and memory m."""
        y, m = inputs
        if isinstance(gate, ProductGate):
            self.joins[layer].append(torch.sigmoid(gate.m_norm(m)).mean(-1)[0])
        elif isinstance(gate, ConvexGate):  # the share of attention is g; that of memory is shown
            self.joins[layer].append(1 - torch.sigmoid(gate.mix(torch.cat([y, m], -1))).mean(-1)[0])


@contextmanager
def recording(model: TitansForCausalLM) -> Iterator[Recorder]:
    """A context in which a `Recorder` sees the model's calls. They must read one stream, without padding."""
    blocks = memory_blocks(model)
    recorder, handles = Recorder(len(blocks)), list[RemovableHandle]()
    for layer, block in enumerate(blocks):

        def note_call(*seen: Any, layer: int = layer) -> None:
            recorder.note_call(layer, *seen)

        def note_join(*seen: Any, layer: int = layer) -> None:
            recorder.note_join(layer, *seen)

        handles.append(memory_of(block).register_forward_hook(note_call, with_kwargs=True))
        gate = getattr(block, "gate", None)
        if gate is not None:
            handles.append(gate.register_forward_hook(note_join))
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def memory_blocks(model: TitansForCausalLM) -> list[TitansBlock[Any]]:
    """The layers that have a memory. Raises ValueError for a model without any."""
    blocks = [block for block in model.model.blocks() if isinstance(getattr(block, "memory", None), NeuralMemory)]
    if not blocks:
        raise ValueError(f"a model of variant {model.config.variant!r} has no memory to look into")
    return blocks


def memory_of(block: TitansBlock[Any]) -> NeuralMemory:
    """The memory of a block that has one."""
    memory = block.memory
    assert isinstance(memory, NeuralMemory)
    return memory


def gates_of(call: MemoryCall) -> Gates:
    """The gates of a call's tokens, computed again from its input."""
    memory, x, state = call.memory, call.x, call.before
    gates = memory._gates(x)
    if state.gates is not None:
        gates, _ = chunk_gates(gates, state.gates, state.memory.position, memory.chunk_size, None)
    theta, eta, alpha = gates
    if memory.predictor is not None and memory.surprise_threshold is not None:
        theta = theta * (memory.predictor(x, state.prev_input) > memory.surprise_threshold)[..., None]
    output = torch.sigmoid(memory.output_gate(x)).unflatten(-1, (memory.num_heads, memory.head_dim)).mean(-1)
    return Gates(theta[0], eta[0], alpha[0], output[0])


def features_of(call: MemoryCall) -> Features:
    """Queries, keys and values of a call's tokens, computed again from its input; in the memory's dtype, so that what
    is computed from them is not rounded to half precision."""
    features, _ = call.memory._features(call.x, call.before.conv_state, None)
    return Features(*(part[0].to(call.after.memory.weights[0].dtype) for part in features))
