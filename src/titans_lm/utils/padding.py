"""Rows of different lengths as one batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(rows: Sequence[Tensor], side: Literal["left", "right"] = "left") -> tuple[Tensor, Tensor]:
    """Rows of tokens `[T_i]`, at least one row -> `[B, T]`, 0 at padding; and the mask, 1 at tokens, else 0."""
    ones = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(list(each), batch_first=True, padding_side=side) for each in (rows, ones))
    return ids, mask
