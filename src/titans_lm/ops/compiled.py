"""The library that `cpp/` is compiled to, and what is handed to it.

It is compiled when first used, for the machine's own instructions, by the C++ compiler that is there (`$CXX`, else c++,
g++ or clang++), and kept in `$XDG_CACHE_HOME/titans_lm` (~/.cache).
"""

import ctypes
import hashlib
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

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
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
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*texts, " ".join((compiler, *FLAGS)).encode(), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans_lm"
    built = folder / f"memory-{NUMBERS[dtype]}-{key[:16]}.so"
    try:
        if not built.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(compiler, NUMBERS[dtype], built)
        found = ctypes.CDLL(str(built))
    except OSError as error:
        raise NotBuilt(f"could not build or load {built}: {error}") from None
    for name in ("titans_state", "titans_trace"):
        getattr(found, name).restype = ctypes.c_long
    return found


def _processor() -> bytes:
    """What of this machine decides which instructions are its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine()).encode()


def _compile(compiler: str, number: str, built: Path) -> None:
    """Beside `built`, then renamed: several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder, built.name)
        command = (*shlex.split(compiler), *FLAGS, f"-DNumber={number}", str(SOURCES / "memory.cpp"), "-o", str(made))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NotBuilt(f"could not be compiled by {compiler}: {reason}")
        os.replace(made, built)


@cache
def _missing(dtype: torch.dtype) -> str | None:
    try:
        library(dtype)
    except NotBuilt as reason:
        return str(reason)
    return None


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the library cannot work on such tensors, or None."""
    if device.type != "cpu":
        return f"runs on CPUs, got tensors on {device.type}"
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

    def run(self, function: str) -> int:
        return getattr(self.library, function)(ctypes.byref(self.structure(**self.fields))) or 0


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
