"""Sources that are random machines: Markov chains, probabilistic automata, short alphabets with repeats, noise."""

from bisect import bisect
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from titans_lm.tasks.streams.parts import SourceInputs, log_uniform, symbols
from titans_lm.tasks.streams.texts import Bytes

BLOCK = 1024
_LEAST = 1e-300
"""Keeps sums above 0."""


class Chain:
    """A Markov chain over `count` symbols, of order `order`. The distribution after a context is drawn from a Dirichlet
    distribution when the context first occurs."""

    def __init__(self, rng: np.random.Generator, order: int, count: int, concentration: float):
        self.rng, self.count, self.contexts = rng, count, count**order
        self.concentration, self._drawn = concentration, list[list[float]]()
        self.follows: dict[int, list[float]] = {}
        """Context -> cumulative probabilities of the next symbol. A context is a number; its lowest digit is the last
        symbol."""
        self.context = int(rng.integers(self.contexts))

    def walk(self, length: int) -> NDArray[np.int64]:
        """The next symbols, `[length]`, each below `count`."""
        drawn, follows, context = [], self.follows, self.context
        for u in self.rng.random(length).tolist():
            if context not in follows:
                follows[context] = self._distribution()
            symbol = min(bisect(follows[context], u), self.count - 1)  # a sum may round to below 1
            drawn.append(symbol)
            context = (context * self.count + symbol) % self.contexts
        self.context = context
        return np.array(drawn, np.int64)

    def _distribution(self) -> list[float]:
        if not self._drawn:  # many in one call are nearly as fast as one
            shares = self.rng.standard_gamma(self.concentration, (min(64, self.contexts), self.count)) + _LEAST
            self._drawn = np.cumsum(shares / shares.sum(1, keepdims=True), 1).tolist()
        return self._drawn.pop()


def markov(inputs: SourceInputs) -> Iterator[Bytes]:
    """A random Markov chain over 2 to 24 symbols, of order 1 to 3, from nearly deterministic to nearly uniform."""
    rng = inputs.rng
    count = int(rng.integers(2, 25))
    chain = Chain(rng, int(rng.integers(1, 4)), count, log_uniform(rng, 0.02, 1.0))
    names = symbols(rng, count)
    while True:
        yield names[chain.walk(BLOCK)]


class Automaton:
    """A random automaton as in RegBench (arXiv:2401.12973): 4 to 12 states, 4 to 18 symbols, one to four edges per
    state with different symbols, drawn uniformly. One edge per state is part of a cycle through all, so that all are
    reachable."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.states, self.count = rng, int(rng.integers(4, 13)), int(rng.integers(4, 19))
        circle = rng.permutation(self.states)
        self.edges: list[list[tuple[int, int]]] = [[] for _ in circle]
        """State -> symbol and next state of each edge."""
        for state, after in zip(circle, np.roll(circle, -1), strict=True):
            says = rng.permutation(self.count)[: rng.integers(1, 5)].tolist()
            leads = [int(after), *rng.integers(self.states, size=len(says) - 1).tolist()]
            self.edges[state] = list(zip(says, leads, strict=True))
        self.state = int(circle[0])

    def walk(self, length: int) -> NDArray[np.int64]:
        """The next symbols, `[length]`."""
        drawn, edges, state = [], self.edges, self.state
        for u in self.rng.random(length).tolist():
            ways = edges[state]
            symbol, state = ways[int(u * len(ways))]
            drawn.append(symbol)
        self.state = state
        return np.array(drawn, np.int64)


def automata(inputs: SourceInputs) -> Iterator[Bytes]:
    """A random automaton whose symbols are bytes, or words of a few bytes."""
    rng = inputs.rng
    automaton, longest = Automaton(rng), int(rng.choice([1, 1, 4]))
    names = symbols(rng, automaton.count)
    words = [names[rng.integers(len(names), size=rng.integers(1, longest + 1))] for _ in names]
    while True:
        walked = automaton.walk(BLOCK // longest)
        yield names[walked] if longest == 1 else np.concatenate([words[symbol] for symbol in walked])


def letters(inputs: SourceInputs) -> Iterator[Bytes]:
    """A sequence of two to six letters, as in DNA: nearly uniform, with repeats of earlier passages that have
    mutations, some of them reversed complements; with or without line breaks."""
    rng = inputs.rng
    count = int(rng.choice([2, 4, 4, 4, 5, 6]))
    names = symbols(rng, count)
    if count == 4 and rng.random() < 0.5:
        names = np.frombuffer(b"ACGT" if rng.random() < 0.5 else b"acgt", np.uint8)
    chain = Chain(rng, int(rng.integers(1, 5)), count, log_uniform(rng, 1.0, 20.0))
    again, change = rng.uniform(0, 0.6), log_uniform(rng, 0.01, 0.3)
    width = int(rng.choice([0, 50, 60, 70, 80]))
    memory, column = np.zeros(0, np.int64), 0
    while True:
        piece = chain.walk(int(rng.integers(32, 512)))
        if rng.random() < again and len(memory) > 64:
            size = int(log_uniform(rng, 16, len(memory)))
            at = int(rng.integers(len(memory) - size + 1))
            copy = memory[at : at + size]
            copy = count - 1 - copy[::-1] if rng.random() < 0.3 else copy
            changed = rng.random(len(copy)) < change
            copy = np.where(changed, rng.integers(count, size=len(copy)), copy)
            piece = np.concatenate([piece, copy])
        memory = np.concatenate([memory, piece])[-65536:]
        line, column = _in_lines(names[piece], width, column)
        yield line


def _in_lines(text: Bytes, width: int, column: int) -> tuple[Bytes, int]:
    """Insert a line break after each `width` letters. Returns the text and the last column."""
    if not width:
        return text, 0
    ends = np.arange(width - column, len(text) + 1, width)
    return np.insert(text, ends, ord("\n")), (column + len(text)) % width


def noise(inputs: SourceInputs) -> Iterator[Bytes]:
    """Uniform bytes: of all 256, or of some of them."""
    rng = inputs.rng
    names = np.arange(256, dtype=np.uint8)
    if rng.random() < 0.4:
        names = symbols(rng, int(log_uniform(rng, 2, 95)))
    while True:
        yield names[rng.integers(len(names), size=BLOCK)]
