"""Continuous batching: answers are generated together, and join and leave between tokens.

A memory has a constant size, so a row is a slot that any request can take: there is nothing to page or to evict.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.inference.serve.answer import Answer
from titans_lm.inference.serve.batch import RowBatch
from titans_lm.inference.serve.prefill import prefill_pieces
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM

MIN_PIECE = 64
"""Tokens of a prompt that are worth a call: shorter pieces take nearly as long."""


class Event(NamedTuple):
    """What a step did for an answer: text that is final now, or the error that ended it."""

    answer: Answer
    result: str | Exception


class Reading(NamedTuple):
    """An answer whose prompt is not read to its end, and its memory so far."""

    answer: Answer
    state: TitansState


class Engine:
    """Generates answers together, at most `max_batch_size` at a time; others wait for a row, first come first served.

        engine = Engine(model)
        engine.add(Answer(ids, model.initial_state(1), Sampling(50), tokenizer))
        while engine.answers():
            for answer, text in engine.step(): ...

    A step gives a token to each answer whose prompt is read, in one call. It reads `prefill_chunk_size` tokens of
    prompts, in turn: a long prompt holds up neither tokens nor other prompts.

    Args:
        model: a Titans model, in eval mode, on any device.
        max_batch_size: rows, each with a memory: of prompts being read and answers being written. 1: one by one.
        prefill_chunk_size: prompt tokens of a step. More read prompts faster; fewer make other answers smoother.

    Raises ValueError for sizes below 1.
    """

    def __init__(self, model: TitansForCausalLM, max_batch_size: int = 32, prefill_chunk_size: int = 512):
        if max_batch_size < 1 or prefill_chunk_size < 1:
            raise ValueError(
                f"max_batch_size and prefill_chunk_size must be at least 1, got {max_batch_size}, {prefill_chunk_size}"
            )
        self.model, self.max_batch_size, self.prefill_chunk_size = model, max_batch_size, prefill_chunk_size
        self.waiting: deque[Answer] = deque()
        """Answers without a row."""
        self.reading: deque[Reading] = deque()
        """Those whose prompt is being read, the one whose turn is next first."""
        self.decoding = RowBatch(model)
        """Those that get a token each step."""

    def answers(self) -> list[Answer]:
        """All answers that are not complete."""
        return [*self.decoding.answers, *(reading.answer for reading in self.reading), *self.waiting]

    def add(self, answer: Answer) -> None:
        """Let an answer wait for a row. Raises ValueError for a memory that is frozen where others are not, or the
        other way round: one call either writes to its rows or does not."""
        others = self.answers()
        if others and others[0].state.frozen != answer.state.frozen:
            raise ValueError(f"this memory has frozen={answer.state.frozen}, those of other answers have not")
        self.waiting.append(answer)

    def discard(self, answers: Sequence[Answer]) -> None:
        """Drop answers, wherever they are. Others go on as if they had not been there."""
        gone = {id(answer) for answer in answers}
        self.waiting = deque(answer for answer in self.waiting if id(answer) not in gone)
        self.reading = deque(reading for reading in self.reading if id(reading.answer) not in gone)
        self.decoding.leave(answers)

    def step(self) -> list[Event]:
        """A token for each answer that is written, then a piece of the prompts. Answers that are complete or have
        failed are dropped."""
        events = self._decode()
        self._admit()
        events += self._prefill()
        self.discard([a for a, result in events if isinstance(result, Exception) or a.finish_reason is not None])
        read = [reading for reading in self.reading if not reading.answer.is_reading]
        self.reading = deque(reading for reading in self.reading if reading.answer.is_reading)
        self.decoding.join([reading.answer for reading in read], [reading.state for reading in read])
        return events

    def _admit(self) -> None:
        room = self.max_batch_size - len(self.decoding.answers) - len(self.reading)
        for _ in range(min(room, len(self.waiting))):
            answer = self.waiting.popleft()
            self.reading.append(Reading(answer, answer.state.shallow_copy()))

    def _decode(self) -> list[Event]:
        answers = self.decoding.answers
        if not answers:
            return []
        results = self.decoding.run(torch.stack([answer.next_ids() for answer in answers]))
        return [Event(answer, _take(answer, 1, logits)) for answer, logits in zip(answers, results, strict=True)]

    def _prefill(self) -> list[Event]:
        """Read a piece of each prompt whose turn it is, those of similar length in one call."""
        turn: list[Reading] = []
        pieces: list[Tensor] = []
        left, share = self.prefill_chunk_size, max(MIN_PIECE, self.prefill_chunk_size // max(1, len(self.reading)))
        while left > 0 and len(turn) < len(self.reading):
            turn.append(self.reading[len(turn)])
            pieces.append(turn[-1].answer.next_ids(min(share, left)))
            left -= len(pieces[-1])
        self.reading.rotate(-len(turn))  # their next turn comes after the others'
        results = prefill_pieces(self.model, pieces, [reading.state for reading in turn], self.decoding.grows)
        return [
            Event(reading.answer, _take(reading.answer, len(ids), logits))
            for reading, ids, logits in zip(turn, pieces, results, strict=True)
        ]


def _take(answer: Answer, read: int, logits: Tensor | Exception) -> str | Exception:
    if isinstance(logits, Exception):
        return logits
    try:
        return answer.take(logits, read)
    except Exception as error:  # of this answer alone, such as logits that are not finite
        return error
