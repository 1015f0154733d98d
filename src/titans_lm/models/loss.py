"""The memory's own loss, and the weights of rows in it."""

from typing import Any

import torch
from torch import Tensor

from titans_lm.ops import Surprise

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss functions. With label smoothing, `Trainer` passes the first one without labels."""


def memory_losses(surprise: tuple[Surprise, ...], attention_mask: Tensor | None) -> Tensor:
    """The memory loss of each row, `[B]`: the mean over layers, heads and tokens that are not masked."""
    each = torch.stack([s.loss.mean(-1) for s in surprise]).mean(0)  # [B, T], 0 where masked
    if attention_mask is None:
        return each.mean(1)
    return each.sum(1) / attention_mask[:, -each.shape[1] :].sum(1).clamp(min=1)


def label_counts(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any) -> Tensor:
    """The number of labels of each row `[B]` that the loss counts. It is the row's weight, whichever batch it is in."""
    return ((labels[:, 1:] if shift_labels is None else shift_labels) != ignore_index).sum(1)
