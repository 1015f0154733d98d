"""Lock files, so that one process at a time writes a memory file or a run's folder; and hidden files beside a path."""

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
"""Maximum length of a file name on common file systems."""


def beside(path: Path, ending: str) -> Path:
    """Path of a hidden file beside `path`, with a name that is never too long."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{ending}"
    return path.with_name(name)


class FileLock:
    """A context that holds a lock file for `target`, so that no other process or thread writes it.

    The kernel releases the lock (`flock`) when its process ends, so a file left by a killed process blocks nobody.
    Entering raises ValueError, naming the holder, if the lock is taken, and OSError if no lock file can be made. Warns
    on a system without such locks."""

    def __init__(self, path: Path, target: Path):
        self.path, self.target = path, target
        self._file = -1

    def __enter__(self) -> "FileLock":
        if fcntl is None:
            warnings.warn(f"this system cannot lock {self.target}: let one process at a time write it", stacklevel=2)
            return self
        while self._file < 0:
            self._file = self._locked()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _holder().encode(errors="replace"), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file >= 0:
            with suppress(OSError):
                self.path.unlink()  # a waiter that has the old file open notices that it is gone
            os.close(self._file)
            self._file = -1

    def _locked(self) -> int:
        """The descriptor of the locked file; -1 if the previous holder removed it meanwhile."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OSError(f"cannot write {self.target}: its lock file cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # its holder has just removed it
                if os.path.samestat(os.fstat(file), self.path.stat()):
                    return file
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise ValueError(f"{self.target} is in use by {holder}; wait until it is done") from None
        except OSError as error:
            warnings.warn(f"{self.target} cannot be locked ({error.strerror}): let one process write it", stacklevel=3)
            return file
        os.close(file)
        return -1


class MemoryLock(FileLock):
    """A lock file beside the memory file `memory`. Raises as `FileLock` does."""

    def __init__(self, memory: Path):
        super().__init__(beside(Path(os.path.realpath(memory)), "lock"), memory)

    def __enter__(self) -> "MemoryLock":
        super().__enter__()
        return self


def _holder() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} ({command}), since {since}"
