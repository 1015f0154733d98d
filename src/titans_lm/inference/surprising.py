"""The lines of a text that a model did not expect: bits per byte of each, the highest kept while it reads."""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHOWN = 300
"""Bytes of a line that are kept, so that a line of any length takes bounded space."""


class Line(NamedTuple):
    """One line of a text, without its end."""

    bits_per_byte: float
    number: int
    """From 1, of the text it is in."""
    text: str
    """Its beginning, at most `SHOWN` bytes; bytes that are no UTF-8 are replaced."""
    source: str = ""
    """The text's name."""


class SurprisingLines:
    """Takes a text piece by piece, keeps its `count` lines with the most bits per byte. Constant size.

    Empty lines do not count; a line's end belongs to it. Raises ValueError for a count below 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"the number of lines must be at least 1, got {count}")
        self.count = count
        self._kept: list[tuple[float, int, Line]] = []  # a heap, the least surprising first
        self._added = 0
        self.source, self.number = "", 1
        self._open()

    def begin(self, source: str) -> None:
        """Another text begins; the line that was open ends."""
        self.end()
        self.source, self.number = source, 1

    def add(self, data: bytes, bits: NDArray[np.float64]) -> None:
        """More of the text: its bytes, and the bits that each took, `[len(data)]`."""
        total = np.concatenate([[0.0], np.cumsum(bits)])
        first = 0
        for part in _lines(data):
            last = first + len(part)
            self._shown += part[: SHOWN - len(self._shown)]
            self._bytes += len(part)
            self._bits += float(total[last] - total[first])
            if part.endswith(b"\n"):
                self.end()
            first = last

    def end(self) -> None:
        """The line that is open is over, as at the end of a text."""
        if self._shown.strip():
            line = Line(self._bits / self._bytes, self.number, self._text(), self.source)
            keep = heapq.heappush if len(self._kept) < self.count else heapq.heappushpop
            keep(self._kept, (line.bits_per_byte, -self._added, line))
            self._added += 1
        if self._bytes:
            self.number += 1
        self._open()

    def most(self) -> list[Line]:
        """The lines kept, the most surprising first; of equals the earlier."""
        return [line for *_, line in sorted(self._kept, reverse=True)]

    def _open(self) -> None:
        self._shown, self._bytes, self._bits = b"", 0, 0.0

    def _text(self) -> str:
        return self._shown.rstrip(b"\r\n").decode(errors="replace")


def _lines(data: bytes) -> list[bytes]:
    """Parts that end with a line feed, and the rest: a carriage return alone ends no line."""
    parts = [part + b"\n" for part in data.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    return [part for part in parts if part]
