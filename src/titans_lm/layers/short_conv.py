"""The short causal convolution of queries, keys and values (section 4.4 of the paper), SiLU, and unit length per head.

`qkv_features` runs in compiled C++ where that can run, else in PyTorch operations.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from titans_lm.layers.checkpointing import checkpointed_pure
from titans_lm.ops import gather_tokens
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.cpu.compiled import (
    SCALARS,
    NativeArgs,
    as_contiguous,
    empty_contiguous,
    fields,
    thread_count,
    unsupported_tensor_reason,
)
from titans_lm.ops.library import LIBRARY, define_operator, recorded_by_autograd
from titans_lm.ops.types import is_traced, is_watched
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


def continue_features(
    y: Float[Tensor, "B T I"], conv_state: tuple[Tensor, ...], filters: Filters | None, heads: int, head_dim: int,
    valid: Tensor | None, compiled: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """`qkv_features` of the projections y, side by side, after each part's `conv_state`; and the `conv_state` after.

    `valid` `[B, T]` is True for each row's first tokens; None: all are valid."""
    length, past = y.shape[1], torch.cat([torch.cat(conv_state, -1).to(y.dtype), y], 1)  # [B, R + T, I]
    features = qkv_features(past, filters, heads, head_dim, compiled)
    if valid is None:
        after = past[:, length:] if length == 1 else past[:, length:].clone()  # a view would keep all of past
    else:
        token = valid.sum(1)[:, None] + torch.arange(conv_state[0].shape[1], device=y.device)
        after = gather_tokens(past, token)
    return features, after.chunk(len(conv_state), -1)


def qkv_features(
    past: Float[Tensor, "B S I"], filters: Filters | None, heads: int, head_dim: int, compiled: bool
) -> tuple[Tensor, ...]:
    """q, k and v, or the first of them, each `[B, T, heads, head_dim]`, of the last T = S - size + 1 tokens.

    `past` holds their projections side by side, I = 1, 2 or 3 times heads * head_dim, of the size - 1 tokens before
    and then of the T tokens. `filters` None: no convolution. `compiled`: use compiled code where it can run.
    """
    alike = filters is None or (filters.dtype, filters.device) == (past.dtype, past.device)
    traced, compiled = is_traced(past), compiled and alike
    if compiled and (_is_for_operator(past) if traced else unsupported_tensor_reason(past, past.dtype) is None):
        filters = past.new_ones(past.shape[2], 1) if filters is None else filters
        if traced or is_watched():
            return tuple(torch.ops.titans_lm.features(past, filters, heads, head_dim))
        run = _CompiledFeatures.apply if torch.is_grad_enabled() else _features_forward
        return run(past, filters, heads, head_dim)
    inputs = (past,) if filters is None else (past, filters)
    if traced:  # what traces a call decides itself what it recomputes
        return eager_features(*inputs, heads=heads, head_dim=head_dim)
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
        (past, filters), (heads, head_dim) = ctx.saved_tensors, ctx.heads
        return *_features_backward(past, filters, heads, head_dim, grad_outputs), None, None


def _features_backward(
    past: Tensor, filters: Tensor, heads: int, head_dim: int, grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    args = FeatureArgs.of(past, filters, heads, head_dim)
    grad_past, grad_filters = (empty_contiguous(x, past.dtype) for x in (past, filters))
    args.set_tensors(
        grad_outputs=[as_contiguous(x, past.dtype) for x in grad_outputs],
        grad_past=grad_past,
        grad_filters=grad_filters,
    )
    args.run("titans_features_backward")
    return grad_past, grad_filters


# ------------------------------------------------------------------------------------------------ operators


def _is_for_operator(past: Tensor) -> bool:
    """Whether a traced call takes the operator; elsewhere a compiler of graphs has operations that it can fuse."""
    return past.device.type == "cpu" and past.dtype in SCALARS


def _operator(past: Tensor, filters: Tensor, heads: int, head_dim: int) -> list[Tensor]:
    if unsupported_tensor_reason(past, past.dtype) is None:
        return list(_features_forward(past, filters, heads, head_dim))
    return [x.contiguous() for x in eager_features(past, filters, heads=heads, head_dim=head_dim)]


def _operator_fake(past: Tensor, filters: Tensor, heads: int, head_dim: int) -> list[Tensor]:
    batch, slots, channels = past.shape
    shape = (batch, slots - filters.shape[1] + 1, heads, head_dim)
    return [past.new_empty(shape) for _ in range(int(channels // (heads * head_dim)))]


def _operator_backward(
    past: Tensor, filters: Tensor, heads: int, head_dim: int, grad_outputs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    if unsupported_tensor_reason(past, past.dtype) is None:
        return _features_backward(past, filters, heads, head_dim, grad_outputs)
    with recorded_by_autograd():
        leaves = [x.detach().requires_grad_() for x in (past, filters)]
        outputs = eager_features(*leaves, heads=heads, head_dim=head_dim)
        grad_past, grad_filters = torch.autograd.grad(outputs, leaves, grad_outputs)
    return grad_past.contiguous(), grad_filters.contiguous()


def _operator_backward_fake(
    past: Tensor,
    filters: Tensor,
    heads: int,  # noqa: ARG001
    head_dim: int,  # noqa: ARG001
    grad_outputs: list[Tensor],  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return empty_contiguous(past, past.dtype), empty_contiguous(filters, past.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    ctx.heads = inputs[2:]
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return *torch.ops.titans_lm.features_backward(*ctx.saved_tensors, *ctx.heads, list(grads)), None, None


define_operator(
    "features", "(Tensor past, Tensor filters, SymInt heads, SymInt head_dim) -> Tensor[]", _operator, _operator_fake
)
define_operator(
    "features_backward",
    "(Tensor past, Tensor filters, SymInt heads, SymInt head_dim, Tensor[] grads) -> (Tensor, Tensor)",
    _operator_backward,
    _operator_backward_fake,
)
torch.library.register_autograd("titans_lm::features", _differentiate, setup_context=_setup_context, lib=LIBRARY)


@register_flop_formula(torch.ops.titans_lm.features)
def features_flops(past: Sequence[int], filters: Sequence[int], *_: Any, **__: Any) -> int:
    """The convolution's."""
    (batch, slots, channels), size = past, filters[1]
    return 2 * batch * (slots - size + 1) * channels * size


@register_flop_formula(torch.ops.titans_lm.features_backward)
def features_backward_flops(*arguments: Any, **_: Any) -> int:
    """By the inputs, by the filters, and the convolution once more, of which nothing is saved."""
    return 3 * features_flops(*arguments)
