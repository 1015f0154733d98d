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
from torch.nn.modules import module as modules

from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"at_home": "empty_like_weights", "is_plain": "is_plain_linear"})

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")

PLAIN_WEIGHTS = (nn.Parameter, Tensor)
HOOKS_OF_ALL: list[dict[int, Any]] = [
    modules._global_forward_hooks, modules._global_forward_pre_hooks,
    modules._global_backward_hooks, modules._global_backward_pre_hooks,
]  # fmt: skip
"""The hooks of calls of every module."""


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
    """Whether something looks at a call of the module itself: a hook, also one of all modules, or a `forward` of its
    own."""
    return "forward" in vars(module) or any(hooks_of(module)) or any(HOOKS_OF_ALL)


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether a product with its weight and bias is all that a call of it does, so that several may be one product.

    False with an adapter, a hook or a parametrization, and for a weight that is quantized, sharded or offloaded.
    """
    if type(linear) is not nn.Linear or has_hooks(linear):
        return False
    parts = (linear.weight, linear.bias)
    return all(part is None or type(part) in PLAIN_WEIGHTS for part in parts)


def is_plain_matrix(linear: nn.Module, shape: tuple[int, int]) -> bool:
    """Whether a product with its weight of this shape is all that a call of it does."""
    return is_plain_linear(linear) and linear.bias is None and linear.weight.shape == shape


def is_plain_norm(norm: nn.Module, width: int) -> bool:
    """Whether a call of it is the RMS norm of this width with its weight alone."""
    if type(norm) is not nn.RMSNorm or has_hooks(norm):
        return False
    return type(norm.weight) in PLAIN_WEIGHTS and norm.weight.shape == (width,)


def eps_of(norm: nn.RMSNorm) -> float:
    """The epsilon that a call of the norm takes."""
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


def empty_like_weights(module: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device that the module's weights have during a call."""
    weight = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    device = weight.device
    if device.type == "meta":  # accelerate offloaded the weights; its hooks know the device of the call
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((torch.device(found) for found in devices if found is not None), device)
    return torch.empty(0, dtype=weight.dtype, device=device)
