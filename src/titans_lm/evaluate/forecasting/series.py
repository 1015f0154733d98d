"""A series of a date and numbers from a CSV file, checked, and its parts: training, validation, test."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

HOURS_OF_A_MONTH = 30 * 24
SPLITS = ("auto", "ett-hour", "ett-minute", "60/20/20", "70/10/20")
"""ett-hour: 12, 4 and 4 months of 30 days, as all papers cut ETTh; ett-minute: the same months of 15-minute rows."""


class Series(NamedTuple):
    """Measurements in the order of their dates."""

    name: str
    columns: list[str]
    values: Tensor
    """`[T, C]`, float64, in the units of the file."""
    digest: str
    """SHA-256 of the file."""


class Parts(NamedTuple):
    """Where the parts end: rows `[0, train)` are for training, `[train, val)` for validation, `[val, test)` for the
    test."""

    train: int
    val: int
    test: int


def load_series(path: Path) -> Series:
    """Read a CSV whose first column is a date and whose others are numbers.

    Raises ValueError, with row and column, for rows of unequal length, dates that cannot be read or do not rise,
    values that are missing, and values that are no finite numbers.
    """
    content = path.read_bytes()
    _check_widths(path, content)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    if table.shape[1] < 2 or not len(table):
        raise ValueError(f"{path} must have a column of dates, one or more of numbers, and rows; it has "
                         f"{table.shape[1]} columns and {len(table)} rows")  # fmt: skip
    _check_dates(path, table.iloc[:, 0])
    columns = [str(name) for name in table.columns[1:]]
    values = torch.stack([_numbers(path, table[name]) for name in columns], 1)
    return Series(path.stem, columns, values, hashlib.sha256(content).hexdigest())


def _place(path: Path, row: int, column: str) -> str:
    """`row` counts the measurements from 0; a person counts from 1, and an editor counts the header too."""
    return f"{path}, row {row + 1} (line {row + 2}), column {column!r}"


def _check_widths(path: Path, content: bytes) -> None:
    """pandas fills short rows and shifts long ones, without a word."""
    try:
        lines = csv.reader(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    header = next(lines, [])
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}, line 1, has two columns of the name {twice!r}")
    for row, fields in enumerate(lines):
        if len(fields) != len(header):
            column = header[len(fields)] if len(fields) < len(header) else header[-1]
            raise ValueError(f"{_place(path, row, column)}: the row has {len(fields)} values, the header has "
                             f"{len(header)} columns")  # fmt: skip


def _check_dates(path: Path, dates: pd.Series) -> None:
    column = str(dates.name)
    parsed = pd.to_datetime(dates, errors="coerce", format="ISO8601")
    if parsed.isna().any():
        parsed = pd.to_datetime(dates, errors="coerce", format="mixed")
    if (wrong := parsed.isna()).any():
        row = int(wrong.to_numpy().argmax())
        raise ValueError(f"{_place(path, row, column)}: {dates[row]!r} is not a date; the first column must hold dates")
    if (wrong := parsed.diff().dt.total_seconds() <= 0).any():
        row = int(wrong.to_numpy().argmax())
        raise ValueError(
            f"{_place(path, row, column)}: {dates[row]!r} is not after {dates[row - 1]!r}; dates must rise"
        )


def _numbers(path: Path, column: pd.Series) -> Tensor:
    numbers = pd.to_numeric(column, errors="coerce").astype("float64").to_numpy(copy=True)
    found = torch.from_numpy(numbers)
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).int().argmax())
        text = str(column[row]).strip()
        missing = text.lower() in ("", "na", "nan", "null", "none")
        what = (
            "the value is missing; fill it in, or leave the row out" if missing else f"{text!r} is not a finite number"
        )
        raise ValueError(f"{_place(path, row, str(column.name))}: {what}")
    return found


def split_of(series: Series, split: str) -> Parts:
    """The parts of a series. "auto": ETT's months by the names of its files, else 70/10/20.

    Raises ValueError for a series that is too short.
    """
    if split == "auto":
        ett = {"ETTh": "ett-hour", "ETTm": "ett-minute"}
        split = ett.get(series.name[:4], "70/10/20")
    rows = len(series.values)
    if split.startswith("ett"):
        month = HOURS_OF_A_MONTH * (4 if split == "ett-minute" else 1)
        parts = Parts(12 * month, 16 * month, 20 * month)
        if rows < parts.test:
            raise ValueError(
                f"{series.name} has {rows} rows, the split {split!r} needs {parts.test}; use --split 60/20/20"
            )
        return parts
    train, _, test = (int(share) / 100 for share in split.split("/"))
    return Parts(int(rows * train), rows - int(rows * test), rows)


def standardised(series: Series, parts: Parts) -> Tensor:
    """Values `[T, C]` in float32, minus the mean and over the standard deviation of the training part, per column.

    A column that is constant there keeps its scale.
    """
    train = series.values[: parts.train]
    std = train.std(0, correction=0)
    return ((series.values - train.mean(0)) / std.where(std > 0, 1.0)).float()
