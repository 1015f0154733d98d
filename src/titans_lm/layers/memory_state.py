"""What goes in and out of a `NeuralMemory`: its state, M_0 and its outputs; and how a call advances the state."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from titans_lm.ops import FactoredMemory, MemoryState, Surprise, gather_tokens
from titans_lm.utils.deprecation import RenamedAttribute, renamed, renamed_arguments

__getattr__ = renamed(
    __name__,
    {"last_input": "next_prev_input", "gates_of_chunks": "chunk_gates", "FirstWeights": "InitialMemory"},
)


class NeuralMemoryState(NamedTuple):
    """What a `NeuralMemory` carries from call to call. Its size does not depend on the number of tokens.

    The layer's options decide which fields are None; a state that does not fit them raises.
    """

    memory: MemoryState | FactoredMemory
    conv_state: tuple[Float[Tensor, "B R I"], ...]
    """For q, k and v: the last R = conv_size - 1 projected inputs, which the convolutions still need."""
    prev_input: Float[Tensor, "B D"] | None = None
    """The last input, from which a predictor predicts the next; None without a predictor."""
    gates: Float[Tensor, "B H 3"] | None = None
    """theta, eta and alpha of the current chunk, where gates belong to a chunk; None where they belong to a token."""

    def detach(self) -> "NeuralMemoryState":
        """The same state, cut off from the autograd graph: truncated BPTT continues from it."""
        prev_input, gates = (None if x is None else x.detach() for x in (self.prev_input, self.gates))
        memory, conv_state = self.whole_memory().detach(), tuple(t.detach() for t in self.conv_state)
        return NeuralMemoryState(memory, conv_state, prev_input, gates)

    def whole_memory(self) -> MemoryState:
        """Its memory; one in factors is computed."""
        return self.memory.whole() if isinstance(self.memory, FactoredMemory) else self.memory


_RENAMED = {"tails": "conv_state", "last": "prev_input"}
for _old, _new in _RENAMED.items():
    setattr(NeuralMemoryState, _old, RenamedAttribute(_old, _new))
setattr(NeuralMemoryState, "__new__", staticmethod(renamed_arguments(_RENAMED)(NeuralMemoryState.__new__)))  # noqa: B010


class ProjectedQueries(NamedTuple):
    """The part of a retrieval that does not depend on the memory's weights, for tokens `[B, T]`."""

    q: Float[Tensor, "B T H K"]
    gate: Float[Tensor, "B T I"]
    """The output gate before its sigmoid."""


class LayerSurprise(NamedTuple):
    """How unexpected each token was before it was written (`ops.Surprise`), and the step that it was written with."""

    loss: Float[Tensor, "B T H"]
    """|| M(k) - v ||^2 at the anchor (eq. 12); 0 where masked."""
    gradient_norm: Float[Tensor, "B T H"]
    """Frobenius norm of the gradient of that loss by the head's memory, after the clip; 0 where masked."""
    theta: Float[Tensor, "B T H"]
    """The step theta (eq. 9); 0 for a token that is not written, being masked or not above `surprise_threshold`."""


class NeuralMemoryOutput(NamedTuple):
    """What one pass over tokens returns."""

    y: Tensor
    """`[B, T, D]`; of `scan`, each head's retrieval `[B, T, H, V]` before `project_output`."""
    state: NeuralMemoryState
    surprise: LayerSurprise | None
    """None where it was not asked for."""


class InitialMemory(nn.ParameterList):
    """M_0: the layers of it that are learned."""

    __call__ = nn.Module.__call__  # a ParameterList refuses

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - wrappers of modules pass an input on
        """A copy, because a state outlives the weights that FSDP gathers for a call."""
        return tuple(weight.clone() for weight in self)


