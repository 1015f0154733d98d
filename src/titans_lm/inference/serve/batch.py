"""The rows of one state, each the memory of an answer. They join and leave between calls."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from titans_lm.inference.serve.answer import Answer
from titans_lm.layers.module_call import empty_like_weights
from titans_lm.models.block_cache import cache_slots, keep_right
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM


class RowBatch:
    """Answers that a model advances in one call: row i of `state` is the memory of `answers[i]`.

    Rows may be at different positions. A row is computed as it would be alone, up to rounding.
    """

    def __init__(self, model: TitansForCausalLM):
        self.model = model
        self.answers: list[Answer] = []
        self.state: TitansState | None = None
        """None while there are no rows."""
        like = empty_like_weights(model.model)
        self._grows = [cache_slots(block.empty_cache(1, like)) == 0 for block in model.model.blocks()]
        """Which layers have a cache that grows: keys and values of unlimited attention."""

    def join(self, answers: Sequence[Answer], states: Sequence[TitansState]) -> None:
        """Add rows at the end, which belong to `answers` in this order."""
        if not answers:
            return
        before = [] if self.state is None else [self.state]
        whole = [*before, *states]
        self.state = whole[0].shallow_copy() if len(whole) == 1 else TitansState.concat(whole)
        self.state.columns = 0  # what generate counts by
        self.answers = [*self.answers, *answers]

    def leave(self, gone: Collection[Answer]) -> None:
        """Remove the rows of these answers; those that are not here do not matter."""
        kept = [i for i, answer in enumerate(self.answers) if not any(answer is other for other in gone)]
        if len(kept) == len(self.answers) or self.state is None:
            return
        self.answers = [self.answers[i] for i in kept]
        self.state = self._without_empty_slots(self.state.select(kept)) if kept else None

    def take_out(self, answers: Sequence[Answer]) -> list[TitansState]:
        """Remove the rows of these answers, and return the state of each."""
        places = [next(i for i, mine in enumerate(self.answers) if mine is answer) for answer in answers]
        assert self.state is not None or not places
        alone = self.state is not None and len(self.answers) == 1
        states = [self.state if alone else self.state.select([i]) for i in places] if self.state is not None else []
        states = [self._without_empty_slots(state) for state in states]
        self.leave(answers)
        return states

    def run(self, pieces: Sequence[Int[Tensor, " T"]]) -> list[Float[Tensor, " V"] | Exception]:
        """Read one piece of at least one token in each row. Returns the logits after it, row by row.

        If the call fails, each row has one of its own, so that a row's error is that row's alone: it takes the place of
        its logits, and the row stays as it was.
        """
        assert self.state is not None
        try:
            return list(self._forward(self.state, pieces))
        except Exception as error:
            if len(pieces) == 1:
                return [error]
        rows = [self.state.select([i]) for i in range(len(pieces))]
        results = [self._forward_one(row, piece) for row, piece in zip(rows, pieces, strict=True)]
        self.state = TitansState.concat(rows)
        return results

    def _forward_one(self, row: TitansState, piece: Tensor) -> Tensor | Exception:
        try:
            return self._forward(row, [piece])[0]
        except Exception as error:
            return error

    def _forward(self, state: TitansState, pieces: Sequence[Tensor]) -> Float[Tensor, "B V"]:
        ids, mask = _left_padded(pieces, self.model.device)
        with torch.no_grad():
            out = self.model(ids, attention_mask=mask, past_key_values=state, logits_to_keep=1)
        return out.logits[:, -1].float().cpu()

    def _without_empty_slots(self, state: TitansState) -> TitansState:
        """The state without slots that are empty in all rows: those that a longer row needed, which has left."""
        if any(self._grows):
            longest = max(state.positions())
            caches = zip(state.layer_caches, self._grows, strict=True)
            state.layer_caches = [keep_right(cache, longest) if grows else cache for cache, grows in caches]
        return state


def _left_padded(
    pieces: Sequence[Int[Tensor, " T"]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"] | None]:
    """The pieces as rows, padded on the left, and their mask; None if they are of one length."""
    width = max(map(len, pieces))
    ids = torch.stack([torch.cat([piece.new_zeros(width - len(piece)), piece]) for piece in pieces])
    if min(map(len, pieces)) == width:
        return ids.to(device), None
    column = torch.arange(width)
    mask = torch.stack([column >= width - len(piece) for piece in pieces]).long()
    return ids.to(device), mask.to(device)
