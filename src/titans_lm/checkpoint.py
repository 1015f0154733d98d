"""Model folders: loaded as data alone, and refused if they are damaged. Some are shipped and go by their names."""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from titans_lm.config import TitansConfig
from titans_lm.model import DIGESTS, TitansForCausalLM

SHIPPED = Path(__file__).parent / "shipped"
"""A folder for each model that is shipped with the package."""
RUN = "run.yaml"
"""In a model's folder: the settings that it was trained with."""
NAMES = sorted(folder.name for folder in SHIPPED.iterdir())
MODEL_HELP = f"a folder that titans train wrote, or the name of a shipped model: {', '.join(NAMES)}"


def find(model: Path) -> Path:
    """The folder of a model: itself or, where it is none and a shipped model has that name, that one's. A folder of
    texts may be called as a model is.

    Raises ValueError for what is neither.
    """
    folder = SHIPPED / model if str(model) in NAMES and not (model / "config.json").is_file() else model
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{model} is not a model: it has no config.json; `titans train` writes such folders, "
            f"and shipped is: {', '.join(NAMES)}"
        )
    return folder


def load(folder: Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer that `titans train` or `save_pretrained` wrote, or that are shipped: as `find` has it.

    Raises ValueError for a folder that is not a Titans checkpoint, or whose files are damaged.
    """
    folder = find(folder)
    _check_digests(folder)
    try:
        kind = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != TitansConfig.model_type:
            raise ValueError(f"its config.json is of a model of type {kind!r}")
        model, report = TitansForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} cannot be loaded as a Titans model: {error}") from error
    foreign = sorted(report["missing_keys"] | report["unexpected_keys"])
    if foreign:
        raise ValueError(
            f"{folder} does not hold the weights of this model: {foreign[0]!r} does not match its config.json"
        )
    return model.eval(), tokenizer


def ship(source: Path, target: Path, surprise_threshold: float | None = None) -> None:
    """Make of a training run `source` what is shipped: `ship(Path("runs/books"), SHIPPED / "books")`.

    Weights are stored in bfloat16, half the size, and loaded as the type that they had. `surprise_threshold` is a key
    of the configuration that may be chosen after training. What else `target` has, such as its README.md, stays. Raises
    ValueError as `load` does, and for a run that does not say how it was trained.
    """
    model, tokenizer = load(source)
    if surprise_threshold is not None:
        model.config.surprise_threshold = surprise_threshold
    if not (find(source) / RUN).is_file():
        raise ValueError(f"{source} has no {RUN}, which says how it was trained")
    half = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(target, state_dict=half.state_dict())
    tokenizer.save_pretrained(target)
    shutil.copyfile(find(source) / RUN, target / RUN)


def _check_digests(folder: Path) -> None:
    """Files are as `save_pretrained` wrote them, where it left their digests."""
    listed = folder / DIGESTS
    if not listed.is_file():
        return
    try:
        digests = dict(json.loads(listed.read_text()))
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {DIGESTS} cannot be read ({error})") from None
    for name, expected in digests.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(
                    f"{folder} is damaged: {name} is not as it was saved (if you changed it, remove {DIGESTS})"
                )
