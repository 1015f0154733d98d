"""`Reader`: read texts of any length into a memory, in bounded space, with interruption and resumption at any point.

The cuts between pieces depend on the text alone, and the memory is saved between pieces. So a reading that was
interrupted and resumed ends in the same memory, to the last bit.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.inference.generate import answer
from titans_lm.inference.token_bits import TokenBits
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_file import NAME_LENGTH, FileIdentity, Source, check_target, file_identity
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.utils.memory_lock import MemoryLock
from titans_lm.utils.text_file import Errors, decoded, examine, is_standard_input, name_of

Mode = Literal["learning", "frozen", "reset"]
Tokens = Tensor | NDArray[np.integer[Any]] | Sequence[int]
Text = Path | str | Tokens | Iterable[str] | Iterable[Tokens]
"""A file (also a pipe or FIFO; `Path("-")` is standard input), a text, tokens `[T]`, or an iterable of texts or of
tokens, each encoded separately."""
LONGEST_PATH = 4096
"""Longer texts are not compared with names of files."""


class Progress(NamedTuple):
    """Progress of a reading after a piece."""

    source: Source
    """The record of the text being read, with the number of its tokens read so far."""
    tokens: int
    """Tokens read since the reading started or resumed."""
    rate: float
    """Tokens per second, since then."""
    left: float | None
    """Estimated seconds left for all texts; None if one is a stream, whose length is unknown."""
    surprise: float | None
    """Mean reconstruction loss since then; None without a learning memory, and with a threshold, which skips the loss
    of unwritten tokens."""


class Reader:
    """Reads texts into a memory, and keeps it in a file.

        reader = Reader(model, tokenizer, memory="book.memory")
        reader.read(Path("book.txt"))          # after Ctrl-C or kill -9 the same call resumes
        print(reader.ask("Who did it?"))       # does not change the memory

    Args:
        model: a Titans model, on any device.
        tokenizer: encodes texts; None: only tokens can be read.
        memory: a file to load, if it exists, and to save to: every `save_seconds`, at the end, and at an interruption.
            None: the memory is in `state` only.
        mode: "learning" writes to the memory. "frozen" reads without writing. "reset" resets it before each text.
        save_seconds: time between saves; at most this much work is lost if the process is killed.
        piece: tokens per forward call. Does not limit the text.
        on_tokens: called after each piece with the text's record, the piece's tokens `[T]`, and the bits `[T]` of each
            token given all before it, nan for the first of a reading. None: these bits are not computed.
        errors: "strict" refuses files that are not UTF-8; "replace" reads invalid bytes as U+FFFD.

    Raises ValueError for a memory file that is damaged or of another model, and for invalid values. Holds a lock on the
    memory file while it reads.
    """

    def __init__(
        self,
        model: TitansForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        memory: str | Path | None = None,
        mode: Mode = "learning",
        save_seconds: float = 30.0,
        piece: int = PREFILL_TOKENS,
        errors: Errors = "strict",
        on_tokens: Callable[[Source, NDArray[np.int64], NDArray[np.float64]], None] | None = None,
    ):
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is not one of: {', '.join(get_args(Mode))}")
        if errors not in get_args(Errors):
            raise ValueError(f"errors={errors!r} is not one of: {', '.join(get_args(Errors))}")
        if piece < 1 or not save_seconds >= 0:  # NaN is not
            raise ValueError(f"piece must be at least 1, and save_seconds at least 0: {piece}, {save_seconds}")
        self.model, self.tokenizer, self.mode, self.piece = model.eval(), tokenizer, mode, piece
        self.memory = None if memory is None else Path(memory)
        self.save_seconds, self.errors = save_seconds, errors
        self.on_tokens, self._bits = on_tokens, TokenBits()
        self._lock: MemoryLock | None = None
        self._found = self._on_disk()
        if self.memory is not None and self._found is None:
            check_target(self.memory)
        with torch.no_grad():
            found = TitansState.load(self.memory, model) if self.memory and self._found else model.initial_state(1)
        self.state = model.with_pending_read(found)  # of a `generate` before

    def read(self, *texts: Text) -> "Reader":
        """Read texts to their end. Raises as `reading` does."""
        for _ in self.reading(*texts):
            pass
        return self

    def reading(self, *texts: Text) -> Generator[Progress, None, None]:
        """Read texts piece by piece, yielding progress. Resumes an interrupted reading of the same texts.

        Raises ValueError for a text that is empty or unreadable, before anything is read (for a stream, at its turn);
        if another reader holds the memory file; and if the memory holds an interrupted reading of other texts
        (`abandon` drops it). A text that fails partway is abandoned."""
        with self._locked():
            if sum(isinstance(text, Path) and is_standard_input(text) for text in texts) > 1:
                raise ValueError("standard input can be read once only; give - once")
            before = self.state.sources
            plan, first = self._plan([self._source(text) for text in texts])
            self._bits = TokenBits()
            clock, saved, changed = _Clock(plan), time.monotonic(), not texts
            try:
                for i, text in enumerate(texts):
                    pieces = iter(()) if plan[i].done else self._pieces(text, plan[i])
                    while True:
                        with self._abandoning():
                            if (piece := next(pieces, None)) is None:
                                break
                            ids, share, whole = piece
                            surprise = self._read(ids, first + i, whole)
                        changed = True
                        yield clock.tick(self.state.sources[first + i], i, len(ids), share, surprise)
                        if time.monotonic() - saved >= self.save_seconds:
                            self.save()
                            saved = time.monotonic()
            finally:
                if changed:
                    self.save()
                else:
                    self.state.sources = before

    def abandon(self) -> None:
        """Drop an interrupted reading: keep what was learned, and do not resume it."""
        self.state.sources = [replace(s, abandoned=not s.done) for s in self.state.sources if s.tokens]

    def ask(self, *prompts: str, frozen: bool = False, remember: bool = False, **options: Any) -> list[str]:
        """Answer each prompt with a fork of this memory. `options` are those of `generate`.

        A fork is discarded, unless there is one prompt and `remember`: then the memory has read prompt and answer to
        the last token. `frozen`: the fork does not write. Returns `num_return_sequences` answers in a row for each
        prompt. Raises ValueError without a tokenizer, for a prompt that is empty or no text, for several answers to
        remember, and for options that have no effect on texts."""
        if not prompts:
            raise ValueError("there is no prompt to answer")
        if remember and (frozen or len(prompts) != 1):
            raise ValueError(f"one prompt can be remembered, and not frozen; got {len(prompts)}, frozen={frozen}")
        if self.tokenizer is None:
            raise ValueError("a reader without a tokenizer cannot be asked")
        odd = [type(prompt).__name__ for prompt in prompts if not isinstance(prompt, str)]
        if odd:
            raise ValueError(f"a prompt is a str, got {odd[0]}; several are ask(*prompts)")
        fork = self.state.select([0] * len(prompts))
        fork.frozen = frozen
        answers, fork = answer(self.model, self.tokenizer, fork, list(prompts), **options)
        if remember and len(answers) != 1:
            raise ValueError(f"one answer can be remembered, and num_return_sequences gave {len(answers)}")
        if remember:
            fork.columns = self.state.columns
            self.state = fork
        return answers

    def save(self) -> None:
        """Write the memory file, if there is one, atomically. Raises ValueError if another process or reader has
        written it since this one loaded it."""
        if self.memory is None:
            return
        with self._locked():
            self.state.save(self.memory, self._lock)
            self._found = self._on_disk()

    # ------------------------------------------------------------------------------------------ parts

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the memory file. Raises ValueError if it is not the one that this reader loaded or wrote."""
        if self.memory is None or self._lock is not None:
            yield
            return
        with MemoryLock(self.memory) as lock:
            if self._on_disk() not in (None, self._found):
                raise ValueError(
                    f"{self.memory} was written by another since this reader loaded it: "
                    f"make a new Reader to continue with its content"
                )
            self._lock = lock
            try:
                yield
            finally:
                self._lock = None

    def _on_disk(self) -> FileIdentity | None:
        """Identity of the memory file; None if there is none."""
        return None if self.memory is None else file_identity(self.memory)

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Abandon the reading if a text fails, so that the memory can read another. An interruption is no failure."""
        try:
            yield
        except (ValueError, TypeError, IndexError, OSError):
            self.abandon()
            raise

    def _source(self, text: Text) -> Source:
        """The record of an unread text. Raises ValueError or OSError if it cannot be read."""
        if self.tokenizer is None and isinstance(text, Path | str):
            raise ValueError("a reader without a tokenizer reads tokens, not texts")
        if isinstance(text, Path):
            file = examine(text, self.errors)
            return Source(name_of(text)[-NAME_LENGTH:], file.size, file.sha256, self.mode)
        if isinstance(text, bytes | bytearray):
            raise ValueError("a text is a str, got bytes: decode them")
        if isinstance(text, str):
            if len(text) < LONGEST_PATH and os.path.isfile(text):
                warnings.warn(
                    f"{text!r} is read as a text of {len(text)} characters, and there is a file of that name: "
                    f"pass Path({text!r}) to read the file",
                    stacklevel=2,
                )
            content = text.encode()
        elif _is_tokens(text):
            content = self._tokens(text).tobytes()
        else:
            return Source("stream", -1, "", self.mode)
        if not content:
            raise ValueError("there is nothing to read: a text is empty")
        name = "text" if isinstance(text, str) else "tokens"
        return Source(name, len(content), hashlib.sha256(content).hexdigest(), self.mode)

    def _plan(self, sources: list[Source]) -> tuple[list[Source], int]:
        """Records of the texts, with the progress of an interrupted reading, and the index of the first record."""
        records = self.state.sources
        interrupted = next((i for i, s in enumerate(records) if not (s.done or s.abandoned)), None)
        if interrupted is None:
            self.state.sources = [*records, *sources]
            return sources, len(records)
        for first in range(interrupted, -1, -1):
            old = records[first:]
            if len(old) == len(sources) and all(map(_same, old, sources)):
                return old, first
        record = records[interrupted]
        raise ValueError(
            f"this memory is in the middle of {record.name} ({record.tokens:,} tokens read, mode {record.mode}): "
            f"give the same texts again to resume, or abandon that reading (titans read --abandon, Reader.abandon)"
        )

    def _pieces(self, text: Text, source: Source) -> Iterator[tuple[NDArray[np.int64], float, Source]]:
        """Yields pieces not read yet: tokens, the fraction of the text read after them, and the record then."""
        stream, digest, tokens, units, rest = source.size < 0, hashlib.sha256(), 0, 0, source.tokens
        for content, ids in self._encoded(text, source.size):
            digest.update(content)
            for start in range(0, len(ids), self.piece):
                part = ids[start : start + self.piece]
                tokens += len(part)
                skipped = min(rest, len(part))
                rest -= skipped
                if stream and tokens == source.tokens and digest.hexdigest() != source.sha256:
                    raise ValueError(f"{source.name} is not the stream that this memory started to read")
                if skipped < len(part):
                    done = (units + len(content) * (start + len(part)) / len(ids)) / max(source.size, 1)
                    known = digest.hexdigest() if stream else source.sha256
                    yield part[skipped:], min(done, 1.0), replace(source, tokens=tokens, sha256=known)
            units += len(content)
        if tokens < source.tokens:
            raise ValueError(f"{source.name} ends before the {source.tokens:,} tokens that this memory read of it")
        nothing, found = np.zeros(0, np.int64), digest.hexdigest()
        if not stream and (units, found) != (source.size, source.sha256):
            yield nothing, 1.0, replace(source, tokens=tokens, size=units, sha256=found, abandoned=True)
            raise ValueError(f"{source.name} changed while it was read: {tokens:,} tokens of it were read before")
        yield nothing, 1.0, replace(source, tokens=tokens, done=True, sha256=found)

    def _encoded(self, text: Text, size: int) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
        """Yields content and its tokens in parts, always the same ones; of a file at most `size` bytes, if known."""
        parts: Iterable[object]
        if isinstance(text, Path):
            parts = decoded(text, errors=self.errors, limit=size if size >= 0 else None)
        else:
            parts = [text] if isinstance(text, str) or _is_tokens(text) else iter(text)
        for part in parts:
            content, piece = part if isinstance(part, tuple) and isinstance(text, Path) else (None, part)
            if not isinstance(piece, str):
                ids = self._tokens(piece)
            elif self.tokenizer is None:
                raise ValueError("a reader without a tokenizer reads tokens, not texts")
            else:
                ids = self._tokens(encode(self.tokenizer, piece))
                content = piece.encode() if content is None else content
            yield ids.tobytes() if content is None else content, ids

    def _tokens(self, ids: object) -> NDArray[np.int64]:
        """Convert to an array `[T]`. Raises ValueError for other shapes and types, and tokens outside the
        vocabulary."""
        array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
        if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"tokens must be whole numbers [T], got {array.dtype} {list(array.shape)}")
        vocabulary = self.model.config.vocab_size
        if len(array) and not (array.min() >= 0 and array.max() < vocabulary):
            at = int(np.argmax((array < 0) | (array >= vocabulary)))
            raise ValueError(f"token {array[at]} at {at} is not one of this model's, which are 0 to {vocabulary - 1}")
        return np.ascontiguousarray(array, np.int64)

    @torch.no_grad()
    def _read(self, ids: NDArray[np.int64], record: int, source: Source) -> Tensor | None:
        """Read one piece and update its record, both or neither. Returns the mean surprise."""
        state, surprise = self.state.shallow_copy(), None
        if self.mode == "reset" and not self.state.sources[record].tokens:
            sources = state.sources
            state.reset()
            state.sources = sources
            self._bits = TokenBits()
        if len(ids):
            state.frozen = self.mode == "frozen"
            tokens = torch.from_numpy(ids)[None].to(self.model.device)
            with_surprise = self.model.config.surprise_threshold is None  # else unwritten tokens need none
            logits_to_keep = 1 if self.on_tokens is None else 0
            out = self.model(
                tokens, past_key_values=state, logits_to_keep=logits_to_keep, output_surprise=with_surprise
            )
            state.frozen = False
            if out.surprise:
                surprise = torch.stack([s.loss.mean() for s in out.surprise]).mean()
        state.sources[record] = replace(source, when=datetime.now(UTC).isoformat(timespec="seconds"))
        self.state = state  # the code above did not change it
        if self.on_tokens is not None and len(ids):
            self.on_tokens(source, ids, self._bits.of(ids, out.logits[0]))
        return surprise


class _Clock:
    """Estimates rate and remaining time."""

    def __init__(self, plan: list[Source]):
        self.sizes = [0 if s.done else s.size for s in plan]
        self.begun, self.tokens, self.first, self.total, self.count = time.monotonic(), 0, 0.0, 0.0, 0
        self.started = False

    def tick(self, source: Source, i: int, tokens: int, share: float, surprise: Tensor | None) -> Progress:
        self.tokens += tokens
        if surprise is not None and tokens:
            self.total, self.count = self.total + float(surprise) * tokens, self.count + tokens
        seconds = max(time.monotonic() - self.begun, 1e-9)
        left = None
        if min(self.sizes) >= 0:
            read = sum(self.sizes[:i]) + self.sizes[i] * share
            if not self.started:  # exclude what an earlier process read
                self.first, self.started = read - self.sizes[i] * share * min(1.0, tokens / max(source.tokens, 1)), True
            left = seconds * (sum(self.sizes) - read) / max(read - self.first, 1e-9)
        return Progress(
            source, self.tokens, self.tokens / seconds, left, self.total / self.count if self.count else None
        )


# ------------------------------------------------------------------------------------------------ texts


def _same(old: Source, new: Source) -> bool:
    """Whether both records are of the same text. A stream is compared when it is read."""
    return (old.name, old.size, old.mode) == (new.name, new.size, new.mode) and (
        new.size < 0 or old.sha256 == new.sha256
    )


def _is_tokens(text: object) -> TypeGuard[Tokens]:
    """Also for an empty sequence, which is not a stream."""
    return isinstance(text, Tensor | np.ndarray) or (
        isinstance(text, Sequence) and not isinstance(text, str) and (not text or isinstance(text[0], Integral))
    )
