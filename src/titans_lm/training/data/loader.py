"""Batches in order, made in this process or in workers, and the place in the data after each of them."""

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from titans_lm.training.data.documents import State, warn_of_skipped
from titans_lm.training.data.packing import Batch, Source
from titans_lm.training.data.schedule import Schedule

PLACE = "data-{:05d}.json"
"""In a checkpoint: a process's place in the data."""


class Shard(NamedTuple):
    """The part `rank` of `size` of the data, that no other worker of any process reads."""

    rank: int
    size: int


class Part(NamedTuple):
    """A worker's rows of a batch, and its place after them."""

    indices: list[int]
    batch: Batch
    state: State | None
    skipped: tuple[int, str]


class _Parts(IterableDataset[Part | Exception]):
    """The parts of a process's batches that one worker makes: every `workers`-th row."""

    def __init__(self, stream: "Stream", process: Shard, number: int, states: list[State] | None):
        self.stream, self.process, self.number, self.states = stream, process, number, states

    def __iter__(self) -> Iterator[Part | Exception]:
        try:
            yield from self._parts()
        except (ValueError, OSError) as error:  # raised here, it would reach the user as a traceback
            yield error

    def _parts(self) -> Iterator[Part]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        process = self.process
        source = self.stream.make(Shard(process.rank * workers + worker, process.size * workers))
        begin = self.number
        if hasattr(source, "load_state_dict"):
            if self.states is None:
                begin = 0  # a checkpoint of an early version has no place: read again
            else:
                source.load_state_dict(self.states[worker])
        for number in itertools.count(begin):
            place = self.stream.schedule.at(number, process.size)
            own = place.rows // process.size
            indices = range(own)[worker::workers]
            batch = source.rows(place, [process.rank * own + index for index in indices])
            if number >= self.number:
                state = source.state_dict() if hasattr(source, "state_dict") else None
                yield Part(list(indices), batch, state, getattr(source, "skipped", (0, "")))


class Stream(IterableDataset[Batch]):
    """A run's endless batches. `make` returns the source of a shard; `workers` processes make the rows, 0: this one."""

    def __init__(self, make: Callable[[Shard], Source], schedule: Schedule, workers: int = 0):
        self.make, self.schedule, self.workers = make, schedule, workers
        self.loader: Loader | None = None
        """Of this process, once the run has begun."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(Loader(self, Shard(0, 1)))

    def begin(self, index: int, count: int) -> "Loader":
        """The batches of process `index` of `count`, from the first one on."""
        self.loader = Loader(self, Shard(index, count))
        return self.loader

    @property
    def skipped(self) -> int:
        """Rows without text that this process has left out."""
        return 0 if self.loader is None else self.loader.skipped


class Loader:
    """The batches of a process, each `[B, T]`. Iterating goes on from `number`, the number of the next batch."""

    def __init__(self, stream: Stream, process: Shard):
        self.stream, self.process = stream, process
        self.number, self.skipped = 0, 0
        self.states: list[State] | None = None

    def __iter__(self) -> Iterator[Batch]:
        workers = self.stream.workers
        loader: DataLoader[Part | Exception] = DataLoader(
            _Parts(self.stream, self.process, self.number, self.states),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the run's own random numbers stay as they are
            pin_memory=torch.cuda.is_available(),
        )
        parts = iter(loader)
        while True:
            made = [self._checked(next(parts)) for _ in range(max(1, workers))]
            self.number += 1
            states = [part.state for part in made if part.state is not None]
            self.states = states or None
            skipped = sum(part.skipped[0] for part in made)
            if skipped and not self.skipped:
                warn_of_skipped(skipped, next(part.skipped[1] for part in made if part.skipped[0]))
            self.skipped = skipped
            yield _merged(made)

    @staticmethod
    def _checked(part: Part | Exception) -> Part:
        if isinstance(part, Exception):
            raise part
        return part

    def save(self, checkpoint: Path) -> None:
        """Write the place after the last batch."""
        place = {"batch": self.number, "process": list(self.process), "places": self.states}
        (checkpoint / PLACE.format(self.process.rank)).write_text(json.dumps(place) + "\n")

    def load(self, checkpoint: Path, number: int) -> None:
        """Go on from the place that a checkpoint has, before batch `number`. Raises ValueError for one of more or fewer
        processes, where the place is not that of the batch alone."""
        self.number, path = number, checkpoint / PLACE.format(self.process.rank)
        if not path.is_file():
            others = list(checkpoint.glob(PLACE.replace("{:05d}", "*")))
            if not others:
                warnings.warn(f"{checkpoint} has no place in the data: it is read again up to there", stacklevel=2)
                return
            path = others[0]
        place = _read_place(path)
        if place["places"] is None:
            return
        if place["process"] != list(self.process) or len(place["places"]) != max(1, self.stream.workers):
            raise ValueError(
                f"{path} is the place of process {place['process'][0] + 1} of {place['process'][1]} with "
                f"{len(place['places'])} workers: resume with as many, each reads its own part of the data"
            )
        if place["batch"] != number:
            raise ValueError(f"{path} is damaged: it is the place before batch {place['batch']}, not {number}")
        self.states = place["places"]


def _read_place(path: Path) -> dict[str, Any]:
    try:
        place: dict[str, Any] = json.loads(path.read_text())
        _ = place["batch"] + place["process"][0] + place["process"][1], place["places"] and place["places"][0].keys()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is damaged: it is not what a training run wrote") from None
    return place


def _as_it_is(part: Any) -> Any:
    return part


def _merged(parts: list[Part]) -> Batch:
    """The parts of all workers as one batch, its rows in order."""
    if len(parts) == 1:
        return parts[0].batch
    back = torch.tensor([index for part in parts for index in part.indices]).argsort()
    return {key: torch.cat([part.batch[key] for part in parts])[back] for key in parts[0].batch}
