"""The data of a run from its settings."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from titans_lm.models.graft_config import GraftConfig
from titans_lm.tasks import Rows, StreamRows, StreamTask, make_task
from titans_lm.training.config import Settings
from titans_lm.training.data.blocks import Blocks, ShuffledRows, TBPTTSampler, Tokens
from titans_lm.training.data.documents import (
    Documents,
    Reader,
    TableRows,
    TextFiles,
    format_of,
    shard_of,
    streamed,
    tables,
    texts_of,
)
from titans_lm.training.data.loader import Shard, Stream
from titans_lm.training.data.packing import Mixture, PackedRows, Source, TaskRows, TaskSource
from titans_lm.training.data.schedule import Schedule
from titans_lm.training.data_settings import RESET, DataSettings
from titans_lm.utils.corpora import split_held_out, text_files

EVALUATION_SEED = 2_000_003
"""Seed of the task examples on which a search compares trials."""


def data_of(settings: Settings, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> tuple[Any, Any]:
    """Training data and held-out data of a run whose batches have so many `rows`, of all processes together.

    Raises ValueError for data that cannot be read.
    """
    data, training = settings.data, settings.training
    steps = max(training.tbptt_steps)
    batches = training.max_steps * training.accumulation
    schedule = Schedule(training.batch_size, data.row_length, data.curriculum, batches, steps)
    if data.task or tokenizer is None:
        return Stream(_Same(TaskRows(_rows(settings, rows))), schedule), None
    borders, continued = data.documents == RESET, steps > 1
    evaluation = _evaluation(settings, tokenizer)
    if not data.is_streamed:
        files, _ = _files(data)
        texts = texts_of(files, data.text_column, data.separator, data.format)
        if not data.curriculum:
            blocks = Blocks(texts, tokenizer, data.sequence_length, borders, continued)
            TBPTTSampler(len(blocks), rows, steps, training.seed)  # raises for too few
            return blocks, evaluation
        shuffled = ShuffledRows(Tokens(texts, tokenizer, borders), steps, training.seed, continued)
        for number in schedule.begins:  # raises for too few
            shuffled.rows(schedule.at(number, rows // training.batch_size), [0])
        return Stream(_Same(shuffled), schedule), evaluation
    make = partial(_source, settings, tokenizer)
    make(Shard(0, 1))  # raises for what is not there
    return Stream(make, schedule, data.workers), evaluation


def examples(settings: Settings) -> list[dict[str, Any]]:
    """Examples of a task on which the trials of a search are compared."""
    if not settings.data.task:
        raise ValueError("a search needs a task, or files of which some are held out (data.held_out)")
    rows = Rows(make_task(settings.data.task), settings.training.batch_size, EVALUATION_SEED)
    return list(itertools.islice(rows, settings.training.eval_blocks))


class _Same:
    """A source that is the same for all shards: it takes what it needs by the numbers of rows."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, shard: Shard) -> Source:  # noqa: ARG002
        return self.source


def _rows(settings: Settings, rows: int) -> Rows | StreamRows:
    """The rows of a task. With `tbptt_steps` its streams continue over that many batches."""
    task, training = make_task(settings.data.task), settings.training
    if max(training.tbptt_steps) > 1:
        assert isinstance(task, StreamTask)  # settings were checked
        return StreamRows(task, training.tbptt_steps, rows, training.seed)
    return Rows(task, rows, training.seed, settings.data.shortest)


def _files(data: DataSettings) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those held out. Raises ValueError for a column of files that have none."""
    files = text_files(data.files, data.suffixes)
    if data.text_column != DataSettings().text_column and all(format_of(f, data.format) == "text" for f in files):
        raise ValueError(
            f"data.text_column={data.text_column!r} has an effect only with data.dataset, or with files of rows "
            f"(JSON lines, CSV, Parquet): all of data.files are read as text"
        )
    return split_held_out(files, data.held_out)


def _evaluation(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Blocks | None:
    """The first `eval_blocks` blocks of what is held out of all sources; None if nothing is."""
    data, count = settings.data, settings.training.eval_blocks
    held_out = [(own, _files(own)[1]) for own, _ in data.weighted_sources() if own.files]
    texts = (texts_of(files, own.text_column, own.separator, own.format) for own, files in held_out)
    if not any(files for _, files in held_out):
        return None
    every = itertools.chain.from_iterable(texts)
    return Blocks(every, tokenizer, data.sequence_length, data.documents == RESET, limit=count)


def _source(settings: Settings, tokenizer: PreTrainedTokenizerBase, shard: Shard) -> Source:
    """What a shard's rows come from."""
    data, training = settings.data, settings.training
    borders, continued = data.documents == RESET, max(training.tbptt_steps) > 1
    sources: list[Source] = []
    weights = []
    for number, (own, weight) in enumerate(data.weighted_sources()):
        weights.append(weight)
        if own.task:
            sources.append(TaskSource(make_task(own.task), training.seed + number, borders))
        else:
            documents = Documents(_reader(own, shard), own.separator)
            sources.append(PackedRows(documents, tokenizer, borders, continued))
    distillation = _distillation(settings)
    if len(sources) == 1 and distillation is None:
        return sources[0]
    return Mixture(sources, weights, training.seed, distillation)


def _distillation(settings: Settings) -> list[float] | None:
    """That of each source; None if they have none of their own."""
    own = [source.distillation for source, _ in settings.data.weighted_sources()]
    if all(value is None for value in own):
        return None
    config = settings.config()
    assert isinstance(config, GraftConfig)  # settings were checked
    return [float(config.distillation if value is None else value) for value in own]


def _reader(data: DataSettings, shard: Shard) -> Reader:
    if data.dataset:
        rows = streamed(data.dataset, data.dataset_config, data.dataset_split, data.data_files)
        return TableRows(shard_of(rows, *shard), data.text_column)
    files, _ = _files(data)
    if any(format_of(file, data.format) != "text" for file in files):
        return TableRows(shard_of(tables(files, data.format), *shard), data.text_column)
    own = files[shard.rank :: shard.size]
    if not own:
        raise ValueError(
            f"data.files has {len(files)} text files, fewer than the {shard.size} processes and workers that read them"
        )
    return TextFiles(own)
