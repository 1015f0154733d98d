"""One token of a memory layer in compiled code: all between its projections and its output projection, in one call.

A decoded token has little to compute, so that the operations' overhead would count. `NeuralMemory` takes this path
where `is_supported` says so. It equals the layer's own operations.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from titans_lm.layers.memory_state import NeuralMemoryOutput, NeuralMemoryState
from titans_lm.layers.module_call import is_plain_linear, is_plain_norm
from titans_lm.ops import MemoryForm, Surprise
from titans_lm.ops.cpu.compiled import SCALARS, as_contiguous, run, thread_count, unsupported_tensor_reason
from titans_lm.ops.decode import Layers, TokenUpdate, advance_token
from titans_lm.ops.types import is_traced, is_watched


@runtime_checkable  # the tests check annotations as they run
class StepLayer(Protocol):
    """The parts of a `NeuralMemory` that a step uses."""

    num_heads: int
    chunk_size: int
    lr: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    convs: nn.ModuleList | None
    theta: nn.Linear
    eta: nn.Linear | None
    alpha: nn.Linear | None
    output_gate: nn.Linear
    output_norm: nn.RMSNorm

    @property
    def backend(self) -> str: ...
    @property
    def gates_of(self) -> str: ...
    @property
    def predictor(self) -> nn.Module | None: ...
    def form(self) -> MemoryForm: ...


class ReadToken(NamedTuple):
    """What reading one token returns."""

    y: Tensor
    """`[B, 1, I]`, what the heads retrieve, normalised and gated: the input of the output projection."""
    conv_state: Tensor
    """The queries' convolution state after the token, `[B, R, I]`."""


def is_supported(layer: StepLayer, x: Tensor, weights: Sequence[Tensor], valid: Tensor | None) -> bool:
    """Whether compiled code can run the layer's step on x `[B, T, D]`: one token of every row, without gradients, on a
    CPU, in the memory's dtype, where no hook, adapter or mode looks at the operations."""
    if (
        x.shape[1] != 1
        or is_traced(x)
        or valid is not None
        or torch.is_grad_enabled()
        or layer.backend not in ("auto", "native")
    ):
        return False
    if layer.convs is None or layer.predictor is not None or layer.gates_of != "token":
        return False
    if x.dtype not in SCALARS or weights[0].dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    if is_watched() or unsupported_tensor_reason(x, x.dtype) is not None:
        return False
    gates = [gate for gate in (layer.theta, layer.eta, layer.alpha) if gate is not None]
    return all(map(is_plain_linear, gates)) and is_plain_norm(layer.output_norm) and _same_dtype(layer, x.dtype)


def _same_dtype(layer: StepLayer, dtype: torch.dtype) -> bool:
    return (
        layer.theta.weight.dtype == dtype == layer.output_norm.weight.dtype and layer.theta.weight.device.type == "cpu"
    )


def read_token(layer: StepLayer, x: Tensor, conv_state: Tensor, weights: Layers) -> ReadToken:
    """Read the memory with these `weights` at the query of x `[B, 1, D]`, and write nothing (eq. 15)."""
    return ReadToken(*_call(layer, x, (layer.q_proj(x),), (conv_state,), (weights,)))


def write_token(layer: StepLayer, x: Tensor, state: NeuralMemoryState, surprise: bool) -> NeuralMemoryOutput:
    """Write the token x `[B, 1, D]`, and read the memory after it (eqs. 10 to 15): y is as that of `read_token`."""
    projected = tuple(project(x) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    found = Surprise(*(x.new_empty(len(x), 1, layer.num_heads) for _ in range(2))) if surprise else None
    conv_state: Sequence[Tensor] = state.conv_state

    def update(anchor: Layers) -> TokenUpdate:
        nonlocal conv_state
        old, (weights, momentum) = state.memory, (tuple(map(torch.empty_like, anchor)) for _ in range(2))
        memory = (old.weights, anchor, old.momentum, weights, momentum)
        y, *conv_state = _call(layer, x, projected, conv_state, memory, found)
        return TokenUpdate(y, weights, momentum, found)

    y, memory, found = advance_token(state.memory, layer.chunk_size, None, update)
    return NeuralMemoryOutput(y, state._replace(memory=memory, conv_state=tuple(conv_state)), found)


def _call(
    layer: StepLayer, x: Tensor, projected: tuple[Tensor, ...], conv_state: Sequence[Tensor],
    memory: tuple[Layers, ...], surprise: Surprise | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `titans_layer_step`: y `[B, 1, I]`, and the parts' convolution states after the token.

    `memory` is what `LayerStepArgs` of csrc/layer_step.h ends with: w, or also anchor, s, new_w and new_s."""
    assert layer.convs is not None
    form, weights, dtype, count = layer.form(), memory[0], x.dtype, len(projected)
    batch, past, inner = conv_state[0].shape
    y, after = x.new_empty(batch, 1, inner), x.new_empty(batch, past, count * inner)
    gates = (layer.theta, layer.eta, layer.alpha)
    conv_state = [t if t.dtype == dtype and t.stride(2) == 1 else as_contiguous(t, dtype) for t in conv_state]
    inputs: list[Tensor | None] = [as_contiguous(x, dtype), *(as_contiguous(t, dtype) for t in projected), *conv_state]
    inputs += [as_contiguous(conv(x), dtype) for conv, _ in zip(layer.convs, projected, strict=False)]
    inputs += [None if gate is None else as_contiguous(gate.weight, dtype) for gate in gates]
    inputs += [None if gate is None else as_contiguous(gate.bias, dtype) for gate in gates]
    inputs += [None, None] if form.norm is None else [as_contiguous(t, dtype) for t in form.norm]
    inputs += [as_contiguous(t, dtype) for t in (layer.output_norm.weight, layer.output_gate(x))]
    inputs += [after, y, *((None, None) if surprise is None else surprise)]
    inputs += [as_contiguous(t, dtype) for part in memory for t in part]
    numbers = (
        batch, layer.num_heads, len(weights), past + 1, x.shape[-1], count,
        thread_count(sum(t.numel() for t in weights)), form.activation == "gelu", form.threshold is not None,
        surprise is not None, weights[0].shape[-2], *(t.shape[-1] for t in weights),
        *(t.stride(0) for t in conv_state), *(t.stride(1) for t in conv_state),
        *(0 if t is None else t.data_ptr() for t in inputs),
    )  # fmt: skip
    scalars = (form.clip or 0, form.threshold or 0, layer.lr, layer.output_norm.eps or torch.finfo(dtype).eps)
    run("titans_layer_step", dtype, (ctypes.c_long * len(numbers))(*numbers), (ctypes.c_double * 4)(*scalars))
    return y, *after.chunk(count, -1)
