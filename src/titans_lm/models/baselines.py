"""The models that the memory is compared with: published recurrences as settings of our memory, attention, Mamba2.

All are trained by the same code, and `config.fitted` gives them the same number of parameters. tests/test_baselines.py
and tests/test_special_cases.py compare these settings with the published recurrences.
"""

from typing import Any

from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedConfig, PreTrainedModel

import titans_lm.models.modeling  # noqa: F401 - registers ours
from titans_lm.models.presets import SIZES, size_target

_RECURRENCE = {"variant": "lmm", "num_persistent_tokens": 0, "memory_momentum": False, "memory_clip": None}
_LINEAR = {**_RECURRENCE, "memory_layers": 1, "memory_form": "plain", "memory_init": "zero", "memory_forgetting": False,
           "memory_lr_start": 0.5}  # fmt: skip
_TTT = {**_RECURRENCE, "memory_form": "residual", "memory_forgetting": False, "memory_chunk_size": 16}

BASELINES: dict[str, dict[str, Any]] = {
    "full_attention": {"variant": "attention", "window_size": None, "num_persistent_tokens": 0},
    "sliding_window": {"variant": "attention", "num_persistent_tokens": 0},
    # With M_0 = 0 as the anchor of all tokens, the error is the value: each token writes theta 2 k^T v.
    "linear_attention": {**_LINEAR, "memory_chunk_size": 2**30, "memory_lr": 0.5},
    "delta_net": {**_LINEAR, "memory_chunk_size": 1, "memory_lr": 0.5},  # beta = 2 theta in (0, 1)
    "delta_net_negative": {**_LINEAR, "memory_chunk_size": 1, "memory_lr": 1.0},  # beta in (0, 2): arXiv:2411.12537
    "gated_delta_net": {**_LINEAR, "memory_chunk_size": 1, "memory_lr": 0.5, "memory_forgetting": True},
    "ttt_linear": {**_TTT, "memory_layers": 1},
    "ttt_mlp": {**_TTT, "memory_layers": 2, "memory_activation": "gelu"},
}
"""Fields of TitansConfig. The linear recurrences start with a step at half of its bound, as in their papers. TTT's
steps have the bound `memory_lr`, as ours have, and not the values of its paper."""
MAMBA2 = "mamba2"
"""transformers' own Mamba2, an independent peer."""
NAMES = (*BASELINES, MAMBA2)


def mamba2_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The Mamba2 of the width in `fields` (a size, with changes) that is nearest to `parameters`, or to the size's.

    Its inner width is twice as large. Its layers have no MLP; their number and the size of their state are fitted.
    Fields of a Titans model alone have no effect. Raises ValueError where no Mamba2 comes within 3 %.
    """
    fields = {**SIZES.get(fields.get("size", ""), {}), **fields}
    missing = [key for key in ("hidden_size", "vocab_size") if key not in fields]
    if missing:
        raise ValueError(f"{MAMBA2} needs a size, or {' and '.join(missing)}")
    for key in ("hidden_size", "vocab_size"):
        if fields[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {fields[key]}")
    width, target = fields["hidden_size"], fields.get("parameters") or size_target(fields)
    head = min(64, width)

    def make(layers: int, state: int) -> PreTrainedConfig:
        return Mamba2Config(
            vocab_size=fields["vocab_size"], hidden_size=width, num_hidden_layers=layers, expand=2, head_dim=head,
            num_heads=2 * width // head, n_groups=1, state_size=state, chunk_size=64, tie_word_embeddings=True,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    one, two = (_parameters(make(n, 128)) for n in (1, 2))
    layers = max(1, round(1 + (target - one) / (two - one)))
    best = min((make(layers, state) for state in range(64, 257, 8)), key=lambda c: abs(_parameters(c) - target))
    if abs(_parameters(best) / target - 1) > 0.03:
        raise ValueError(f"no {MAMBA2} of width {width} has {target:,.0f} parameters within 3 %; give other parameters")
    return best


def _parameters(config: PreTrainedConfig) -> int:
    """The parameters of a Mamba2: two projections, a convolution, norms, three numbers per head; a tied embedding."""
    inner = 2 * config.hidden_size
    convolved = inner + 2 * config.n_groups * config.state_size
    block = config.hidden_size * (inner + convolved + config.num_heads) + inner * config.hidden_size
    block += convolved * (config.conv_kernel + 1) + inner + 3 * config.num_heads + config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * block + config.hidden_size


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a configuration, with random weights."""
    return AutoModelForCausalLM.from_config(config)
