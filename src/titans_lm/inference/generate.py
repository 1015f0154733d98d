"""Generation from a memory: read tokens into a state, continue from it, answer prompts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import NAMES
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.utils.deprecation import renamed
from titans_lm.utils.padding import padded

MAX_LOGITS = 2**25
"""Maximum number of logits per forward call."""
_GIVEN = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "tokenizer", *NAMES)
"""Options of `generate` that prompts, memory and reader determine."""
_MORE_THAN_TEXT = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip
"""Options of `generate` that make it return more than texts."""
__getattr__ = renamed(__name__, {"read": "prefill", "go_on": "generate_from", "PIECE": "PREFILL_TOKENS"})


def piece_with_logits(vocab_size: int, piece: int = PREFILL_TOKENS) -> int:
    """Tokens per forward call that returns all logits: at most `piece`, fewer for a large vocabulary, at least 1."""
    return max(1, min(piece, MAX_LOGITS // vocab_size))


@torch.no_grad()
def prefill(
    model: TitansForCausalLM, ids: Tensor, state: TitansState, piece: int = PREFILL_TOKENS
) -> Iterator[tuple[Tensor, Any]]:
    """Prefill ids `[B, T]` from `state`, which is updated, `piece` tokens per call. Yields (ids, output) of each call.

    Outputs have all logits and the surprise of each layer.
    """
    for part in ids.split(piece, 1):
        yield part, model(part, past_key_values=state, output_surprise=True)


def generate_from(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, prompt: Tensor, **options: Any
) -> Tensor:
    """Generate after `prompt` `[1, T]`, T >= 1, which the state has not read yet. Returns prompt and continuation.

    `options` are those of transformers' `generate`. Does not change `state`.
    """
    return model.generate(
        prompt, past_key_values=state.continuation(), **{"pad_token_id": tokenizer.pad_token_id, **options}
    )


def answer(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    state: TitansState,
    prompts: list[str],
    /,
    **options: Any,
) -> tuple[list[str], TitansState]:
    """Generate an answer to each prompt, row by row of `state`, which has a row per prompt.

    `options` are those of transformers' `generate`; greedy by default. Returns the texts, `num_return_sequences` in a
    row for each prompt, and the memory after prompts and answers, a row for each text. Does not change `state`. Raises
    ValueError for a prompt without tokens, and for options that change what is read or returned."""
    _check_options(options)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    if not all(len(row) for row in ids):
        raise ValueError("a prompt is empty: give at least one character to continue from")
    batch, mask = padded([torch.as_tensor(row) for row in ids])
    state = state.continuation()
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer
    out = model.generate(
        batch.to(model.device), attention_mask=mask.to(model.device), past_key_values=state,
        **_defaults(model, tokenizer, options),
    )  # fmt: skip
    with torch.no_grad():
        model.read_pending(state)
    return tokenizer.batch_decode(out[:, batch.shape[1] :], skip_special_tokens=True), state


def _defaults(model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, greedy if they do not say, and sampling from all tokens, where `generate` takes the 50 likeliest."""
    all_tokens = {"top_k": 0} if options.get("do_sample") and model.generation_config.top_k is None else {}
    return {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **all_tokens, **options}


def _check_options(options: dict[str, Any]) -> None:
    for name in _GIVEN:
        if name in options:
            raise ValueError(f"{name} cannot be passed: prompts, memory and reader determine it; use model.generate")
    for name in _MORE_THAN_TEXT:
        if options.get(name):
            raise ValueError(
                f"{name}={options[name]!r}: answers are texts; "
                f"for more call model.generate(..., past_key_values=state.continuation())"
            )
    if options.get("generation_config") is not None:
        raise ValueError("generation_config cannot be passed: give its values as options, such as temperature=0.7")
    if options.get("use_cache") is False:
        raise ValueError("use_cache=False: answers are given from the memory, which is the cache; leave it out")
