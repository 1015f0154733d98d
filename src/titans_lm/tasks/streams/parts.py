"""Common parts of the sources of streams: their inputs, and how bytes are taken from them."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from titans_lm.tasks.streams.texts import Bytes, Texts


class Part:
    """A running source: its pieces as one stream of bytes."""

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
    """The inputs from which a source makes its pieces."""

    rng: np.random.Generator
    """The source's own generator."""
    texts: Callable[[], Texts]
    length: int
    """Bytes of the stream that the source is a part of."""
    other: Callable[[np.random.Generator], Part]
    """Starts another source, drawn with the stream's weights."""


Source = Callable[[SourceInputs], Iterator[Bytes]]


def log_uniform(rng: np.random.Generator, low: int | float, high: int | float) -> float:
    """A log-uniform draw."""
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))


def symbols(rng: np.random.Generator, count: int) -> Bytes:
    """`count` different bytes: printable ones or any."""
    low, high = (33, 127) if rng.random() < 0.5 else (0, 256)
    return (low + rng.permutation(high - low)[:count]).astype(np.uint8)


def as_bytes(text: str) -> Bytes:
    return np.frombuffer(text.encode(), np.uint8)