class StateShapes(NamedTuple):
    """The shapes of a layer's state, without the rows; None for a field that the layer does not have."""

    weights: Sequence[tuple[int, ...]]
    conv_state: tuple[int, int]
    prev_input: tuple[int] | None
    gates: tuple[int, int] | None

    def first(self, memory: MemoryState, like: Tensor) -> NeuralMemoryState:
        """The state of a memory that has read no token, on the device of `like`, in its dtype (gates in float32 or
        float64)."""
        wide, batch = like if like.dtype == torch.float64 else like.float(), memory.position.shape[0]
        conv_state = tuple(like.new_zeros(batch, *self.conv_state) for _ in "qkv")
        prev_input = None if self.prev_input is None else like.new_zeros(batch, *self.prev_input)
        gates = None if self.gates is None else wide.new_zeros(batch, *self.gates)
        return NeuralMemoryState(memory, conv_state, prev_input, gates)

    def zeros(self, batch: int, like: Tensor) -> NeuralMemoryState:
        """`first` of a memory of zeros, for `batch` rows (the memory in float32 or float64)."""
        wide = like if like.dtype == torch.float64 else like.float()
        weights = tuple(wide.new_zeros(batch, *shape) for shape in self.weights)
        position = torch.zeros(batch, dtype=torch.long, device=like.device)
        return self.first(MemoryState(weights, weights, weights, position), like)

    def fits(self, state: NeuralMemoryState, rows: int) -> bool:
        """Whether the state is one of this layer, of so many rows."""
        return all(shapes == expected for _, shapes, expected in self._parts(state, rows))

    def check(self, state: NeuralMemoryState, rows: int) -> None:
        """Raises ValueError unless the state `fits`."""
        for name, shapes, expected in self._parts(state, rows):
            if shapes != expected:
                shown = [tuple(shape) for shape in shapes]
                raise ValueError(f"the state does not fit this memory: its {name} is {shown}, expected {expected}")

    def _parts(self, state: NeuralMemoryState, rows: int) -> Iterator[tuple[str, list[Any], list[Any]]]:
        """The parts of a state: their names, the shapes of their tensors, and the shapes that are expected."""
        for name, tensors in zip(("anchor", "weights", "momentum"), state.memory[:3], strict=True):
            yield f"memory.{name}", [t.shape for t in tensors], [(rows, *shape) for shape in self.weights]
        yield "conv_state", [t.shape for t in state.conv_state], [(rows, *self.conv_state)] * 3
        for name, tensor, shape in zip(("prev_input", "gates"), state[2:], self[2:], strict=True):
            if tensor is not None or shape is not None:
                yield name, [] if tensor is None else [tensor.shape], [] if shape is None else [(rows, *shape)]


def with_theta(surprise: Surprise, theta: Tensor, threshold: float | None, valid: Tensor | None) -> LayerSurprise:
    """The surprise of tokens, beside the step that they were written with: `theta` `[B, T, H]` where a token is one of
    the `valid` ones, and its loss is above the `threshold`."""
    if threshold is not None:
        theta = theta * (surprise.loss > threshold)
    return LayerSurprise(*surprise, theta if valid is None else theta * valid[..., None])


def check_inputs(dim: int, x: Tensor, state: Any, mask: Tensor | None = None) -> None:
    """Raises ValueError for a call's arguments of a shape or type that a memory of width `dim` cannot take."""
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be [B, T, D] with D = {dim}, got {list(x.shape)}")
    if state is not None and not isinstance(state, NeuralMemoryState):
        raise ValueError(f"the state must be the one that an earlier call returned, got {type(state).__name__}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be [B, T] = {list(x.shape[:2])}, True at tokens, got {list(mask.shape)} of {mask.dtype}"
        )


def next_prev_input(
    x: Float[Tensor, "B T D"], prev_input: Float[Tensor, "B D"], valid: Tensor | None
) -> Float[Tensor, "B D"]:
    """The last valid input of each row of x, or `prev_input` in a row without one."""
    if x.shape[1] == 0:
        return prev_input
    if valid is None:
        return x[:, -1].detach()
    inputs = torch.cat([prev_input[:, None].to(x.dtype), x.detach()], 1)
    return gather_tokens(inputs, valid.sum(1)[:, None])[:, 0]


def chunk_gates(
    gates: tuple[Tensor, Tensor, Tensor], current: Tensor, position: Tensor, size: int, valid: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """For each token the gates of its chunk's first token, and the gates of the chunk that is current afterwards.

    `gates` are each token's own theta, eta and alpha, `[B, T, H]`. `current` `[B, H, 3]` are the gates of the chunk
    that an earlier call began. `position` `[B]` counts the tokens in that chunk of `size` tokens.
    """
    own = torch.cat([current[:, None], torch.stack(gates, -1)], 1)  # [B, 1 + T, H, 3]
    tokens = gates[0].shape[1]
    token = torch.arange(tokens, device=position.device)
    first = token - (position[:, None] + token) % size  # [B, T], negative where an earlier call has read it
    of_chunks = torch.cat([current[:, None], gather_tokens(own, (first + 1).clamp(min=0))], 1)
    count = torch.full_like(position, tokens) if valid is None else valid.sum(1)
    theta, eta, alpha = of_chunks[:, 1:].unbind(-1)
    return (theta, eta, alpha), gather_tokens(of_chunks, count[:, None])[:, 0]
