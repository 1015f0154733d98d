"""State tracking: predict the state after every token but the last. A row of T tokens has T - 1 labels.

For longer rows, change `length`.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from titans_lm.tasks import IGNORED, Batch, at_least

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Parity:
    """Bits. The label is the parity of the ones so far. Raises ValueError naming the invalid field."""

    length: int = 40
    """Tokens T of a row, at least 2."""
    vocab_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        at_least(2, length=self.length)

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        ids = rng.integers(0, 2, (rows, self.length))
        return _labelled_everywhere(ids, _walk(_sums(2), ids))


@dataclass(frozen=True)
class Modular:
    """Numbers below `modulus`, each its own token. The label is their sum so far, modulo `modulus`.

    With `operators` numbers alternate with +, - and *, which are the tokens modulus, modulus + 1 and modulus + 2, and
    each number has the value so far as its label: T // 2 labels. Operators apply from left to right, which takes
    `modulus` states; in the task of this name in neural_networks_chomsky_hierarchy (arXiv:2207.02098) * binds first.

    Raises ValueError naming the field that is wrong.
    """

    length: int = 40
    """Tokens T of a row, at least 2."""
    modulus: int = 5
    """At least 2."""
    operators: bool = False

    def __post_init__(self) -> None:
        at_least(2, length=self.length, modulus=self.modulus)
        if not isinstance(self.operators, bool):
            raise ValueError(f"operators must be true or false, got {self.operators!r}")

    @property
    def vocab_size(self) -> int:
        return self.modulus + 3 * self.operators

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        if self.operators:
            return self._expressions(rng, rows)
        ids = rng.integers(0, self.modulus, (rows, self.length))
        return _labelled_everywhere(ids, _walk(_sums(self.modulus), ids))

    def _expressions(self, rng: np.random.Generator, rows: int) -> Batch:
        m = self.modulus
        value, number = np.arange(m)[:, None], np.arange(m)
        table = np.concatenate([value + number, value - number, value * number], axis=1) % m
        numbers = rng.integers(0, m, (rows, (self.length + 1) // 2))
        operators = rng.integers(0, 3, (rows, self.length // 2))
        ids = np.empty((rows, self.length), np.int64)
        ids[:, 0::2], ids[:, 1::2] = numbers, m + operators
        steps = numbers.copy()  # the first is added to 0
        steps[:, 1:] += m * operators[:, : numbers.shape[1] - 1]
        labels = np.full_like(ids, IGNORED)
        labels[:, 1::2] = _walk(table, steps)[:, : self.length // 2]
        return Batch(ids, labels)


@dataclass(frozen=True)
class _Word:
    """The word problem of a symmetric group (arXiv:2404.08819): tokens are permutations, applied one after another.
    The label is their product so far.

    A permutation's token is its rank in lexicographic order: token 0 changes nothing, and what token g makes of i is
    entry i of the g-th of `itertools.permutations(range(of))`.

    Raises ValueError naming the field that is wrong.
    """

    length: int = 40
    """Tokens T of a row, at least 2."""
    of: ClassVar[int]
    vocab_size: ClassVar[int]

    def __post_init__(self) -> None:
        at_least(2, length=self.length)

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        ids = rng.integers(0, self.vocab_size, (rows, self.length))
        return _labelled_everywhere(ids, _walk(_products(self.of), ids))


class S3(_Word):
    """The word problem of the 6 permutations of 3 things."""

    of, vocab_size = 3, 6


class S5(_Word):
    """The word problem of the 120 permutations of 5 things, the smallest symmetric group that is not solvable."""

    of, vocab_size = 5, 120


def _labelled_everywhere(ids: Tokens, answers: Tokens) -> Batch:
    """A batch in which `answers[:, t]` is the label after token ids[:, t]."""
    return Batch(ids, np.concatenate([np.full_like(ids[:, :1], IGNORED), answers[:, :-1]], axis=1))


def _walk(table: Tokens, steps: Tokens) -> Tokens:
    """From state 0 through steps `[rows, n]`, by table[state, step] -> the state after each, `[rows, n]`."""
    states, state = np.empty_like(steps), np.zeros(len(steps), np.int64)
    for t in range(steps.shape[1]):
        states[:, t] = state = table[state, steps[:, t]]
    return states


def _sums(modulus: int) -> Tokens:
    return np.add.outer(np.arange(modulus), np.arange(modulus)) % modulus


@functools.cache
def _products(of: int) -> Tokens:
    """table[a, b]: permutation b applied after a."""
    elements = np.array(list(itertools.permutations(range(of))))
    products = elements[np.arange(len(elements))[:, None], elements[:, None]]  # [a, b, i] = elements[b, elements[a, i]]
    return np.searchsorted(_numbers(elements), _numbers(products))


def _numbers(permutations: Tokens) -> Tokens:
    """A number per permutation that orders them lexicographically: entries as digits."""
    return permutations @ (10 ** np.arange(permutations.shape[-1])[::-1])
