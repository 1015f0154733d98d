"""Load the library that `build.py` compiles, and pass arguments to its functions."""

import contextlib
import ctypes
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from titans_lm.ops.cpu.build import NativeBuildError, build, find_compiler
from titans_lm.ops.types import is_traced

LOG = logging.getLogger(__name__)
FUNCTIONS = [
    f"titans_{name}"
    for name in ("state_size", "saved_size", "forward", "backward", "decode", "layer_step", "linears", "residual_mlp",
                 "product_gate", "convex_gate", "rms_norm", "add", "attention_step", "replay", "features_forward",
                 "features_backward", "layer_forward", "layer_backward", "segments_forward", "segments_backward")
]  # fmt: skip


class StepRecorder(Protocol):
    """What notes the steps of a token. See `recorder.py`."""

    is_complete: bool

    def note_step(self, function: Any, numbers: Any, of_layer: Any, scalars: Any) -> None: ...
    def note_weights(self, weights: Any) -> None: ...
    def note_places(self, cache: Any) -> None: ...


recording: ContextVar[StepRecorder | None] = ContextVar("recorder of steps", default=None)
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
SCALARS = {torch.float32: "float", torch.float64: "double"}
SINGLE_THREAD_WORK = 2**20
"""A call of fewer multiplications than this runs on one thread: starting others would take as long."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The library for scalars of `dtype`. Raises NativeBuildError with the reason if it cannot be built or loaded."""
    compiler = find_compiler()
    try:
        return _load(compiler, SCALARS[dtype])
    except (OSError, RuntimeError, ValueError) as error:  # no file, no home folder, a command that cannot be parsed
        raise NativeBuildError(f"could not build or load compiled code: {error}") from None


def _load(compiler: str, scalar: str) -> ctypes.CDLL:
    path = build(compiler, scalar)
    try:
        return _open(path)
    except OSError:  # another system built it, with the same home folder
        LOG.info("%s cannot be loaded: building it again", path)
        return _open(build(compiler, scalar, rebuild=True))


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in FUNCTIONS:
        getattr(library, name).restype = ctypes.c_long
    return library


@cache
def _build_failure(dtype: torch.dtype) -> str | None:
    """Why the library cannot be built, or None. Cached: a compiler installed later is used by the next process."""
    try:
        library(dtype)
    except NativeBuildError as reason:
        LOG.info("compiled code is not used: it %s", reason)
        return str(reason)
    return None


def unsupported_tensor_reason(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why the library cannot run on tensors such as x, with scalars of `dtype`; None if it can."""
    if x.device.type != "cpu":
        return f"runs on CPUs, got tensors on {x.device.type}"
    if torch.jit.is_tracing() or not (type(x) in PLAIN_TENSORS or is_traced(x)):
        return "is called with addresses of tensors, which tracing does not have"
    if forward_ad._current_level >= 0:
        return "has no forward-mode derivatives"
    return _build_failure(dtype) if dtype in SCALARS else f"computes in float32 and float64, got {dtype}"


# ------------------------------------------------------------------------------------------------ arguments


class NativeArgs:
    """The fields of one of the library's structures, and references to the tensors that its pointers point to."""

    structure: ClassVar[type[ctypes.Structure]]

    def __init__(self, dtype: torch.dtype, **numbers: int | float):
        self.library = library(dtype)
        self.fields: dict[str, int | float] = numbers
        self.references: list[Any] = []

    def set_tensors(self, **tensors: Tensor | Sequence[Tensor] | None) -> None:
        """Set pointers to contiguous tensors of the library's dtype, or to arrays of them; None is a null pointer."""
        self.references.append(tensors)
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                self.fields[name] = value.data_ptr()
            elif value is not None:
                self.set_array(name, (ctypes.c_void_p * len(value))(*[x.data_ptr() for x in value]))

    def set_array(self, name: str, array: Any) -> None:
        self.references.append(array)
        self.fields[name] = ctypes.addressof(array)

    def call(self, function: str) -> int:
        """Call a function of the library with the structure; return its result."""
        result: int = getattr(self.library, function)(ctypes.byref(self.structure(**self.fields)))
        return result

    def run(self, function: str) -> None:
        """`run` of a function with the structure."""
        _run(self.library, function, ctypes.byref(self.structure(**self.fields)))


def run(function: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a function that returns an error code, of the library for `dtype`. Raises MemoryError if its buffers could
    not be allocated."""
    _run(library(dtype), function, *arguments)


def run_step(
    function: str, dtype: torch.dtype, numbers: Sequence[int], of_layer: Any = None, scalars: Sequence[float] = ()
) -> None:
    """`run` of a step of a decoded token, whose arguments are `numbers`, those that its layer always has, and scalars.
    An active recorder notes it."""
    arguments = ((ctypes.c_long * len(numbers))(*numbers), of_layer, (ctypes.c_double * len(scalars))(*scalars))
    if (recorder := recording.get()) is not None:
        recorder.note_step(getattr(library(dtype), function), *arguments)
    _run(library(dtype), function, *arguments)


def _run(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    profiled = torch.autograd._profiler_enabled()
    with torch.profiler.record_function(function) if profiled else contextlib.nullcontext():
        failed = getattr(library, function)(*arguments)
    if failed:
        raise MemoryError(f"{function}: its buffers could not be allocated")


def fields(scalar: Any, names: str) -> list[tuple[str, Any]]:
    """The fields `names` of a structure, all of one type."""
    return [(name, scalar) for name in names.split()]


def thread_count(work: int) -> int:
    """Threads for a call of `work` multiplications."""
    return 1 if work < SINGLE_THREAD_WORK else torch.get_num_threads()


def as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a contiguous tensor of `dtype`, itself if it is one."""
    return x if x.dtype == dtype and x.is_contiguous() else x.detach().to(dtype).contiguous()


def empty_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty contiguous tensor of x's shape."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
