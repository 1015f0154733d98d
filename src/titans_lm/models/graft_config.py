"""`GraftConfig`: a pretrained model, the layers that get a memory, and the memory's options."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from titans_lm.models.configuration import TitansConfig, plain_errors, plain_reason, unknown_key

KEYS = (
    "graft", "layers", "window_size", "lora_rank", "lora_alpha", "lora_targets", "distillation", "surprise_threshold",
    "surprise_threshold_on", "num_memory_heads",
    *(f.name for f in dataclasses.fields(TitansConfig) if f.name.startswith("memory_")),
)  # fmt: skip
"""The keys of a run's `model` section with `graft`."""
_ATTENTION_TYPES = ("full_attention", "sliding_attention")


@strict
class GraftConfig(TitansConfig):
    """Configuration of a `GraftForCausalLM`: a pretrained model, the base, whose layers have a memory beside attention.

    Keys that describe the architecture, such as hidden_size, are the base's. `graft_config` fills them in.
    """

    model_type = "titans_graft"
    auto_map: ClassVar[dict[str, str]] = {}  # a graft's folder has no code

    base: str = ""
    """Folder or Hub name of the pretrained model."""
    base_weights: str = ""
    """SHA-256 of its weights. A graft is useless on others."""
    layers: list[int] | None = None
    """The layers with a memory, counted from 0; None: all."""
    window_size: int | None = None
    """Attention sees this many tokens, the current one included; None: as many as the base's does."""
    num_persistent_tokens: int = 0
    tie_word_embeddings: bool = False
    lora_rank: int = 0
    """Rank of LoRA on the base's linear maps, which are frozen themselves; 0: none."""
    lora_alpha: int | float | None = None
    """Scale of LoRA; default 2 * lora_rank."""
    lora_targets: list[str] | None = None
    """The ends of the names of the modules with LoRA, such as [q_proj, v_proj]; None: all linear maps."""
    distillation: int | float = 0.0
    """In training the loss is distillation * KL(base, graft) + (1 - distillation) * that of the next token. The base
    reads the batch's rows as it was published: without memory, LoRA and window."""

    @property
    def grafted(self) -> list[int]:
        """The layers with a memory."""
        return list(range(self.num_hidden_layers)) if self.layers is None else sorted(self.layers)

    def own_fields(self) -> dict[str, Any]:
        """The fields that say what the model computes: not where its base lies, nor how it is trained."""
        names = [f.name for f in dataclasses.fields(TitansConfig) if f.name in TitansConfig.__annotations__]
        return {key: getattr(self, key) for key in [*names, "base_weights", "layers", *_LORA]}

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.layers is not None:
            odd = [layer for layer in self.layers if not 0 <= layer < self.num_hidden_layers]
            if odd or len(set(self.layers)) != len(self.layers) or not self.layers:
                raise ValueError(
                    f"layers must be different numbers from 0 to {self.num_hidden_layers - 1}, got {self.layers}"
                )
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be in [0, 1], got {self.distillation}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, got {self.lora_rank}")
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets is not None):
            raise ValueError("lora_alpha and lora_targets have an effect only with lora_rank above 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha}")

    def _check_window(self) -> None:
        """A base without a window keeps its own attention."""


_LORA = ("lora_rank", "lora_alpha", "lora_targets")
AutoConfig.register(GraftConfig.model_type, GraftConfig, exist_ok=True)
GraftConfig.__init__ = plain_errors(GraftConfig.__init__)  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------ the base's config


def graft_config(fields: dict[str, Any]) -> GraftConfig:
    """The configuration of a run's `model` section, whose key `graft` names the base. Loads the base's configuration.

    Raises ValueError for a base that cannot be found or grafted, and for keys that a graft does not have.
    """
    for key in fields:
        if key not in KEYS:
            raise ValueError(unknown_key(key, list(KEYS), "a graft"))
    options = {key: value for key, value in fields.items() if key != "graft"}
    base = base_config(fields["graft"])
    return GraftConfig(base=str(fields["graft"]), **_architecture(base, options.get("window_size")), **options)


def saved_config(folder: Path) -> TitansConfig:
    """The configuration of a model's folder, of a Titans model or of a graft."""
    kind = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
    config: TitansConfig = (GraftConfig if kind == GraftConfig.model_type else TitansConfig).from_pretrained(
        folder, local_files_only=True
    )
    return config


def base_config(base: Any) -> PreTrainedConfig:
    """The configuration of a base, by folder or Hub name. Raises ValueError for what is none; runs no code of it."""
    if not isinstance(base, str) or not base:
        raise ValueError(f"graft must be the folder or the Hub name of a pretrained model, got {base!r}")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"graft: {base!r} is not the folder or the Hub name of a pretrained model: {plain_reason(error)}"
        ) from error
    if isinstance(config, TitansConfig):
        raise ValueError(f"graft: {base} has a memory already; fine-tune it with model.pretrained")
    return config


def _architecture(base: PreTrainedConfig, window: Any) -> dict[str, Any]:
    """The base's sizes. Raises ValueError for a model of another kind than a decoder of attention layers."""
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if not all(isinstance(getattr(base, key, None), int) for key in keys):
        raise ValueError(f"graft: a model of type {base.model_type!r} is not a decoder of text with attention layers")
    windows(base, None)
    sizes = {key: getattr(base, key) for key in keys}
    return {**sizes, "max_position_embeddings": _longest(base, window)}


def windows(base: PreTrainedConfig, cut: int | None) -> list[int | None]:
    """How many tokens each layer's attention sees, with a window of `cut`; None: all. Raises ValueError for layers that
    are not attention."""
    count = base.num_hidden_layers
    kinds = list(getattr(base, "layer_types", None) or [])
    own = getattr(base, "sliding_window", None) if getattr(base, "use_sliding_window", True) else None
    odd = sorted(set(kinds) - set(_ATTENTION_TYPES))
    if odd:
        raise ValueError(f"graft: {base.model_type!r} has layers of type {odd[0]!r}; attention layers can be grafted")
    found = [own if kind == "sliding_attention" else None for kind in kinds] or [own] * count
    return [min((size for size in (window, cut) if size is not None), default=None) for window in found]


def _longest(base: PreTrainedConfig, window: int | None) -> int | None:
    """The most tokens of a stream. Rotary positions in a window have none, because only distances within it count.
    Learned positions end, and so do rotary angles that depend on the length (dynamic, longrope)."""
    rope = getattr(base, "rope_parameters", None)
    parts = [part for part in (rope or {}).values() if isinstance(part, dict)] or [rope or {}]
    kinds = {part.get("rope_type", "default") for part in parts if part}
    varying = kinds & {"dynamic", "longrope"}
    if window is not None and kinds and not varying:
        return None
    limits = [getattr(base, "max_position_embeddings", None)]
    limits += [part.get("original_max_position_embeddings") for part in parts] if "longrope" in kinds else []
    return min((limit for limit in limits if limit is not None), default=None)
