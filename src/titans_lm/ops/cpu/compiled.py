"""The library that `csrc/` is compiled to, loaded, and what is handed to it. How it is compiled: `build.py`."""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from titans_lm.ops.cpu.build import NotBuilt, build, find_compiler

LOG = logging.getLogger(__name__)
FUNCTIONS = [f"titans_{name}" for name in ("state", "trace", "read", "back", "step", "make", "back_make")]
PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = {torch.float32: "float", torch.float64: "double"}
SMALL = 2**20
"""A call of fewer multiplications than this runs on one thread: starting others would take as long."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled sources for numbers of `dtype`. Raises NotBuilt, with the reason, where they cannot be."""
    compiler = find_compiler()
    try:
        return _load(compiler, NUMBERS[dtype])
    except (OSError, RuntimeError, ValueError) as error:  # no file, no home folder, no words of a command
        raise NotBuilt(f"could not build or load compiled code: {error}") from None


def _load(compiler: str, number: str) -> ctypes.CDLL:
    place = build(compiler, number)
    try:
        return _opened(place)
    except OSError:  # of another system with the same home folder
        LOG.info("%s cannot be loaded: building it again", place)
        return _opened(build(compiler, number, anew=True))


def _opened(place: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(place))
    for name in FUNCTIONS:
        getattr(found, name).restype = ctypes.c_long
    return found


@cache
def _missing(dtype: torch.dtype) -> str | None:
    """Found out once in a process: a compiler that comes later is seen by the next."""
    try:
        library(dtype)
    except NotBuilt as reason:
        LOG.info("no compiled code: it %s", reason)
        return str(reason)
    return None


def reason_against(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the library cannot work on tensors such as x, in numbers of `dtype`; or None."""
    if x.device.type != "cpu":
        return f"runs on CPUs, got tensors on {x.device.type}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in PLAIN:
        return "is called with addresses of numbers, which tracing has not"
    return _missing(dtype) if dtype in NUMBERS else f"computes in float32 and float64, got {dtype}"


# ------------------------------------------------------------------------------------------------ what it is handed


class Handed:
    """The fields of one of the library's structures, and what its pointers point to."""

    structure: ClassVar[type[ctypes.Structure]]

    def __init__(self, dtype: torch.dtype, **numbers: int | float):
        self.library = library(dtype)
        self.fields: dict[str, int | float] = numbers
        self.alive: list[Any] = []

    def give(self, **tensors: Tensor | Sequence[Tensor] | None) -> None:
        """Contiguous tensors of the library's dtype, one or several; None is a null pointer."""
        self.alive.append(tensors)
        for name, given in tensors.items():
            if isinstance(given, Tensor):
                self.fields[name] = given.data_ptr()
            elif given is not None:
                self.give_array(name, (ctypes.c_void_p * len(given))(*[x.data_ptr() for x in given]))

    def give_array(self, name: str, array: Any) -> None:
        self.alive.append(array)
        self.fields[name] = ctypes.addressof(array)

    def ask(self, function: str) -> int:
        found: int = getattr(self.library, function)(ctypes.byref(self.structure(**self.fields)))
        return found

    def run(self, function: str) -> None:
        """Raises MemoryError where there is not enough for its buffers."""
        if self.ask(function):
            raise MemoryError(f"{function}: no memory left for its buffers")


def fields(number: Any, names: str) -> list[tuple[str, Any]]:
    """Of a structure: `names`, all of one type."""
    return [(name, number) for name in names.split()]


def threads_for(work: int) -> int:
    """`work`: multiplications."""
    return 1 if work < SMALL else torch.get_num_threads()


def solid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Its numbers one behind the other, in `dtype`."""
    return x if x.dtype == dtype and x.is_contiguous() else x.detach().to(dtype).contiguous()


def solid_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To be filled."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
