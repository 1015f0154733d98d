"""Documents from files and Hugging Face data sets, one after another, with the place after each."""

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from titans_lm.utils.text_file import decode_text, read_text

FORMATS = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".arrow": "arrow",
}  # fmt: skip
"""Endings of files with a document in each row. Any other file is one document."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
State = dict[str, Any]
"""A place in a source: plain values, as JSON has them."""


def format_of(path: Path, given: str | None = None) -> str:
    """ "parquet", "json", "csv", "arrow", or "text": what is `given`, else by the name of a file, which may be
    compressed."""
    if given is not None:
        return given
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def read_document(path: Path) -> str:
    """The text of a file that may be compressed. Raises ValueError for what is not text, or cannot be decompressed."""
    if path.suffix.lower() not in COMPRESSED:
        return read_text(path)
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            content = file.read()
    except ValueError as error:
        raise ValueError(f"{path} cannot be decompressed: {error} (.zst needs `pip install zstandard`)") from error
    except Exception as error:  # each library has its own
        raise ValueError(f"{path} cannot be decompressed: {error or type(error).__name__}") from error
    return decode_text(content, path)


@runtime_checkable
class Reader(Protocol):
    """Rows of a source, from a place on."""

    def __iter__(self) -> Iterator[Any]:
        """The rows from the place on: a text, or what stands in its stead."""

    def state_dict(self) -> State:
        """The place after the last row."""

    def load_state_dict(self, state: State) -> None:
        """Go to a place."""


class TextFiles:
    """Each file is one text."""

    def __init__(self, files: list[Path]):
        self.files, self.file = files, 0

    def __iter__(self) -> Iterator[str]:
        while self.file < len(self.files):
            self.file += 1
            yield read_document(self.files[self.file - 1])

    def state_dict(self) -> State:
        return {"file": self.file}

    def load_state_dict(self, state: State) -> None:
        self.file = state["file"]


class TableRows:
    """A column of a streamed Hugging Face data set, which knows its own place."""

    def __init__(self, data: Any, column: str):
        self.data, self.column = data, column
        self.state = data.state_dict()

    def __iter__(self) -> Iterator[Any]:
        try:
            for rows in self.data.iter(batch_size=1):  # unlike iter(data), the same in a DataLoader's worker
                self.state = self.data.state_dict()
                if self.column not in rows:
                    names = ", ".join(rows)
                    raise ValueError(f"data.text_column={self.column!r} is not in the data set; it has {names}")
                yield rows[self.column][0]
        except (ValueError, OSError):
            raise
        except Exception as error:  # the library raises many kinds; all mean that the next row cannot be read
            raise ValueError(f"the data set cannot be read on: {error}") from error

    def state_dict(self) -> State:
        state: State = self.state
        return state

    def load_state_dict(self, state: State) -> None:
        self.state = json.loads(json.dumps(state))  # the library changes it
        self.data.load_state_dict(json.loads(json.dumps(state)))


class Documents:
    """The documents of a source, again and again. Rows without text are left out and counted.

    A `separator` cuts a text into several documents. `__next__` raises ValueError at the end of a first pass in which
    no row had a text.
    """

    def __init__(self, reader: Reader, separator: str | None = None):
        self.reader, self.separator = reader, separator
        self.begin = reader.state_dict()
        self.epoch, self.row, self.skipped, self.first_skipped = 0, 0, 0, ""
        self._rows = iter(reader)
        self._texts: list[str] = []
        self._before, self._part = self.begin, 0

    def __iter__(self) -> "Documents":
        return self

    def __next__(self) -> str:
        while self._part >= len(self._texts):
            self._read_row()
        self._part += 1
        return self._texts[self._part - 1]

    def once(self) -> Iterator[str]:
        """The documents from here to the end, once."""
        for value in self._rows:
            yield from self._split(value)
            self.row += 1

    def _read_row(self) -> None:
        self._before, self._part, self._texts = self.reader.state_dict(), 0, []
        for value in self._rows:
            self._texts = self._split(value)
            self.row += 1
            return
        if not self.epoch and self.row == self.skipped:
            raise ValueError(f"the data set has no text: {self.row} rows, {self.first_skipped or 'none of them'}")
        self.epoch += 1
        self._go_to(self.begin)

    def _split(self, value: Any) -> list[str]:
        texts = []
        if isinstance(value, str) and value:
            texts = [text for text in value.split(self.separator) if text] if self.separator else [value]
            what = "separators alone"
        else:
            what = "null" if value is None else "an empty text" if value == "" else type(value).__name__
        if not texts:
            self.skipped += 1
            self.first_skipped = self.first_skipped or f"row {self.row} of the data set has no text ({what})"
        return texts

    def _go_to(self, state: State) -> None:
        self.reader.load_state_dict(state)
        self._rows = iter(self.reader)
        self._before, self._part, self._texts = state, 0, []

    def state_dict(self) -> State:
        """The place after the last document."""
        counts = {key: getattr(self, key) for key in _COUNTS}
        return {"before": self._before, "part": self._part, **counts}

    def load_state_dict(self, state: State) -> None:
        """Go to a place. Reads the row again that the last document came from, and none before it."""
        self._go_to(state["before"])
        if state["part"]:
            self._read_row()
        self._part = state["part"]
        for key in _COUNTS:
            setattr(self, key, state[key])


_COUNTS = ("epoch", "row", "skipped", "first_skipped")


def streamed(name: str, config: str | None, split: str, data_files: list[str] | None, **options: Any) -> Any:
    """A Hugging Face data set, or local files ("json", "parquet", "csv" with `data_files`), as it is read."""
    from datasets import load_dataset  # takes two seconds

    if name == "csv":
        options = {"keep_default_na": False, **options}  # a text "null" or "NA" is a text
    try:
        return load_dataset(name, config, split=split, data_files=data_files, streaming=True, **options)
    except Exception as error:  # the library raises many kinds; all mean that this data set cannot be loaded
        raise ValueError(f"data set {name!r} cannot be loaded: {error}") from error


def tables(files: list[Path], given: str | None = None) -> Any:
    """The rows of local files of one format, streamed. Raises ValueError for files of several formats."""
    kinds = {(format_of(file, given), ".tsv" in map(str.lower, file.suffixes)) for file in files}
    if len(kinds) > 1:
        found = " and ".join(sorted({kind for kind, _ in kinds}))
        raise ValueError(f"files that are streamed must be of one format, got {found}; give them as data.sources")
    ((kind, tabs),) = kinds
    data = streamed(kind, None, "train", [str(file) for file in files], **({"sep": "\t"} if tabs else {}))
    return data.reshard() if kind == "parquet" else data  # by row groups: a place is found without reading those before


def shard_of(data: Any, index: int, count: int) -> Any:
    """The part `index` of `count` of a streamed data set: whole files or row groups if there are as many, else every
    `count`-th row."""
    if count == 1:
        return data
    from datasets.distributed import split_dataset_by_node

    by_shards = data.num_shards >= count
    return split_dataset_by_node(data, index, count, strategy="shards" if by_shards else "examples")


def texts_of(files: Iterable[Path], column: str, separator: str | None, given: str | None = None) -> Iterator[str]:
    """Every document of `files`, once, in order. Warns of rows without text."""
    for file in files:
        is_text = format_of(file, given) == "text"
        reader: Reader = TextFiles([file]) if is_text else TableRows(tables([file], given), column)
        documents = Documents(reader, separator)
        yield from documents.once()
        warn_of_skipped(documents.skipped, f"{file}: {documents.first_skipped}")


def warn_of_skipped(count: int, first: str) -> None:
    """Warn once of rows that are left out, if there are any."""
    if count:
        warnings.warn(f"{first}: such rows are left out, {count} so far", stacklevel=3)
