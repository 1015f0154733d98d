"""`probe`: what a memory still holds of a passage that it read before."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_lm.analyze.recorder import Features, features_of, recording
from titans_lm.analyze.trace import PIECE, Span, one_stream
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.ops import retrieve

CANDIDATES = 4096
"""Values of the text among which the right one is ranked; of a longer text, evenly spaced ones."""


@dataclass(frozen=True)
class Probe:
    """What the memory holds of a passage of P tokens, after each of N stretches of the text."""

    passage: Span
    read: NDArray[np.int64]
    """Tokens read at each checkpoint, `[N]`: at the passage's begin, at its end, and after each further piece."""
    error: NDArray[np.float32]
    """|| M(k) - v ||^2 / || v ||^2 of the passage's keys and values, `[N, P, L, H]`."""
    rank: NDArray[np.int64]
    """Place of the right value at the end, among the values of the text that are nearest to M(k), `[P, L, H]`; 1 is
    best."""
    candidates: int
    """Values that are ranked."""

    def half_life(self) -> NDArray[np.float64]:
        """Tokens after the passage until half of what its reading gained is lost, `[L, H]`.

        Interpolated between checkpoints; inf if the text ends before; nan where nothing was gained."""
        gain = (self.error[:1] - self.error).mean(1)[1:]
        after = self.read[1:] - self.read[1]
        found = np.full(gain.shape[1:], math.inf)
        for index in np.ndindex(*found.shape):
            curve = gain[(slice(None), *index)]
            below = np.flatnonzero(curve < curve[0] / 2)
            if curve[0] <= 0:
                found[index] = math.nan
            elif len(below):
                b = int(below[0])
                share = (curve[b - 1] - curve[0] / 2) / (curve[b - 1] - curve[b])
                found[index] = after[b - 1] + share * (after[b] - after[b - 1])
        return found


@torch.no_grad()
def probe(
    model: TitansForCausalLM, ids: Any, passage: Span, state: TitansState | None = None, piece: int = PIECE
) -> Probe:
    """Read ids `[T]` and ask the memories for the passage: at its end, and after each further `piece` of the text.

    Raises ValueError for a passage that is not in the text, and what `trace` raises for ids."""
    tokens = one_stream(ids, model.config.vocab_size)
    first, end = passage
    if not 0 <= first < end <= len(tokens):
        raise ValueError(f"the passage must be within the {len(tokens):,} tokens of the text, got {first:,} to {end:,}")
    begin = (model.initial_state(1) if state is None else model.with_pending_read(state)).shallow_copy()
    step = max(1, len(tokens) // CANDIDATES)
    values: list[list[Tensor]] = []
    held: list[tuple[NeuralMemory, Features]] = []
    read, weights = list[int](), list[list[tuple[Tensor, ...]]]()
    done = 0
    with recording(model) as recorder:
        for part in _cut(tokens, first, end, piece):
            model(part[None].to(model.device), past_key_values=begin)
            found = []
            for calls in recorder.calls:
                parts = [features_of(call) for call in calls]
                found.append(Features(*(torch.cat(part) for part in zip(*parts, strict=True))))
            values.append([features.v[-done % step :: step] for features in found])
            if done == first:
                held = [(calls[0].memory, features) for calls, features in zip(recorder.calls, found, strict=True)]
                read.append(done)
                weights.append([calls[0].before.memory.weights for calls in recorder.calls])
            done += len(part)
            if done >= end:
                read.append(done)
                weights.append([calls[-1].after.memory.weights for calls in recorder.calls])
            recorder.clear()
    error = torch.stack(
        [torch.stack([_errors(*one, w) for one, w in zip(held, now, strict=True)], 1) for now in weights]
    )
    texts = [torch.cat(parts) for parts in zip(*values, strict=True)]
    rank = torch.stack([_ranks(*one, w, text) for one, w, text in zip(held, weights[-1], texts, strict=True)], 1)
    return Probe(passage, np.array(read), error.float().cpu().numpy(), rank.cpu().numpy(), len(texts[0]))


def _cut(tokens: Tensor, first: int, end: int, piece: int) -> list[Tensor]:
    """The text in pieces, of which the passage is one."""
    return [
        part
        for stretch, size in ((tokens[:first], piece), (tokens[first:end], end - first), (tokens[end:], piece))
        if len(stretch)
        for part in stretch.split(size)
    ]


def _errors(memory: NeuralMemory, passage: Features, weights: tuple[Tensor, ...]) -> Tensor:
    """`[P, H]`"""
    found = retrieve(passage.k[None], weights, memory.form())[0]
    return (found - passage.v).square().sum(-1) / passage.v.square().sum(-1).clamp(min=1e-30)


def _ranks(memory: NeuralMemory, passage: Features, weights: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """`[P, H]`: 1 plus the candidates `[C, H, V]` that are nearer to M(k) than the right value."""
    found = retrieve(passage.k[None], weights, memory.form())[0]
    own = (found - passage.v).square().sum(-1)
    apart = torch.cdist(found.transpose(0, 1), values.transpose(0, 1)).square()  # [H, P, C]
    return 1 + (apart < own.t()[..., None] * (1 - 1e-4)).sum(-1).t()
