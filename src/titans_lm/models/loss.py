"""What is added to the loss of a model with a memory, and the weights of documents in it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_lm.layers.memory_state import LayerSurprise
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.packing import document_starts

LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss functions. With label smoothing, `Trainer` passes the first one without labels."""


class MemoryTerms(NamedTuple):
    """The mean of each quantity over the batch's documents. Training adds each times its weight to the loss. None if
    its weight is 0."""

    loss: Tensor | None
    """The memory's reconstruction loss before each write."""
    theta: Tensor | None
    """The memory's step."""


def memory_weights(config: TitansConfig) -> dict[str, float]:
    """The weight of each of the `MemoryTerms` in the loss, without those of weight 0."""
    weights = {"loss": config.memory_loss_weight, "theta": config.memory_theta_weight}
    return {name: weight for name, weight in weights.items() if weight > 0}


def memory_terms(
    weights: dict[str, float],
    surprise: tuple[LayerSurprise, ...],
    labels: Tensor,
    attention_mask: Tensor | None,
    packed: dict[str, Any],
    loss_arguments: dict[str, Any],
) -> tuple[Tensor, MemoryTerms]:
    """What is added to the loss, and the terms that `weights` name.

    A document's term is the mean over layers, heads and tokens that are not masked. Its weight is that of its labels,
    whichever row and batch it is in. `packed` has `position_ids` and the like, of rows with several documents.
    """
    each = torch.stack([torch.stack([getattr(s, name).mean(-1) for s in surprise]).mean(0) for name in weights])
    totals, own = _document_sums(each, labels, attention_mask, packed, loss_arguments)
    means, items = totals / own.clamp(min=1), loss_arguments.get("num_items_in_batch")
    added = means if items is None else totals / items
    terms = dict(zip(weights, means, strict=True))
    total = sum((weight * part for weight, part in zip(weights.values(), added, strict=True)), added.new_zeros(()))
    return total, MemoryTerms(terms.get("loss"), terms.get("theta"))


def _document_sums(
    each: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    packed: dict[str, Any],
    loss_arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`each` `[N, B, T]`, N terms of every token, 0 where masked -> `[N]`, their means over a document's tokens times
    its number of labels, summed; and the number of labels."""
    terms, rows, width = each.shape
    mask = None if attention_mask is None else attention_mask[:, -width:].bool()
    tokens = each.new_ones(rows, width) if mask is None else mask.to(each.dtype)
    counted = _counted(labels, **loss_arguments).to(each.dtype)
    starts = document_starts(mask, (rows, width), packed.get("position_ids"), lambda: [[]] * rows, packed)
    if starts is None:
        sums, size, own = each.sum(2), tokens.sum(1), counted.sum(1)
    else:
        document = starts.to(each.device).flatten().cumsum(0) + torch.arange(
            rows, device=each.device
        ).repeat_interleave(width)
        parts = torch.cat([each, tokens[None], counted[None]])
        zeros = each.new_zeros(terms + 2, int(document[-1]) + 1)
        sums, size, own = zeros.index_add(1, document, parts.flatten(1)).tensor_split((terms, terms + 1))
    return (sums / size.clamp(min=1) * own).sum(1), own.sum()


def _counted(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any) -> Tensor:
    """`[B, T]`: the tokens of which the loss counts the label, at the document that the label belongs to."""
    if shift_labels is not None:
        return shift_labels != ignore_index
    counted = labels != ignore_index
    return torch.cat([torch.zeros_like(counted[:, :1]), counted[:, 1:]], 1)
