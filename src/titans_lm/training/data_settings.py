"""The settings of a run's data: the section `data` of its YAML file."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from titans_lm.models.configuration import unknown_key
from titans_lm.tasks import StreamTask, make_task, with_length
from titans_lm.utils.yaml_values import at_least, typed

FORMATS = ("text", "json", "csv", "parquet", "arrow")
JOIN, RESET = "join", "reset"


@dataclass
class DataSettings:
    """The data: exactly one of `files`, `dataset`, `task` and `sources`."""

    files: list[str] = field(default_factory=list)
    """Files, folders, patterns such as data/*.jsonl.gz, or "python-stdlib". A text file is a document; a file of JSON
    lines, CSV, Parquet or Arrow has one in each row. Files may be compressed (.gz, .bz2, .xz, .zst)."""
    suffixes: list[str] = field(default_factory=lambda: [".txt"])
    """File name endings that are read from a folder."""
    format: str | None = None
    """What all files are, whatever their names: text, json, csv, parquet or arrow."""
    held_out: int = 1
    """Number of files, the last in order, that are used for evaluation only. 0: no evaluation."""
    stream: bool = False
    """Read files from the disk in their order, again and again, not all into memory and in a drawn order."""
    dataset: str | None = None
    """Name of a Hugging Face data set, which is streamed; "json" or "parquet" with data_files for local files."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    data_files: list[str] | None = None
    text_column: str = "text"
    separator: str | None = None
    """A text between two documents of one file or row."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Several sources. Each has a `weight`, its share of the rows, and keys as above; its held_out is 0 by default."""
    distillation: float | None = None
    """Of a source, in training a graft: its rows' `model.distillation`."""
    documents: str = JOIN
    """join: the model reads on from one document into the next. reset: it reads each as if it were alone."""
    tokenizer: str = "bytes"
    """ "bytes", or any Hugging Face tokenizer."""
    sequence_length: int = 1024
    curriculum: list[dict[str, Any]] = field(default_factory=list)
    """Stages {until: share of the steps, sequence_length: tokens of a row}; a batch keeps its number of tokens."""
    workers: int = 0
    """Processes that read, tokenize and pack what is streamed. 0: the training process does."""
    task: dict[str, Any] = field(default_factory=dict)
    """Name and options of a synthetic task, such as {name: mqar, pairs: 8} (`titans_lm.tasks`)."""
    shortest: int | None = None
    """With a task: draw the length of each batch log-uniformly between this and the task's length."""

    @property
    def row_length(self) -> int:
        """Tokens of the longest rows."""
        return make_task(self.task).length if self.task else self.sequence_length

    @property
    def is_streamed(self) -> bool:
        """Whether documents are read from the disk or the net while the run goes on."""
        return self.stream or bool(self.dataset or self.sources)

    def weighted_sources(self) -> list[tuple["DataSettings", float]]:
        """Each source with settings of its own, and its weight. Raises ValueError for a source that cannot be."""
        if not self.sources:
            return [(self, 1.0)]
        return [self._source(options, f"data.sources[{number}]") for number, options in enumerate(self.sources)]

    def _source(self, options: dict[str, Any], name: str) -> tuple["DataSettings", float]:
        hints = {key: hint for key, hint in typing.get_type_hints(DataSettings).items() if key in _OF_A_SOURCE}
        values: dict[str, Any] = {"held_out": 0, "separator": self.separator}
        for key, value in options.items():
            if key not in hints and key != "weight":
                raise ValueError(unknown_key(str(key), [*hints, "weight"], name))
            values[key] = typed(value, hints.get(key, float), f"{name}.{key}")
        if values["held_out"] and "files" not in values:
            raise ValueError(f"{name}.held_out={values['held_out']} has an effect only with files")
        weight = values.pop("weight", 1.0)
        if not 0 < weight < float("inf"):
            raise ValueError(f"{name}.weight must be above 0 and finite, got {weight}")
        source = DataSettings(
            **values, stream="files" in values, tokenizer=self.tokenizer, sequence_length=self.sequence_length
        )
        if source.task and source.separator == self.separator:
            source.separator = None
        try:
            source.check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if source.task:
            self._check_task_source(source.task, name)
        return source, weight

    def _check_task_source(self, options: dict[str, Any], name: str) -> None:
        task = make_task(options)
        tokenizer = getattr(task, "tokenizer", None)
        if tokenizer != self.tokenizer:
            own = "numbers" if tokenizer is None else f"those of {tokenizer}"
            raise ValueError(f"{name}.task: its tokens are {own}, those of other sources are of {self.tokenizer}")
        self._check_length(task, self.sequence_length, f"{name}.task")

    def check(self) -> None:
        if sum(map(bool, (self.files, self.dataset, self.task, self.sources))) != 1:
            raise ValueError("give one of data.files, data.dataset, data.task and data.sources")
        self._check_effects()
        if self.documents not in (JOIN, RESET):
            raise ValueError(f"data.documents must be {JOIN} or {RESET}, got {self.documents!r}")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"data.format={self.format!r} is not one of {', '.join(FORMATS)}")
        if self.separator == "":
            raise ValueError("data.separator must be a text such as <|endoftext|>, got an empty one")
        if self.distillation is not None and not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be in [0, 1], got {self.distillation}")
        at_least("data.held_out", self.held_out, 0)
        at_least("data.workers", self.workers, 0)
        at_least("data.sequence_length", self.sequence_length, 2)
        if self.task:
            self._check_task()
        self.weighted_sources()
        self._check_curriculum()

    def _check_effects(self) -> None:
        """Raises ValueError for settings that would have no effect."""
        if self.shortest is not None and not self.task:
            raise ValueError(f"data.shortest={self.shortest} is for data.task; other rows all have sequence_length")
        if not self.dataset:
            self._refuse_given(("dataset_config", "data_files"), "data.dataset")
        if not self.files:
            self._refuse_given(("suffixes", "format", "stream"), "data.files")
        if not (self.files or self.dataset):
            self._refuse_given(("text_column",), "data.files or data.dataset")
        if self.sources:
            self._refuse_given(("held_out",), "data.files, and each of data.sources has its own")
        if self.task:
            self._refuse_given(("separator",), "data.files, data.dataset or data.sources")
            self._refuse_given(("documents",), "texts: each row of a task is read alone already, but")
        if not self.is_streamed:
            self._refuse_given(("workers",), "data.stream, data.dataset or data.sources")

    def _refuse_given(self, keys: tuple[str, ...], needed: str) -> None:
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
        self._check_length(task, self.shortest, "data.shortest")

    @staticmethod
    def _check_length(task: Any, length: int, name: str) -> None:
        try:
            with_length(task, length)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _check_curriculum(self) -> None:
        before = 0.0
        for number, stage in enumerate(self.curriculum):
            name = f"data.curriculum[{number}]"
            if stage.keys() != {"until", "sequence_length"}:
                raise ValueError(f"{name} must have until and sequence_length, got {', '.join(stage) or 'nothing'}")
            until = typed(stage["until"], float, f"{name}.until")
            length = typed(stage["sequence_length"], int, f"{name}.sequence_length")
            if not before < until <= 1:
                raise ValueError(
                    f"{name}.until must be above {before:g}, where it begins, and at most 1, got {until:g}"
                )
            if not 2 <= length <= self.row_length:
                longest = "the task's length" if self.task else "data.sequence_length"
                raise ValueError(f"{name}.sequence_length must be from 2 to {longest}={self.row_length}, got {length}")
            for source, _ in self.weighted_sources():
                if source.task:
                    self._check_length(make_task(source.task), length, f"{name}.sequence_length")
            before = until
        if self.curriculum and before != 1:
            raise ValueError(f"data.curriculum must end with until: 1.0, got {before:g}")
        if self.curriculum and self.shortest is not None:
            raise ValueError("data.curriculum and data.shortest both give a batch its length; leave one out")

    def check_continued(self) -> None:
        """Raises ValueError for data whose rows do not continue from batch to batch."""
        goes_on = self.task and isinstance(make_task(self.task), StreamTask)
        if self.sources or (self.task and not goes_on):
            what = (
                "the rows of several sources are drawn anew in each batch" if self.sources else "its rows do not go on"
            )
            raise ValueError(
                f"training.tbptt_steps above 1 needs data.files, data.dataset, or a data.task whose rows continue, "
                f"{{name: streams}}: {what}"
            )
        if goes_on and self.shortest is not None:
            raise ValueError(
                "training.tbptt_steps above 1 does not go with data.shortest: streams continue by whole rows"
            )

    def check_batches(self, rows: int, time_limit: bool) -> None:
        """Raises ValueError for a curriculum or workers that do not fit batches of so many `rows`."""
        if self.curriculum and time_limit:
            raise ValueError("data.curriculum has shares of max_steps, which training.max_minutes may end early")
        for number, stage in enumerate(self.curriculum):
            if rows * self.row_length % stage["sequence_length"]:
                raise ValueError(
                    f"data.curriculum[{number}].sequence_length={stage['sequence_length']} does not divide the "
                    f"{rows * self.row_length} tokens of a batch (training.batch_size={rows} rows of {self.row_length})"
                )
        if self.workers > rows:
            raise ValueError(f"data.workers must be at most training.batch_size={rows}, got {self.workers}")


_OF_A_SOURCE = {
    "files", "suffixes", "format", "held_out", "dataset", "dataset_config", "dataset_split", "data_files",
    "text_column", "separator", "task", "distillation",
}  # fmt: skip
assert {f.name for f in dataclasses.fields(DataSettings)} > _OF_A_SOURCE
