"""The settings of a run's data: the section `data` of its YAML file."""

from dataclasses import dataclass, field
from typing import Any

from titans_lm.tasks import make_task, with_length
from titans_lm.utils.yaml_values import at_least


@dataclass
class DataSettings:
    """The data: exactly one of `files`, `dataset` and `task`."""

    files: list[str] = field(default_factory=list)
    """Text files, folders, or "python-stdlib"."""
    suffixes: list[str] = field(default_factory=lambda: [".txt"])
    """File name endings that are read from a folder."""
    held_out: int = 1
    """Number of files, the last in order, that are used for evaluation only. 0: no evaluation."""
    dataset: str | None = None
    """Name of a Hugging Face data set, which is streamed; "json" or "parquet" with data_files for local files."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    data_files: list[str] | None = None
    text_column: str = "text"
    tokenizer: str = "bytes"
    """ "bytes", or any Hugging Face tokenizer."""
    sequence_length: int = 1024
    task: dict[str, Any] = field(default_factory=dict)
    """Name and options of a synthetic task, such as {name: mqar, pairs: 8} (`titans_lm.tasks`)."""
    shortest: int | None = None
    """With a task: draw the length of each batch log-uniformly between this and the task's length."""

    def check(self) -> None:
        if sum(map(bool, (self.files, self.dataset, self.task))) != 1:
            raise ValueError("give one of data.files, data.dataset and data.task")
        if self.task:
            self._check_task()
        elif self.shortest is not None:
            raise ValueError(f"data.shortest={self.shortest} is for data.task; other rows all have sequence_length")
        if not self.dataset:
            self._refuse_given(("dataset_config", "data_files", "text_column"), "data.dataset")
        if not self.files:
            self._refuse_given(("suffixes",), "data.files")
        at_least("data.held_out", self.held_out, 0)
        at_least("data.sequence_length", self.sequence_length, 2)

    def _refuse_given(self, keys: tuple[str, ...], needed: str) -> None:
        """Raises ValueError for settings that would have no effect."""
        defaults = DataSettings()
        for key in keys:
            if getattr(self, key) != getattr(defaults, key):
                raise ValueError(f"data.{key}={getattr(self, key)!r} has an effect only with {needed}")

    def _check_task(self) -> None:
        try:
            task = make_task(self.task)
        except ValueError as error:
            raise ValueError(f"data.task: {error}") from error
        if self.shortest is None:
            return
        if not 1 <= self.shortest <= task.length:
            raise ValueError(f"data.shortest must be from 1 to the task's length={task.length}, got {self.shortest}")
        try:
            with_length(task, self.shortest)
        except ValueError as error:
            raise ValueError(f"data.shortest: {error}") from error
