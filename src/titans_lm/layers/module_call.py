"""Methods that run as a call of their module, and what a module's weights are outside a call.

A module's weights are sure to be usable only while the module is called: FSDP gathers sharded weights for the call,
accelerate loads offloaded weights for it, and adapters and other hooks act on it. So every method that uses weights
runs as a call, also the ones that are not `forward`.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"at_home": "empty_like_weights", "is_plain": "is_plain_linear"})

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")


def routes_methods(forward: F) -> F:
    """Decorates `forward`: a call with `method=...` runs that method in place of `forward`. See `as_call`."""

    @functools.wraps(forward)
    def run(module: nn.Module, *inputs: Any, method: Callable[..., Any] | None = None, **options: Any) -> Any:
        return (forward if method is None else method)(module, *inputs, **options)

    return cast(F, run)


def as_call(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Decorates a method: it runs as a call of its module, hooks included. `forward` has to be in `routes_methods`."""

    @functools.wraps(method)
    def run(module: M, *inputs: P.args, **options: P.kwargs) -> Any:
        return module(*inputs, method=method, **options)

    return run


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks of calls of the module itself, by kind."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks at a call of the module itself: a hook, or a `forward` of its own."""
    return "forward" in vars(module) or any(hooks_of(module))


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether a product with its weight and bias is all that a call of it does, so that several may be one product.

    False with an adapter, a hook or a parametrization, and for a weight that is quantized, sharded or offloaded.
    """
    if type(linear) is not nn.Linear or has_hooks(linear):
        return False
    parts = (linear.weight, linear.bias)
    return all(part is None or type(part) in (nn.Parameter, Tensor) for part in parts)


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether a call of it is the RMS norm with its weight alone."""
    return type(norm) is nn.RMSNorm and not has_hooks(norm)


def empty_like_weights(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device that the module's weights have during a call."""
    weight = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    device = weight.device
    if device.type == "meta":  # accelerate offloaded the weights; its hooks know the device of the call
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((torch.device(found) for found in devices if found is not None), device)
    return torch.empty(0, dtype=weight.dtype, device=device)
