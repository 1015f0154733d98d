"""Distillation of a graft: the base that it was made from is its teacher."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

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


def published_hidden_states(base: PreTrainedModel, x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What the decoder `base` computes of embeddings `[B, T, D]` as it was published. Padding has no position, in bases
    that take positions; others derive them from the mask."""
    options: dict[str, Any] = {}
    if attention_mask is not None and "position_ids" in inspect.signature(base.forward).parameters:
        options["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    with as_published(base):
        out = base(inputs_embeds=x, attention_mask=attention_mask, use_cache=False, **options)
    hidden: Tensor = out.last_hidden_state
    return hidden


@contextmanager
def as_published(base: nn.Module) -> Iterator[None]:
    """Within this context, LoRA is left out of `base` and nothing is dropped."""
    modules: list[Any] = list(base.modules())
    training = [part for part in modules if part.training]
    adapted = [part for part in modules if hasattr(part, "lora_A")]
    for part in training:
        part.training = False
    for part in adapted:
        part._disable_adapters = True  # `enable_adapters(False)` would change requires_grad too
    try:
        yield
    finally:
        for part in training:
            part.training = True
        for part in adapted:
            part._disable_adapters = False


def distilled(teacher: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """What distillation puts in place of the next token's loss: KL(teacher, graft) less that loss, summed over the
    labels of each row, `[B]`."""
    counted = labels[:, 1:] != -100
    p, q = (F.log_softmax(x[:, :-1].float(), -1) for x in (teacher, logits))
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    own = q.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return ((divergence + own) * counted).sum(1)
