"""Result files: what was found, with when, where and from which source; written whole or not at all. Also the process
that a command is."""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from titans_lm.utils.memory_lock import beside


def provenance(command: str) -> dict[str, str]:
    """The command, the day, the commit, the machine and the torch that made a result."""
    import torch  # what else is here, the command line needs before a verb's torch

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """ "unknown" without git, or where the package is not in a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; `number` says which one."""

    def __init__(self, number: int, *words: str):
        super().__init__(*words)
        self.number = number

    @classmethod
    def status(cls, interruption: BaseException) -> int:
        """128 and the signal's number, as a shell has it; of another KeyboardInterrupt that of the one it came from."""
        cause: BaseException | None = interruption
        while cause is not None:
            if isinstance(cause, cls):
                return 128 + cause.number
            cause = cause.__context__
        return 128 + signal.SIGINT


def stop(number: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler
    """Ends what runs here as Ctrl-C does."""
    raise Stopped(number)


@contextlib.contextmanager
def on_stop(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP call `handler` within. One that is ignored, as SIGHUP under nohup, stays ignored.
    Python has handlers in the main thread only; elsewhere nothing changes."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if here and signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line(verb: str, arguments: argparse.Namespace, positional: Iterable[str] = ()) -> str:
    """`titans VERB ...` in full, defaults too. `positional` are the arguments whose names are not written."""
    words = ["titans", *verb.split()]
    for name in positional:
        value = getattr(arguments, name)
        words += map(str, value if isinstance(value, list) else [value])
    for name, value in vars(arguments).items():
        flag = f"--{'set' if name == 'changes' else name.replace('_', '-')}"
        if name in (*positional, "what") or value is None or value is False:
            continue
        if name == "changes":
            words += [word for change in value for word in (flag, change)]
        else:
            words += [flag, *map(str, [] if value is True else value if isinstance(value, list) else [value])]
    return shlex.join(words)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(result, indent=1) + "\n")


RESULTS = Path("results")
"""Where results go by default; the folder is made when the first is written."""


def check_output(out: Path, *, picture: bool = False, ours: bool = True) -> None:
    """Raises ValueError where a result cannot be written to `out`, or something else is there, or where its `picture`
    would be. `ours`: a file that is there must be a result of this package; else the caller checks that."""
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out} is not a file; give the name of one, such as {out / 'result.json'}")
    if picture and out.suffix == ".png":
        raise ValueError(f"--out {out} is the name of the picture; give one that ends in .json")
    folder = out.absolute().parent
    if not folder.is_dir() and (out.parent != RESULTS or folder.exists()):
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if not os.access(folder if folder.is_dir() else Path.cwd(), os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} cannot be written to")
    if ours and out.exists() and not _is_result(out):
        raise ValueError(f"{out} is not a result file of this command; give another name")
    image = out.with_suffix(".png")
    if picture and image.exists() and b"Matplotlib" not in image.read_bytes()[:1024]:
        raise ValueError(f"{image} is not a picture of this command; give --out another name")


def _is_result(path: Path) -> bool:
    try:
        return str(json.loads(path.read_text())["command"]).startswith("titans ")
    except (ValueError, KeyError, TypeError):
        return False


def write_text(path: Path, text: str) -> None:
    """Beside, then renamed. A link stays, and what it leads to is written; a file that was there keeps its mode."""
    path = Path(os.path.realpath(path))
    if path.parent == RESULTS.absolute():
        path.parent.mkdir(exist_ok=True)
    part = beside(path, "part")
    try:
        part.write_text(text)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Lines:
    """Results as JSON lines, one a cell, after a first line of `settings` and provenance: what is there is not computed
    again, so that long work is interrupted and resumed. The file is whole at every moment.

    Raises ValueError where `path` has results of other settings, or is something else, and then changes nothing.
    """

    def __init__(self, path: Path, settings: dict[str, Any], command: str):
        self.path, self.rows = path, list[dict[str, Any]]()
        self.head = {**provenance(command), "settings": json.loads(json.dumps(settings))}
        if path.exists():
            self._go_on()

    def _go_on(self) -> None:
        try:
            head, *rows = map(json.loads, self.path.read_text().splitlines())
            other = {key: value for key, value in head["settings"].items() if self.head["settings"].get(key) != value}
            same = head["settings"] == self.head["settings"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{self.path} is not a result file of this command; give another name") from None
        if not same:
            raise ValueError(
                f"{self.path} has results of other settings ({', '.join(other) or 'fewer'}); give another name"
            )
        self.head, self.rows = head, rows

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The first row that has these values."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in (self.head, *self.rows)))


def keep_freed_memory() -> None:
    """What is freed stays with this process (up to 2 GiB at a time) instead of going back to the system.

    On a CPU each step of a model frees and takes the same memory again; the system zeroes every page of it anew, which
    can take a third of the time. Pieces of different sizes leave gaps: a step may take a third
    more memory at its most. For the commands' own processes, and where the C library is glibc.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # nothing is mapped by itself, to be given back when it is freed
        libc.mallopt(trim_threshold, 2**31 - 1)
