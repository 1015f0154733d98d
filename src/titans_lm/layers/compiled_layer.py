"""A memory layer in compiled code: projections, gates, convolutions, the scan and its output, in one call.

The tokens go through all of it group by group, so that what a group shares stays in a cache. `NeuralMemory` takes this
path where `is_supported` says so. It equals the layer's own operations. The state before each group is saved, and the
backward pass runs the memory's chunks again.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titans_lm.layers.compiled_call import (
    LayerArgs,
    LayerInputs,
    LayerSaved,
    Options,
    Parts,
    ScanLayer,
    by_weight,
    contiguous,
    gates_of,
    grads_or_zeros,
)
from titans_lm.layers.memory_state import NeuralMemoryOutput, NeuralMemoryState
from titans_lm.layers.module_call import has_hooks, is_plain_linear, is_plain_matrix, is_plain_norm
from titans_lm.ops import MemoryState
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.chunked.scan import MAX_CHUNK
from titans_lm.ops.cpu.compiled import unsupported_tensor_reason
from titans_lm.ops.types import has_values, is_watched

GROUP_TOKENS = 256
"""About the tokens of a group."""
MIN_TOKENS = 256
"""Fewer tokens are not worth the copy of the weights that the compiled products read."""


def is_plain(layer: ScanLayer, x: Tensor, state: NeuralMemoryState) -> bool:
    """Whether compiled code can run chunks of x `[B, T, D]` after `state`: on a CPU, in the memory's dtype, where no
    hook, adapter or mode looks at the operations."""
    if not has_values(x) or is_watched() or layer.backend not in ("auto", "native") or layer.convs is None:
        return False
    if layer.predictor is not None or layer.gates_of != "token" or not 1 < layer.chunk_size <= MAX_CHUNK:
        return False
    if torch.is_autocast_enabled(x.device.type) or unsupported_tensor_reason(x, x.dtype) is not None:
        return False
    if not layer._state_shapes.fits(state, len(x)):  # the layer's own operations raise its error
        return False
    tensors = [*layer.parameters(), *itertools.chain(*state.memory[:3]), *state.conv_state]
    if not all(t.dtype == x.dtype and t.device == x.device for t in tensors) or any(map(has_hooks, layer.convs)):
        return False
    return _has_plain_weights(layer, x.shape[2])


def _has_plain_weights(layer: ScanLayer, dim: int) -> bool:
    """Whether products with weights of the expected shapes, and the gates' biases, are all that the layer's modules
    do."""
    inner, gates = layer.num_heads * layer.shapes[0][1], gates_of(layer)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.output_gate)
    return (
        all(is_plain_matrix(projection, (inner, dim)) for projection in projections)
        and is_plain_matrix(layer.o_proj, (dim, inner))
        and all(is_plain_linear(gate) and gate.bias is not None for gate in gates)
        and all(gate.weight.shape == (layer.num_heads, dim) for gate in gates)
        and is_plain_norm(layer.output_norm, layer.shapes[-1][-1])
    )


def is_supported(layer: ScanLayer, x: Tensor, state: NeuralMemoryState, valid: Tensor | None) -> bool:
    """Whether compiled code can run the layer on x `[B, T, D]` after `state`, all rows at one place of a chunk."""
    if valid is not None or not has_values(x) or x.shape[1] < MIN_TOKENS or not is_plain(layer, x, state):
        return False
    position = state.memory.position
    return len(position) > 0 and bool((position == position[0]).all()) and _parts(layer, x, state).whole > 0


def _parts(layer: ScanLayer, x: Tensor, state: NeuralMemoryState) -> Parts:
    lead = -int(state.memory.position[0]) % layer.chunk_size
    whole = max(x.shape[1] - lead, 0) // layer.chunk_size * layer.chunk_size
    return Parts(lead, whole, x.shape[1] - lead - whole)


def run(layer: ScanLayer, x: Tensor, state: NeuralMemoryState) -> NeuralMemoryOutput:
    """The layer's output at x `[B, T, D]` and the state after it."""
    flat, parts = (x, *LayerInputs.of(layer, state).flatten()), _parts(layer, x, state)
    size = layer.chunk_size * max(1, GROUP_TOKENS // layer.chunk_size)
    m, conv_state, *ends = _Layer.apply(Options.of(layer, size, parts, flat), *flat)
    return NeuralMemoryOutput(m, after(state, conv_state, ends, parts.tail), None)


def after(state: NeuralMemoryState, conv_state: Tensor, ends: Sequence[Tensor], tail: int) -> NeuralMemoryState:
    """The state after a call, from what it returns; `tail` tokens of a chunk are read."""
    layers = len(ends) // 3
    anchor, weights, momentum = (tuple(ends[i * layers : (i + 1) * layers]) for i in range(3))
    memory = MemoryState(anchor if tail else weights, weights, momentum, torch.full_like(state.memory.position, tail))
    return state._replace(memory=memory, conv_state=conv_state.chunk(3, -1))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, *flat: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        (tokens,), inputs = contiguous([x]), LayerInputs.unflatten(flat)
        saved, m = LayerSaved.empty(options, inputs, x.shape[1]), torch.empty_like(tokens)
        args = LayerArgs.of_call(options, inputs, saved, tokens)
        args.set_tensors(m=m)
        ends = args.forward("titans_layer_forward", saved, inputs)
        if options.saves:
            ctx.options, ctx.count = options, len(flat)
            ctx.save_for_backward(x, *flat, *saved)
        return m, saved.conv_state(inputs.conv_state), *ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_m: Tensor | None, *grad_ends: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        (x,) = contiguous([x])
        inputs, saved = LayerInputs.unflatten(rest[: ctx.count]), LayerSaved(*rest[ctx.count :])
        like = (x, inputs.conv_state, *inputs.anchor, *inputs.weights, *inputs.momentum)
        grad_m, *ends = grads_or_zeros((grad_m, *grad_ends), like)
        args, grad_x = LayerArgs.of_call(ctx.options, inputs, saved, x), torch.empty_like(x)
        args.set_tensors(grad_x=grad_x)
        found = args.backward("titans_layer_backward", inputs, saved, grad_m, ends)
        return None, grad_x, *found.by_inputs(inputs, x, by_weight(grad_m, saved.gated)).flatten()
