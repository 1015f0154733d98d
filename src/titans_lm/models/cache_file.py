"""Memory files: what a model remembers, with what was read, in one safetensors file.

A file has the same size whatever was read. Nothing in it is executed; every byte that matters is under its digest.
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

from titans_lm.utils.memory_lock import MemoryLock, beside

KIND = "titans-lm memory"
FORMAT = f"{KIND} 2"
SOURCES_BYTES = 32 * 1024
"""What was read takes this much of the file, however much that was: the oldest is left out where it does not fit."""
NAME_LENGTH = 200
OF_MEMORY = ".memory.memory."
"""In the names of the tensors that the memory itself is, in every layer."""


@dataclass(frozen=True)
class Source:
    """One text that was read, or that is being read."""

    name: str
    """Of the file, or what the reader was told; its last characters, if it is long."""
    size: int
    """Bytes; of tokens, 8 for each. -1: a stream, which has no end to be known."""
    sha256: str
    """Of the file; of a stream, of what was read of it."""
    mode: str
    """learning, frozen or reset."""
    tokens: int = 0
    """How many were read."""
    done: bool = False
    """All of it was read."""
    abandoned: bool = False
    """The rest is not going to be."""
    when: str = ""
    """The time at which its last token was read, UTC."""


@dataclass(frozen=True)
class Card:
    """What a memory file says of itself."""

    model: str
    """In words, for people."""
    configuration: str
    """SHA-256 of the model's configuration, and of its weights: the memory is of no use to another model."""
    weights: str
    columns: int = 0
    parent: str = ""
    """The digest of the file that this was forked from."""
    sources: list[Source] = field(default_factory=list)
    digest: str = ""
    """SHA-256 of everything else in the file."""


# ------------------------------------------------------------------------------------------------ read and write


def write(path: str | Path, tensors: dict[str, Tensor], card: Card, lock: MemoryLock | None = None) -> Card:
    """Write a file whole, or not at all: beside, to the disk, then renamed. -> the card, with its digest.

    A symbolic link is followed, and the file keeps its mode and owner. `lock`: the file's, if the caller holds it.
    Raises as `check_target` does; ValueError where another holds the lock; OSError for what cannot be written.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    sources = card.sources[len(card.sources) - _newest(card.sources) :]
    told = json.dumps([asdict(s) for s in sources])
    metadata = {
        "format": FORMAT,
        "model": card.model,
        "configuration": card.configuration,
        "weights": card.weights,
        "columns": f"{card.columns:020d}",
        "parent": card.parent.rjust(64),
        "sources": told,
        "padding": " " * (SOURCES_BYTES - _length(told)),
    }
    metadata["digest"] = _digest(tensors, metadata)
    with MemoryLock(Path(path)) if lock is None else nullcontext():
        check_target(path)
        _write_whole(Path(path), serialize(tensors, metadata))
    return Card(**{**vars(card), "sources": sources, "digest": metadata["digest"]})


def check_target(path: str | Path) -> None:
    """Raises ValueError or OSError for a path to which no memory is written: without a folder that may be written to,
    or where something is that is not a memory file, which is never overwritten."""
    if str(path) == "-":
        raise ValueError("a memory cannot be written to standard output: give the name of a file")
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise ValueError(f"cannot write {path}: its folder does not exist")
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write {path}: its folder may not be written to")
    if not os.path.lexists(real):
        return
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"cannot write {path}: it is not a regular file")
    if found.st_size and not _is_memory(real):
        raise ValueError(f"{path} is not a memory file and is not overwritten: give another name")


def _is_memory(path: Path) -> bool:
    """Whether a file begins as memory files do; the rest of it may be damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            told = json.loads(file.read(length) if length <= path.stat().st_size else b"")
            return str(told["__metadata__"]["format"]).startswith(KIND)
        except (ValueError, TypeError, KeyError, RecursionError):
            return False


def _newest(sources: list[Source]) -> int:
    """How many, from the last back, fit into the file."""
    room = SOURCES_BYTES - _length("[]")
    for count, source in enumerate(reversed(sources)):
        room -= _length(json.dumps(asdict(source)) + ", ") - 2  # without the quotes around
        if room < 0:
            return count
    return len(sources)


def _length(text: str) -> int:
    """Of the text in the header, which is JSON."""
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
            os.fsync(file.fileno())  # or a power cut may leave a name with nothing in it
        os.replace(part, real)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _take_owner_and_mode(part: Path, old: os.stat_result) -> None:
    if hasattr(os, "chown"):
        with suppress(OSError):  # only the superuser gives files away
            os.chown(part, old.st_uid, old.st_gid)
    part.chmod(stat.S_IMODE(old.st_mode))


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """All tensors, on the CPU, and the card.

    Raises ValueError for what is not a memory file, is of another version, is damaged, be it by one bit, or that
    `check` refuses; OSError for what cannot be read.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a memory file: it is not a regular file")  # a FIFO would be waited for
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
    check(path, tensors)
    try:
        sources = [Source(**{f.name: s[f.name] for f in fields(Source)}) for s in json.loads(metadata["sources"])]
        text = {key: metadata[key].strip() for key in ("model", "configuration", "weights", "parent")}
        return tensors, Card(**text, columns=int(metadata["columns"]), sources=sources, digest=digest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error!r})") from None


def check(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for tensors that no model leaves: numbers that are not finite, no rows or unequal ones, and
    several types where there is one. A file can have its right digest and be made by hand."""
    position = tensors.get("position")
    if position is None or position.dtype != torch.long or position.dim() != 1:
        raise ValueError(f"{path} is not a memory: it has no positions of its rows")
    if len(position) == 0 or int(position.min()) < 0:
        raise ValueError(f"{path} is not a memory: it has {len(position)} rows, at positions {position.tolist()}")
    types: dict[str, torch.dtype] = {}
    for name, t in tensors.items():
        if t.shape[:1] != position.shape:
            raise ValueError(f"{path} is not a memory: {name} is {list(t.shape)} of {len(position)} rows")
        if not t.is_floating_point():
            continue
        check_finite(path, {name: t})
        role = OF_MEMORY if OF_MEMORY in name else re.sub(r"^layers\.\d+", "", name)
        if types.setdefault(role, t.dtype) != t.dtype:
            raise ValueError(f"{path} mixes types: {name} is {t.dtype}, others of its kind are {types[role]}")


def check_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor with a nan or an infinity."""
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"{path}: {name} has numbers that are not finite")
