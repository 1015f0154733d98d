"""Make a graft on a pretrained model, and load one from its folder. Runs no code of either folder, reads no pickle."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from titans_lm.models.configuration import plain_reason
from titans_lm.models.graft import GraftForCausalLM
from titans_lm.models.graft_base import load_base
from titans_lm.models.graft_config import GraftConfig, graft_config
from titans_lm.models.model_files import add_digests
from titans_lm.models.model_identity import weights_digest

_PROBE = 12
"""Tokens with which a new graft is compared with its base."""
_ROUNDING = 0.05
"""The largest difference of logits that is rounding, as a part of the largest logit: bfloat16 has three digits."""


def graft(base: str | Path, **fields: Any) -> GraftForCausalLM:
    """Give a pretrained causal language model of transformers a memory beside its attention.

    Returns a `TitansForCausalLM` whose logits are the base's to the bit, because its gates are closed; training opens
    them. The base's weights are frozen.

    Args:
        base: its folder or Hub name.
        fields: of `GraftConfig`: `layers` with a memory (default all), `window_size` to which attention is cut,
            `lora_rank`, `distillation`, and the memory's own, such as `memory_dim`.

    Raises ValueError for a base that cannot be loaded or grafted, and for a wrong field.
    """
    return make_graft(graft_config({"graft": str(base), **fields}))


def make_graft(config: GraftConfig) -> GraftForCausalLM:
    """A new graft on the base that `config` names, in its dtype. Its logits are the base's.

    Raises ValueError for a base that cannot be loaded or grafted, among them any that computes something else when a
    graft calls it."""
    base = load_base(config.base)
    config.base_weights = weights_digest(base)
    ids = (torch.arange(_PROBE) * 7919 % config.vocab_size)[None].to(base.device)
    with torch.no_grad():
        expected = base.eval()(input_ids=ids).logits
    model = GraftForCausalLM(config, base).eval()
    try:
        found = _differing(model, ids, expected)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        found = " ".join(str(error).split())
    if found is not None:
        raise ValueError(
            f"graft: {config.base}, {type(base).__name__}, does not work with transformers' caches and masks as a "
            f"graft uses them: {found}"
        )
    return model


@torch.no_grad()
def _differing(model: GraftForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How ids `[1, T]` read by a new graft differ from the base's logits; None if they do not."""
    window, tokens = model.config.window_size, ids.shape[1]
    if window is not None and window < tokens:
        expected = model(ids).logits
    elif not torch.equal(model(ids).logits, expected):
        return "it has other logits"
    state = model.initial_state(1)
    parts = [
        model(part, past_key_values=state).logits for part in ids.split([tokens // 2, 1, tokens - tokens // 2 - 1], 1)
    ]
    mask = torch.tensor([[1, 0, 0] + [1] * (tokens - 1)], device=ids.device)
    padded = torch.cat([ids[:, :1], ids[:, :2], ids[:, 1:]], 1)
    masked = model(padded, attention_mask=mask).logits[:, mask[0].bool()]
    for logits, way in ((torch.cat(parts, 1), "a text read in parts"), (masked, "a text with padding")):
        error = float((logits - expected).float().abs().max() / expected.float().abs().max())
        if not error < _ROUNDING:
            return f"{way} has other logits, by {error:.0%}"
    return None


def save_graft(model: GraftForCausalLM, folder: Path) -> None:
    """Save a graft for `load_graft`, with its base's tokenizer, if that has one."""
    model.save_pretrained(folder)
    with suppress(OSError, ValueError):
        add_digests(folder, AutoTokenizer.from_pretrained(model.config.base).save_pretrained(folder))


def load_graft(folder: Path) -> tuple[GraftForCausalLM, PreTrainedTokenizerBase]:
    """The graft in a folder that `save_pretrained` wrote, on its base, and its tokenizer. Raises ValueError as
    `GraftForCausalLM.from_pretrained` does."""
    model: GraftForCausalLM = GraftForCausalLM.from_pretrained(folder)
    return model, _tokenizer(folder, model.config.base)


def check_tokenizer(config: GraftConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError for data whose tokens the base does not know. A base without a tokenizer passes."""
    try:
        own = AutoTokenizer.from_pretrained(config.base, trust_remote_code=False)
    except (OSError, ValueError):
        return
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(f"data.tokenizer has other tokens than the base; set data.tokenizer: {config.base}")


def _tokenizer(folder: Path, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the graft, or the base's."""
    own = (folder / "tokenizer_config.json").is_file()
    try:
        return AutoTokenizer.from_pretrained(folder if own else base, trust_remote_code=False, local_files_only=own)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {folder if own else base} cannot be loaded: {plain_reason(error)}"
        ) from error
