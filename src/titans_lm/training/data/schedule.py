"""How many rows of which length each batch has: one shape for the whole run, or a length curriculum."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A batch of the run."""

    number: int
    """Of the batch, from 0."""
    rows: int
    """Rows of the batch, of all processes together."""
    length: int
    """Tokens of a row."""
    begin: int
    """Number of the first batch of this stage of the curriculum."""


class Schedule:
    """The shapes of a run's batches. Each stage of a curriculum lasts `until` a share of the `batches`, rounded up to a
    multiple of `steps`, so that no memory is carried from one stage to the next. Batches keep their number of tokens.
    """

    def __init__(
        self, rows: int, length: int, curriculum: Sequence[dict[str, Any]] = (), batches: int = 0, steps: int = 1
    ):
        self.begins, self.shapes = [0], []
        for stage in curriculum or [{"until": 1.0, "sequence_length": length}]:
            own = int(stage["sequence_length"])
            self.shapes.append((rows * length // own, own))
            self.begins.append(math.ceil(batches * stage["until"] / steps) * steps)
        del self.begins[-1]  # the last stage lasts to the end

    def at(self, number: int, processes: int = 1) -> Place:
        """The batch `number` of so many processes, each with its own rows."""
        stage = bisect_right(self.begins, number) - 1
        rows, length = self.shapes[stage]
        return Place(number, rows * processes, length, self.begins[stage])
