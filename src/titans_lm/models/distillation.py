"""Distillation of a graft: the base that it was made from is its teacher."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from titans_lm.models.packing import PACKED, document_starts, documents, in_rows


def teacher_logits(
    base_logits: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    attention_mask: Tensor | None,
    rows: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The logits of `base_logits(embeddings, mask)` for the `rows` `[B]` (True: taught) of embeddings x `[B, T, D]`,
    each document read by itself. `options` has `position_ids` and the like, of rows with several documents."""
    mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
    packed = {key: options.get(key) for key in PACKED}
    starts = document_starts(mask, (x.shape[0], x.shape[1]), options.get("position_ids"), lambda: [[]] * len(x), packed)
    x, mask = x[rows], None if mask is None else mask[rows]
    if starts is None:
        return base_logits(x, mask)
    groups = documents(starts.to(x.device)[rows], mask)
    return in_rows(groups, tuple(base_logits(g.unpack(x), g.valid) for g in groups), (x.shape[0], x.shape[1]))


def distilled(teacher: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """What distillation puts in place of the next token's loss: KL(teacher, graft) less that loss, summed over the
    labels of each row, `[B]`."""
    counted = labels[:, 1:] != -100
    p, q = (F.log_softmax(x[:, :-1].float(), -1) for x in (teacher, logits))
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    own = q.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return ((divergence + own) * counted).sum(1)
