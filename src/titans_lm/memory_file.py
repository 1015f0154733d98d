"""Memory files: what a model remembers, with what was read, in one safetensors file.

A file has the same size whatever was read. Nothing in it is executed; every byte that matters is under its digest.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

FORMAT = "titans-lm memory 2"
SOURCES_BYTES = 32 * 1024
"""What was read takes this much of the file, however much that was: the oldest is left out where it does not fit."""
NAME_LENGTH = 200


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


def write(path: str | Path, tensors: dict[str, Tensor], card: Card) -> Card:
    """Write a file whole, or not at all: beside, to the disk, then renamed. -> the card, with its digest."""
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
    _write_whole(Path(path), serialize(tensors, metadata))
    return Card(**{**vars(card), "sources": sources, "digest": metadata["digest"]})


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
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave a name with nothing in it
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """All tensors, on the CPU, and the card.

    Raises ValueError for what is not a memory file, is of another version, or is damaged, be it by one bit; OSError for
    what cannot be read.
    """
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
    try:
        sources = [Source(**{f.name: s[f.name] for f in fields(Source)}) for s in json.loads(metadata["sources"])]
        text = {key: metadata[key].strip() for key in ("model", "configuration", "weights", "parent")}
        return tensors, Card(**text, columns=int(metadata["columns"]), sources=sources, digest=digest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error!r})") from None
