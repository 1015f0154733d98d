"""A model's folder: where shipped models are, the digests of its files, and the code that opens it elsewhere."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

AUTO_CODE = "modeling_titans"
"""The module beside saved weights that opens them in a process that has not imported this package."""
AUTO_MAP = {
    "AutoConfig": f"{AUTO_CODE}.TitansConfig",
    "AutoModel": f"{AUTO_CODE}.TitansModel",
    "AutoModelForCausalLM": f"{AUTO_CODE}.TitansForCausalLM",
}
"""Which of its classes an Auto class takes."""
SHIPPED = Path(__file__).parent / "shipped"
"""A folder for each model that is shipped with the package."""
NAMES = sorted(folder.name for folder in SHIPPED.iterdir())
MODEL_HELP = f"a folder that titans train wrote, or the name of a shipped model: {', '.join(NAMES)}"
DIGESTS = "digests.json"
"""In a saved model's folder: the SHA-256 of its files."""
_WEIGHTS = ("config.json", "model*.safetensors*", f"{AUTO_CODE}.py")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors*")

_CODE = f'''"""Opens this model with the package titans-lm, whose version must know the model's configuration.

    import titans_lm
    model, tokenizer = titans_lm.load(FOLDER)

After `import titans_lm`, `AutoModelForCausalLM.from_pretrained(FOLDER)` works too. A process that has not imported the
package finds it through this file with `trust_remote_code=True`.
"""

from titans_lm import {", ".join(sorted(name.rsplit(".", 1)[1] for name in AUTO_MAP.values()))}  # noqa: F401
'''


def shipped(name: str | Path) -> str | Path:
    """The folder of the shipped model of that name, or `name` itself where it is another or a model's folder."""
    return SHIPPED / name if str(name) in NAMES and not (Path(name) / "config.json").is_file() else name


def find(model: str | Path) -> Path:
    """The folder of a model: itself or, where it is none and a shipped model has that name, that one's. A folder of
    texts may be called as a model is.

    Raises ValueError for what is neither.
    """
    folder = Path(shipped(model))
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
    """Whether a class is of this package, and not of someone who went on from it. FSDP derives a class from each."""
    named = next(c for c in model.__mro__ if not c.__name__.startswith("FSDP"))
    return named.__module__.split(".")[0] == __name__.split(".")[0]


def complete(folder: str | Path, *, adapter: bool) -> None:
    """Write what belongs beside a model, or beside an `adapter` alone, that was just saved: code that opens it, and the
    digests. Files that were not written now, an adapter's beside a model or a model's beside an adapter, keep theirs.
    A tokenizer's are forgotten, because it is about to be saved too; `add_digests` has them."""
    folder = Path(folder)
    if not adapter:
        (folder / f"{AUTO_CODE}.py").write_text(_CODE)
    written, others = (_ADAPTER, _WEIGHTS) if adapter else (_WEIGHTS, _ADAPTER)
    listed = _listed(folder) if (folder / DIGESTS).is_file() else {}
    there = {path.name for pattern in others for path in folder.glob(pattern)}
    _write(folder, {name: digest for name, digest in listed.items() if name in there})
    add_digests(folder, (path for pattern in written for path in sorted(folder.glob(pattern))))


def add_digests(folder: str | Path, files: Iterable[str | Path]) -> None:
    """Put files of a saved model's folder under its digests, such as those that `tokenizer.save_pretrained` returns."""
    folder = Path(folder)
    inside = (path for path in map(Path, files) if path.is_file() and path.resolve().parent == folder.resolve())
    _write(folder, _listed(folder) | {path.name: _digest(path) for path in inside})


def check_digests(folder: Path, listed: str = DIGESTS) -> None:
    """Raises ValueError where a file of a model's folder is not as it was saved, by the digests in its file `listed`.
    Nothing is checked where a folder has no such file."""
    if not (folder / listed).is_file():
        return
    for name, expected in _listed(folder, listed).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if _digest(path) != expected:
            raise ValueError(f"{folder} is damaged: {name} is not as it was saved (if you changed it, remove {listed})")


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
