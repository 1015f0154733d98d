"""A model's folder: the places of shipped models, digests of the files, and code that opens the model elsewhere."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from titans_lm.utils.deprecation import renamed

AUTO_CODE = "modeling_titans"
"""The module beside saved weights that opens them in a process that has not imported this package."""
AUTO_MAP = {
    "AutoConfig": f"{AUTO_CODE}.TitansConfig",
    "AutoModel": f"{AUTO_CODE}.TitansModel",
    "AutoModelForCausalLM": f"{AUTO_CODE}.TitansForCausalLM",
    "AutoModelForSequenceClassification": f"{AUTO_CODE}.TitansForSequenceClassification",
    "AutoModelForTokenClassification": f"{AUTO_CODE}.TitansForTokenClassification",
}
"""The class in it for each Auto class."""
TIME_SERIES_AUTO_MAP = {
    "AutoConfig": f"{AUTO_CODE}.TitansTimeSeriesConfig",
    "AutoModelForTimeSeriesPrediction": f"{AUTO_CODE}.TitansForTimeSeriesPrediction",
}
"""The same of the forecasters."""
_CLASSES = {name.rsplit(".", 1)[1] for name in (*AUTO_MAP.values(), *TIME_SERIES_AUTO_MAP.values())}
SHIPPED = Path(__file__).parent / "shipped"
"""The folder of the models that are shipped with the package, each in a folder of its own."""
NAMES = sorted(folder.name for folder in SHIPPED.iterdir())
MODEL_HELP = f"a folder that titans train wrote, or the name of a shipped model: {', '.join(NAMES)}"
DIGESTS = "digests.json"
"""The file in a saved model's folder with the SHA-256 of its other files."""
_WEIGHTS = ("config.json", "model*.safetensors*", f"{AUTO_CODE}.py")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors*")

_IMPORTED = "".join(f"    {name},\n" for name in sorted(_CLASSES))
_CODE = f'''"""Opens this model with the package titans-lm, whose version must know the model's configuration.

    import titans_lm
    model, tokenizer = titans_lm.load(FOLDER)

After `import titans_lm`, `AutoModelForCausalLM.from_pretrained(FOLDER)` works too. A process that has not imported the
package finds it through this file with `trust_remote_code=True`.
"""

from titans_lm import (  # noqa: F401
{_IMPORTED})
'''

__getattr__ = renamed(__name__, {"shipped": "shipped_folder", "complete": "add_companions"})


def shipped_folder(name: str | Path) -> str | Path:
    """The folder of the shipped model `name`; or `name` itself, if it is a model's folder or no shipped model."""
    return SHIPPED / name if str(name) in NAMES and not (Path(name) / "config.json").is_file() else name


def find(model: str | Path) -> Path:
    """The folder of a model: `model` itself if it is one, else the shipped model of that name. (A folder of texts may
    have the name of a shipped model.)

    Raises ValueError for anything else.
    """
    folder = Path(shipped_folder(model))
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} holds an adapter and no model: load the model that it was trained on, then "
            f"model.load_adapter({str(model)!r})"
        )
    raise ValueError(
        f"{model} is not a model: it has no config.json; `titans train` writes such folders, "
        f"and shipped is: {', '.join(NAMES)}"
    )


def is_ours(model: type) -> bool:
    """Whether a class is of this package, not one that derives from it elsewhere. (FSDP derives a class of each.)"""
    named = next(c for c in model.__mro__ if not c.__name__.startswith("FSDP"))
    return named.__module__.split(".")[0] == __name__.split(".")[0]


def add_companions(folder: str | Path, *, adapter: bool, code: bool = True) -> None:
    """Write the files beside a model, or an `adapter`, that was just saved: code that opens it (if
    `code`, and not for an adapter) and digests.

    A model beside a new adapter, and an adapter beside a new model, keep their digests. A tokenizer loses them, because
    it is saved next; `add_digests` then adds them."""
    folder = Path(folder)
    if code and not adapter:
        (folder / f"{AUTO_CODE}.py").write_text(_CODE)
    written, others = (_ADAPTER, _WEIGHTS) if adapter else (_WEIGHTS, _ADAPTER)
    listed = _listed(folder) if (folder / DIGESTS).is_file() else {}
    kept = {path.name for pattern in others for path in folder.glob(pattern)}
    _write(folder, {name: digest for name, digest in listed.items() if name in kept})
    add_digests(folder, (path for pattern in written for path in sorted(folder.glob(pattern))))


def add_digests(folder: str | Path, files: Iterable[str | Path]) -> None:
    """Add files of a saved model's folder to its digests, such as those that `tokenizer.save_pretrained` returns."""
    folder = Path(folder)
    inside = (path for path in map(Path, files) if path.is_file() and path.resolve().parent == folder.resolve())
    _write(folder, _listed(folder) | {path.name: _digest(path) for path in inside})


def check_digests(folder: Path, listed: str = DIGESTS) -> None:
    """Raises ValueError for a file that was changed or lost since it was saved, by the digests in the file `listed`.

    A folder without that file passes."""
    if not (folder / listed).is_file():
        return
    for name, expected in _listed(folder, listed).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if _digest(path) != expected:
            raise ValueError(f"{folder} is damaged: {name} is not as it was saved (if you changed it, remove {listed})")


def check_weights(folder: Path, foreign: Sequence[str], weights: Iterable[tuple[str, Any]], of: str = "model") -> None:
    """Raises ValueError for names of weights that are not the model's or that it lacks, `foreign`, and for one of
    `weights`, names and tensors, that is not finite."""
    if foreign:
        raise ValueError(
            f"{folder} does not hold the weights of this {of}: {foreign[0]!r} does not match its config.json"
        )
    broken = next((name for name, weight in weights if not bool(weight.isfinite().all())), None)
    if broken is not None:
        raise ValueError(f"{folder} cannot be used: its weight {broken!r} has numbers that are not finite")


def _listed(folder: Path, listed: str = DIGESTS) -> dict[str, str]:
    try:
        return dict(json.loads((folder / listed).read_text()))
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {listed} cannot be read ({error})") from None


def _write(folder: Path, digests: dict[str, str]) -> None:
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
