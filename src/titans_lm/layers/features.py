"""From projections to queries, keys and values: the short causal convolution (section 4.4 of the paper), SiLU, and for
queries and keys the unit of each head."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_lm.layers.checkpointing import made_again
from titans_lm.ops.cpu.compiled import (
    NativeArgs,
    as_contiguous,
    empty_contiguous,
    fields,
    thread_count,
    unsupported_tensor_reason,
)

Filters = Float[Tensor, "I size"]


class ShortConvolution(nn.Module):
    """A causal convolution along time, one filter for each channel: its filters `[I, size]`."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        size = self.weight.shape[1]
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, x: Tensor) -> Filters:  # noqa: ARG002 - what wraps a module passes an input on
        """The filters, for `features`, which applies those of q, k and v at once."""
        return self.weight


class FirstWeights(nn.ParameterList):
    """M_0, as far as it is learned."""

    __call__ = nn.Module.__call__  # a ParameterList refuses

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG002 - what wraps a module passes an input on
        """A copy: a state lives on when what FSDP gathered for a call is freed."""
        return tuple(weight.clone() for weight in self)


def features(
    past: Float[Tensor, "B S I"], filters: Filters | None, heads: int, head_dim: int, compiled: bool
) -> tuple[Tensor, ...]:
    """q, k, v, or the first of them, each `[B, T, heads, head_dim]`, of the last T = S - size + 1 tokens.

    `past` are their projections side by side, I = 1, 2 or 3 times heads * head_dim, after those of the size - 1 tokens
    before. `compiled`: by compiled code where that can run.
    """
    alike = filters is None or (filters.dtype, filters.device) == (past.dtype, past.device)
    if compiled and alike and unsupported_tensor_reason(past, past.dtype) is None:
        filters = past.new_ones(past.shape[2], 1) if filters is None else filters
        make = _Compiled.apply if torch.is_grad_enabled() else _make
        return make(past, filters, heads, head_dim)
    inputs = (past,) if filters is None else (past, filters)
    return made_again(lambda *inputs: in_eager(*inputs, heads=heads, head_dim=head_dim), *inputs)


def in_eager(past: Tensor, filters: Tensor | None = None, *, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """As `features`, by operations of PyTorch."""
    y = (past if filters is None else convolved(past, filters)).unflatten(-1, (-1, heads, head_dim))
    units, *v = y.split(2, 2)  # apart, for what is kept of v would else be as large as all three
    return *_unit(F.silu(units)).unbind(2), *(F.silu(part.squeeze(2)) for part in v)


def convolved(past: Float[Tensor, "B S I"], filters: Filters) -> Float[Tensor, "B T I"]:
    """Each of the last T tokens and those before it, weighed: sums take half of conv1d's time."""
    taps = filters.to(past.dtype).t()
    length = past.shape[1] - len(taps) + 1
    if length == 1:
        return (past * taps).sum(1, keepdim=True)
    y = past[:, :length] * taps[0]
    for age in range(1, len(taps)):
        y = torch.addcmul(y, past[:, age : age + length], taps[age])
    return y


def _unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in float32 at least; finite gradient at 0."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


# ------------------------------------------------------------------------------------------------ compiled


class _FeatureArgs(ctypes.Structure):
    """`FeatureArgs` of ops/cpu/csrc/token_features.h."""

    _fields_ = (
        *fields(ctypes.c_long, "batch tokens size parts heads width threads"),
        *fields(ctypes.c_void_p, "past filters outputs grad_outputs grad_past grad_filters"),
    )


class FeatureArgs(NativeArgs):
    structure = _FeatureArgs

    @classmethod
    def of(cls, past: Tensor, filters: Tensor, heads: int, head_dim: int) -> "FeatureArgs":
        (batch, slots, channels), size = past.shape, filters.shape[1]
        args = cls(
            past.dtype, batch=batch, tokens=slots - size + 1, size=size, parts=channels // (heads * head_dim),
            heads=heads, width=head_dim, threads=thread_count(batch * slots * channels * size),
        )  # fmt: skip
        args.set_tensors(past=as_contiguous(past, past.dtype), filters=as_contiguous(filters, past.dtype))
        return args


def _make(past: Tensor, filters: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    args = FeatureArgs.of(past, filters, heads, head_dim)
    batch, slots, channels = past.shape
    shape = (batch, slots - filters.shape[1] + 1, heads, head_dim)
    outputs = tuple(past.new_empty(shape) for _ in range(channels // (heads * head_dim)))
    args.set_tensors(outputs=outputs)
    args.run("titans_features_forward")
    return outputs


class _Compiled(torch.autograd.Function):
    """`_make`, with a backward pass, for which its inputs alone are kept."""

    @staticmethod
    def forward(ctx: Any, past: Tensor, filters: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
        ctx.heads = heads, head_dim
        ctx.save_for_backward(past, filters)
        return _make(past, filters, heads, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        past, filters = ctx.saved_tensors
        args = FeatureArgs.of(past, filters, *ctx.heads)
        grad_past, grad_filters = (empty_contiguous(x, past.dtype) for x in (past, filters))
        args.set_tensors(
            grad_outputs=[as_contiguous(x, past.dtype) for x in grad_outputs],
            grad_past=grad_past,
            grad_filters=grad_filters,
        )
        args.run("titans_features_backward")
        return grad_past, grad_filters, None, None
