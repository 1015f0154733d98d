"""A module's weights are there while it is called: FSDP gathers them then, accelerate loads offloaded ones then, and
adapters and other hooks act then. So whatever uses weights is part of a call, also what is not `forward`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_steps(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`module(..., step="write")` then runs `module._write(...)` as the module's call, in place of its `forward`."""

    @functools.wraps(forward)
    def run(module: nn.Module, *inputs: Any, step: str | None = None, **options: Any) -> Any:
        return (forward if step is None else getattr(type(module), f"_{step}"))(module, *inputs, **options)

    return run


def is_plain(linear: nn.Module) -> bool:
    """Whether its weight and bias are tensors as others, and all there is to it: then several may be one product.

    It is not with an adapter, a hook or a parametrization, or with a weight that is quantized, sharded or offloaded.
    """
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    return all(type(part) in (nn.Parameter, Tensor) for part in (linear.weight, linear.bias))


def at_home(module: nn.Module) -> Tensor:
    """An empty tensor with the dtype and on the device that the module's weights have while it is called."""
    weight = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    device = weight.device
    if device.type == "meta":  # accelerate keeps offloaded weights elsewhere, and knows where they are used
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        used_on = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((torch.device(used) for used in used_on if used is not None), device)
    return torch.empty(0, dtype=weight.dtype, device=device)
