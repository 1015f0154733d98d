"""A context in which memories are bypassed: for ablations, and for training the rest of a model first."""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from titans_lm.utils.deprecation import renamed

_bypassed: ContextVar[frozenset[nn.Module]] = ContextVar("bypassed modules", default=frozenset())
_contexts = 0
"""Contexts that are open, in all threads. A compiled graph can depend on this, but not on a ContextVar."""
_lock = threading.Lock()

__getattr__ = renamed(__name__, {"memory_off": "bypass_memory"})


@contextlib.contextmanager
def bypass_memory(model: nn.Module) -> Iterator[None]:
    """Within this context, each `NeuralMemory` of the model returns 0, writes nothing and gets no gradient.

    Contexts nest. They hold for calls from this thread (or this task of asyncio) alone, and not for threads that it
    starts, such as those of `nn.DataParallel`. A compiled model raises RuntimeError while a context is open: call the
    model itself there.
    """
    token = _bypassed.set(_bypassed.get() | frozenset(model.modules()))
    _count_contexts(1)
    try:
        yield
    finally:
        _count_contexts(-1)
        _bypassed.reset(token)


def _count_contexts(change: int) -> None:
    global _contexts
    with _lock:
        _contexts += change


def is_any_bypassed() -> bool:
    """Whether the call at hand is in a `bypass_memory` context of any model."""
    return bool(_bypassed.get())


def is_bypassed(memory: nn.Module) -> bool:
    """Whether the call at hand is in a `bypass_memory` context of a model with this memory."""
    if torch.compiler.is_compiling():
        if _contexts:
            raise RuntimeError("a compiled model has no bypass_memory: call the model itself in this context")
        return False
    return memory in _bypassed.get()
