"""Second reading of a passage: how much of it is still remembered after other text (part of `adapt`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titans_lm.evaluate import perplexity
from titans_lm.models.modeling import TitansForCausalLM

LAGS = (0, 1 << 10, 1 << 14, 1 << 18, 1 << 20)
"""Tokens between the two readings."""
PASSAGE, PASSAGES = 4096, 4


def reread(
    model: TitansForCausalLM, ids: Tensor, lag: int, passage: int = PASSAGE, passages: int = PASSAGES
) -> Iterator[dict[str, Any]]:
    """Read a passage of ids `[1, T]`, the `lag` tokens after it, and the passage again, for `passages` evenly spaced
    passages.

    Yields a row per passage: `lag`, `at`, and `first` and `second`, the nats per token of both readings. Excludes the
    first token of each reading, whose contexts differ. Yields fewer passages, or none, for a short text.
    """
    length = passage + lag
    room = ids.shape[1] - length
    if room < 0:
        return
    for at in sorted({round(room * i / max(passages - 1, 1)) for i in range(passages)}):
        text = ids[:, at : at + length]
        again = torch.cat([text, text[:, :passage]], 1)
        nats = torch.zeros(again.shape[1], dtype=torch.float64)
        for first, part in perplexity.token_nats(model, again, "on", perplexity.RESET):
            nats[first : first + len(part)] = part
        yield {"lag": lag, "at": at, "first": float(nats[1:passage].mean()), "second": float(nats[length + 1 :].mean())}
