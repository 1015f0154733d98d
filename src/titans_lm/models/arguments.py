"""Checks of the arguments of a model's `forward`: each one has its effect, or is refused by name."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from titans_lm.models.block_cache import BlockCache
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import NAMES
from titans_lm.models.configuration import unknown_key
from titans_lm.models.packing import PACKED
from titans_lm.ops import assert_traced, has_values
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"hidden_states": "select_hidden_states"})

FORWARD = (
    "input_ids", "attention_mask", *NAMES, "inputs_embeds", "labels", "use_cache", "logits_to_keep",
    "output_surprise", "output_hidden_states", "position_ids", "return_dict", "num_items_in_batch", *PACKED,
)  # fmt: skip
"""The arguments that have an effect."""
_OF_DECORATORS = ("debug_io", "debug_io_dir", "prune_layers")
"""Arguments that transformers' `merge_with_config_defaults` handles and passes on."""


def check_arguments(options: dict[str, Any], columns: int, tokens: int) -> None:
    """Check the other arguments, `options`, of a call with `tokens` columns after `columns` earlier ones.

    An argument passes if it asks for nothing: None, or what the model does anyway. Raises ValueError for any other.
    """
    for key, value in options.items():
        if value is None or key in PACKED or key in _OF_DECORATORS:
            continue
        if key not in _WITHOUT_EFFECT:
            raise ValueError(unknown_key(key, list(FORWARD), "the arguments of forward"))
        if value is _DEFAULTS.get(key):  # also in a traced call, where a tensor has no values
            continue
        fits, reason = _WITHOUT_EFFECT[key]
        if not fits(torch.as_tensor(value), range(columns, columns + tokens)):
            raise ValueError(f"{key}={value if isinstance(value, bool) else '...'}: {reason}")


_WITHOUT_EFFECT: dict[str, tuple[Callable[[Tensor, range], bool], str]] = {
    "output_attentions": (lambda x, _: not x.any(), "a Titans model does not return attention weights"),
    "output_router_logits": (lambda x, _: not x.any(), "a Titans model has no experts"),
    "is_causal": (lambda x, _: bool(x.all()), "a Titans model is always causal"),
    "token_type_ids": (lambda x, _: not x.any(), "a Titans model has one type of tokens, 0"),
    "cache_position": (
        lambda x, columns: x.tolist() == list(columns),
        "columns continue those that the state has read",
    ),
}
"""Arguments without an effect: the test of the values that describe what the model does anyway, and why it does no
other."""
_DEFAULTS = {"output_attentions": False, "output_router_logits": False, "is_causal": True}
"""What transformers itself passes."""


def check_state(state: Any) -> TitansState:
    """`state`. Raises ValueError for a cache that is not a TitansState."""
    if isinstance(state, TitansState):
        return state
    reason = (
        f"past_key_values must be a TitansState, which model.initial_state(batch) makes, got {type(state).__name__}"
    )
    if isinstance(state, Cache) and state.get_seq_length() > 0:  # of another model, or PEFT's prefix
        reason += (
            ": keys and values, as in prefix tuning, have no place in a memory; use PEFT's prompt tuning, whose "
            "learned tokens the memory reads, or LoRA"
        )
    raise ValueError(reason)


def warn_of_memory_loss(weights: dict[str, float], unused: bool) -> None:
    """Warns where a call in training cannot add `memory_loss_weight` times the memory's loss, or `memory_theta_weight`
    times its step, because its loss is computed elsewhere: some trainers, such as TRL's, compute it from the hidden
    states. `unused`: the call is in training and does not return the surprise."""
    if weights and unused and torch.is_grad_enabled():
        keys = " and ".join(f"memory_{name}_weight={weight}" for name, weight in weights.items())
        terms = ", ".join(f"{weight} * surprise.{name}.mean()" for name, weight in weights.items())
        warnings.warn(
            f"no effect of {keys} in a call without labels, because the loss is computed outside of the model; set 0, "
            f"or call it with output_surprise=True and add {terms}, the mean over layers, to the loss",
            stacklevel=2,
        )


