"""Titans models with a head for labels: of a whole text, and of each token."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from titans_lm.models.arguments import given_tokens
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import OF_TRANSFORMERS
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.modeling import TitansModel, TitansPreTrainedModel
from titans_lm.models.outputs import TitansTokenClassifierOutput
from titans_lm.models.packing import PACKED, document_starts

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class _Classifier(TitansPreTrainedModel):
    """A model and a linear score of its hidden states."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TitansModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def initial_state(self, batch: int) -> TitansState:
        """The state of `batch` streams before their first token."""
        return self.model.initial_state(batch)

    def begin_with(self, memory: TitansState | None) -> None:
        """See `TitansModel.begin_with`."""
        self.model.begin_with(memory)


class TitansForSequenceClassification(_Classifier):
    """One label, several labels or numbers for a text: a linear score at its last token, as transformers has it."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: TitansState | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As `TitansModel.forward`, with `logits` `[B, num_labels]` of each row's last token.

        The last token is the last one that `attention_mask` shows; without a mask, the last that is not
        `pad_token_id`, which is then masked. So padding may be on any side. `labels`: `[B]` classes, `[B, num_labels]`
        of 0 and 1, or numbers, by `config.problem_type`, which without a value follows from num_labels and dtype.

        Raises ValueError for packed documents, which would need a label each, and for a row without a token.
        """
        packed = [key for key in PACKED if kwargs.get(key) is not None]
        if packed:
            raise ValueError(f"{packed[0]} describes several documents in a row, and a row gets one label: give each "
                             f"document a row of its own")  # fmt: skip
        tokens = given_tokens(input_ids, inputs_embeds)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        last = _last_tokens(attention_mask, tokens)
        items = kwargs.pop("num_items_in_batch", None)
        if position_ids is not None:
            _check_one_document(position_ids, attention_mask, tokens)
        out = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, cache=cache, **kwargs,
        )  # fmt: skip
        hidden = out.last_hidden_state[torch.arange(len(tokens), device=tokens.device), last]
        logits = self.score(hidden)
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels) * _share(labels, items),
            logits=logits,
            **{OF_TRANSFORMERS: out.cache},
            hidden_states=out.hidden_states,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        rows = [len(logits)]
        whole = problem == "multi_label_classification" or (problem == "regression" and self.num_labels > 1)
        whole = whole or (problem is None and self.num_labels > 1 and labels.is_floating_point())
        expected = [*rows, self.num_labels] if whole else rows
        if list(labels.shape) != expected and not (not whole and list(labels.shape) == [*rows, 1]):
            raise ValueError(f"labels must be {expected} for {problem or 'these labels'}, got {list(labels.shape)}")
        if self.num_labels == 1 and problem in (None, "regression"):
            labels = labels.view(-1).to(
                logits.dtype
            )  # transformers squeezes, which a batch of one row does not survive
            return nn.functional.mse_loss(logits.view(-1), labels)
        loss: Tensor = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return loss


class TitansForTokenClassification(_Classifier):
    """A label for each token. A token's label may depend on the tokens up to it, and on none after it. In training
    `config.classifier_dropout` of the hidden states are dropped."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: TitansState | None = None,
        **kwargs: Any,
    ) -> TitansTokenClassifierOutput:
        """As `TitansModel.forward`, packed documents included, with `logits` `[B, T, num_labels]`. `labels` `[B, T]`,
        -100 where there is none."""
        items = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, cache=cache, **kwargs,
        )  # fmt: skip
        logits = self.score(self.dropout(out.last_hidden_state))
        loss: Tensor | None = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(f"labels must be [B, T] = {list(logits.shape[:2])}, got {list(labels.shape)}")
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=items)
        return TitansTokenClassifierOutput(loss, logits, out.cache, out.hidden_states)


def _share(labels: Tensor, items: Tensor | int | None) -> Tensor | float:
    """What makes a mean over these labels their part of the mean over `items`, when gradients accumulate."""
    return 1.0 if items is None else (labels != -100).sum() / items


def _last_tokens(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The column of each row's last token. Raises ValueError for a row of padding alone."""
    rows, columns = tokens.shape[:2]
    if columns == 0:
        raise ValueError("the rows have no token")
    if mask is None:
        return torch.full((rows,), columns - 1, device=tokens.device)
    mask = mask[:, -columns:].to(tokens.device) != 0  # a longer mask covers the tokens before this call too
    if not mask.is_meta and not bool((found := mask.any(1)).all()):
        raise ValueError(f"row {int((~found).int().argmax())} holds padding alone, and no token to classify")
    return (mask * torch.arange(1, columns + 1, device=tokens.device)).argmax(1)


def _check_one_document(position_ids: Tensor, mask: Tensor | None, tokens: Tensor) -> None:
    """Raises ValueError where positions start at 0 again, and as `document_starts` does."""
    rows, columns = tokens.shape[:2]
    mask = None if mask is None else mask[:, -columns:].bool()
    starts = document_starts(mask, (rows, columns), position_ids, lambda: [[]] * rows, {})
    if starts is not None:
        row, column = starts.nonzero()[0].tolist()
        raise ValueError(f"position_ids starts a second document in row {row}, column {column}, and a row gets one "
                         f"label: give each document a row of its own")  # fmt: skip


AutoModelForSequenceClassification.register(TitansConfig, TitansForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(TitansConfig, TitansForTokenClassification, exist_ok=True)
