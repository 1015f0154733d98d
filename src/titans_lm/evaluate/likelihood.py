"""Log-likelihood of continuations of texts, both of any length, read in pieces through the memory.

A context that several requests share is read once, and its memory forked for each. At most MAX_LOGITS logits exist at
a time, so space does not grow with the text, except for its token ids.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.padding import padded

MAX_LOGITS = 2**24
"""Maximum logits at a time: 64 MiB of float32, and a few times that for log-probabilities."""


class Request(NamedTuple):
    """Token ids of the context, at least one, and of the continuation, which is scored."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """The score of a continuation."""

    log_probability: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether every token is the most probable one."""


@torch.no_grad()
def scores(
    model: TitansForCausalLM, requests: Sequence[Request], rows: int = 8, piece: int = PREFILL_TOKENS
) -> Iterator[tuple[int, Score]]:
    """Yields (number of the request, score), longest contexts first, up to `rows` streams per batch.

    Raises ValueError for a context without tokens.
    """
    forks: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        if not request.context:
            raise ValueError(f"request {number} has no context: at least one token has to come before what is scored")
        forks.setdefault(tuple(request.context), []).append(number)
    contexts = sorted(forks, key=len, reverse=True)  # rows of similar length need little padding
    for start in range(0, len(contexts), rows):
        batch = contexts[start : start + rows]
        # The last token of a context is read with each continuation: its logits are the first that count.
        state = read_rows(model, [context[:-1] for context in batch], piece)
        streams = [(row, number) for row, context in enumerate(batch) for number in forks[context]]
        streams.sort(key=lambda stream: len(requests[stream[1]].continuation), reverse=True)
        for first in range(0, len(streams), rows):
            branch = streams[first : first + rows]
            texts = [[batch[row][-1], *requests[number].continuation] for row, number in branch]
            fork = state.select([row for row, _ in branch])
            yield from zip((number for _, number in branch), _score(model, fork, texts, piece), strict=True)


@torch.no_grad()
def read_rows(model: TitansForCausalLM, rows: Sequence[Sequence[int]], piece: int = PREFILL_TOKENS) -> TitansState:
    """Read rows of tokens of any lengths, also 0, from the initial state. Returns the state after them."""
    state = model.initial_state(len(rows))
    ids, mask = _batch(rows, model.device, "left")
    for at in range(0, ids.shape[1], piece):
        part = slice(at, at + piece)
        model.model(ids[:, part], attention_mask=mask[:, part], past_key_values=state)
    return state


def _score(model: TitansForCausalLM, state: TitansState, rows: list[list[int]], piece: int) -> list[Score]:
    """Read rows from `state`, and score all tokens but the first of each."""
    ids, mask = _batch(rows, model.device, "right")
    inputs, targets, mask = ids[:, :-1], ids[:, 1:], mask[:, 1:]
    total = torch.zeros(len(rows), dtype=torch.float64, device=model.device)
    wrong = torch.zeros(len(rows), dtype=torch.long, device=model.device)
    for at in range(0, inputs.shape[1], piece):
        part = slice(at, at + piece)
        out = model.model(inputs[:, part], attention_mask=mask[:, part], past_key_values=state)
        scored = mask[:, part].bool()
        row = scored.nonzero()[:, 0]  # [N], of each token that is scored
        log_probabilities, missed = _tokens(model, out.last_hidden_state[scored], targets[:, part][scored])
        total.index_add_(0, row, log_probabilities)
        wrong.index_add_(0, row, missed)
    return [Score(t, w == 0) for t, w in zip(total.tolist(), wrong.tolist(), strict=True)]


def _tokens(model: TitansForCausalLM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states `[N, D]`, next tokens `[N]` -> log-probabilities in float64 `[N]`, and `[N]` 1 where another token
    is more probable, else 0."""
    found, missed = [], []
    size = max(1, MAX_LOGITS // model.vocab_size)
    for some, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = model.lm_head(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].double())
        missed.append((logits.argmax(-1) != wanted).long())
    return torch.cat(found), torch.cat(missed)


def _batch(
    rows: Sequence[Sequence[int]], device: torch.device, side: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Rows of tokens -> `[B, T]`, and 1 where a token is there, else 0 `[B, T]`."""
    ids, mask = padded([torch.tensor(row, dtype=torch.long) for row in rows], side)
    return ids.to(device), mask.to(device)
