"""Bits of each token given all before it, for a text that is read piece by piece."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.models.tokenizer import is_bytes
from titans_lm.utils.nats import target_nats


class TokenBits:
    """Takes the logits of one piece after another."""

    def __init__(self) -> None:
        self._next: Tensor | None = None

    def of(self, ids: NDArray[np.int64], logits: Tensor) -> NDArray[np.float64]:
        """Bits `[T]` of the tokens `ids` `[T]`, whose logits are `[T, V]`; nan for the first token of the text, which
        nothing predicts."""
        before = logits[:-1] if self._next is None else torch.cat([self._next, logits[:-1]])
        self._next = logits[-1:].detach()
        bits = np.full(len(ids), np.nan)
        if len(before):
            targets = torch.from_numpy(ids[-len(before) :])
            bits[-len(before) :] = target_nats(before, targets).double().cpu().numpy() / math.log(2)
        return bits


def by_bytes(
    tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64], bits: NDArray[np.float64]
) -> tuple[bytes, NDArray[np.float64]]:
    """The bytes of tokens, and the bits of each byte: the first byte of a token has all its bits, and the bytes of a
    token with unknown bits have nan."""
    if is_bytes(tokenizer):
        return ids.astype(np.uint8).tobytes(), bits
    parts = [tokenizer.decode([token]).encode() or b" " for token in ids.tolist()]
    starts = np.cumsum([0, *map(len, parts)])
    spread = np.repeat(np.where(np.isnan(bits), np.nan, 0.0), np.diff(starts))
    spread[starts[:-1]] = bits
    return b"".join(parts), spread
