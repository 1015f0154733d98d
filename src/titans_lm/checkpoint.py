"""Model folders: loaded as data alone, and refused if they are damaged."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from titans_lm.config import TitansConfig
from titans_lm.model import DIGESTS, TitansForCausalLM


def load(folder: Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer that `titans train` or `save_pretrained` wrote.

    Raises ValueError for a folder that is not a Titans checkpoint, or whose files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model: it has no config.json; `titans train` writes such folders")
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
