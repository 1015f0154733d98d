"""Texts to draw passages from: files, folders, archives, the standard library; some are held out."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titans_lm.utils.corpora import STDLIB, is_held_out, stdlib_files, stdlib_held_out, text_files
from titans_lm.utils.text_file import read_text

Bytes = NDArray[np.uint8]
_PASSAGE = 4096
"""Bytes that are handed on at a time."""
_LINE = 400
"""Bytes in which to look for the next line."""
_WORD = re.compile(r"[A-Za-z]{2,14}")
_ARCHIVES = (".tar", ".tgz", ".txz", ".tar.gz", ".tar.xz", ".tar.bz2")


class Files(NamedTuple):
    """A path or "python-stdlib", and the weight with which passages are drawn from it."""

    path: str
    weight: float


class Texts:
    """Groups of texts with weights. A passage is drawn uniformly by bytes within a group."""

    def __init__(self, groups: Sequence[Bytes], weights: Sequence[float]):
        self.groups = groups
        self._shares = np.cumsum(weights) / np.sum(weights)

    def reading(self, rng: np.random.Generator) -> Iterator[Bytes]:
        """Yields pieces of a group, endlessly, from a random place, at the start of a line if one is near."""
        group = self.groups[int(np.searchsorted(self._shares, rng.random(), "right"))]
        at = int(rng.integers(len(group)))
        ends = np.flatnonzero(group[at : at + _LINE] == ord("\n"))
        at = at + int(ends[0]) + 1 if len(ends) else at
        while True:
            if at >= len(group):
                at = 0
            yield group[at : at + _PASSAGE]
            at += _PASSAGE

    def words(self, rng: np.random.Generator) -> list[str]:
        """Distinct words of a passage in order of occurrence; at least two."""
        text = "".join(bytes(next(self.reading(rng))).decode("latin-1") for _ in range(2))
        return list(dict.fromkeys([*_WORD.findall(text), "a", "the"]))


@lru_cache(maxsize=4)
def load_texts(files: tuple[Files, ...], suffixes: tuple[str, ...], held_out: int) -> Texts:
    """The texts of all `files` except those held out: of each folder and archive the last `held_out` by name, of the
    standard library always those that `utils.corpora.stdlib_held_out` lists.

    Raises ValueError for a path that does not exist or has no text left.
    """
    groups = []
    for path, _ in files:
        texts = [text for _, text in _kept(path, suffixes, held_out)]
        groups.append(np.frombuffer("".join(texts).encode(), np.uint8))
        if not len(groups[-1]):
            raise ValueError(f"{path} has no text in it")
    return Texts(groups, [weight for _, weight in files])


def held_out_texts(path: str, suffixes: Sequence[str] = (".txt",), held_out: int = 0) -> list[tuple[str, str]]:
    """Names and texts of this path that `load_texts` leaves out."""
    if path == STDLIB:
        return [(str(file), read_text(file)) for file in stdlib_held_out()]
    texts = _all(path, tuple(suffixes))
    return texts[len(texts) - held_out :]


def _kept(path: str, suffixes: tuple[str, ...], held_out: int) -> list[tuple[str, str]]:
    if path == STDLIB:
        return [(str(file), read_text(file)) for file in stdlib_files() if not is_held_out(file)]
    texts = _all(path, suffixes)
    if not held_out or not (Path(path).is_dir() or _is_archive(path)):
        return texts
    if held_out >= len(texts):
        raise ValueError(f"held_out={held_out} leaves nothing of {path}: it has {len(texts)} files")
    return texts[:-held_out]


def _is_archive(path: str) -> bool:
    return path.endswith(_ARCHIVES)


def _all(path: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names and texts, by name."""
    if not (_is_archive(path) and Path(path).is_file()):
        return [(str(file), read_text(file)) for file in text_files([path], suffixes)]
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(suffixes)]
            texts = [(m.name, _decoded(path, m.name, archive.extractfile(m))) for m in members]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}") from error
    if not texts:
        raise ValueError(f"{path} has no file that ends in {' or '.join(suffixes)}")
    return sorted(texts)


def _decoded(path: str, name: str, file: object) -> str:
    try:
        text: str = file.read().decode()  # type: ignore[attr-defined]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: {name} is not text: it is not UTF-8") from None
    return text
