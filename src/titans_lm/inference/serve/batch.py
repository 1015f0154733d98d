"""The rows of one state, each the memory of an answer. They join and leave between calls."""

import logging
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans_lm.inference.serve.answer import Answer
from titans_lm.layers.module_call import empty_like_weights
from titans_lm.models.block_cache import cache_slots, keep_right
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM

LOG = logging.getLogger(__name__)


class RowBatch:
    """Answers that a model advances in one call: row i of `state` is the memory of `answers[i]`.

    Rows may be at different positions. A row is computed as it would be alone, up to rounding.
    """

    def __init__(self, model: TitansForCausalLM):
        self.model = model
        self.answers: list[Answer] = []
        self.state: TitansState | None = None
        """None while there are no rows."""
        self.grows = growing_layers(model)

    def join(self, answers: Sequence[Answer], states: Sequence[TitansState]) -> None:
        """Add rows at the end, which belong to `answers` in this order."""
        if not answers:
            return
        rows = [*([] if self.state is None else [self.state]), *(state.shallow_copy() for state in states)]
        for state in rows:
            self.model.begin_decoding(state)
        self.state = rows[0] if len(rows) == 1 else TitansState.concat(rows)
        self.state.columns = 0  # what generate counts by
        self.answers = [*self.answers, *answers]

    def leave(self, gone: Collection[Answer]) -> None:
        """Remove the rows of these answers; those that are not here do not matter."""
        kept = [i for i, answer in enumerate(self.answers) if not any(answer is other for other in gone)]
        if len(kept) == len(self.answers) or self.state is None:
            return
        self.answers = [self.answers[i] for i in kept]
        self.state = without_empty_slots(self.state.select(kept), self.grows) if kept else None

    def run(self, tokens: Int[Tensor, "B 1"]) -> list[Float[Tensor, " V"] | Exception]:
        """Read a token in each row. Returns the logits after it, row by row.

        If the call fails, each row has one of its own, so that a row's error is that row's alone: it takes the place of
        its logits, and the row stays as it was. The error of the call is logged.
        """
        assert self.state is not None
        results: list[Tensor | Exception]
        try:
            results = list(last_logits(self.model, tokens, self.state))
        except Exception:
            LOG.exception("a call for %d rows failed: each row is computed alone", len(tokens))
            rows = [self.state.select([i]) for i in range(len(tokens))]
            results = [logits_or_error(self.model, *pair) for pair in zip(tokens.split(1), rows, strict=True)]
            self.state = TitansState.concat(rows)
        return results


def growing_layers(model: TitansForCausalLM) -> list[bool]:
    """Which layers have a cache that grows: keys and values of unlimited attention."""
    like = empty_like_weights(model.model)
    return [cache_slots(block.empty_cache(1, like)) == 0 for block in model.model.blocks()]


def without_empty_slots(state: TitansState, grows: Sequence[bool]) -> TitansState:
    """The state without slots that are empty in all rows: those that a longer row needed."""
    if any(grows):
        longest = max(state.positions())
        caches = zip(state.layer_caches, grows, strict=True)
        state.layer_caches = [keep_right(cache, longest) if layer else cache for cache, layer in caches]
    return state


def logits_or_error(
    model: TitansForCausalLM, ids: Int[Tensor, "1 T"], state: TitansState
) -> Float[Tensor, " V"] | Exception:
    """Read tokens into the state of one row. Returns the logits after them, or the error, and then the state is as it
    was."""
    try:
        return last_logits(model, ids, state)[0]
    except Exception as error:
        return error


def last_logits(
    model: TitansForCausalLM, ids: Int[Tensor, "B T"], state: TitansState, mask: Int[Tensor, "B T"] | None = None
) -> Float[Tensor, "B V"]:
    """Read tokens into the state's rows. Returns the logits after them, on the CPU."""
    with torch.no_grad():
        mask = None if mask is None else mask.to(model.device)
        out = model(ids.to(model.device), attention_mask=mask, past_key_values=state, logits_to_keep=1)
    return out.logits[:, -1].cpu()
