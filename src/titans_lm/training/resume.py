"""Which runs may go on from a checkpoint: those of the same settings, but for what may change."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from titans_lm.models.hub import RUN
from titans_lm.training.config import Settings, load_settings
from titans_lm.training.run_folder import rows_of


def check_same(folder: Path, settings: Settings) -> None:
    """Raises ValueError if the run in `folder` has other settings, or no run.yaml."""
    ours, theirs = _flat(settings), _flat(load_settings(folder / RUN, []))
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        raise ValueError(f"{folder} is of a run of other settings ({', '.join(other)}); remove it, or run elsewhere")


MAY_CHANGE = (
    "max_steps", "max_minutes", "learning_rate", "final_rate", "warmup", "weight_decay", "max_grad_norm", "bf16",
    "activation_checkpointing", "fsdp", "compile", "logging_steps", "eval_steps", "eval_blocks", "save_steps", "keep",
    "report_to", "sample_steps", "sample_prompts", "sample_tokens", "progress_seconds",
)  # fmt: skip
"""Keys of `training` that may change on resume. They take effect from there on."""


def check_resumed(checkpoint: Path, settings: Settings, rows: int) -> None:
    """Raises ValueError if a run of these settings, of `rows` rows in the batch of all processes, cannot resume from
    `checkpoint`: with another model, other data or another order of it, the result would be of neither run."""
    if not (checkpoint / RUN).is_file():  # written by an early version
        logging.getLogger(__name__).warning("%s has no run.yaml: its settings cannot be compared", checkpoint)
        return
    before = load_settings(checkpoint / RUN, [])
    ours, theirs = _flat(settings), _flat(before)
    other = {key: theirs.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    if settings.config().to_dict() == before.config().to_dict():  # the same model under other key names
        other = {key: value for key, value in other.items() if not key.startswith("model.")}
    there = rows_of(checkpoint, before.training.batch_size)
    if there == rows:  # of more or fewer processes
        other.pop("training.batch_size", None)
    elif "training.batch_size" not in other:
        raise ValueError(
            f"{checkpoint} has batches of {there} rows in all, not {rows}: take as many processes as it had"
        )
    free = {f"training.{name}" for name in MAY_CHANGE if name != "max_steps" or not settings.data.curriculum}
    fixed = {key: value for key, value in other.items() if key not in free}
    if fixed:
        changes = ", ".join(f"{key}={ours.get(key)!r} (was {value!r})" for key, value in fixed.items())
        raise ValueError(f"{changes} cannot change on resume; keep it, or train in another training.output_dir")


def _flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value, without `output_dir` and `resume`."""
    sections = dataclasses.asdict(settings)
    del sections["training"]["output_dir"], sections["training"]["resume"]
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
