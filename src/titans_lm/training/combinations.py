"""Settings that do not go together: each is fine by itself, and beside another it would have no effect, or end the run
after it has begun."""

from typing import Any

from transformers import PreTrainedConfig

from titans_lm.models.configuration import TitansConfig
from titans_lm.models.graft_config import GraftConfig
from titans_lm.tasks import make_task
from titans_lm.training.data_settings import DataSettings

_OF_MEMORY = ("memory_loss_weight", "surprise_threshold")


def check_model_keys(fields: dict[str, Any]) -> None:
    """Raises ValueError for keys of the model's section of which one would hide the other."""
    if fields.get("parameters") is not None and "intermediate_size" in fields:
        raise ValueError(
            f"model.parameters={fields['parameters']} chooses model.intermediate_size, which is given too: drop one"
        )


def check_model(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises ValueError for a given key that has no effect in this model. Keys of shapes, gates and steps pass in
    variants that do not have them, so that the models of a study can share a section."""
    variant = getattr(config, "variant", None)
    if variant is None or variant == "attention":
        for key in _OF_MEMORY:
            if fields.get(key):
                raise ValueError(f"model.{key}={fields[key]} is for a model with a memory; this one has none")


def check_data(data: DataSettings) -> None:
    """Raises ValueError for a key of the data's section that has no effect on this kind of data."""
    defaults = DataSettings()
    if data.task:
        for key, instead in (("tokenizer", "the task has its own"), ("sequence_length", "give data.task a length")):
            if getattr(data, key) != getattr(defaults, key):
                raise ValueError(f"data.{key}={getattr(data, key)!r} has no effect with data.task: {instead}")
    if not data.dataset and data.dataset_split != defaults.dataset_split:
        raise ValueError(f"data.dataset_split={data.dataset_split!r} has an effect only with data.dataset")
    if data.distillation is not None:
        raise ValueError(
            f"data.distillation={data.distillation} is for one of data.sources; for all: model.distillation"
        )
    if not data.files and data.held_out not in (0, defaults.held_out):
        raise ValueError(f"data.held_out={data.held_out} is a number of data.files; other data has none")


def check_distillation(data: DataSettings, config: PreTrainedConfig) -> None:
    """Raises ValueError for sources with `distillation` where the model has no base to learn from."""
    if any("distillation" in source for source in data.sources) and not isinstance(config, GraftConfig):
        raise ValueError("data.sources: distillation is for a graft (model.graft), which has a base to learn from")


def check_length(data: DataSettings, config: PreTrainedConfig, spans: list[int]) -> None:
    """Raises ValueError for streams that would become longer than the model allows, after some batches."""
    limit = getattr(config, "max_position_embeddings", None) if isinstance(config, TitansConfig) else None
    length = make_task(data.task).length if data.task else data.sequence_length
    if limit is not None and length * max(spans) > limit:
        raise ValueError(
            f"model.max_position_embeddings={limit} is below the {length * max(spans)} tokens of a stream: rows of "
            f"{length} tokens, carried over training.tbptt_steps={max(spans)} batches"
        )
