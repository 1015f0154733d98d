"""What all sources of streams share: what they are given, and how bytes are taken from them."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from titans_lm.tasks.streams.texts import Bytes, Texts


class Part:
    """A source at work: its pieces as one stream, from which bytes are taken as they are needed."""

    def __init__(self, name: str, pieces: Iterator[Bytes]):
        self.name, self._pieces, self._rest = name, pieces, np.zeros(0, np.uint8)

    def take(self, count: int) -> Bytes:
        """The next `count` bytes, `[count]`."""
        parts, have = [self._rest], len(self._rest)
        while have < count:
            parts.append(next(self._pieces))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        self._rest = joined[count:]
        return joined[:count]


class SourceInputs(NamedTuple):
    """What a source makes its pieces from."""

    rng: np.random.Generator
    """Its own."""
    texts: Callable[[], Texts]
    length: int
    """Bytes of the stream that it is a part of."""
    other: Callable[[np.random.Generator], Part]
    """Begins another source, drawn as the streams draw theirs."""


Source = Callable[[SourceInputs], Iterator[Bytes]]


def log_uniform(rng: np.random.Generator, low: int | float, high: int | float) -> float:
    """Drawn evenly in its logarithm."""
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))


def symbols(rng: np.random.Generator, count: int) -> Bytes:
    """So many different bytes: printable ones or any."""
    low, high = (33, 127) if rng.random() < 0.5 else (0, 256)
    return (low + rng.permutation(high - low)[:count]).astype(np.uint8)


def as_bytes(text: str) -> Bytes:
    return np.frombuffer(text.encode(), np.uint8)
