"""The most surprising lines of a text, by bits per byte, collected while it is read."""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHOWN = 300
"""Maximum bytes kept of a line, so that a line of any length takes bounded space."""


class Line(NamedTuple):
    """A line of a text, without its line end."""

    bits_per_byte: float
    number: int
    """Line number in its text, from 1."""
    text: str
    """Its beginning, at most `SHOWN` bytes, with invalid UTF-8 replaced."""
    source: str = ""
    """The text's name."""


class SurprisingLines:
    """Keeps the `count` lines with the most bits per byte of a text that arrives piece by piece. Constant size.

    Ignores empty lines and lines of which nothing is known; a line includes its line end. Raises ValueError for a count
    below 1.
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
        """Start another text. Ends the open line."""
        self.end()
        self.source, self.number = source, 1

    def add(self, data: bytes, bits: NDArray[np.float64]) -> None:
        """Add a piece of the text: its bytes, and the bits of each, `[len(data)]`; nan, of a byte that nothing
        predicted, does not count in its line's mean."""
        known = ~np.isnan(bits)
        total, counts = (np.concatenate([[0.0], np.cumsum(values)]) for values in (np.where(known, bits, 0.0), known))
        first = 0
        for part in _lines(data):
            last = first + len(part)
            self._shown += part[: SHOWN - len(self._shown)]
            self._bytes += len(part)
            self._known += int(counts[last] - counts[first])
            self._bits += float(total[last] - total[first])
            if part.endswith(b"\n"):
                self.end()
            first = last

    def end(self) -> None:
        """End the open line, as at the end of a text."""
        if self._shown.strip() and self._known:
            text = self._shown.rstrip(b"\r\n").decode(errors="replace")
            line = Line(self._bits / self._known, self.number, text, self.source)
            keep = heapq.heappush if len(self._kept) < self.count else heapq.heappushpop
            keep(self._kept, (line.bits_per_byte, -self._added, line))
            self._added += 1
        if self._bytes:
            self.number += 1
        self._open()

    def most(self) -> list[Line]:
        """The lines kept, most surprising first; equal ones in text order."""
        return [line for *_, line in sorted(self._kept, reverse=True)]

    def _open(self) -> None:
        self._shown, self._bytes, self._known, self._bits = b"", 0, 0, 0.0


def _lines(data: bytes) -> list[bytes]:
    """Split after each line feed. A carriage return alone does not end a line."""
    parts = [part + b"\n" for part in data.split(b"\n")]
    parts[-1] = parts[-1][:-1]
    return [part for part in parts if part]
