"""The namespace `torch.ops.titans_lm`, and how an operator is defined in it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from titans_lm.ops.autograd import refuse_second_derivative

LIBRARY = torch.library.Library("titans_lm", "DEF")


def define_operator(name: str, signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define and return `titans_lm::name`: its implementation for all devices, and that for tensors of shapes alone.

    An operator `*_backward` has no derivative."""
    LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"titans_lm::{name}", fake, lib=LIBRARY)
    if name.endswith("_backward"):
        torch.library.register_autograd(f"titans_lm::{name}", refuse_second_derivative, lib=LIBRARY)
    return getattr(torch.ops.titans_lm, name)


@contextlib.contextmanager
def recorded_by_autograd() -> Iterator[None]:
    """Autograd as in an eager call, within the implementation of an operator, which runs below autograd."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield
