"""Logits of the last tokens alone, where a batch has labels at its end only, as the answer of a question is.

With a vocabulary of thousands, logits take longer than a small model.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from titans_lm.models.loss import memory_weights
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.tasks import IGNORED


def only_needed_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call of the model, with `logits_to_keep` and the labels of those logits, if at most half of
    the positions need logits; else `inputs`. The loss is the same.

    What a memory adds to the loss and a distillation look at all labels, so their models get `inputs`, as do labels on
    a GPU, which would have to be waited for."""
    labels = inputs.get("labels")
    if type(model) is not TitansForCausalLM or memory_weights(model.config) or labels is None or not labels.is_cpu:
        return inputs
    if "logits_to_keep" in inputs or "shift_labels" in inputs:
        return inputs
    labelled = (labels != IGNORED).any(0).nonzero()
    first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
    count = labels.shape[1] - max(first - 1, 0)  # the logits that predict a label are of the token before it
    if 2 * count > labels.shape[1]:
        return inputs
    return {**inputs, "labels": labels[:, -count:], "logits_to_keep": count}
