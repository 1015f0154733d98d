"""Load, save and ship models with their tokenizers. Loading runs no code of the folder and refuses damaged files."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from titans_lm.models.configuration import TitansConfig, plain_reason
from titans_lm.models.graft_config import GraftConfig
from titans_lm.models.graft_files import load_graft
from titans_lm.models.model_files import MODEL_HELP, NAMES, SHIPPED, add_digests, check_digests, check_weights, find
from titans_lm.models.modeling import TitansForCausalLM

__all__ = ["MODEL_HELP", "NAMES", "RUN", "SHIPPED", "find", "load", "save", "ship"]

RUN = "run.yaml"
"""The file in a model's folder with the settings of its training."""
_AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load(model: str | Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer of a folder from `titans train` or `save_pretrained`, or of a shipped model by its name,
    such as "books". No code of the folder is run.

    Raises ValueError for a folder that holds no Titans model, for damaged files, and for weights that are not finite.
    """
    folder = find(model)
    check_digests(folder)
    try:
        kind = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind == GraftConfig.model_type:
            return load_graft(folder)
        if kind != TitansConfig.model_type:
            raise ValueError(f"its config.json is of a model of type {kind!r}")
        loaded, report = TitansForCausalLM.from_pretrained(folder, output_loading_info=True, **_AS_DATA)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_AS_DATA)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} cannot be loaded as a Titans model: {plain_reason(error)}") from error
    check_weights(folder, sorted(report["missing_keys"] | report["unexpected_keys"]), loaded.named_parameters())
    return loaded.eval(), tokenizer


def save(model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model and its tokenizer to a folder for `load`, with digests of all files."""
    model.save_pretrained(folder)
    add_digests(folder, tokenizer.save_pretrained(folder))


def ship(source: Path, target: Path, surprise_threshold: float | None = None) -> None:
    """Turn a training run into a shipped model: `ship(Path("runs/books"), SHIPPED / "books")`.

    The weights are stored in bfloat16, half the size, and load in their original dtype. `surprise_threshold` is a key
    of the configuration that may be chosen after training. Other files of `target`, such as its README.md, stay. Raises
    ValueError as `load` does, and for a run without the settings of its training.
    """
    model, tokenizer = load(source)
    if surprise_threshold is not None:
        model.config.surprise_threshold = surprise_threshold
    if not (find(source) / RUN).is_file():
        raise ValueError(f"{source} has no {RUN}, with the settings of its training")
    half = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(target, state_dict=half.state_dict())
    add_digests(target, tokenizer.save_pretrained(target))
    shutil.copyfile(find(source) / RUN, target / RUN)
