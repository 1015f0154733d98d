"""Text to tokens: files, folders, Hugging Face data sets; bytes by default; packed into blocks of equal length."""

import logging
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from titans_lm.text_file import is_blank, read_text
from titans_lm.text_file import text_pieces as text_pieces  # also had from here

_log = logging.getLogger(__name__)
STDLIB = "python-stdlib"
"""In place of a path: the source files of Python's own standard library, which every machine has."""
_NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}


# ------------------------------------------------------------------------------------------------ tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes themselves (of UTF-8 text), then <pad>, <bos>, <eos>. Needs no download."""
    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<bos>", "<eos>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_characters() -> list[str]:
    """The printable character by which the byte-level alphabet stands for each byte (as in GPT-2's tokenizer)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in set(printable) else chr(next(others)) for b in range(256)]


_known: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each token below 256 is one byte."""
    if tokenizer not in _known:  # asking takes as long as the bytes of a megabyte, and short texts are many
        ids = tokenizer.convert_tokens_to_ids(_byte_characters()) if tokenizer.vocab_size == 256 else []
        _known[tokenizer] = ids == list(range(256))
    return _known[tokenizer]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "bytes", or the name or folder of any Hugging Face tokenizer. One that brings its own code is refused."""
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'tokenizer {name!r} cannot be loaded; give "bytes", a folder or a Hub name: {plain_reason(error)}'
        ) from error


def plain_reason(error: Exception) -> str:
    """What transformers says, as one line; of code that it would run, that it is not."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run"
    return " ".join(str(error).split())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    """The text's tokens, `[T]`, without special ones. Raises ValueError for half a character (a lone surrogate), as a
    command line has it whose bytes are not UTF-8."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start:,} is {text[error.start]!r}"
        raise ValueError(f"this is not text, for it is not UTF-8: {place} in {text[:50]!r}") from None
    if is_bytes(tokenizer):  # a megabyte in a millisecond
        return np.frombuffer(content, np.uint8).astype(np.int64)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)


# ------------------------------------------------------------------------------------------------ files


def text_files(paths: Iterable[str], suffixes: Iterable[str]) -> list[Path]:
    """The files among `paths`, and those with one of `suffixes` in folders among them, in sorted order, but for those
    in folders that have nothing but white space in them.

    Raises ValueError for a path that does not exist or has no such file.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if name == STDLIB:
            found += stdlib_files()
        elif path.is_dir():
            inside = sorted(p for s in suffixes for p in path.rglob(f"*{s}") if p.is_file())
            if not inside:
                raise ValueError(f"{path} has no file that ends in {' or '.join(suffixes)}")
            if not (written := [p for p in inside if not is_blank(p)]):
                raise ValueError(f"{path} has only empty files that end in {' or '.join(suffixes)}")
            if len(written) < len(inside):
                _log.warning("%s: %d empty files are left out", path, len(inside) - len(written))
            found += written
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist; give text files, folders or {STDLIB!r}")
    return found


def stdlib_files() -> list[Path]:
    """The standard library's own modules that hold text, in sorted order; its tests and bundled packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in sorted(root.rglob("*.py")) if not _NOT_PROSE & set(p.relative_to(root).parts))
    return [p for p in files if _is_text(p)]


def stdlib_held_out() -> list[Path]:
    """Those of `stdlib_files` that tasks do not train on, about one in ten: which they are hangs on their names alone,
    so that they are held out on every machine and in every version of Python."""
    return [path for path in stdlib_files() if is_held_out(path)]


def is_held_out(path: Path) -> bool:
    """Whether a file of the standard library is one of `stdlib_held_out`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return zlib.crc32(path.relative_to(root).as_posix().encode()) % 10 == 0


def _is_text(path: Path) -> bool:
    try:
        return bool(read_text(path))
    except (ValueError, OSError):
        return False


def split_held_out(files: list[Path], held_out: int) -> tuple[list[Path], list[Path]]:
    """By file, never by line: the last `held_out` files in order are not trained on."""
    if held_out >= len(files):
        raise ValueError(f"data.held_out={held_out} leaves nothing to train on: there are {len(files)} files")
    return files[: len(files) - held_out], files[len(files) - held_out :]


# ------------------------------------------------------------------------------------------------ blocks


def token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int64]]:
    """Each text's tokens, closed by the end token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        yield np.concatenate([encode(tokenizer, text), np.asarray(end, np.int64)])


class Blocks(Dataset[dict[str, Tensor]]):
    """Texts one after another, cut into blocks of `length` tokens; what is left at the end is dropped."""

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


class CarriedOrder(Sampler[int]):
    """Which blocks a batch has, so that its rows' texts go on for `carried` batches, then others begin; shuffled anew
    each epoch. `carried` = 1 is plain shuffling. Blocks that fill no whole round are left out, others in each epoch."""

    def __init__(self, count: int, batch: int, carried: int, seed: int):
        self.batch, self.carried, self.seed, self.epoch = batch, carried, seed, 0
        self.runs = count // carried
        if self.runs < batch:
            raise ValueError(
                f"the text has {count} blocks, too few for {batch} rows that go on for {carried}; "
                "take a smaller training.batch_size, training.carried_steps or data.sequence_length"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.runs // self.batch * self.batch * self.carried

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.runs, generator=generator)[: self.runs // self.batch * self.batch]
        runs = order.view(-1, 1, self.batch) * self.carried + torch.arange(self.carried)[:, None]  # [rounds, n, B]
        return iter(runs.flatten().tolist())


class StreamedBlocks(IterableDataset[dict[str, Tensor]]):
    """The same over a Hugging Face data set that is read as it is needed; the order is the data set's own."""

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
        except Exception as error:  # the library raises many kinds; all mean that there is no next row to be had
            raise ValueError(f"the data set cannot be read on: {error}") from error

    def _texts(self) -> Iterator[str]:
        """Of the rows that have one; of the first that has none a warning is given, and `skipped` counts them."""
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
                    told = f"row {number} of the data set has no text (null): such rows are left out"
                    warnings.warn(told, stacklevel=2)


def streamed(name: str, config: str | None, split: str, data_files: list[str] | None) -> Iterable[dict[str, Any]]:
    """The rows of a Hugging Face data set, or of local files ("json", "parquet", "text" with `data_files`)."""
    from datasets import load_dataset  # two seconds, only where it is needed

    try:
        options = {"keep_default_na": False} if name == "csv" else {}  # a text "null" or "NA" is a text
        return load_dataset(name, config, split=split, data_files=data_files, streaming=True, **options)
    except Exception as error:  # the library raises many kinds; all mean that this data set is not to be had
        raise ValueError(f"data set {name!r} cannot be loaded: {error}") from error
