"""One token of a memory layer in compiled code, in one call, with its projections where those are plain linear layers.

A decoded token has little to compute, so that the operations' overhead would count. `NeuralMemory` takes this path
where `is_supported` says so. It equals the layer's own operations.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from titans_lm.layers.few_rows import is_few_rows, runs_compiled
from titans_lm.layers.memory_state import NeuralMemoryOutput, NeuralMemoryState, with_theta
from titans_lm.layers.short_conv import ShortConvolution
from titans_lm.layers.weight_addresses import NotPlainError, WeightAddresses, addresses_of
from titans_lm.ops import FactoredMemory, MemoryState, Surprise
from titans_lm.ops.cpu.compiled import as_contiguous, run_step, thread_count, unsupported_tensor_reason
from titans_lm.ops.decode import Layers, TokenUpdate, advance_token


@runtime_checkable  # the tests check annotations as they run
class StepLayer(Protocol):
    """The parts of a `NeuralMemory` that a step uses."""

    num_heads: int
    chunk_size: int
    lr: float
    clip: float | None
    activation: Literal["silu", "gelu"]
    surprise_threshold: float | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    convs: nn.ModuleList | None
    theta: nn.Linear
    eta: nn.Linear | None
    alpha: nn.Linear | None
    output_gate: nn.Linear
    output_norm: nn.RMSNorm
    o_proj: nn.Linear
    shapes: list[tuple[int, int, int]]

    @property
    def backend(self) -> str: ...
    @property
    def gates_of(self) -> str: ...
    @property
    def predictor(self) -> nn.Module | None: ...


class ReadToken(NamedTuple):
    """What reading one token returns."""

    y: Tensor
    """`[B, 1, D]`, the layer's output."""
    conv_state: Tensor
    """The queries' convolution state after the token, `[B, R, I]`."""


def step_weights(
    layer: StepLayer, x: Tensor, weights: Sequence[Tensor], valid: Tensor | None
) -> WeightAddresses | None:
    """The layer's weights, if compiled code can run its step on x `[B, T, D]`: one token of every row, without
    gradients, on a CPU, in the dtype of the memory's `weights`, where no hook, adapter or mode looks at the operations.
    Else None."""
    if x.shape[1] != 1 or valid is not None or weights[0].dtype != x.dtype or not runs_compiled(x):
        return None
    found = _weights(layer)
    return found if found is not None and found.dtype == x.dtype and found.width == x.shape[2] else None


def _weights(layer: StepLayer) -> WeightAddresses | None:
    """The layer's weights, for compiled code; None where it cannot run on them."""
    if layer.backend not in ("auto", "native") or layer.predictor is not None or layer.gates_of != "token":
        return None
    return addresses_of(layer, _describe)


def _describe(layer: StepLayer, found: WeightAddresses) -> None:
    """Note the weights as `LayerStepArgs` of csrc/layer_step.h has them."""
    assert isinstance(layer, nn.Module)
    if layer.convs is None:
        raise NotPlainError
    convs = found.module(layer, "convs", nn.ModuleList)
    assert convs is not None
    filters = [found.module(convs, str(i), ShortConvolution) for i in range(3)]
    gates = [found.module(layer, name, nn.Linear) for name in ("theta", "eta", "alpha")]
    assert isinstance(filters[0], ShortConvolution)
    assert isinstance(gates[0], nn.Linear)
    heads, size, dim = layer.num_heads, filters[0].weight.shape[-1], gates[0].weight.shape[-1]
    width, inner = layer.shapes[-1][-1], layer.num_heads * layer.shapes[0][1]
    numbers: list[int] = [heads, len(layer.shapes), size, dim, layer.shapes[0][1], *(out for _, _, out in layer.shapes)]
    numbers += [found.weight(conv, "weight", (inner, size)) for conv in filters if conv is not None]
    for name, shape in (("weight", (heads, dim)), ("bias", (heads,))):
        numbers += [0 if gate is None else found.weight(gate, name, shape) for gate in gates]
    numbers += [found.optional(layer, name, (heads, width)) for name in ("norm_weight", "norm_bias")]
    numbers += [found.norm(layer, "output_norm", width)]
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "output_gate"), (inner, dim)) | {"o_proj": (dim, inner)}
    try:
        numbers += [found.linear(layer, name, shape) for name, shape in shapes.items()]
    except NotPlainError:
        found.is_whole, numbers = False, [*numbers, *[0] * len(shapes)]
    found.width, found.numbers = dim, (ctypes.c_long * len(numbers))(*numbers)


def in_factors(layer: StepLayer, state: NeuralMemoryState) -> NeuralMemoryState:
    """The state with a copy of its memory in factors, where steps of the layer can run on it; else the state."""
    memory, dtype = state.memory, state.conv_state[0].dtype
    if isinstance(memory, FactoredMemory) or layer.chunk_size == 1:  # the latter writes its weights at each token
        return state
    if memory.weights[0].dtype != dtype or unsupported_tensor_reason(memory.weights[0], dtype) is not None:
        return state
    found = _weights(layer)
    if found is None or found.dtype != dtype:
        return state
    conv_state = torch.cat(state.conv_state, -1).chunk(len(state.conv_state), -1)  # as steps leave it
    return state._replace(memory=FactoredMemory.of(memory, layer.chunk_size), conv_state=tuple(conv_state))


def read_token(layer: StepLayer, found: WeightAddresses, x: Tensor, conv_state: Tensor, weights: Layers) -> ReadToken:
    """Read the memory with these `weights` at the query of x `[B, 1, D]`, and write nothing (eq. 15).

    Raises ValueError for weights or a `conv_state` of another layer."""
    (heads, width, _), size = layer.shapes[0], found.numbers[2]
    shapes = [(len(x), *shape) for shape in layer.shapes] + [(len(x), size - 1, heads * width)]
    if (own := [tuple(t.shape) for t in (*weights, conv_state)]) != shapes:
        raise ValueError(f"the state does not fit this memory: its weights and conv_state are {own}, expected {shapes}")
    return ReadToken(*_call(layer, found, x, (conv_state,), (weights,)))