def check_caches(caches: list[BlockCache], expected: list[type[Any]]) -> None:
    """Raises ValueError for the caches of a model of another variant or number of layers."""
    found = [type(cache) for cache in caches]
    if caches and found != expected:
        wanted = f"{len(expected)} x {expected[0].__name__}"
        got = " and ".join(f"{n} x {kind.__name__}" for kind, n in Counter(found).items())
        raise ValueError(f"past_key_values belongs to another model: its layers are {got}, this model's are {wanted}")


def embedded(embedding: nn.Module | None, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The inputs as `[B, T, D]`. Raises ValueError as `given_tokens` does, and for tokens without an `embedding`, which
    a forecaster's model does not have."""
    tokens = given_tokens(input_ids, inputs_embeds)
    if inputs_embeds is not None:
        return inputs_embeds
    if embedding is None:
        raise ValueError("this model has no embedding of tokens: pass inputs_embeds")
    embeds: Tensor = embedding(tokens)
    return embeds


def given_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that is given. Raises ValueError for none, for both and for another number of dimensions."""
    if input_ids is not None and inputs_embeds is None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T], got {list(input_ids.shape)}")
        return input_ids
    if inputs_embeds is None or input_ids is not None:
        raise ValueError("pass input_ids or inputs_embeds, and not both")
    if inputs_embeds.dim() != 3:
        raise ValueError(f"inputs_embeds must be [B, T, D], got {list(inputs_embeds.shape)}")
    return inputs_embeds


def token_mask(attention_mask: Tensor | None, x: Tensor, rows: int) -> Tensor | None:
    """The mask of x `[B, T, D]`: `[B, T]`, True at tokens; None if all are. A longer mask covers earlier tokens too."""
    if x.shape[0] != rows:
        raise ValueError(f"past_key_values has {rows} rows, the input has {x.shape[0]}")
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != x.shape[0] or attention_mask.shape[1] < x.shape[1]:
        raise ValueError(f"attention_mask must be [B, T] = {list(x.shape[:2])}, got {list(attention_mask.shape)}")
    mask = attention_mask[:, attention_mask.shape[1] - x.shape[1] :]
    odd = (mask != 0) & (mask != 1)
    if not has_values(x):
        assert_traced(~odd.any(), "attention_mask must be 0 or 1")
        return mask.bool()
    if bool(odd.any()):
        raise ValueError(
            f"attention_mask must be 0 or 1, got {mask[odd][0].item()}; separate the documents of one row by "
            f"position_ids, seq_idx or cu_seq_lens_q"
        )
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def check_finite(x: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError where the embedding `[B, T, D]` of a token that is not masked has a nan or an infinity.

    Attention and memory compute many tokens in one product, where later tokens are multiplied by 0. A nan times 0 is
    nan, so it would reach earlier tokens too.
    """
    finite = x.isfinite().all(-1)
    finite = finite if mask is None else finite | ~mask
    if not has_values(x):
        assert_traced(finite.all(), "the embedding of a token is not finite; a mask of 0 there hides it")
    elif not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"the embedding of row {row}, column {column} is not finite; a mask of 0 there hides it")


def select_hidden_states(
    option: bool | int | list[int] | None, states: list[Tensor]
) -> tuple[Tensor | None, ...] | None:
    """What `output_hidden_states=option` returns: all of the states; those at some indices, else None; or None.

    Raises ValueError for an index of none of them."""
    if option is None or option is False:
        return None
    if option is True:
        return tuple(states)
    indices, count = [option] if isinstance(option, int) else option, len(states)
    if outside := [index for index in indices if not -count <= index < count]:
        raise ValueError(
            f"output_hidden_states={outside[0]}: there are {count}, the embeddings and each layer's output"
        )
    chosen = {index % count for index in indices}
    return tuple(state if i in chosen else None for i, state in enumerate(states))
