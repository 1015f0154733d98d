"""Memory files: a `TitansState` and a list of the texts that it has read, in one safetensors file.

A file's size does not depend on what was read. Loading it executes nothing. A digest covers every byte that matters.
"""

import json
import os
import stat
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from titans_lm.models.cache_card import (
    FORMAT,
    KIND,
    MEMORY_INFIX,
    Card,
    Source,
    StoredTensor,
    check_stored,
    digest_of,
    load_card,
    metadata_of,
)
from titans_lm.utils.deprecation import renamed
from titans_lm.utils.memory_lock import MemoryLock, beside

__all__ = [
    "FORMAT",
    "KIND",
    "MEMORY_INFIX",
    "Card",
    "FileIdentity",
    "Source",
    "check_finite",
    "check_target",
    "check_tensors",
    "file_identity",
    "load_file",
    "save_file",
]

SOURCES_BYTES = 32 * 1024
"""The list of texts takes this much of the file, whatever its length: the oldest texts that do not fit are left out."""
NAME_LENGTH = 200
__getattr__ = renamed(
    __name__,
    {"read": "load_file", "write": "save_file", "check": "check_tensors", "OF_MEMORY": "MEMORY_INFIX"},
)


# ------------------------------------------------------------------------------------------------ save and load


def save_file(path: str | Path, tensors: dict[str, Tensor], card: Card, lock: MemoryLock | None = None) -> Card:
    """Write a memory file, whole or not at all -> the card, with its digest.

    The file is written beside its place, synced to the disk, and renamed. A symbolic link is followed; an existing
    file's mode and owner stay. `lock` is the file's lock, if the caller holds it. Raises what `check_target` raises,
    ValueError where another process holds the lock, and OSError where writing fails.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    sources = card.sources[len(card.sources) - _newest(card.sources) :]
    listed = json.dumps([asdict(s) for s in sources])
    metadata = {
        "format": FORMAT,
        "model": card.model,
        "configuration": card.configuration,
        "weights": card.weights,
        "columns": f"{card.columns:020d}",
        "parent": card.parent.rjust(64),
        "sources": listed,
        "padding": " " * (SOURCES_BYTES - _json_length(listed)),
    }
    metadata["digest"] = digest_of({name: _stored(t) for name, t in tensors.items()}, metadata)
    with MemoryLock(Path(path)) if lock is None else nullcontext():
        check_target(path)
        _write_whole(Path(path), serialize(tensors, metadata))
    return Card(**{**vars(card), "sources": sources, "digest": metadata["digest"]})


def check_target(path: str | Path) -> None:
    """Raises ValueError or OSError for a path where no memory file can or may be written: in a folder that does not
    exist or is not writable, or in place of something that is not a memory file."""
    if str(path) == "-":
        raise ValueError("a memory cannot be written to standard output: give a file name")
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise ValueError(f"cannot write {path}: its folder does not exist")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write {path}: its folder is not writable")
    if not os.path.lexists(real):
        return
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"cannot write {path}: it is not a regular file")
    if found.st_size and not _is_memory(real):
        raise ValueError(f"{path} is not a memory file and is not overwritten: give another name")


class FileIdentity(NamedTuple):
    """What changes with each write of a memory file."""

    device: int
    inode: int
    size: int
    modified: int


def file_identity(path: Path) -> FileIdentity | None:
    """None if there is no file."""
    if not path.exists():
        return None
    found = path.stat()
    return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _is_memory(path: Path) -> bool:
    """Whether a file begins as memory files do. The rest may be damaged."""
    return str((metadata_of(path) or {}).get("format")).startswith(KIND)


def _newest(sources: list[Source]) -> int:
    """How many of the last sources fit into the file."""
    room = SOURCES_BYTES - _json_length("[]")
    for count, source in enumerate(reversed(sources)):
        room -= _json_length(json.dumps(asdict(source)) + ", ") - 2  # without the quotes around
        if room < 0:
            return count
    return len(sources)


def _json_length(text: str) -> int:
    """The bytes of `text` in the header, which is JSON."""
    return len(json.dumps(text).encode())


def _write_whole(path: Path, content: bytes) -> None:
    real = Path(os.path.realpath(path))
    part = beside(real, f"{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:
            if real.exists():
                _take_owner_and_mode(part, real.stat())
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave an empty file
        os.replace(part, real)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _take_owner_and_mode(part: Path, old: os.stat_result) -> None:
    if hasattr(os, "chown"):
        with suppress(OSError):  # only the superuser may change the owner
            os.chown(part, old.st_uid, old.st_gid)
    part.chmod(stat.S_IMODE(old.st_mode))


def load_file(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """The tensors of a memory file, on the CPU, and its card. Raises what `cache_card.load_card` raises."""
    stored, card = load_card(path)
    return {name: _tensor(t) for name, t in stored.items()}, card


def check_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors that no model saves: numbers that are not finite, no rows or different numbers of
    rows, or mixed dtypes."""
    check_stored(path, {name: _stored(t) for name, t in tensors.items()})


def _tensor(stored: StoredTensor) -> Tensor:
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not stored.data:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(stored.data, dtype=dtype).view(stored.shape)


def _stored(t: Tensor) -> StoredTensor:
    data = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return StoredTensor(str(t.dtype).removeprefix("torch."), tuple(t.shape), data)


def check_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError, with the name of the first tensor that has a nan or an infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"{path}: {name} has numbers that are not finite")


def possible_dtypes(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """The dtypes that a tensor may have in a file, if the model's first state has `dtype`: under autocast, windows and
    convolutions have half precision; the memory itself never has."""
    half = dtype == torch.float32 and MEMORY_INFIX not in name
    return {dtype, torch.bfloat16, torch.float16} if half else {dtype}


def check_pending(path: str | Path, pending: Tensor | None, rows: int, vocab_size: int) -> None:
    """Raises ValueError unless the pending tokens are one for each row, a token of the model or -1."""
    if pending is None:
        return
    if list(pending.shape) != [rows] or pending.dtype != torch.int64:
        raise ValueError(f"{path} does not fit this model: 'pending' is {list(pending.shape)}, {pending.dtype}")
    if int(pending.min()) < -1 or int(pending.max()) >= vocab_size:
        raise ValueError(f"{path} does not fit this model: its pending tokens are {pending.tolist()}")


def check_shapes(
    path: str | Path, found: dict[str, tuple[int, ...]], expected: dict[str, Tensor], window: int | None
) -> None:
    """Raises ValueError unless the file has the model's tensors, no other, in its shapes, all of the same rows."""
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise ValueError(f"{path} does not fit this model: tensor {odd!r} is in only one of them")
    rows = found["position"][:1]
    for name, shape in found.items():
        wanted = rows + tuple(expected[name].shape[1:])
        if window is None and ".attention." in name:  # it grows with the tokens
            wanted, shape = wanted[:2] + wanted[3:], shape[:2] + shape[3:]
        if shape != wanted:
            raise ValueError(f"{path} does not fit this model: {name!r} is {list(shape)}, not {list(wanted)}")
