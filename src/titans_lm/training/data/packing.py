"""Documents packed into rows of tokens, and several sources in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.tasks import Rows, StreamRows, Task, with_length
from titans_lm.training.data.blocks import row_of, tokens_of
from titans_lm.training.data.documents import Documents, State
from titans_lm.training.data.schedule import Place

Batch = dict[str, Tensor]


@runtime_checkable
class Source(Protocol):
    """What rows come from. A stateless one has no `state_dict`: its rows depend on their place alone."""

    def rows(self, place: Place, indices: Sequence[int]) -> Batch:
        """The rows `indices` of the batch at `place`, `[len(indices), T]`. Batches are asked for in turn."""


@dataclass
class _Lane:
    """A document that is being cut into rows."""

    source: State
    """The place of the source before this document."""
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    read: int = 0
    """Tokens of the document that rows have."""

    def state_dict(self) -> State:
        return {"source": self.source, "read": self.read}


class PackedRows:
    """Rows cut from documents one after another. Nothing is left out: a row may end within a document, and the next
    begins there. With `borders`, documents do not see each other (see `row_of`).

    With `continued`, each row of a batch continues the text of the same row of the batch before.
    """

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, borders: bool, continued: bool):
        self.documents, self.tokenizer, self.borders, self.continued = documents, tokenizer, borders, continued
        self.tokens = 0  # read from the source
        self.lanes: dict[int, _Lane] = {}
        self.waiting: list[_Lane] = []  # begun in rows that a later stage of a curriculum does not have

    @property
    def skipped(self) -> tuple[int, str]:
        """The number of rows without text, and the first of them in words."""
        return self.documents.skipped, self.documents.first_skipped

    def rows(self, place: Place, indices: Sequence[int]) -> Batch:
        if self.continued:
            for index in self.lanes.keys() - set(indices):
                self.waiting.append(self.lanes.pop(index))
        rows = [self._row(index if self.continued else 0, place.length) for index in indices]
        ids, position = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return row_of(ids, position if self.borders else None, self.continued)

    def _row(self, number: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of the next row, and the position of each in its document."""
        ids, position = np.empty(length, np.int64), np.empty(length, np.int64)
        at = 0
        while at < length:
            lane = self.lanes.get(number)
            if lane is None or lane.read == len(lane.tokens):
                lane = self.lanes[number] = self._next(length)
            end = min(length, at + len(lane.tokens) - lane.read)
            ids[at:end] = lane.tokens[lane.read : lane.read + end - at]
            position[at:end] = np.arange(lane.read, lane.read + end - at)
            lane.read += end - at
            at = end
        return ids, position

    def _next(self, length: int) -> _Lane:
        """A document to cut. Raises ValueError for a source of fewer tokens than one row."""
        while self.waiting:
            lane = self.waiting.pop(0)
            if lane.read < len(lane.tokens):
                return lane
        before = self.documents.epoch
        lane = _Lane(self.documents.state_dict())
        lane.tokens = tokens_of(next(self.documents), self.tokenizer)
        if before == 0 < self.documents.epoch and self.tokens < length:
            raise ValueError(
                f"the data set has {self.tokens} tokens, fewer than one block of sequence_length={length} "
                f"({self.documents.skipped} rows have no text)"
            )
        self.tokens += len(lane.tokens)
        return lane

    def state_dict(self) -> State:
        return {
            "documents": self.documents.state_dict(),
            "tokens": self.tokens,
            "lanes": {str(index): lane.state_dict() for index, lane in self.lanes.items()},
            "waiting": [lane.state_dict() for lane in self.waiting],
        }

    def load_state_dict(self, state: State) -> None:
        """Go to a place: reads the documents again that have begun, and no others."""
        self.lanes = {int(index): self._begun(lane) for index, lane in state["lanes"].items()}
        self.waiting = [self._begun(lane) for lane in state["waiting"]]
        self.tokens = state["tokens"]
        self.documents.load_state_dict(state["documents"])

    def _begun(self, state: State) -> _Lane:
        self.documents.load_state_dict(state["source"])
        return _Lane(state["source"], tokens_of(next(self.documents), self.tokenizer), state["read"])


class TaskRows:
    """Rows of a synthetic task. They depend on their place alone."""

    def __init__(self, made: Rows | StreamRows):
        self.made = made

    def rows(self, place: Place, indices: Sequence[int]) -> Batch:
        return self.made.rows_of(place.number, place.rows, indices, place.length)


class TaskSource:
    """Rows of a task beside other sources: each row depends on (seed, batch, row) only. With `borders` a row is a
    document."""

    def __init__(self, task: Task, seed: int, borders: bool):
        self.task, self.seed, self.borders = task, seed, borders

    def rows(self, place: Place, indices: Sequence[int]) -> Batch:
        task = with_length(self.task, place.length)
        made = [task.batch(np.random.default_rng((self.seed, place.number, index)), 1) for index in indices]
        batch = {
            "input_ids": torch.from_numpy(np.concatenate([row.input_ids for row in made])),
            "labels": torch.from_numpy(np.concatenate([row.labels for row in made])),
        }
        if self.borders:
            batch["position_ids"] = torch.arange(place.length).repeat(len(indices), 1)
        return batch


class Mixture:
    """Each row is of one of several sources, drawn by weight. So a weight is a share of the tokens. Which one depends
    on (seed, batch, row) only.

    With `distillation`, one number for each source, a batch has that of each row, `[B]`.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int, distillation: list[float] | None = None
    ):
        self.sources, self.seed, self.distillation = sources, seed, distillation
        self.shares = np.cumsum(weights) / sum(weights)

    @property
    def skipped(self) -> tuple[int, str]:
        found = [source.skipped for source in self.sources if isinstance(source, PackedRows)]
        return sum(count for count, _ in found), next((first for _, first in found if first), "")

    def rows(self, place: Place, indices: Sequence[int]) -> Batch:
        drawn = [np.random.default_rng((self.seed, place.number, index)).random() for index in indices]
        source = np.searchsorted(self.shares, drawn, "right")
        parts, order = [], []
        for number in sorted(set(source.tolist())):
            own = np.flatnonzero(source == number)
            parts.append(self.sources[number].rows(place, [indices[i] for i in own.tolist()]))
            order += own.tolist()
        back = torch.tensor(order).argsort()
        batch = {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}
        if self.distillation is not None:
            batch["distillation"] = torch.tensor(self.distillation)[torch.from_numpy(source)]
        return batch

    def state_dict(self) -> State:
        return {
            str(number): source.state_dict()
            for number, source in enumerate(self.sources)
            if isinstance(source, PackedRows)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for number, own in state.items():
            source = self.sources[int(number)]
            assert isinstance(source, PackedRows)
            source.load_state_dict(own)
