"""The memory that is carried from batch to batch (truncated BPTT), and its files in checkpoints."""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from titans_lm.models.cache import TitansState
from titans_lm.training.processes import Processes

CARRIED = "memory.safetensors"
"""In a checkpoint: the memory that the next batch starts with, with `tbptt_steps`. With several processes each writes
`memory-rows-A-B.safetensors`, which has the rows A to B - 1 of their batch."""


class CarriedMemory:
    """The memories of a process's rows: row i of the batch of all processes is carried over `spans[i % len(spans)]`
    batches, and begins anew with the longest span."""

    def __init__(self, spans: Sequence[int], rows: int, processes: Processes):
        """`rows`: rows of each process in a batch."""
        self.spans, self.all_rows = list(spans), range(rows * processes.count)
        self.rows = self.all_rows[rows * processes.index : rows * (processes.index + 1)]
        self.batches = 0
        """Batches read so far."""
        self.state: TitansState | None = None
        """The memory after the last of them."""

    @property
    def is_on(self) -> bool:
        """False where every batch begins with an empty memory."""
        return max(self.spans) > 1

    def next(self) -> TitansState | None:
        """The memory that the next batch begins with. Rows that have read their batches are reset."""
        done = self.batches % max(self.spans)
        self.batches += 1
        if done == 0:
            self.state = None
            return None
        assert self.state is not None
        over = {row for row in self.all_rows if done % self.spans[row % len(self.spans)] == 0}
        self.state.restarts = bool(over)
        if own := [i for i, row in enumerate(self.rows) if row in over]:  # else it would be copied at every step
            self.state.reset(own)
        return self.state

    def keep(self, state: TitansState) -> None:
        """Take the memory after a batch, without its gradients."""
        self.state = state.detach()

    def save(self, folder: Path) -> None:
        """Write this process's rows. `save_file` says what it raises."""
        if self.state is not None:
            some = f"memory-rows-{self.rows.start}-{self.rows.stop}.safetensors"
            self.state.save(folder / (CARRIED if self.rows == self.all_rows else some))

    def load(self, checkpoint: Path, model: PreTrainedModel, batches: int) -> None:
        """Take this process's rows from the files of a checkpoint, whichever processes wrote them, after `batches`
        batches. Raises ValueError where rows are missing, and as `TitansState.load` does."""
        self.batches = batches
        parts, covered = [], self.rows.start
        for path, start, stop in _files(checkpoint):
            wanted = range(max(covered, start), min(self.rows.stop, stop if stop else self.rows.stop))
            if wanted and wanted.start == covered:
                state = TitansState.load(path, model)
                parts.append(state.select([row - start for row in wanted if row - start < state.batch_size]))
                covered += parts[-1].batch_size
        if covered < self.rows.stop:
            raise ValueError(f"{checkpoint} has no memory of row {covered}; its run had other rows in a batch")
        self.state = parts[0] if len(parts) == 1 else TitansState.concat(parts)


def _files(checkpoint: Path) -> list[tuple[Path, int, int]]:
    """The files with carried memories, by row: path, first row, and the row after the last, 0 where all are in it."""
    if (checkpoint / CARRIED).is_file():
        return [(checkpoint / CARRIED, 0, 0)]
    found = [(path, re.fullmatch(r"memory-rows-(\d+)-(\d+)", path.stem)) for path in checkpoint.glob("memory-rows-*")]
    return sorted(((path, int(m[1]), int(m[2])) for path, m in found if m), key=lambda file: file[1])
