"""`TitansConfig`: the configuration of a Titans model, strictly validated, with the key's name in every error."""

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from titans_lm.layers.memory_options import head_width
from titans_lm.models.model_files import AUTO_MAP
from titans_lm.models.registration import register_models, register_other_configurations

VARIANTS = ("mac", "mag", "mal", "lmm", "attention")
Variant = Literal["mac", "mag", "mal", "lmm", "attention"]


@strict
class TitansConfig(PreTrainedConfig):
    """Configuration of `TitansModel` and `TitansForCausalLM`.

    Raises ValueError for an impossible value, with the key and the possible values, and for an unknown keyword. An
    unknown key of a `config.json` stays as an attribute, with one warning, because other programs that work with
    transformers models keep keys of their own there.
    """

    model_type = "titans"
    auto_map: ClassVar[dict[str, str]] = AUTO_MAP  # for models of older versions, which were saved without one
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - as transformers declares it
    attribute_map = {"hidden_dim": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}  # noqa: RUF012

    variant: Variant = "mag"
    """mac: memory as context; mag: as gate; mal: as layer; lmm: memory alone; attention: no memory, the baseline."""
    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    head_dim: int | None = None
    """Width of an attention head; default hidden_size / num_attention_heads."""
    intermediate_size: int = 2816
    """Width of the gated MLP (SwiGLU)."""
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int | None = None
    """The most tokens of a stream; None: no limit."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    window_size: int | None = 512
    """Tokens that attention sees, the current one included (mag, mal, attention). None: all tokens (attention)."""
    segment_size: int = 512
    """Tokens of a segment (mac)."""
    num_persistent_tokens: int = 16
    """Learned tokens in front of the sequence, in every block (eq. 19)."""
    gate: Literal["product", "convex"] = "product"
    """How mac and mag join attention y and memory m: norm(y) * sigmoid(norm(m)), or g * y + (1 - g) * m, g learned."""

    num_memory_heads: int | None = None
    """Default: hidden_size / memory_head_dim."""
    memory_head_dim: int = 64
    memory_layers: int = 2
    """Depth of the memory, at least 1; 1 is a matrix."""
    memory_dim: int | None = None
    """Hidden width of each head's memory; default 4 * memory_head_dim."""
    memory_lr: float = 0.1
    """Upper bound of theta, the memory's step, in (0, 1]."""
    memory_lr_start: float = 0.01
    """theta before training, in (0, 1]; at most half of memory_lr."""
    memory_chunk_size: int = 16
    """Tokens whose gradients are taken at the same weights (the inner-loop mini-batch); 1 is exactly the paper."""
    memory_init: Literal["learned", "zero"] = "learned"
    memory_start: Literal["auto", "associative", "random"] = "auto"
    """The memory's projections and convolutions before training. associative: a memory of what follows what; auto:
    associative, if there are convolutions."""
    memory_lags: int = 4
    """How many tokens back the keys of an associative start look; at most memory_conv_size - 1."""
    memory_form: Literal["residual", "plain"] = "residual"
    """residual: M(k) = k + norm(MLP(k)), stable; plain: the paper's MLP."""
    memory_activation: Literal["silu", "gelu"] = "silu"
    memory_clip: float | None = 1.0
    """Bound of each token's gradient at the memory's output; None: unbounded."""
    memory_momentum: bool = True
    memory_forgetting: bool = True
    memory_gates_of: Literal["token", "chunk"] = "token"
    """Whether theta, eta and alpha belong to each token, or to each chunk, as those of its first token."""
    memory_alpha_bias: float = -6.0
    """Forgetting before training, before the sigmoid: -5 forgets over some 150 tokens, -8 over 3,000."""
    memory_conv_size: int = 4
    """Width of the causal convolutions on q, k, v; 1: none."""
    memory_loss_weight: float = 0.0
    """Weight of the memory's own reconstruction loss in training (lambda)."""
    memory_theta_weight: float = 0.0
    """Weight of the mean theta, added to the loss in training: the larger, the fewer or smaller the memory's steps."""
    surprise_threshold: float | None = None
    """Only tokens with a larger surprise are written; None: all are."""
    surprise_threshold_on: Literal["reconstruction", "prediction"] = "reconstruction"
    """The surprise: the memory's reconstruction loss, or the error of a learned prediction of the layer's input."""
    classifier_dropout: float = 0.1
    """Share of the hidden states that a token classifier drops in training, in [0, 1)."""

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, key in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, key, kwargs.pop(alias))
        unknown = [key for key in kwargs if key not in _INHERITED]
        if unknown and "model_type" not in kwargs:  # only a saved configuration has it
            raise ValueError(unknown_key(unknown[0], known_keys(type(self)), type(self).__name__))
        if unknown:
            _warn_unknown(unknown, type(self))
        if self.head_dim is None:
            heads = ("hidden_size", "num_attention_heads")
            self.head_dim = head_width(self.hidden_size, self.num_attention_heads, heads)
        if self.memory_dim is None:
            self.memory_dim = 4 * self.memory_head_dim
        if self.num_memory_heads is None:
            self.num_memory_heads = max(1, self.hidden_size // max(self.memory_head_dim, 1))
        super().__post_init__(**kwargs)
        register_models()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, which does not call `__post_init__`."""
        self.__dict__.update(state)
        register_models()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a dict from `to_dict` or a `config.json`; `kwargs` replace its values.

        Warns about unknown keys. Raises ValueError for another model's configuration.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"this is the configuration of a model of type {kind!r}, not {cls.model_type!r}")
        return super().from_dict({**config_dict, "model_type": kind}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """As transformers has it, for a class of your own. This class does not need it: models are saved with their
        `AUTO_MAP` and without a copy of the package's code."""
        if cls.__module__.split(".")[0] != __name__.split(".")[0]:
            super().register_for_auto_class(auto_class)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers has it."""
        if self._auto_class is not None:  # transformers adds to the map, so this configuration needs its own
            self.auto_map = dict(self.auto_map)  # type: ignore[misc]
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_architecture(self) -> None:
        """Raises ValueError for a value that is impossible by itself or with the others."""
        for key in _NUMBERS:
            if getattr(self, key) != getattr(self, key):
                raise ValueError(f"{key} must be a number, got nan")
        for keys, fits, words in _RANGES:
            for key in keys:
                value = getattr(self, key)
                if value is not None and not fits(value):
                    raise ValueError(f"{key} must be {words}, got {value}")
        self._check_window()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size={self.vocab_size}, got {self.pad_token_id}")

    def _check_window(self) -> None:
        if self.window_size is None and self.variant in ("mag", "mal"):
            raise ValueError(f"window_size must be a number for variant {self.variant!r}; null is for 'attention'")

    def own_fields(self) -> dict[str, Any]:
        """The fields of this class and their values, without those that it inherits."""
        return {key: getattr(self, key) for key in DEFAULT_CONFIG}


def plain_errors(initialise: Callable[..., None]) -> Callable[..., None]:
    """Decorates the initialiser: the errors of `strict` become a ValueError of one line that names the field."""

    @functools.wraps(initialise)
    def wrapped(self: TitansConfig, *args: Any, **kwargs: Any) -> None:
        numbers = {f.name for f in dataclasses.fields(self) if f.type in (float, float | None)}
        for key, value in kwargs.items():  # an integer stands for a float
            if key in numbers and type(value) is int:
                kwargs[key] = float(value)
        try:
            initialise(self, *args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__ or error
            raise ValueError(" ".join(str(cause).split())) from None

    return wrapped


_NUMBERS = {f.name for f in dataclasses.fields(TitansConfig) if f.type in (float, float | None)}
TitansConfig.__init__ = plain_errors(TitansConfig.__init__)  # type: ignore[method-assign]

_COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size",
    "window_size", "segment_size", "max_position_embeddings", "num_memory_heads", "memory_head_dim", "memory_layers",
    "memory_dim", "memory_chunk_size", "memory_conv_size", "memory_lags",
)  # fmt: skip
_NOT_NEGATIVE = ("num_persistent_tokens", "memory_loss_weight", "memory_theta_weight", "initializer_range")
_RANGES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (_COUNTS, lambda value: value >= 1, "at least 1"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (("rms_norm_eps", "rope_theta", "memory_clip"), lambda value: value > 0, "above 0"),
    (("classifier_dropout",), lambda value: 0 <= value < 1, "in [0, 1)"),
    (("memory_lr", "memory_lr_start"), lambda value: 0 < value <= 1, "in (0, 1]"),
    (("head_dim",), lambda value: value % 2 == 0, "even (rotary positions rotate pairs)"),
]
_INHERITED = {f.name for f in dataclasses.fields(PreTrainedConfig)} | {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation", "_commit_hash", "model_type", "name_or_path",
    "_name_or_path", "transformers_version", "architectures", "auto_map", "experts_implementation", "num_labels",
    "output_attentions", "quantization_config", "per_layer_config", "transformers_weights",
}  # fmt: skip
"""Keys that transformers sets, uses and saves."""


def known_keys(config: type = TitansConfig) -> list[str]:
    """The keys that a user sets: the fields of this class, the special tokens and the aliases."""
    own = [f.name for f in dataclasses.fields(config) if not f.name.startswith("_")]
    return own + list(TitansConfig.attribute_map)


def unknown_key(key: str, known: list[str], where: str) -> str:
    """A message of one line: the unknown key, its place, and the nearest known key."""
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    return f"unknown key {key!r} in {where}" + (f"; did you mean {near[0]!r}?" if near else "")


def _warn_unknown(keys: list[str], config: type) -> None:
    """Warn once about all unknown keys."""
    message = "; ".join(unknown_key(key, known_keys(config), "config.json") for key in keys)
    warnings.warn(f"{message} (kept as attributes, without any effect)", stacklevel=2)


def plain_reason(error: Exception) -> str:
    """The message of an error of transformers, as one line."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run"
    return " ".join(str(error).split())


DEFAULT_CONFIG: dict[str, Any] = {
    f.name: f.default for f in dataclasses.fields(TitansConfig) if f.name in TitansConfig.__annotations__
}
"""Every field of this class and its default."""

VARIANT_CONFIGS: dict[str, dict[str, Any]] = {
    "mac": {"variant": "mac"},
    "mag": {"variant": "mag"},
    "mal": {"variant": "mal"},
    "lmm": {"variant": "lmm"},
    "attention": {"variant": "attention", "window_size": None, "num_persistent_tokens": 0},
}
"""The keys of each variant, as in `TitansConfig(**VARIANT_CONFIGS["mac"])`."""

AutoConfig.register(TitansConfig.model_type, TitansConfig, exist_ok=True)
register_other_configurations()
