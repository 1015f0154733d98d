"""Recall: the value assigned to a key, and the symbols among noise.

Token 0 is blank. The lower half of the vocabulary are keys, the upper half values, as in Zoology (arXiv:2312.04927).
"""

import math
from dataclasses import InitVar, dataclass

import numpy as np
from numpy.typing import NDArray

from titans_lm.tasks import IGNORED, Batch, at_least

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall (arXiv:2312.04927; generator `multiquery_ar` of HazyResearch/zoology).

    A row begins with `pairs` distinct keys, each followed by its value; the values are distinct too. Then every key
    occurs once more, with its value as the label. After the pairs come slots of two tokens: slot g = 1, 2, ... holds a
    question with a weight of g^(power - 1), each at most one; the rest is blank.

    Published are (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64), without filler, with 100,000 rows to train
    on and 3,000 to test. Small vocabularies work too. A row has `pairs` labels.

    Raises ValueError naming the invalid field.
    """

    length: int = 64
    """Tokens T of a row, at least 4 a pair."""
    pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01
    """Above 0. 1: questions are uniform over slots; less: they come sooner."""
    filler: bool = False
    """Random tokens of the whole vocabulary in place of blanks. The pairs at the beginning alone are assignments."""

    def __post_init__(self) -> None:
        at_least(1, pairs=self.pairs)
        _check_vocabulary(self.vocab_size, self.pairs, self.assigned)
        at_least(2 * (self.assigned + self.pairs), length=self.length)
        if not _is_number(self.power) or not 0 < self.power < math.inf:
            raise ValueError(f"power must be a number above 0, got {self.power!r}")
        if not isinstance(self.filler, bool):
            raise ValueError(f"filler must be true or false, got {self.filler!r}")

    @property
    def assigned(self) -> int:
        """Key-value pairs at the beginning."""
        return self.pairs

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        slots = _by_power_law(rng, rows, self.pairs, (self.length - 2 * self.assigned) // 2, self.power)
        questions = 2 * self.assigned + 2 * slots
        return _recall(rng, self.length, self.vocab_size, self.assigned, questions, self.filler)


@dataclass(frozen=True)
class ForgettingMQAR(MQAR):
    """MQAR in which some keys are assigned again, after all pairs, to a value that the row has not seen before: the
    latest value is the answer (after `forgetting_mqar` of HazyResearch/zoology). A row needs 4 tokens a pair and 2 more
    for each that is assigned again.

    Raises ValueError naming the invalid field.
    """

    again: float = 0.5
    """Share of the keys, from 0 to 1, rounded to whole keys."""

    def __post_init__(self) -> None:
        if not _is_number(self.again) or not 0 <= self.again <= 1:
            raise ValueError(f"again must be a share from 0 to 1, got {self.again!r}")
        super().__post_init__()

    @property
    def assigned(self) -> int:
        """Key-value pairs at the beginning, the later ones among them."""
        return self.pairs + round(self.again * self.pairs)


@dataclass(frozen=True)
class BlankGap:
    """Pairs of distinct keys and values, then blank tokens, then every key once more in another order, each followed by
    a blank. There its value is the label: a row has `pairs` labels.

    Raises ValueError naming the invalid field.
    """

    length: int = 116
    """Tokens T of a row: 4 a pair, the others are the gap."""
    pairs: int = 4
    vocab_size: int = 64
    gap: InitVar[int | None] = None
    """Blank tokens between pairs and questions; given, it says the length, whatever `length` is."""

    def __post_init__(self, gap: int | None) -> None:
        at_least(1, pairs=self.pairs)
        _check_vocabulary(self.vocab_size, self.pairs, self.pairs)
        if gap is not None:
            at_least(0, gap=gap)
            object.__setattr__(self, "length", 4 * self.pairs + gap)
        at_least(4 * self.pairs, length=self.length)

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        places = np.tile(np.arange(self.length - 2 * self.pairs, self.length, 2), (rows, 1))
        return _recall(rng, self.length, self.vocab_size, self.pairs, rng.permuted(places, axis=1), filler=False)


@dataclass(frozen=True)
class SelectiveCopying:
    """Symbols at random places among noise, to be said in their order at the markers that follow (arXiv:2312.00752,
    section 4.1.1; generator `copying` of state-spaces/s4, with variable places).

    Noise is token 0, the marker is the last token, the others are symbols, drawn with repetition. A row ends with
    `symbols` markers, at each of which a symbol is questions, and one more marker. Published are 4,096 tokens of noise
    and symbols, 16 symbols, a vocabulary of 16.

    Raises ValueError naming the invalid field.
    """

    length: int = 4096
    """Tokens T of a row, at least 2 a symbol and 1."""
    symbols: int = 16
    """Number of symbols to copy."""
    vocab_size: int = 16

    def __post_init__(self) -> None:
        at_least(1, symbols=self.symbols)
        at_least(4, vocab_size=self.vocab_size)
        at_least(2 * self.symbols + 1, length=self.length)

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        first = self.length - self.symbols - 1  # marker
        symbols = rng.integers(1, self.vocab_size - 1, (rows, self.symbols))
        ids, labels = _blank(rows, self.length)
        np.put_along_axis(ids, np.sort(_distinct(rng, rows, self.symbols, 0, first)), symbols, axis=1)
        ids[:, first:] = self.vocab_size - 1
        labels[:, first + 1 :] = symbols
        return Batch(ids, labels)


def _recall(
    rng: np.random.Generator, length: int, vocab_size: int, assigned: int, questions: Tokens, filler: bool
) -> Batch:
    """Rows in which key i occurs again at `questions[:, i]`; pairs beyond one per key assign some keys again."""
    rows, pairs = questions.shape
    keys = _distinct(rng, rows, pairs, 1, vocab_size // 2)
    values = _distinct(rng, rows, assigned, vocab_size // 2, vocab_size)
    again = _distinct(rng, rows, assigned - pairs, 0, pairs)
    answers = values[:, :pairs].copy()
    np.put_along_axis(answers, again, values[:, pairs:], axis=1)
    ids, labels = _blank(rows, length)
    ids[:, 0 : 2 * assigned : 2] = np.concatenate([keys, np.take_along_axis(keys, again, axis=1)], axis=1)
    ids[:, 1 : 2 * assigned : 2] = values
    np.put_along_axis(ids, questions, keys, axis=1)
    np.put_along_axis(labels, questions + 1, answers, axis=1)
    if filler:
        ids = np.where(ids == 0, rng.integers(0, vocab_size, ids.shape), ids)
    return Batch(ids, labels)


def _blank(rows: int, length: int) -> Batch:
    return Batch(np.zeros((rows, length), np.int64), np.full((rows, length), IGNORED, np.int64))


def _distinct(rng: np.random.Generator, rows: int, count: int, low: int, high: int) -> Tokens:
    """`count` distinct numbers of [low, high) in each row, uniform over choices and orders (Floyd's sampling, whose
    cost does not depend on the range). -> `[rows, count]`"""
    numbers = np.empty((rows, count), np.int64)
    for i, last in enumerate(range(high - low - count, high - low)):
        drawn = rng.integers(0, last, rows, endpoint=True)
        taken = (numbers[:, :i] == drawn[:, None]).any(axis=1)
        numbers[:, i] = np.where(taken, last, drawn)
    return low + rng.permuted(numbers, axis=1)


def _by_power_law(rng: np.random.Generator, rows: int, count: int, slots: int, power: float) -> Tokens:
    """`count` of the slots 0, 1, ... in each row, drawn one after another with the weight (slot + 1)^(power - 1), in
    this order: of independent waiting times with these rates, the shortest. -> `[rows, count]`"""
    waiting = rng.exponential(size=(rows, slots)) * np.arange(1.0, slots + 1) ** (1 - power)
    return np.argsort(waiting, axis=1)[:, :count]


def _check_vocabulary(vocab_size: int, pairs: int, assigned: int) -> None:
    least = 2 * max(pairs + 1, assigned)
    at_least(1, vocab_size=vocab_size)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least} for {assigned} pairs, got {vocab_size}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
