"""`Trace`: the arrays of a traced text, with named axes; to and from files that other programs read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_lm.models.cache import TitansState
from titans_lm.utils.memory_lock import beside

AXES: dict[str, tuple[str, ...]] = {
    "token_id": ("token",),
    "bits": ("token",),
    "bits_frozen": ("token",),
    "prediction": ("token", "top"),
    "probability": ("token", "top"),
    "prediction_frozen": ("token", "top"),
    "probability_frozen": ("token", "top"),
    "surprise": ("token", "layer", "head"),
    "gradient_norm": ("token", "layer", "head"),
    "theta": ("token", "layer", "head"),
    "eta": ("token", "layer", "head"),
    "alpha": ("token", "layer", "head"),
    "output_gate": ("token", "layer", "head"),
    "memory_gate": ("token", "layer"),
    "checkpoint": ("checkpoint",),
    "memory_norm": ("checkpoint", "layer", "head"),
    "momentum_norm": ("checkpoint", "layer", "head"),
    "memory_change": ("checkpoint", "layer", "head"),
    "snapshot": ("snapshot",),
    "singular_values": ("snapshot", "layer", "head", "matrix", "rank"),
    "similarity": ("snapshot", "other_snapshot", "layer", "head"),
}
"""The axes of each array that a trace can have."""
UNITS = {
    "bits": "bits of the token given all before it; nan at the first",
    "bits_frozen": "the same with the memory as it was at the start",
    "prediction": "token ids, the most probable first; -1 where nothing was predicted",
    "probability": "probability of each prediction",
    "surprise": "|| M(k) - v ||^2 before the write (eq. 12)",
    "gradient_norm": "Frobenius norm of the gradient of the surprise by the head's memory, after the clip",
    "theta": "step (eq. 10); 0 at a token that was not written",
    "eta": "momentum (eq. 10)",
    "alpha": "forgetting (eq. 13)",
    "output_gate": "sigmoid that scales the head's retrieval, mean over channels",
    "memory_gate": "share of the memory where it joins attention, mean over channels",
    "checkpoint": "tokens read",
    "memory_norm": "Frobenius norm of the head's weights",
    "momentum_norm": "Frobenius norm of the head's momentum",
    "memory_change": "Frobenius norm of the difference from the weights at the start",
    "snapshot": "tokens read",
    "singular_values": "of each weight matrix, largest first",
    "similarity": "cosine of what two snapshots differ by from the weights at the start",
}
"""What the numbers of an array are."""
BY_HEAD = ("surprise", "gradient_norm", "theta", "eta", "alpha", "output_gate")
"""Arrays by token, layer and head."""


@dataclass(frozen=True)
class Trace:
    """What a memory did with a text of T tokens. `trace["theta"]` is an array; `AXES` names its axes.

    Arrays are float32, ids and counts whole numbers. Layers are those with a memory, in order.
    """

    arrays: dict[str, NDArray[Any]]
    """The arrays by name. What a mode of reading does not show is not there."""
    attributes: dict[str, str | int] = field(default_factory=dict)
    """How the text was read: variant, reading (its mode), piece, position (tokens read before), and more."""
    state: TitansState | None = None
    """The memory after the text; None for a trace from a file."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.arrays:
            raise KeyError(f"this trace has no {name!r}; it has: {', '.join(self.arrays)}")
        return self.arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        return len(self.arrays["token_id"])

    @property
    def layers(self) -> int:
        """Layers with a memory."""
        return int(self.arrays["memory_norm"].shape[1])

    @property
    def heads(self) -> int:
        """Memory heads of each layer."""
        return int(self.arrays["memory_norm"].shape[2])

    @property
    def helped(self) -> NDArray[np.float32]:
        """Bits with memory less bits with the memory frozen, `[T]`: below 0 where memory helped."""
        helped: NDArray[np.float32] = self["bits"] - self["bits_frozen"]
        return helped

    def to_xarray(self) -> Any:
        """An `xarray.Dataset`. Raises ValueError if xarray is not installed."""
        try:
            import xarray
        except ImportError:
            raise ValueError("this needs xarray: pip install 'titans-lm[analyze]'") from None
        data = {
            name: (AXES[name], value, {"description": UNITS[name]} if name in UNITS else {})
            for name, value in self.arrays.items()
            if name not in ("checkpoint", "snapshot")
        }
        begun = int(self.attributes.get("position", 0))
        coords: dict[str, Any] = {"token": begun + np.arange(len(self)), "checkpoint": self["checkpoint"]}
        if "snapshot" in self:
            coords |= {"snapshot": self["snapshot"], "other_snapshot": self["snapshot"]}
        return xarray.Dataset(data, coords, self.attributes)

    def to_netcdf(self, path: str | Path) -> None:
        """Write a NetCDF 3 file. Raises ValueError if xarray or scipy is not installed."""
        data = self.to_xarray()
        data = data.assign({name: part.astype("int32") for name, part in data.items() if part.dtype.kind == "i"})
        data = data.assign_coords({name: part.astype("int32") for name, part in data.coords.items()})
        try:
            import scipy.io  # noqa: F401 - what xarray writes with
        except ImportError:
            raise ValueError("this needs scipy: pip install 'titans-lm[analyze]'") from None
        with _whole(Path(path)) as part:
            data.to_netcdf(part, engine="scipy")

    def to_npz(self, path: str | Path) -> None:
        """Write a NumPy archive, for `from_npz`."""
        about = np.frombuffer(json.dumps(self.attributes).encode(), np.uint8)
        with _whole(Path(path)) as part, part.open("wb") as file:
            np.savez_compressed(file, **{**self.arrays, "attributes": about})  # type: ignore[arg-type]

    @classmethod
    def from_npz(cls, path: str | Path) -> "Trace":
        """Read what `to_npz` wrote. Loads no pickle. Raises ValueError for another file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            attributes = json.loads(arrays.pop("attributes").tobytes())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; give a file that to_npz wrote") from None
        except Exception as error:  # zip, zlib and NumPy have many kinds
            raise ValueError(f"{path} is not a trace: {error}") from None
        odd = next((name for name, a in arrays.items() if name not in AXES or a.ndim != len(AXES[name])), None)
        if odd is not None or "token_id" not in arrays:
            raise ValueError(f"{path} is not a trace: {odd or 'token_id'!r} is not an array of one")
        return cls(arrays, attributes)

    def to_parquet(self, path: str | Path) -> None:
        """Write a row for each token. Other axes become columns, such as `theta.layer0.head1`. No checkpoints."""
        import pyarrow
        from pyarrow import parquet

        columns = {}
        for name, array in self.arrays.items():
            axes = AXES[name]
            if axes[0] == "token":
                for index in np.ndindex(*array.shape[1:]):
                    ends = [f"{axis}{i}" for axis, i in zip(axes[1:], index, strict=True)]
                    columns[".".join([name, *ends])] = array[(slice(None), *index)]
        with _whole(Path(path)) as part:
            parquet.write_table(pyarrow.table(columns), part)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that becomes `path` if the block raises nothing."""
    part = beside(path, "part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
