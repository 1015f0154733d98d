"""What a call of the model is given beside its tokens: each argument is obeyed, or refused by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_lm.models.cache import TitansState
from titans_lm.models.configuration import unknown_key
from titans_lm.models.packing import PACKED

FORWARD = (
    "input_ids", "attention_mask", "past_key_values", "inputs_embeds", "labels", "use_cache", "logits_to_keep",
    "output_surprise", "output_hidden_states", "position_ids", "return_dict", "num_items_in_batch", *PACKED,
)  # fmt: skip
"""The arguments that a model obeys."""
_OF_DECORATORS = ("debug_io", "debug_io_dir", "prune_layers")
"""Those that transformers' `merge_with_config_defaults` obeys and passes on."""


def check_arguments(options: dict[str, Any], columns: int, tokens: int) -> None:
    """`options` beside those that are obeyed, of a call with `tokens` columns after `columns` earlier ones.

    Arguments pass that ask for nothing: None, and what is so anyway. Raises ValueError for all others.
    """
    for key, value in options.items():
        if value is None or key in PACKED or key in _OF_DECORATORS:
            continue
        if key not in _WITHOUT_EFFECT:
            raise ValueError(unknown_key(key, list(FORWARD), "the arguments of forward"))
        fits, reason = _WITHOUT_EFFECT[key]
        if not fits(torch.as_tensor(value), range(columns, columns + tokens)):
            raise ValueError(f"{key}={value if isinstance(value, bool) else '...'}: {reason}")


_WITHOUT_EFFECT: dict[str, tuple[Callable[[Tensor, range], bool], str]] = {
    "output_attentions": (lambda x, _: not x.any(), "a Titans model does not return attention weights"),
    "output_router_logits": (lambda x, _: not x.any(), "a Titans model has no experts"),
    "is_causal": (lambda x, _: bool(x.all()), "a memory reads forwards; a Titans model is always causal"),
    "token_type_ids": (lambda x, _: not x.any(), "a Titans model has one type of tokens, 0"),
    "cache_position": (lambda x, columns: x.tolist() == list(columns), "columns follow those that the state has read"),
}
"""Arguments that may say what is so anyway: when they do, and why they cannot say anything else."""


def check_state(state: Any) -> TitansState:
    """`state`. Raises ValueError for a cache that is not a TitansState."""
    if not isinstance(state, TitansState):
        raise ValueError(
            f"past_key_values must be a TitansState, which model.initial_state(batch) makes, got {type(state).__name__}"
        )
    return state


def embedded(embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """`[B, T, D]`. Raises ValueError unless there is one of them."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass input_ids or inputs_embeds, and not both")
    return embedding(input_ids) if inputs_embeds is None else inputs_embeds


def token_mask(attention_mask: Tensor | None, x: Tensor, rows: int) -> Tensor | None:
    """The part of the mask that is about x `[B, T, D]`, `[B, T]`, True where a token is there; None where all are."""
    if len(x) != rows:
        raise ValueError(f"past_key_values remembers {rows} rows, the input has {len(x)}")
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or len(attention_mask) != len(x) or attention_mask.shape[1] < x.shape[1]:
        raise ValueError(f"attention_mask must be [B, T] = {list(x.shape[:2])}, got {list(attention_mask.shape)}")
    mask = attention_mask[:, attention_mask.shape[1] - x.shape[1] :]
    odd = (mask != 0) & (mask != 1)
    if bool(odd.any()):
        raise ValueError(
            f"attention_mask must be 0 or 1, got {mask[odd][0].item()}; documents of one row are told apart by "
            f"position_ids, seq_idx or cu_seq_lens_q"
        )
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def check_finite(x: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError where an embedding `[B, T, D]` of a token that is there has a nan or an infinity.

    Attention and memory compute many tokens in one product, in which what a token does not see is multiplied by 0: a
    nan would reach the tokens before it as well.
    """
    fine = x.isfinite().all(-1)
    fine = fine if mask is None else fine | ~mask
    if not bool(fine.all()):
        row, column = (~fine).nonzero()[0].tolist()
        raise ValueError(f"the embedding of row {row}, column {column} is not finite; a mask of 0 there hides it")


def hidden_states(asked: bool | int | list[int] | None, states: list[Tensor]) -> tuple[Tensor | None, ...] | None:
    """As `output_hidden_states` asks: all of them; those at some indices, else None; or none at all."""
    if asked is None or asked is False:
        return None
    if asked is True:
        return tuple(states)
    chosen = {index % len(states) for index in ([asked] if isinstance(asked, int) else asked)}
    return tuple(state if i in chosen else None for i, state in enumerate(states))