def write_token(
    layer: StepLayer, of_layer: WeightAddresses, x: Tensor, state: NeuralMemoryState, theta: Tensor | None
) -> NeuralMemoryOutput:
    """Write the token x `[B, 1, D]`, and read the memory after it (eqs. 10 to 15). With `theta` `[B, 1, H]`, the step
    that the layer's gate gives for x, also its surprise."""
    found = None if theta is None else Surprise(*(x.new_empty(len(x), 1, layer.num_heads) for _ in range(2)))
    if isinstance(state.memory, FactoredMemory):
        y, state = _write_factors(layer, of_layer, x, state, state.memory, found)
    else:
        y, state = _write_weights(layer, of_layer, x, state, state.memory, found)
    if found is None or theta is None:
        return NeuralMemoryOutput(y, state, None)
    return NeuralMemoryOutput(y, state, with_theta(found, theta, layer.surprise_threshold, None))


def _write_weights(
    layer: StepLayer,
    of_layer: WeightAddresses,
    x: Tensor,
    state: NeuralMemoryState,
    old: MemoryState,
    found: Surprise | None,
) -> tuple[Tensor, NeuralMemoryState]:
    conv_state = state.conv_state

    def update(anchor: Layers) -> TokenUpdate:
        nonlocal conv_state
        weights, momentum = (tuple(map(torch.empty_like, anchor)) for _ in range(2))
        memory = (old.weights, anchor, old.momentum, weights, momentum)
        y, *after = _call(layer, of_layer, x, conv_state, memory, found)
        conv_state = tuple(after)
        return TokenUpdate(y, weights, momentum, found)

    y, memory, _ = advance_token(old, layer.chunk_size, None, update)
    return y, state._replace(memory=memory, conv_state=conv_state)


def _write_factors(
    layer: StepLayer,
    of_layer: WeightAddresses,
    x: Tensor,
    state: NeuralMemoryState,
    old: FactoredMemory,
    found: Surprise | None,
) -> tuple[Tensor, NeuralMemoryState]:
    position, coefficients = torch.empty_like(old.position), torch.empty_like(old.coefficients)
    memory = (old.base_weights, old.base_anchor, old.base_momentum, old.x, old.g)
    of_factors = (old.coefficients, coefficients, old.position, position)
    y, *conv_state = _call(layer, of_layer, x, state.conv_state, memory, found, of_factors)
    new = old._replace(position=position, coefficients=coefficients)
    return y, state._replace(memory=new, conv_state=tuple(conv_state))


def _call(
    layer: StepLayer, weights: WeightAddresses, x: Tensor, conv_state: Sequence[Tensor], memory: tuple[Layers, ...],
    surprise: Surprise | None = None, of_factors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `titans_layer_step`: the layer's output `[B, 1, D]`, and the parts' convolution states after the token.

    `memory` and `of_factors` are what `LayerStepArgs` of csrc/layer_step.h has of the state: w, or also anchor and s,
    then new_w and new_s, or what a memory in factors has, which is written in place."""
    dtype, count, threshold = x.dtype, len(conv_state), layer.surprise_threshold
    batch, past, inner = conv_state[0].shape
    whole, x = weights.is_whole and is_few_rows(x), as_contiguous(x, dtype)
    if whole:
        room = x.new_empty(count + 2, batch, inner)
        *projected, output_gate, y = room.unbind()
        output: Tensor | None = torch.empty_like(x)
    else:
        projections = (layer.q_proj, layer.k_proj, layer.v_proj)[:count]
        projected = [as_contiguous(project(x), dtype) for project in projections]
        output_gate, y, output = as_contiguous(layer.output_gate(x), dtype), x.new_empty(batch, 1, inner), None
        if any(t.shape != y.shape for t in (*projected, output_gate)):
            raise ValueError(f"the projections and the output gate of this memory must return {inner} channels")
    after = x.new_empty(batch, past, count * inner)
    conv_state = [t if t.dtype == dtype and t.stride(2) == 1 else as_contiguous(t, dtype) for t in conv_state]
    inputs = [x, *conv_state, *projected, output_gate, after, y, output, *(surprise or (None, None))]
    parts = [t for part in memory for t in part]
    if of_factors:
        assert all(t.is_contiguous() for t in (*parts, *of_factors))  # a copy would be written, not they
    else:
        parts = [as_contiguous(t, dtype) for t in parts]
    numbers = (
        batch, count, thread_count(sum(t.numel() for t in memory[0])), layer.activation == "gelu",
        threshold is not None, surprise is not None, memory[3][0].shape[2] if of_factors else 0, layer.chunk_size,
        *(t.stride(0) for t in conv_state), *(t.stride(1) for t in conv_state),
        *(0 if t is None else t.data_ptr() for t in inputs), *(t.data_ptr() for t in (*parts, *of_factors)),
    )  # fmt: skip
    of_layer = weights.numbers if whole else _without_linears(weights.numbers)
    scalars = [float(number) for number in (layer.clip or 0, threshold or 0, layer.lr, weights.eps[0])]
    run_step("titans_layer_step", dtype, numbers, of_layer, scalars)
    return layer.o_proj(y) if output is None else output, *after.chunk(count, -1)


def _without_linears(numbers: Any) -> Any:
    """The layer's arguments, where its projections are computed outside."""
    return (ctypes.c_long * len(numbers))(*numbers[:-5], 0, 0, 0, 0, 0)
