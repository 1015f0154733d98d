"""A page from a trace: what it says at the top, predicted words, and readings that stand beside."""

from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from titans_lm.analyze.arrays import Trace
from titans_lm.analyze.attribution import Attribution
from titans_lm.analyze.display import token_bytes
from titans_lm.analyze.page import PageData, PageText, Series, Sources
from titans_lm.analyze.trace import Progress, read_bits
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode

SOURCES = 6
"""Sources of one token that a page shows."""


def page_data(
    name: str,
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    found: Trace,
    texts: list[PageText],
    others: list[Series] | None = None,
    compared: Series | None = None,
    attributions: list[Attribution] | None = None,
) -> PageData:
    """What the page of a model's trace shows; `name` is the model's."""
    sources = [Sources(one.token, one.method, one.top(SOURCES)) for one in attributions or ()]
    return PageData(
        f"{name} reads {', '.join(text.name for text in texts)}", found, token_bytes(tokenizer, found["token_id"]),
        _vocabulary(tokenizer, found), texts, _facts(name, model, found, texts), others or [], compared, sources,
    )  # fmt: skip


def other_model_bits(
    label: str,
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    parts: list[bytes | str],
    progress: Progress | None = None,
) -> Series:
    """The bits that another model gives to the same text, `parts`, added up over the bytes of each of its tokens.

    A token of the other model has all its bits at its first byte. Raises ValueError for a text with special tokens, and
    for one that the other tokenizer does not give back byte by byte.
    """
    if not all(isinstance(part, bytes) for part in parts):
        raise ValueError("a text with special tokens cannot be compared between models")
    content = b"".join(part for part in parts if isinstance(part, bytes))
    ids = encode(tokenizer, content.decode("utf-8", "ignore"))
    theirs = token_bytes(tokenizer, ids)
    starts = np.cumsum([0, *(len(part) for part in theirs)])
    if b"".join(part for part in theirs if isinstance(part, bytes)) != content[: starts[-1]] or starts[-1] > len(
        content
    ):
        raise ValueError(f"the tokens of {label} do not give the text back, so its bits have no place in it")
    bits, _ = read_bits(model, torch.from_numpy(ids), None, [], progress=progress)
    spread = np.zeros(len(content))
    spread[starts[:-1]] = np.nan_to_num(bits)
    ours = np.cumsum([0, *(len(part) for part in parts)])
    total = np.concatenate([[0.0], np.cumsum(spread)])
    mine: NDArray[np.float32] = (total[ours[1:]] - total[ours[:-1]]).astype(np.float32)
    mine[ours[:-1] < starts[1]] = np.nan  # nothing predicts the other model's first token
    return Series(label, mine)


def _facts(name: str, model: TitansForCausalLM, found: Trace, texts: list[PageText]) -> dict[str, str]:
    bits = f"{float(np.nanmean(found['bits'])):.3f} a token"
    if "bits_frozen" in found:
        bits += f", {float(np.nanmean(found['bits_frozen'])):.3f} with the memory frozen"
    threshold = model.config.surprise_threshold
    facts = {
        "model": f"{name} ({model.config.variant}, {found.layers} layers, {found.heads} memory heads)",
        "text": ", ".join(text.name for text in texts),
        "tokens": f"{len(found):,}",
        "bits": bits,
    }
    if threshold is not None and "theta" in found:
        facts["written"] = f"{float((found['theta'] > 0).mean()):.1%} (surprise above {threshold:g})"
    return facts | {"made": datetime.now(UTC).strftime("%Y-%m-%d")}


def _vocabulary(tokenizer: PreTrainedTokenizerBase, found: Trace) -> dict[int, bytes | str]:
    """The bytes of each token that was predicted."""
    seen = [found[name].ravel() for name in ("prediction", "prediction_frozen") if name in found]
    ids = np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int64)
    ids = ids[ids >= 0].astype(np.int64)
    return dict(zip(ids.tolist(), token_bytes(tokenizer, ids), strict=True))
