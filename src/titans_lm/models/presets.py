"""Configurations by a named size, or fitted to a number of parameters; and the counting of parameters."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from titans_lm.models.configuration import DEFAULT_CONFIG, TitansConfig, Variant
from titans_lm.models.modeling import TitansForCausalLM

_Config = TypeVar("_Config", bound=PreTrainedConfig)
_Model = TypeVar("_Model", bound=PreTrainedModel)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "vocab_size": 320, "window_size": 64,
             "segment_size": 64, "num_persistent_tokens": 4},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, "vocab_size": 320,
              "window_size": 256, "segment_size": 256, "num_persistent_tokens": 8},
    "170m": {"num_hidden_layers": 12, "hidden_size": 768},
    "340m": {"num_hidden_layers": 24, "hidden_size": 1024},
    "400m": {"num_hidden_layers": 24, "hidden_size": 1088},
    "760m": {"num_hidden_layers": 24, "hidden_size": 1536},
}  # fmt: skip
"""Layers and widths, from the paper (but for its 400M), with 16 attention heads and memory heads of width 64."""

PARAMETERS = {"tiny": 0.8e6, "small": 15e6, "170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6}
"""The number of parameters that a size stands for: its name, or a choice for tiny and small."""


def preset(size: str, variant: Variant = "mag", **changes: Any) -> TitansConfig:
    """The configuration of a named size, with `changes`. The MLP's width brings it to the size's number of parameters,
    so that variants of one size compare fairly.

    Raises ValueError for a size or a key that does not exist.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; it is one of {', '.join(SIZES)}")
    fields = {**SIZES[size], "variant": variant, **changes}
    if "intermediate_size" in changes:
        return TitansConfig(**fields)
    return fitted(size_target({"size": size, **fields}), **fields)


def size_target(fields: dict[str, Any]) -> float:
    """The number of parameters that the size in `fields` stands for, adjusted for the embedding of another vocabulary.
    Raises ValueError without a size."""
    if fields.get("size") not in SIZES:
        raise ValueError(f"without a size (one of {', '.join(SIZES)}) parameters must be given")
    usual = SIZES[fields["size"]].get("vocab_size", DEFAULT_CONFIG["vocab_size"])
    more = fields.get("vocab_size", usual) - usual
    return PARAMETERS[fields["size"]] + more * fields.get("hidden_size", SIZES[fields["size"]]["hidden_size"])


def fitted(parameters: float, **fields: Any) -> TitansConfig:
    """The configuration of `fields`, with the width of the MLP that brings the model to this many parameters.

    Raises ValueError where no width comes within 3 %.
    """
    one, two = (count_parameters(TitansConfig(**fields, intermediate_size=n)) for n in (64, 128))
    unit = 64 if parameters > 1e8 else 8
    width = unit * max(1, round((64 + 64 * (parameters - one) / (two - one)) / unit))
    found = one + (two - one) * (width - 64) / 64
    if abs(found / parameters - 1) > 0.03:
        raise ValueError(
            f"no MLP brings this model to {parameters:,.0f} parameters within 3 %: one of width {width} makes "
            f"them {found:,.0f}; give other parameters, or intermediate_size"
        )
    return TitansConfig(**fields, intermediate_size=width)


def build_on_meta(build: Callable[[_Config], _Model], config: _Config) -> _Model:
    """The model of `config` on the meta device: shapes, without memory for weights. Weights are not initialised, which
    takes long there and sets nothing, but tied, so that `parameters` has each once."""
    with torch.device("meta"), no_init_weights():
        model = build(config)
    model.tie_weights()  # no_init_weights leaves it out
    return model


def count_parameters(config: TitansConfig) -> int:
    """The number of parameters of `TitansForCausalLM(config)`.

    All layers have the same shapes, so a model of one layer is built: all 24 would take seconds."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    model = build_on_meta(TitansForCausalLM, one)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return sum(p.numel() for p in model.parameters()) + (config.num_hidden_layers - 1) * layer
