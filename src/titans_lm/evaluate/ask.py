"""Greedy answers after a text of any length: prefilled in pieces through the memory, or at once without one."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.modeling import TitansForCausalLM


@torch.no_grad()
def follow(model: PreTrainedModel, ids: Tensor, count: int, piece: int = PREFILL_TOKENS) -> Tensor:
    """Decode `count` tokens greedily after each row of ids `[B, T]`, T >= 1. -> `[B, count]`"""
    model.eval()
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    pad = model.config.pad_token_id
    ids, first = ids.to(model.device), 0
    if isinstance(model, TitansForCausalLM):
        state, first = model.initial_state(len(ids)), ids.shape[1] - 1
        for part in ids[:, :first].split(piece, 1):
            model(part, past_key_values=state, logits_to_keep=1)
        options["past_key_values"] = state.continuation()
    prompt = ids[:, first:]  # no padding, even if it contains the padding token
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0 if pad is None else pad}
    out: Any = model.generate(prompt, **options)
    return out[:, ids.shape[1] - first :].cpu()
