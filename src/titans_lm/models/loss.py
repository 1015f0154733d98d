"""The memory's own loss, and the weights of documents in it."""

from typing import Any

import torch
from torch import Tensor

from titans_lm.models.packing import document_starts
from titans_lm.ops import Surprise

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss functions. With label smoothing, `Trainer` passes the first one without labels."""


def memory_loss_sum(
    surprise: tuple[Surprise, ...],
    labels: Tensor,
    attention_mask: Tensor | None,
    packed: dict[str, Any],
    loss_arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The memory loss of each document times its number of labels, summed; and the number of labels.

    A document's memory loss is the mean over layers, heads and tokens that are not masked. So its weight is that of its
    labels, whichever row and batch it is in. `packed` has `position_ids` and the like, of rows with several documents.
    """
    each = torch.stack([s.loss.mean(-1) for s in surprise]).mean(0)  # [B, T], 0 where masked
    rows, width = each.shape
    mask = None if attention_mask is None else attention_mask[:, -width:].bool()
    tokens = each.new_ones(rows, width) if mask is None else mask.to(each.dtype)
    counted = _counted(labels, **loss_arguments).to(each.dtype)
    starts = document_starts(mask, (rows, width), packed.get("position_ids"), lambda: [[]] * rows, packed)
    if starts is None:
        loss, size, own = each.sum(1), tokens.sum(1), counted.sum(1)
    else:
        document = starts.to(each.device).flatten().cumsum(0) + torch.arange(
            rows, device=each.device
        ).repeat_interleave(width)
        zeros = each.new_zeros(int(document[-1]) + 1)
        loss, size, own = (zeros.index_add(0, document, x.flatten()) for x in (each, tokens, counted))
    return (loss / size.clamp(min=1) * own).sum(), own.sum()


def _counted(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any) -> Tensor:
    """`[B, T]`: the tokens of which the loss counts the label, at the document that the label belongs to."""
    if shift_labels is not None:
        return shift_labels != ignore_index
    counted = labels != ignore_index
    return torch.cat([torch.zeros_like(counted[:, :1]), counted[:, 1:]], 1)
