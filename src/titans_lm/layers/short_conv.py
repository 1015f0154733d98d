"""The short causal convolution of queries, keys and values (section 4.4 of the paper), SiLU, and unit length per head.

`qkv_features` runs in compiled C++ where that can run, else in PyTorch operations.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_lm.layers.checkpointing import checkpointed_pure
from titans_lm.ops.cpu.compiled import (
    NativeArgs,
    as_contiguous,
    empty_contiguous,
    fields,
    thread_count,
    unsupported_tensor_reason,
)
from titans_lm.utils.deprecation import renamed

Filters = Float[Tensor, "I size"]

__getattr__ = renamed(
    __name__, {"features": "qkv_features", "in_eager": "eager_features", "convolved": "causal_convolution"}
)


class ShortConvolution(nn.Module):
    """A causal convolution along time, with one filter for each channel: its filters `[I, size]`."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        size = self.weight.shape[1]
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, x: Tensor) -> Filters:  # noqa: ARG002 - wrappers of modules pass an input on
        """The filters. `qkv_features` applies those of q, k and v at once."""
        return self.weight


def qkv_features(
    past: Float[Tensor, "B S I"], filters: Filters | None, heads: int, head_dim: int, compiled: bool
) -> tuple[Tensor, ...]:
    """q, k and v, or the first of them, each `[B, T, heads, head_dim]`, of the last T = S - size + 1 tokens.

    `past` holds their projections side by side, I = 1, 2 or 3 times heads * head_dim, of the size - 1 tokens before
    and then of the T tokens. `filters` None: no convolution. `compiled`: use compiled code where it can run.
    """
    alike = filters is None or (filters.dtype, filters.device) == (past.dtype, past.device)
    if compiled and alike and unsupported_tensor_reason(past, past.dtype) is None:
        filters = past.new_ones(past.shape[2], 1) if filters is None else filters
        run = _CompiledFeatures.apply if torch.is_grad_enabled() else _features_forward
        return run(past, filters, heads, head_dim)
    inputs = (past,) if filters is None else (past, filters)
    return checkpointed_pure(lambda *inputs: eager_features(*inputs, heads=heads, head_dim=head_dim), *inputs)


def eager_features(past: Tensor, filters: Tensor | None = None, *, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """`qkv_features` in PyTorch operations."""
    y = (past if filters is None else causal_convolution(past, filters)).unflatten(-1, (-1, heads, head_dim))
    qk, *v = y.split(2, 2)  # apart, because a view of v would keep all three alive
    return *_unit_length(F.silu(qk)).unbind(2), *(F.silu(part.squeeze(2)) for part in v)


def causal_convolution(past: Float[Tensor, "B S I"], filters: Filters) -> Float[Tensor, "B T I"]:
    """For each of the last T tokens, the weighted sum of it and the tokens before it. Half the time of conv1d."""
    taps = filters.to(past.dtype).t()
    length = past.shape[1] - len(taps) + 1
    if length == 1:
        return (past * taps).sum(1, keepdim=True)
    y = past[:, :length] * taps[0]
    for tap in range(1, len(taps)):
        y = torch.addcmul(y, past[:, tap : tap + length], taps[tap])
    return y


def _unit_length(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in float32 or float64, with a finite gradient at 0."""
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
    """The arguments of the compiled functions."""

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


def _features_forward(past: Tensor, filters: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    args = FeatureArgs.of(past, filters, heads, head_dim)
    batch, slots, channels = past.shape
    shape = (batch, slots - filters.shape[1] + 1, heads, head_dim)
    outputs = tuple(past.new_empty(shape) for _ in range(channels // (heads * head_dim)))
    args.set_tensors(outputs=outputs)
    args.run("titans_features_forward")
    return outputs


class _CompiledFeatures(torch.autograd.Function):
    """`_features_forward` with a backward pass, which needs its inputs alone."""

    @staticmethod
    def forward(ctx: Any, past: Tensor, filters: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
        ctx.heads = heads, head_dim
        ctx.save_for_backward(past, filters)
        return _features_forward(past, filters, heads, head_dim)

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
