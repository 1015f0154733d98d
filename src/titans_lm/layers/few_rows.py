"""Linear layers of few rows, as decoding has them, in compiled code: it reads weights from memory two to three times as
fast as the products of a BLAS library, which are made for many rows."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from titans_lm.layers.module_call import is_plain_linear
from titans_lm.layers.weight_addresses import WeightAddresses, addresses_of
from titans_lm.ops.cpu.compiled import (
    SCALARS,
    as_contiguous,
    recording,
    run_step,
    thread_count,
    unsupported_tensor_reason,
)
from titans_lm.ops.types import is_watched

L = TypeVar("L")

MAX_ROWS = 8
MAX_THREADS = 2
"""A BLAS library shares its products among more threads with less delay."""


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Each of the modules' module(x), for x `[B, T, D]`: in one compiled call, if x has few rows and the modules do
    nothing else."""
    if not (runs_compiled(x) and is_few_rows(x) and all(_is_plain(module, x) for module in modules)):
        return tuple(module(x) for module in modules)
    if (recorder := recording.get()) is not None:
        recorder.is_complete = False  # nothing would notice that a weight has moved
    x, rows = as_contiguous(x, x.dtype), x.shape[0] * x.shape[1]
    numbers: list[int] = []
    outputs: list[Tensor] = []
    work = 0
    for module in modules:
        weight, bias = cast(nn.Linear, module).weight, cast(nn.Linear, module).bias
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        numbers += (weight.shape[0], weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
        outputs.append(y)
        work += weight.numel()
    numbers = [rows, x.shape[2], thread_count(work), len(outputs), x.data_ptr(), *numbers]
    run_step("titans_linears", x.dtype, numbers)
    return tuple(outputs)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x), for x `[B, T, D]`: compiled, if it is an `nn.RMSNorm` and x has few rows."""
    found = few_rows_weights(x, norm, _describe_norm)
    if found is None:
        y: Tensor = norm(x)
        return y
    x = as_contiguous(x, x.dtype)
    y = torch.empty_like(x)
    numbers = (x.shape[0] * x.shape[1], x.shape[2], x.data_ptr(), *found.numbers, y.data_ptr())
    run_step("titans_rms_norm", x.dtype, numbers, scalars=found.eps)
    return y


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, for x `[B, T, D]`: compiled, if x has few rows and y is like it."""
    if x.shape != y.shape or x.dtype != y.dtype or not (runs_compiled(x) and is_few_rows(x)):
        return x + y
    x, y, z = as_contiguous(x, x.dtype), as_contiguous(y, x.dtype), x.new_empty(x.shape)
    run_step("titans_add", x.dtype, (z.numel(), x.data_ptr(), y.data_ptr(), z.data_ptr()))
    return z


def _describe_norm(norm: nn.Module, found: WeightAddresses) -> None:
    found.check(norm, nn.RMSNorm)
    assert isinstance(norm, nn.RMSNorm)
    found.width = norm.normalized_shape[-1]
    found.numbers = (found.norm_weight(norm, found.width),)


def few_rows_weights(x: Tensor, layer: L, describe: Callable[[L, WeightAddresses], None]) -> WeightAddresses | None:
    """The layer's weights, if compiled code can run on them and x `[B, T, D]`, and is worth it; else None."""
    if not (runs_compiled(x) and is_few_rows(x)):
        return None
    found = addresses_of(layer, describe)
    return found if found is not None and found.dtype == x.dtype and found.width == x.shape[2] else None


def is_few_rows(x: Tensor) -> bool:
    """Whether x `[B, T, D]` is a token of so few rows that compiled code is faster, if it can run. Several tokens are
    read by the modules, so that they are to the bit what they are with gradients."""
    return x.dim() == 3 and x.shape[1] == 1 and 0 < x.shape[0] <= MAX_ROWS and torch.get_num_threads() <= MAX_THREADS


def runs_compiled(x: Tensor) -> bool:
    """Whether compiled code can run on x: without gradients, on a CPU, where no mode looks at the operations."""
    if type(x) is not Tensor or not x.is_cpu or x.dtype not in SCALARS or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or is_watched() or torch.is_autocast_enabled("cpu"):
        return False
    return unsupported_tensor_reason(x, x.dtype) is None


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether a product with its weight, and a bias, is all that the module does to x."""
    if not is_plain_linear(module):
        return False
    weight, bias = cast(nn.Linear, module).weight, cast(nn.Linear, module).bias
    if weight.dtype != x.dtype or weight.shape[1] != x.shape[-1] or not weight.is_cpu or not weight.is_contiguous():
        return False
    return bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
