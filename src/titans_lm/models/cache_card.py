"""What a memory file says of itself, read and checked without PyTorch: `titans memory show` needs no more.

The file is in the safetensors format. Its header is JSON; the tensors' bytes follow. Loading it executes nothing.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

KIND = "titans-lm memory"
FORMAT = f"{KIND} 2"
MEMORY_INFIX = ".memory.memory."
"""Part of the names of the memory's own tensors, in every layer."""
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' names of types -> PyTorch's."""


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


class StoredTensor(NamedTuple):
    """A tensor as the file has it."""

    dtype: str
    """PyTorch's name of the type, such as "float32"."""
    shape: tuple[int, ...]
    data: bytearray | memoryview

    @property
    def is_floating_point(self) -> bool:
        return "float" in self.dtype

    def is_finite(self) -> bool:
        """Whether no number of it is a nan or an infinity. NumPy has no bfloat16: there the exponent's bits tell."""
        if self.dtype == "bfloat16":
            return not bool((np.frombuffer(self.data, np.uint16) & 0x7F80 == 0x7F80).any())
        return bool(np.isfinite(np.frombuffer(self.data, self.dtype)).all())


def load_card(path: str | Path) -> tuple[dict[str, StoredTensor], Card]:
    """The tensors of a memory file, as bytes, and its card.

    Raises ValueError for another kind of file or format version, for a file damaged by a single bit, and for tensors
    that no model saves; OSError for a file that cannot be opened.
    """
    tensors, metadata = _read(path)
    digest = metadata.pop("digest", "")
    if digest != digest_of(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not have the digest that it was written with")
    check_stored(path, tensors)
    try:
        sources = [Source(**{f.name: s[f.name] for f in fields(Source)}) for s in json.loads(metadata["sources"])]
        text = {key: metadata[key].strip() for key in ("model", "configuration", "weights", "parent")}
        columns = int(metadata["columns"])
        if columns < 0:
            raise ValueError(f"columns={columns}")
        return tensors, Card(**text, columns=columns, sources=sources, digest=digest)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its description cannot be read ({error!r})") from None


def digest_of(tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} torch.{t.dtype} {t.shape}".encode())
        digest.update(t.data)
    return digest.hexdigest()


def positions(tensors: dict[str, StoredTensor]) -> NDArray[np.int64]:
    """The number of tokens that each row has read, `[B]`."""
    return np.frombuffer(tensors["position"].data, np.int64)


def metadata_of(path: Path) -> dict[str, Any] | None:
    """The metadata in the header of a safetensors file; None for what has no such header. The rest is not read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            found = json.loads(file.read(length) if length <= path.stat().st_size else b"")["__metadata__"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def _read(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a memory file: it is not a regular file")  # opening a FIFO would block
    try:
        metadata = metadata_of(Path(path))
        if metadata is None:
            raise ValueError(f"{path} is not a memory file, or is damaged: its header cannot be read")
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is not a memory file of this version ({FORMAT!r}): its format is {metadata.get('format')!r}"
            )
        found = deserialize(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a memory file, or is damaged: {error}") from None
    except OSError as error:
        raise OSError(f"memory file {path} cannot be read: {error}") from error
    unknown = next((t["dtype"] for _, t in found if t["dtype"] not in DTYPES), None)
    if unknown is not None:
        raise ValueError(f"{path} is not a memory: it has numbers of type {unknown}")
    tensors = {name: StoredTensor(DTYPES[t["dtype"]], tuple(t["shape"]), t["data"]) for name, t in found}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def check_stored(path: str | Path, tensors: dict[str, StoredTensor]) -> None:
    """Raises ValueError for tensors that no model saves: numbers that are not finite, no rows or different numbers of
    rows, or mixed dtypes. A file made by hand can have a correct digest."""
    position = tensors.get("position")
    if position is None or position.dtype != "int64" or len(position.shape) != 1:
        raise ValueError(f"{path} is not a memory: it has no positions of its rows")
    rows = positions(tensors)
    if len(rows) == 0 or rows.min() < 0:
        raise ValueError(f"{path} is not a memory: it has {len(rows)} rows, at positions {rows.tolist()}")
    dtypes: dict[str, str] = {}
    for name, t in tensors.items():
        if t.shape[:1] != position.shape:
            raise ValueError(f"{path} is not a memory: {name} is {list(t.shape)} of {len(rows)} rows")
        if not t.is_floating_point:
            continue
        if not t.is_finite():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
        role = MEMORY_INFIX if MEMORY_INFIX in name else re.sub(r"^layers\.\d+", "", name)
        if dtypes.setdefault(role, t.dtype) != t.dtype:
            raise ValueError(
                f"{path} mixes types: {name} is torch.{t.dtype}, others of its kind are torch.{dtypes[role]}"
            )
