"""The library that `csrc/` is compiled to: where it is kept, and how it is known to be whole.

It is compiled when first used, for the machine's own instructions, by the C++ compiler that is there (`$CXX`, else c++,
g++ or clang++), and kept in `$XDG_CACHE_HOME/titans_lm` (~/.cache) with its SHA-256 beside it. What lies there is code
that this process will run: a library whose digest differs is built again, and a folder that another user could write
to is not used.
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

LOG = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
NATIVE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
FLAGS = ("-O3", NATIVE, "-std=c++17", "-shared", "-fPIC", "-pthread")
LOCK_SECONDS = 600
"""How long to wait for another process that is building."""
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotBuilt(Exception):
    """Why there is no library."""


def find_compiler() -> str:
    """The command, possibly with arguments. Raises NotBuilt where there is none."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NotBuilt("needs a C++ compiler: c++, g++ or clang++, or the one that CXX names")
    return compiler


def library_path(compiler: str, number: str) -> Path:
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


def build(compiler: str, number: str, *, anew: bool = False) -> Path:
    """The library's file, compiled if it is not there or not as it was built (`anew`: in any case).

    Raises NotBuilt where the compiler fails or the folder is not this user's alone; OSError for what cannot be written.
    """
    place = library_path(compiler, number)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(place.parent)
    if not anew and _is_intact(place):
        return place
    with FileLock(place.parent / "lock", timeout=LOCK_SECONDS):
        if anew or not _is_intact(place):  # another process may have built it meanwhile
            _remove_leftovers(place.parent)
            _compile(compiler, number, place)
    return place


def _compile(compiler: str, number: str, place: Path) -> None:
    """Elsewhere in the folder, then renamed: a file under its own name is always whole."""
    LOG.info("compiling %s with %s: some seconds, once", place, compiler)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder, place.name)
        command = (*shlex.split(compiler), *FLAGS, f"-DNumber={number}", str(SOURCES / "memory.cpp"), "-o", str(made))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NotBuilt(f"could not be compiled by {compiler}: {reason}")
        digest = Path(folder, _digest_path(place).name)
        digest.write_text(_digest(made) + "\n")
        for file in (made, digest):  # killed in between: the digest is that of the one before, which is seen
            file.chmod(0o700)
            os.replace(file, place.parent / file.name)


# ------------------------------------------------------------------------------------------------ what lies there


def _digest_path(place: Path) -> Path:
    return place.with_name(f"{place.name}.sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_intact(place: Path) -> bool:
    """Whether the library is there, byte for byte as it was built, and both files are this user's alone."""
    digest = _digest_path(place)
    if not place.is_file() or not digest.is_file():
        return False
    if not all(_is_own(file) for file in (place, digest)) or digest.read_bytes().strip() != _digest(place).encode():
        LOG.warning("%s is not as it was built: building it again", place)
        return False
    return True


def _is_own(path: Path) -> bool:
    """Belongs to this user, and nobody else may write to it."""
    found = path.stat()
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE)


def _check_folder(folder: Path) -> None:
    """Raises NotBuilt where another user could put a file, or a folder above could be exchanged."""
    reason = None if _is_own(folder) else "another user owns it or may write to it: chmod 700 it, or remove it"
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            reason = f"anyone may write to {parent}"
    if reason is not None:
        LOG.warning("%s is not used, and memories run without compiled code: %s", folder, reason)
        raise NotBuilt(f"does not use {folder}: {reason}")


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of builds that were killed. The caller holds the lock: nothing is being built."""
    for left in folder.glob("tmp*"):
        shutil.rmtree(left, ignore_errors=True)
