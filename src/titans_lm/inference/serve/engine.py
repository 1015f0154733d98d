"""Continuous batching: answers are generated together, and join and leave between tokens.

A memory has a constant size, so a row is a slot that any request can take: there is nothing to page or to evict.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from titans_lm.inference.serve.answer import Answer
from titans_lm.inference.serve.batch import RowBatch
from titans_lm.models.modeling import TitansForCausalLM


class Event(NamedTuple):
    """What a step did for an answer: text that is final now, or the error that ended it."""

    answer: Answer
    result: str | Exception


class Engine:
    """Generates answers together, at most `max_batch_size` at a time; others wait for a row, first come first served.

        engine = Engine(model)
        engine.add(Answer(ids, model.initial_state(1), Sampling(50), tokenizer))
        while engine.answers():
            for answer, text in engine.step(): ...

    A step gives a token to each answer whose prompt is read. All prompts that are being read share a piece of at most
    `prefill_chunk_size` tokens, padding included: a long prompt holds up neither tokens nor shorter prompts.

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
        self.max_batch_size, self.prefill_chunk_size = max_batch_size, prefill_chunk_size
        self.waiting: deque[Answer] = deque()
        """Answers without a row."""
        self.reading, self.decoding = RowBatch(model), RowBatch(model)
        """Rows whose prompt is not read yet; rows that get a token each step."""

    def answers(self) -> list[Answer]:
        """All answers that are not complete."""
        return [*self.decoding.answers, *self.reading.answers, *self.waiting]

    def add(self, answer: Answer) -> None:
        """Let an answer wait for a row. Raises ValueError for a memory that is frozen where others are not, or the
        other way round: one call either writes to its rows or does not."""
        others = self.answers()
        if others and others[0].state.frozen != answer.state.frozen:
            raise ValueError(f"this memory has frozen={answer.state.frozen}, those of other answers have not")
        self.waiting.append(answer)

    def discard(self, answers: Sequence[Answer]) -> None:
        """Drop answers, wherever they are. Others go on as if they had not been there."""
        self.waiting = deque(a for a in self.waiting if not any(a is other for other in answers))
        self.reading.leave(answers)
        self.decoding.leave(answers)

    def step(self) -> list[Event]:
        """One call for the tokens of answers, and one for a piece of the prompts. Answers that are complete or have
        failed are dropped."""
        events = self._decode()
        self._admit()
        events += self._prefill()
        self.discard([a for a, result in events if isinstance(result, Exception) or a.finish_reason is not None])
        read = [answer for answer in self.reading.answers if not answer.is_reading]
        self.decoding.join(read, self.reading.take_out(read))
        return events

    def _admit(self) -> None:
        room = self.max_batch_size - len(self.decoding.answers) - len(self.reading.answers)
        admitted = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.reading.join(admitted, [answer.state for answer in admitted])

    def _decode(self) -> list[Event]:
        answers = self.decoding.answers
        return self._advance(self.decoding, [answer.next_ids() for answer in answers]) if answers else []

    def _prefill(self) -> list[Event]:
        answers = self.reading.answers
        if not answers:
            return []
        share = max(1, self.prefill_chunk_size // len(answers))
        return self._advance(self.reading, [answer.next_ids(share) for answer in answers])

    def _advance(self, rows: RowBatch, pieces: list[Tensor]) -> list[Event]:
        results = zip(rows.answers, pieces, rows.run(pieces), strict=True)
        return [Event(answer, _take(answer, piece, logits)) for answer, piece, logits in results]


def _take(answer: Answer, piece: Tensor, logits: Tensor | Exception) -> str | Exception:
    if isinstance(logits, Exception):
        return logits
    try:
        return answer.take(logits, len(piece))
    except Exception as error:  # of this answer alone, such as logits that are not finite
        return error
