"""Several tasks, for a model that learns all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from titans_lm.tasks import Batch, Task, make_task


@dataclass(frozen=True)
class Mixed:
    """Each batch is of one of `tasks`, drawn uniformly.

    Raises ValueError for fewer than two tasks, an invalid one, or different tokenizers.
    """

    tasks: Sequence[Mapping[str, Any]]
    """The options of each, such as {name: mqar, pairs: 8}."""
    length: int | None = None
    """Tokens of a row of every task; None: each task has its own length."""

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or len(self.tasks) < 2 or not all(isinstance(t, Mapping) for t in self.tasks):
            raise ValueError(f"tasks must be two or more, each such as {{name: mqar}}, got {self.tasks!r}")
        names = {getattr(task, "tokenizer", None) for task in self._made}
        if len(names) > 1:
            raise ValueError(f"tasks must have one tokenizer, got {', '.join(sorted(map(str, names)))}")
        if self.length is None:
            object.__setattr__(self, "length", max(task.length for task in self._made))

    @cached_property
    def _made(self) -> list[Task]:
        own = {} if self.length is None else {"length": self.length}
        return [make_task({**options, **own}) for options in self.tasks]

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer of all tasks; None if tokens are numbers."""
        name: str | None = getattr(self._made[0], "tokenizer", None)
        return name

    @property
    def vocab_size(self) -> int:
        return max(task.vocab_size for task in self._made)

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        return self._made[rng.integers(len(self._made))].batch(rng, rows)
