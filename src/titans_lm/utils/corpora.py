"""Lists of text files: from files, folders and the Python standard library, and which of them are held out."""

import glob
import logging
import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path

from titans_lm.utils.text_file import is_blank, read_text

_log = logging.getLogger(__name__)
STDLIB = "python-stdlib"
"""In place of a path: the source files of the Python standard library, which every machine has."""
_NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}


def text_files(paths: Iterable[str], suffixes: Iterable[str]) -> list[Path]:
    """The files among `paths`, sorted those that fit a pattern such as data/*.txt, and for each folder, sorted, its
    files with one of `suffixes` that are not blank.

    Raises ValueError for a path that does not exist, and a pattern or a folder without such a file.
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
        elif glob.has_magic(name):
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
            if not found:
                raise ValueError(f"no file fits {name}")
            files += found
        else:
            raise ValueError(f"{path} does not exist; give text files, folders or {STDLIB!r}")
    return files


def stdlib_files() -> list[Path]:
    """The non-empty modules of the standard library, sorted, without its tests and bundled packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in sorted(root.rglob("*.py")) if not _NOT_PROSE & set(p.relative_to(root).parts))
    return [p for p in files if _is_text(p)]


def stdlib_held_out() -> list[Path]:
    """About one in ten of `stdlib_files`, on which tasks do not train. The choice depends on names only, so it is the
    same on every machine and in every version of Python."""
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
    """Split files into those to train on and the last `held_out`. Raises ValueError if none is left to train on."""
    if held_out >= len(files):
        raise ValueError(f"data.held_out={held_out} leaves nothing to train on: there are {len(files)} files")
    return files[: len(files) - held_out], files[len(files) - held_out :]
