"""Texts in memory: blocks of tokens, and the order in which batches take them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from titans_lm.models.tokenizer import encode
from titans_lm.tasks import IGNORED
from titans_lm.training.data.schedule import Place


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """The tokens of a document `[T]`, followed by the end token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([encode(tokenizer, text), np.asarray(end, np.int64)])


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int64]]:
    """The tokens of each text, as `tokens_of` has them."""
    return (tokens_of(text, tokenizer) for text in texts)


def row_of(ids: Tensor, position: Tensor | None, continued: bool = False) -> dict[str, Tensor]:
    """A row for training, of tokens `[..., T]`. With their `position` in their documents the model reads each document
    as if it were alone, and no document's first token has a label.

    A row may begin within a document, whose positions then count from the row's first token, unless the row is
    `continued`: the memory of the row before knows what came before.
    """
    if position is None:
        return {"input_ids": ids, "labels": ids}
    labels = ids.masked_fill(position == 0, IGNORED)
    if not continued:
        begun = (position == 0).cumsum(-1) > 0
        position = torch.where(begun, position, position - position[..., :1])
    return {"input_ids": ids, "labels": labels, "position_ids": position}


class Tokens:
    """Texts in memory as one stream of tokens, with the position of each in its document if `borders` is set. Texts
    after the first `limit` tokens are not read."""

    def __init__(
        self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, borders: bool = False, limit: int | None = None
    ):
        parts, count = [], 0
        for part in token_stream(texts, tokenizer):
            parts.append(part)
            count += len(part)
            if limit is not None and count >= limit:
                break
        self.ids = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int32)
        lengths = [np.zeros(0, np.int64), *(np.arange(len(part)) for part in parts)]
        self.position = np.concatenate(lengths).astype(np.int32) if borders else None

    def blocks(self, length: int) -> tuple[Tensor, Tensor | None]:
        """Ids and positions `[N, length]`, without the remainder. Raises ValueError for fewer tokens than `length`."""
        count = len(self.ids) // length
        if count == 0:
            raise ValueError(f"the text has {len(self.ids)} tokens, fewer than one block of sequence_length={length}")
        ids, position = (
            None if part is None else torch.from_numpy(part[: count * length].reshape(count, length))
            for part in (self.ids, self.position)
        )
        assert ids is not None
        return ids, position


class Blocks(Dataset[dict[str, Tensor]]):
    """Concatenate texts and cut them into blocks of `length` tokens, at most `limit`. Drops the remainder at the end.
    With `borders`, each text is a document of its own (see `row_of`)."""

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        borders: bool = False,
        continued: bool = False,
        limit: int | None = None,
    ):
        most = None if limit is None else limit * length
        ids, position = Tokens(texts, tokenizer, borders, most).blocks(length)
        self.blocks, self.position = ids[:limit], None if position is None else position[:limit]
        self.continued = continued

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        position = None if self.position is None else self.position[index].long()
        return row_of(self.blocks[index].long(), position, self.continued)


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


class ShuffledRows:
    """Texts in memory for a curriculum: blocks of a stage's length, in the order of `TBPTTSampler`. A batch depends on
    (seed, its number) only."""

    def __init__(self, tokens: Tokens, steps: int, seed: int, continued: bool):
        self.tokens, self.steps, self.seed, self.continued = tokens, steps, seed, continued
        self._order: tuple[tuple[int, int], list[int]] | None = None

    def rows(self, place: Place, indices: Sequence[int]) -> dict[str, Tensor]:
        """The rows `indices` of the batch at `place`, `[len(indices), T]`."""
        ids, position = self.tokens.blocks(place.length)
        sampler = TBPTTSampler(len(ids), place.rows, self.steps, self.seed)
        epoch, batch = divmod(place.number - place.begin, len(sampler) // place.rows)
        if self._order is None or self._order[0] != (place.begin, epoch):
            sampler.set_epoch(epoch)
            self._order = (place.begin, epoch), list(sampler)
        blocks = [self._order[1][batch * place.rows + index] for index in indices]
        return row_of(ids[blocks].long(), None if position is None else position[blocks].long(), self.continued)
