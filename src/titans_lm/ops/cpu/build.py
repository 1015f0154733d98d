"""Compile `csrc/` to a shared library, cache it, and check the cached file.

The library is compiled at first use, for this machine's instruction set, by `$CXX` or else c++, g++ or clang++. It is
cached in `$XDG_CACHE_HOME/titans_lm` (~/.cache) with its SHA-256 beside it. The process runs this code, so a library
with another digest is built again, and a folder that another user could write to is not used.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"NotBuilt": "NativeBuildError"})

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
ARCH_FLAG = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
FLAGS = ("-O3", ARCH_FLAG, "-std=c++17", "-shared", "-fPIC", "-pthread")
LOCK_SECONDS = 600
"""How long to wait for another process that builds the library."""
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NativeBuildError(Exception):
    """The library could not be built; the message says why."""


def find_compiler() -> str:
    """The compiler's command, possibly with arguments. Raises NativeBuildError if there is none."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NativeBuildError("needs a C++ compiler: c++, g++ or clang++, or the one that CXX names")
    return compiler


def library_path(compiler: str, scalar: str) -> Path:
    """The path of the library for these sources, this compiler and this kind of processor."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*texts, " ".join((compiler, *FLAGS)).encode(), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans_lm"
    return folder / f"memory-{scalar}-{key[:16]}.so"


def _processor() -> bytes:
    """The description of the processor that determines its instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine()).encode()


def build(compiler: str, scalar: str, *, rebuild: bool = False) -> Path:
    """Compile the library unless an intact one is cached, or with `rebuild` in any case. Returns its path.

    Raises NativeBuildError if the compiler fails or the folder is not private to this user, OSError if it cannot be
    written.
    """
    path = library_path(compiler, scalar)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(path.parent)
    if not rebuild and _is_intact(path):
        return path
    with FileLock(path.parent / "lock", timeout=LOCK_SECONDS):
        if rebuild or not _is_intact(path):  # another process may have built it meanwhile
            _remove_leftovers(path.parent)
            _compile(compiler, scalar, path)
    return path


def _compile(compiler: str, scalar: str, path: Path) -> None:
    """Compile to a temporary folder beside `path`, then rename: a file under its final name is always whole."""
    LOG.info("compiling %s with %s: some seconds, once", path, compiler)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        library = Path(folder, path.name)
        command = (
            *shlex.split(compiler),
            *FLAGS,
            f"-DScalar={scalar}",
            str(SOURCES / "memory.cpp"),
            "-o",
            str(library),
        )
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if process.returncode:
            lines = (process.stderr or process.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NativeBuildError(f"could not be compiled by {compiler}: {reason}")
        digest = Path(folder, _digest_path(path).name)
        digest.write_text(_digest(library) + "\n")
        for file in (library, digest):  # if killed in between, the old digest does not match
            file.chmod(0o700)
            os.replace(file, path.parent / file.name)


# ------------------------------------------------------------------------------------------------ the cached files


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_intact(path: Path) -> bool:
    """Whether the library exists, matches its digest, and both files belong to this user alone."""
    digest = _digest_path(path)
    if not path.is_file() or not digest.is_file():
        return False
    if not all(_is_own(file) for file in (path, digest)) or digest.read_bytes().strip() != _digest(path).encode():
        LOG.warning("%s does not match its digest: building it again", path)
        return False
    return True


def _is_own(path: Path) -> bool:
    """Whether the file belongs to this user and nobody else may write to it."""
    status = path.stat()
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & WRITABLE_BY_OTHERS)


def _check_folder(folder: Path) -> None:
    """Raise NativeBuildError if another user could write to the folder, or replace it or a folder above it."""
    reason = None if _is_own(folder) else "another user owns it or may write to it: chmod 700 it, or remove it"
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            reason = f"anyone may write to {parent}"
    if reason is not None:
        LOG.warning("%s is not used, and memories run without compiled code: %s", folder, reason)
        raise NativeBuildError(f"does not use {folder}: {reason}")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of builds that were killed. The caller holds the lock: no build is running."""
    for leftover in folder.glob("tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
