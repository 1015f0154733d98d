"""Memory files: a `TitansState` and a list of the texts that it has read, in one safetensors file.

A file's size does not depend on what was read. Loading it executes nothing. A digest covers every byte that matters.
"""

import hashlib
import json
import os
import re
import stat
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from titans_lm.utils.deprecation import renamed
from titans_lm.utils.memory_lock import MemoryLock, beside

KIND = "titans-lm memory"
FORMAT = f"{KIND} 2"
SOURCES_BYTES = 32 * 1024
"""The list of texts takes this much of the file, whatever its length: the oldest texts that do not fit are left out."""
NAME_LENGTH = 200
MEMORY_INFIX = ".memory.memory."
"""Part of the names of the memory's own tensors, in every layer."""

__getattr__ = renamed(
    __name__,
    {"read": "load_file", "write": "save_file", "check": "check_tensors", "OF_MEMORY": "MEMORY_INFIX"},
)


@dataclass(frozen=True)
class Source:
    """A text that was read, or is being read."""

    name: str
    """The name of the file, or the one given to the reader; the end of a long name."""
    size: int
    """Bytes; 8 for each of a text of token ids; -1 for a stream, whose length is unknown."""
    sha256: str
    """Of the file; of a stream, the part that was read."""
    mode: str
    """learning, frozen or reset."""
    tokens: int = 0
    """The number of tokens read."""
    done: bool = False
    """Whether all of it was read."""
    abandoned: bool = False
    """Whether the rest will not be read."""
    when: str = ""
    """When its last token was read, UTC."""


@dataclass(frozen=True)
class Card:
    """The description in a memory file."""

    model: str
    """The model in words, for people."""
    configuration: str
    """SHA-256 of the model's configuration. The memory is useless to a model with another one, or other weights."""
    weights: str
    """SHA-256 of the model's weights."""
    columns: int = 0
    parent: str = ""
    """The digest of the file that this one was forked from."""
    sources: list[Source] = field(default_factory=list)
    digest: str = ""
    """SHA-256 of everything else in the file."""


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
    metadata["digest"] = _digest(tensors, metadata)
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


def _is_memory(path: Path) -> bool:
    """Whether a file begins as memory files do. The rest may be damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length <= path.stat().st_size else b"")
            return str(header["__metadata__"]["format"]).startswith(KIND)
        except (ValueError, TypeError, KeyError, RecursionError):
            return False


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


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_file(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """The tensors of a memory file, on the CPU, and its card.

    Raises ValueError for another kind of file or format version, for a file damaged by a single bit, and for tensors
    that `check_tensors` refuses; OSError for a file that cannot be opened.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a memory file: it is not a regular file")  # opening a FIFO would block
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is not a memory file of this version ({FORMAT!r}): its format is "
                    f"{metadata.get('format')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a memory file, or is damaged: {error}") from None
    except OSError as error:
        raise OSError(f"memory file {path} cannot be read: {error}") from error
    digest = metadata.pop("digest", "")
    if digest != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not have the digest that it was written with")
    check_tensors(path, tensors)
    try:
        sources = [Source(**{f.name: s[f.name] for f in fields(Source)}) for s in json.loads(metadata["sources"])]
        text = {key: metadata[key].strip() for key in ("model", "configuration", "weights", "parent")}
        return tensors, Card(**text, columns=int(metadata["columns"]), sources=sources, digest=digest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error!r})") from None


def check_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors that no model saves: numbers that are not finite, no rows or different numbers of
    rows, or mixed dtypes. A file made by hand can have a correct digest."""
    position = tensors.get("position")
    if position is None or position.dtype != torch.long or position.dim() != 1:
        raise ValueError(f"{path} is not a memory: it has no positions of its rows")
    if len(position) == 0 or int(position.min()) < 0:
        raise ValueError(f"{path} is not a memory: it has {len(position)} rows, at positions {position.tolist()}")
    dtypes: dict[str, torch.dtype] = {}
    for name, t in tensors.items():
        if t.shape[:1] != position.shape:
            raise ValueError(f"{path} is not a memory: {name} is {list(t.shape)} of {len(position)} rows")
        if not t.is_floating_point():
            continue
        check_finite(path, {name: t})
        role = MEMORY_INFIX if MEMORY_INFIX in name else re.sub(r"^layers\.\d+", "", name)
        if dtypes.setdefault(role, t.dtype) != t.dtype:
            raise ValueError(f"{path} mixes types: {name} is {t.dtype}, others of its kind are {dtypes[role]}")


def check_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError, with the name of the first tensor that has a nan or an infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"{path}: {name} has numbers that are not finite")
