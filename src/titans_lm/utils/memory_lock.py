"""One process at a time writes a memory file: a lock beside it, which says who holds it.

The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends, so that a file which a
killed process left here stops nobody.
"""

import hashlib
import os
import socket
import sys
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME_BYTES = 255
"""Of a file's name, on the usual file systems."""


def beside(path: Path, ending: str) -> Path:
    """A hidden file in the folder of `path` that belongs to it; its name is never too long."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{ending}"
    return path.with_name(name)


class MemoryLock:
    """A context in which no other process, and no other reader of this one, writes the memory file `memory`.

    Entering raises ValueError, with who holds the lock, where another does; OSError where no file can be made beside
    the memory file. Where the system has no such locks, a warning says so.
    """

    def __init__(self, memory: Path):
        self.memory = memory
        self._path = beside(Path(os.path.realpath(memory)), "lock")
        self._file = -1

    def __enter__(self) -> "MemoryLock":
        if fcntl is None:
            warnings.warn(f"this system cannot lock {self.memory}: let one process at a time write it", stacklevel=2)
            return self
        while self._file < 0:
            self._file = self._locked()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _holder().encode(errors="replace"), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file >= 0:
            with suppress(OSError):
                self._path.unlink()  # who waits with the old file open finds that it is no longer here
            os.close(self._file)
            self._file = -1

    def _locked(self) -> int:
        """The open file with the lock; -1 where it was removed meanwhile, by who held it before."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OSError(f"cannot write {self.memory}: no lock can be made beside it: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                return file
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise ValueError(f"{self.memory} is in use by {holder}; wait until it is done") from None
        except OSError as error:
            warnings.warn(f"{self.memory} cannot be locked ({error.strerror}): let one process write it", stacklevel=3)
            return file
        os.close(file)
        return -1


def _holder() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({command}), since {since}"
