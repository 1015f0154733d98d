"""Blocks of tokens from texts and streamed Hugging Face data sets, and the order in which batches take them."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase

from titans_lm.models.tokenizer import encode


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int64]]:
    """The tokens of each text, followed by the end token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        yield np.concatenate([encode(tokenizer, text), np.asarray(end, np.int64)])


class Blocks(Dataset[dict[str, Tensor]]):
    """Concatenate texts and cut them into blocks of `length` tokens. Drops the remainder at the end."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int):
        stream = np.concatenate([np.zeros(0, np.int64), *token_stream(texts, tokenizer)])
        count = len(stream) // length
        if count == 0:
            raise ValueError(f"the text has {len(stream)} tokens, fewer than one block of sequence_length={length}")
        self.blocks = torch.from_numpy(stream[: count * length].astype(np.int32).reshape(count, length))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block}


class TBPTTSampler(Sampler[int]):
    """Order blocks for truncated BPTT: each row of a batch continues its text for `steps` batches, then starts another.

    Shuffles anew each epoch; `steps` = 1 is plain shuffling. Leaves out blocks that fill no whole round, others in each
    epoch. Raises ValueError for fewer than `batch` runs of `steps` blocks.
    """

    def __init__(self, count: int, batch: int, steps: int, seed: int):
        self.batch, self.steps, self.seed, self.epoch = batch, steps, seed, 0
        self.runs = count // steps
        if self.runs < batch:
            raise ValueError(
                f"the text has {count} blocks, too few for {batch} rows of {steps} blocks each; "
                "take a smaller training.batch_size, training.tbptt_steps or data.sequence_length"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.runs // self.batch * self.batch * self.steps

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.runs, generator=generator)[: self.runs // self.batch * self.batch]
        runs = order.view(-1, 1, self.batch) * self.steps + torch.arange(self.steps)[:, None]  # [rounds, n, B]
        return iter(runs.flatten().tolist())


class StreamedBlocks(IterableDataset[dict[str, Tensor]]):
    """Blocks of a streamed Hugging Face data set, in its own order."""

    def __init__(self, rows: Iterable[dict[str, Any]], column: str, tokenizer: PreTrainedTokenizerBase, length: int):
        self.rows, self.column, self.tokenizer, self.length = rows, column, tokenizer, length
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rest, blocks = np.zeros(0, np.int64), 0
        for tokens in token_stream(self._texts(), self.tokenizer):
            rest = np.concatenate([rest, tokens])
            while len(rest) >= self.length:
                block = torch.from_numpy(rest[: self.length].copy())
                rest = rest[self.length :]
                blocks += 1
                yield {"input_ids": block, "labels": block}
        if not blocks:
            raise ValueError(
                f"the data set has {len(rest)} tokens, fewer than one block of sequence_length={self.length} "
                f"({self.skipped} rows have no text)"
            )

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows
        except (ValueError, OSError):
            raise
        except Exception as error:  # the library raises many kinds; all mean that the next row cannot be read
            raise ValueError(f"the data set cannot be read on: {error}") from error

    def _texts(self) -> Iterator[str]:
        """The texts of rows that have one. Counts the others in `skipped`, and warns of the first."""
        for number, row in enumerate(self._read()):
            if self.column not in row:
                raise ValueError(f"data.text_column={self.column!r} is not in the data set; it has {', '.join(row)}")
            text = row[self.column]
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise ValueError(
                    f"data.text_column={self.column!r} holds {type(text).__name__}, not text, in row {number}"
                )
            else:
                self.skipped += 1
                if self.skipped == 1:
                    message = f"row {number} of the data set has no text (null): such rows are left out"
                    warnings.warn(message, stacklevel=2)


def streamed(name: str, config: str | None, split: str, data_files: list[str] | None) -> Iterable[dict[str, Any]]:
    """The rows of a Hugging Face data set, or of local files ("json", "parquet", "text" with `data_files`)."""
    from datasets import load_dataset  # takes two seconds

    try:
        options = {"keep_default_na": False} if name == "csv" else {}  # a text "null" or "NA" is a text
        return load_dataset(name, config, split=split, data_files=data_files, streaming=True, **options)
    except Exception as error:  # the library raises many kinds; all mean that this data set cannot be loaded
        raise ValueError(f"data set {name!r} cannot be loaded: {error}") from error
