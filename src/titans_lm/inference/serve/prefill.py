"""Pieces of several prompts, read in one call where their lengths are similar."""

import logging
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from titans_lm.inference.serve.batch import last_logits, logits_or_error, without_empty_slots
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.padding import padded

LOG = logging.getLogger(__name__)
SIMILAR = 0.5
"""Pieces are read in one call if each has at least this part of the longest one's tokens, and where caches grow of the
longest one's context: the rest is padding, which takes time and memory."""


def prefill_pieces(
    model: TitansForCausalLM, pieces: Sequence[Int[Tensor, " T"]], states: Sequence[TitansState], grows: Sequence[bool]
) -> list[Float[Tensor, " V"] | Exception]:
    """Read a piece into each state, of one row. Returns the logits after it, or the error, and then the state is as it
    was. A row is computed as it would be alone, up to rounding.

    If a call fails, each of its rows has one of its own, so that a row's error is that row's alone. The error of the
    call is logged. `grows`: see `growing_layers`.
    """
    results: dict[int, Float[Tensor, " V"] | Exception] = {}
    for group in _groups(pieces, states, grows):
        found = _read(model, [pieces[i] for i in group], [states[i] for i in group], grows)
        results |= zip(group, found, strict=True)
    return [results[i] for i in range(len(pieces))]


def _groups(pieces: Sequence[Tensor], states: Sequence[TitansState], grows: Sequence[bool]) -> list[list[int]]:
    """The places of pieces that are read in one call. A state with a pending token, which is read before the piece, has
    a call of its own."""
    alone = [[i] for i, state in enumerate(states) if state.pending is not None]
    contexts = [max(state.positions()) if any(grows) else 0 for state in states]
    sizes = [(len(piece), context + len(piece)) for piece, context in zip(pieces, contexts, strict=True)]
    groups: list[list[int]] = []
    for i in sorted((i for i, state in enumerate(states) if state.pending is None), key=lambda i: sizes[i][::-1]):
        for group in groups:
            members = [sizes[j] for j in (*group, i)]
            if all(min(size) >= SIMILAR * max(size) for size in zip(*members, strict=True)):
                group.append(i)
                break
        else:
            groups.append([i])
    return alone + groups


def _read(
    model: TitansForCausalLM, pieces: Sequence[Tensor], states: Sequence[TitansState], grows: Sequence[bool]
) -> list[Tensor | Exception]:
    if len(pieces) > 1:
        try:
            return [*_read_together(model, pieces, states, grows)]
        except Exception:
            LOG.exception("a call for %d prompts failed: each is read alone", len(pieces))
    return [logits_or_error(model, ids[None], state) for ids, state in zip(pieces, states, strict=True)]


def _read_together(
    model: TitansForCausalLM, pieces: Sequence[Tensor], states: Sequence[TitansState], grows: Sequence[bool]
) -> Tensor:
    """The logits `[B, V]`. The states are changed at the end, by nothing that may fail."""
    ids, mask = padded(pieces)
    whole = TitansState.concat(list(states))
    logits = last_logits(model, ids, whole, None if bool(mask.all()) else mask)
    rows = [without_empty_slots(whole.select([i]), grows) for i in range(len(pieces))]
    for row, state, piece in zip(rows, states, pieces, strict=True):
        row.columns = state.columns + len(piece)
        state.assign(row)
    return logits
