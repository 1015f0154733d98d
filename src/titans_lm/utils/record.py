"""Result files with provenance, written atomically; and signals and cores of a command's process."""

import argparse
import contextlib
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

from titans_lm.utils.memory_lock import FileLock, beside


def provenance(command: str) -> dict[str, str]:
    """Command, date, commit, machine, threads and version of torch of a result."""
    import torch  # the rest of this module is used before torch is loaded

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _commit() -> str:
    """ "unknown" without git or outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


class Stopped(KeyboardInterrupt):
    """Interrupted by the signal `number`."""

    def __init__(self, number: int, *words: str):
        super().__init__(*words)
        self.number = number

    @classmethod
    def status(cls, interruption: BaseException) -> int:
        """Exit status 128 + signal number, also of a KeyboardInterrupt raised while a Stopped was handled."""
        cause: BaseException | None = interruption
        while cause is not None:
            if isinstance(cause, cls):
                return 128 + cause.number
            cause = cause.__context__
        return 128 + signal.SIGINT


def stop(number: int, frame: Any) -> None:  # noqa: ARG001 - a signal handler
    """Signal handler that raises Stopped."""
    raise Stopped(number)


@contextlib.contextmanager
def on_stop(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """A context in which SIGINT, SIGTERM and SIGHUP call `handler`. Ignored signals (SIGHUP under nohup) stay ignored.
    Has no effect outside the main thread, where Python allows no handlers."""
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
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command_line(verb: str, arguments: argparse.Namespace, positional: Iterable[str] = ()) -> str:
    """The full command line, defaults included. `positional` names the arguments without a flag."""
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
    """Write JSON as `write_text` writes text."""
    write_text(path, json.dumps(result, indent=1) + "\n")


RESULTS = Path("results")
"""Default folder of results, created with the first one."""


def check_output(out: Path, *, picture: bool = False, ours: bool = True) -> None:
    """Raises ValueError if a result cannot be written to `out`, or if another file is there or at its `picture`'s path.
    `ours`: check that an existing file is a result of this package; else the caller checks it."""
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


def check_folder(flag: str, folder: Path, result: str, *others: str) -> None:
    """Raises ValueError for a folder of results that is a file, or has files of these names from elsewhere. `result` is
    the JSON file by which a command knows a folder that it has written to before."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is not a folder; give the name of one")
    if not _is_result(folder / result):
        for name in (result, *others):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is not of this command; give {flag} another folder")


def check_least(arguments: argparse.Namespace, least: int, *names: str) -> None:
    """Raises ValueError for the first of these flags with a value below `least`. Ignores None."""
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {number}")


def _is_result(path: Path) -> bool:
    try:
        return str(json.loads(path.read_text())["command"]).startswith("titans ")
    except (ValueError, KeyError, TypeError, OSError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write atomically: to a file beside, then rename. Follows a link, and keeps the mode of an existing file."""
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
    """Results as JSON lines, one per cell, after a first line with `settings` and provenance. Long work resumes from
    them.

        with Lines(path, settings, command) as lines:
            if lines.find(length=8) is None: lines.add({"length": 8, "score": measure(8)})

    As a context it locks `path`, as `FileLock` does: of two commands with the same file the second would repeat the
    first one's work and write over its lines. Every write is atomic. Raises ValueError, and changes nothing, if `path`
    holds results of other settings or another kind of file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], command: str):
        self.path, self.rows = path, list[dict[str, Any]]()
        self.head = {**provenance(command), "settings": json.loads(json.dumps(settings))}
        self._lock, self._made_folder = FileLock(beside(Path(os.path.realpath(path)), "lock"), path), False
        self._load()

    def __enter__(self) -> "Lines":
        if self.path.absolute().parent == RESULTS.absolute() and not RESULTS.exists():
            RESULTS.mkdir()
            self._made_folder = True
        self._lock.__enter__()
        self._load()  # what another command has added since
        return self

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)
        if self._made_folder:
            with contextlib.suppress(OSError):  # it has files
                RESULTS.rmdir()

    def _load(self) -> None:
        if not self.path.exists():
            return
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
        """The first row with these values, or None."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in (self.head, *self.rows)))
