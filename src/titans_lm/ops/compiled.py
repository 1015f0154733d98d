"""The library that `cpp/` is compiled to, and what is handed to it.

It is compiled when first used, for the machine's own instructions, by the C++ compiler that is there (`$CXX`, else c++,
g++ or clang++), and kept in `$XDG_CACHE_HOME/titans_lm` (~/.cache).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "cpp"
NATIVE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
FLAGS = ("-O3", NATIVE, "-std=c++17", "-shared", "-fPIC", "-pthread")
FUNCTIONS = [f"titans_{name}" for name in ("state", "trace", "read", "back", "step", "make", "back_make")]
PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = {torch.float32: "float", torch.float64: "double"}
SMALL = 2**20
"""A call of fewer multiplications than this runs on one thread: starting others would take as long."""


class NotBuilt(Exception):
    """Why there is no library."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled sources for numbers of `dtype`. Raises NotBuilt, with the reason, where they cannot be."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NotBuilt("needs a C++ compiler: c++, g++ or clang++, or the one that CXX names")
    try:
        return _load(_place(compiler, NUMBERS[dtype]), compiler, NUMBERS[dtype])
    except (OSError, RuntimeError, ValueError) as error:  # no file, no home folder, no words of a command
        raise NotBuilt(f"could not build or load compiled code: {error}") from None


def _place(compiler: str, number: str) -> Path:
    """Where the library is kept: one for each state of the sources, compiler's name and kind of processor."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*texts, " ".join((compiler, *FLAGS)).encode(), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans_lm"
    return folder / f"memory-{number}-{key[:16]}.so"


def _processor() -> bytes:
    """What of this machine decides which instructions are its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine()).encode()


def _load(place: Path, compiler: str, number: str) -> ctypes.CDLL:
    if place.exists():
        try:
            return _opened(place)
        except OSError:  # of another system with the same home folder: built anew
            LOG.info("%s cannot be loaded", place)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _compile(compiler, number, place)
    return _opened(place)


def _opened(place: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(place))
    for name in FUNCTIONS:
        getattr(found, name).restype = ctypes.c_long
    return found


def _compile(compiler: str, number: str, place: Path) -> None:
    """Beside `place`, then renamed: several processes may do so at once."""
    LOG.info("compiling %s with %s: some seconds, once", place, compiler)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder, place.name)
        command = (*shlex.split(compiler), *FLAGS, f"-DNumber={number}", str(SOURCES / "memory.cpp"), "-o", str(made))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NotBuilt(f"could not be compiled by {compiler}: {reason}")
        os.replace(made, place)


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
