"""Settings that do not go together: each is fine by itself, and beside another it would have no effect, or end the run
after it has begun."""

from typing import Any

from transformers import PreTrainedConfig

from titans_lm.models.configuration import TitansConfig
from titans_lm.models.graft_config import GraftConfig
from titans_lm.tasks import make_task
from titans_lm.training.data_settings import DataSettings

_OF_MEMORY = ("memory_loss_weight", "memory_theta_weight", "surprise_threshold")
_OF_VARIANTS = {"gate": ("mac", "mag"), "window_size": ("mag", "mal", "attention"), "segment_size": ("mac",)}
"""Keys of the model's section -> the variants that have them."""
_WITH_MEMORY = ("mac", "mag", "mal", "lmm")


def check_model_keys(fields: dict[str, Any]) -> None:
    """Raises ValueError for keys of the model's section of which one would hide the other."""
    if fields.get("parameters") is not None and "intermediate_size" in fields:
        raise ValueError(
            f"model.parameters={fields['parameters']} chooses model.intermediate_size, which is given too: drop one"
        )


def check_model(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises ValueError for a given key of the memory's learning that has no effect in this model."""
    variant = getattr(config, "variant", None)
    if variant is None or variant == "attention":
        for key in _OF_MEMORY:
            if fields.get(key):
                raise ValueError(f"model.{key}={fields[key]} is for a model with a memory; this one has none")


def check_run(fields: dict[str, Any], config: PreTrainedConfig, data: DataSettings, training: Any) -> None:
    """Raises ValueError for a given key without an effect in a run by itself. `parse_settings` lets it pass, because
    the cells of a study share sections. A model's key that is null counts as left out."""
    variant = getattr(config, "variant", None)
    for key, value in fields.items():
        of_memory = key == "num_memory_heads" or key.startswith(("memory_", "surprise_"))
        variants = _OF_VARIANTS.get(key, _WITH_MEMORY if of_memory else None)
        if variants is not None and variant is not None and variant not in variants and value is not None:
            raise ValueError(
                f"model.{key}={value} has no effect in variant {variant!r}, it is of {', '.join(variants)}; leave it "
                f"out, or --set model.{key}=null"
            )
    evaluated = any(source.files and source.held_out for source, _ in data.weighted_sources())
    if not evaluated and training.eval_steps != type(training)().eval_steps:
        raise ValueError(
            f"training.eval_steps={training.eval_steps} has an effect only with files that are held out (data.held_out)"
        )


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
