"""Synthetic tasks with labels: recall, state tracking, needles, facts in a text, streams.

A task is a frozen dataclass. Its fields are its options, all of them plain values: a YAML file names them
(`data.task: {name: mqar, pairs: 8}`), and a test changes them (`dataclasses.replace(task, length=1024)`).
"""

import dataclasses
import importlib
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

IGNORED = -100
"""The label of a position without loss, as in transformers."""


class Batch(NamedTuple):
    """Rows of one length. `labels` are those of transformers: the logits at t - 1 should predict `labels[:, t]`, which
    is not always the token at t. `IGNORED` where there is no question."""

    input_ids: NDArray[np.int64]  # [B, T]
    labels: NDArray[np.int64]  # [B, T]


@runtime_checkable
class Task(Protocol):
    """A task. Its constructor raises ValueError for an invalid value, naming the field."""

    @property
    def length(self) -> int:
        """Tokens T of every row."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary."""

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """`rows` examples. The same generator state gives the same bytes."""


@runtime_checkable
class StreamTask(Task, Protocol):
    """A task whose examples have any length and continue from row to row. Every token has a label."""

    def stream(self, rng: np.random.Generator, length: int) -> NDArray[np.uint8]:
        """Tokens `[length]` of one example. The same generator state gives the same tokens."""


TASKS = {
    "mqar": "recall.MQAR",
    "forgetting_mqar": "recall.ForgettingMQAR",
    "blank_gap": "recall.BlankGap",
    "selective_copying": "recall.SelectiveCopying",
    "parity": "tracking.Parity",
    "modular": "tracking.Modular",
    "s3": "tracking.S3",
    "s5": "tracking.S5",
    "needle": "needle.Needle",
    "babilong": "babilong.Babilong",
    "mixed": "mixed.Mixed",
    "streams": "streams.Streams",
}
"""Name -> module of this package, and class."""


def task_class(name: str) -> type[Any]:
    """The class of a task. Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of: {', '.join(TASKS)}")
    file, _, kind = TASKS[name].partition(".")
    return getattr(importlib.import_module(f"titans_lm.tasks.{file}"), kind)


def make_task(options: dict[str, Any]) -> Task:
    """Build a task from options such as `{"name": "mqar", "pairs": 8}`. Raises ValueError naming the wrong option."""
    if "name" not in options:
        raise ValueError(f"a task needs a name, one of: {', '.join(TASKS)}")
    name = str(options["name"])
    kind = task_class(name)
    options_of_kind = inspect.signature(kind).parameters
    for key in options:
        if key != "name" and key not in options_of_kind:
            raise ValueError(f"task {name} has no option {key!r}; it has {', '.join(options_of_kind)}")
    missing = [key for key, p in options_of_kind.items() if p.default is inspect.Parameter.empty and key not in options]
    if missing:
        raise ValueError(f"task {name} needs {' and '.join(missing)}")
    try:
        task: Task = kind(**{key: value for key, value in options.items() if key != "name"})
    except TypeError as error:  # a list where a number belongs, and the like
        raise ValueError(f"task {name}: an option has a value of the wrong type: {error}") from error
    return task


_MOST = 2**40
"""The largest count: larger ones are mistakes, and too large for numpy."""


def at_least(least: int, **values: int) -> None:
    """Raises ValueError for the first of `values` that is not a whole number of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if value > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}, got {value}")


class Rows(IterableDataset[dict[str, Tensor]]):
    """Endless examples for training, `rows` per batch. A batch has the task's length, or one drawn log-uniformly
    between `shortest` and it. Batch n depends on (seed, n) only."""

    def __init__(self, task: Task, rows: int, seed: int, shortest: int | None = None):
        self.task, self.rows, self.seed, self.shortest = task, rows, seed, shortest

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count():
            batch = self.rows_of(number, self.rows, range(self.rows))
            yield from ({key: rows[row] for key, rows in batch.items()} for row in range(self.rows))

    def rows_of(self, number: int, rows: int, indices: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """The rows `indices` of batch `number`, which has so many `rows`, of this length."""
        rng = np.random.default_rng((self.seed, number))
        task = self.task if length is None else with_length(self.task, length)
        if self.shortest is not None:
            task = with_length(task, self._drawn(rng, self.shortest))
        ids, labels = (torch.from_numpy(part)[list(indices)] for part in task.batch(rng, rows))
        return {"input_ids": ids, "labels": labels}

    def _drawn(self, rng: np.random.Generator, shortest: int) -> int:
        return round(math.exp(rng.uniform(math.log(shortest), math.log(self.task.length))))


class StreamRows(IterableDataset[dict[str, Tensor]]):
    """Endless rows for truncated BPTT: row i of a batch continues the stream of row i of the batch before.

    A stream ends after as many batches as `spans` gives its row (values are taken in turn), or when the longest span
    ends. The trainer resets memories at the same batches. A stream depends on (seed, row, its number in the row) only.
    """

    def __init__(self, task: StreamTask, spans: Sequence[int], rows: int, seed: int):
        self.task, self.seed = task, seed
        self.spans, self._pattern = [spans[row % len(spans)] for row in range(rows)], list(spans)
        self._made: dict[int, tuple[tuple[int, int], Tensor]] = {}  # row -> number of its stream and length, the stream

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count():
            ids = self.rows_of(number, len(self.spans), range(len(self.spans)))["input_ids"]
            yield from ({"input_ids": row, "labels": row} for row in ids)

    def rows_of(
        self,
        number: int,
        rows: int,  # noqa: ARG002 - as in Rows
        indices: Sequence[int],
        length: int | None = None,
    ) -> dict[str, Tensor]:
        """The rows `indices` of batch `number`, which has so many `rows`, of this length."""
        length = self.task.length if length is None else length
        made = []
        for row in indices:
            span = self._pattern[row % len(self._pattern)]
            which, part = self._place(number, span)
            if self._made.get(row, ((), ()))[0] != (which, length):
                self._made[row] = (which, length), self._stream(row, span, which, length)
            made.append(self._made[row][1][part].long())
        ids = torch.stack(made)
        return {"input_ids": ids, "labels": ids}

    def _place(self, number: int, span: int) -> tuple[int, int]:
        """-> the number of the stream in its row that batch `number` is part of, and the number of the part."""
        turns, within = divmod(number, max(self.spans))
        return turns * math.ceil(max(self.spans) / span) + within // span, within % span

    def _stream(self, row: int, span: int, which: int, length: int) -> Tensor:
        rng = np.random.default_rng((self.seed, row, which))
        return torch.from_numpy(self.task.stream(rng, span * length)).view(span, length)


def with_length(task: Task, length: int) -> Task:
    """The task with this row length."""
    if length == task.length:
        return task
    changed: Task = dataclasses.replace(task, length=length)  # type: ignore[type-var]
    return changed
