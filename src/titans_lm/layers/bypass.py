"""A context in which memories are bypassed: for ablations, and for training the rest of a model first."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import nn

from titans_lm.utils.deprecation import renamed

_bypassed: ContextVar[frozenset[nn.Module]] = ContextVar("bypassed modules", default=frozenset())

__getattr__ = renamed(__name__, {"memory_off": "bypass_memory"})


@contextlib.contextmanager
def bypass_memory(model: nn.Module) -> Iterator[None]:
    """Within this context, each `NeuralMemory` of the model returns 0, writes nothing and gets no gradient.

    Contexts nest. They hold for calls from this thread (or this task of asyncio) alone, and not for threads that it
    starts, such as those of `nn.DataParallel`.
    """
    token = _bypassed.set(_bypassed.get() | frozenset(model.modules()))
    try:
        yield
    finally:
        _bypassed.reset(token)


def is_bypassed(memory: nn.Module) -> bool:
    """Whether the call at hand is in a `bypass_memory` context of a model with this memory."""
    return memory in _bypassed.get()
