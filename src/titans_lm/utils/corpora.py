"""Which files texts are in: files, folders, and the standard library of Python; which of them are held out."""

import logging
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path

from titans_lm.utils.text_file import is_blank, read_text

_log = logging.getLogger(__name__)
STDLIB = "python-stdlib"
"""In place of a path: the source files of Python's own standard library, which every machine has."""
_NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}


def text_files(paths: Iterable[str], suffixes: Iterable[str]) -> list[Path]:
    """The files among `paths`, and those with one of `suffixes` in folders among them, in sorted order, but for those
    in folders that have nothing but white space in them.

    Raises ValueError for a path that does not exist or has no such file.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if name == STDLIB:
            files += stdlib_files()
        elif path.is_dir():
            candidates = sorted(p for s in suffixes for p in path.rglob(f"*{s}") if p.is_file())
            if not candidates:
                raise ValueError(f"{path} has no file that ends in {' or '.join(suffixes)}")
            if not (with_text := [p for p in candidates if not is_blank(p)]):
                raise ValueError(f"{path} has only empty files that end in {' or '.join(suffixes)}")
            if len(with_text) < len(candidates):
                _log.warning("%s: %d empty files are left out", path, len(candidates) - len(with_text))
            files += with_text
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist; give text files, folders or {STDLIB!r}")
    return files


def stdlib_files() -> list[Path]:
    """The standard library's own modules that hold text, in sorted order; its tests and bundled packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in sorted(root.rglob("*.py")) if not _NOT_PROSE & set(p.relative_to(root).parts))
    return [p for p in files if _is_text(p)]


def stdlib_held_out() -> list[Path]:
    """Those of `stdlib_files` that tasks do not train on, about one in ten: which they are hangs on their names alone,
    so that they are held out on every machine and in every version of Python."""
    return [path for path in stdlib_files() if is_held_out(path)]


def is_held_out(path: Path) -> bool:
    """Whether a file of the standard library is one of `stdlib_held_out`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0


def _is_text(path: Path) -> bool:
    try:
        return bool(read_text(path))
    except (ValueError, OSError):
        return False


def split_held_out(files: list[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """By file, never by line: the last `held_out` files in order are not trained on."""
    if held_out >= len(files):
        raise ValueError(f"data.held_out={held_out} leaves nothing to train on: there are {len(files)} files")
    return files[: len(files) - held_out], files[len(files) - held_out :]
