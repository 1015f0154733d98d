"""`Reader`, and `titans read`: texts of any length into a memory, once, in bounded space; stopped and resumed anywhere.

Where a text is cut into pieces depends on the text alone, and what is saved is the memory between two pieces. So a
reading that was interrupted, by whatever, and resumed ends in the same memory to the last bit.
"""

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.checkpoint import MODEL_HELP, load
from titans_lm.data import encode, text_pieces
from titans_lm.memory_file import NAME_LENGTH, Source
from titans_lm.model import TitansForCausalLM
from titans_lm.state import TitansState

PIECE = 4096
"""Tokens of one call: enough to keep the processor busy; memory use does not depend on the text's length."""
Mode = Literal["learning", "frozen", "reset"]
Text = Path | str | Tensor | Sequence[int] | Iterable[str] | Iterable[Sequence[int]]
"""A file; a text; tokens `[T]`; or a stream of texts or of tokens, each encoded by itself."""


class Progress(NamedTuple):
    """How far a reading is, after a piece."""

    source: Source
    """The text that is being read, and how many of its tokens were."""
    tokens: int
    """Read since the reading began or was resumed."""
    rate: float
    """Tokens a second, since then."""
    left: float | None
    """Seconds, for all texts; None where one is a stream, whose end is not known."""
    surprise: float | None
    """Mean reconstruction loss of what was read since then; None without a memory that learns, and with a threshold,
    where it is not computed for what is not written."""


class Reader:
    """Reads texts with a model, on and on, and keeps what was learned.

        reader = Reader(model, tokenizer, memory="book.memory")
        reader.read(Path("book.txt"))          # Ctrl-C, kill -9: the same again goes on where it was
        print(reader.ask("Who did it?"))       # is not remembered

    Args:
        model: a Titans model, on any device.
        tokenizer: what makes tokens of texts; None: only tokens can be read.
        memory: a file to begin with, if it exists, and to save to: every `save_seconds`, at the end, and at an
            interruption. None: what was learned is in `state` alone.
        mode: "learning" writes what is read. "frozen" reads without writing. "reset" forgets before each text.
        save_seconds: so much work is lost at most when the process is killed.
        piece: tokens of one call of the model. Not a limit of anything.

    Raises ValueError for a memory file of another model or a damaged one, and for values that make no sense.
    """

    def __init__(
        self,
        model: TitansForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        memory: str | Path | None = None,
        mode: Mode = "learning",
        save_seconds: float = 30.0,
        piece: int = PIECE,
    ):
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} is not one of: {', '.join(get_args(Mode))}")
        if piece < 1 or save_seconds < 0:
            raise ValueError(f"piece must be at least 1, and save_seconds not negative: {piece}, {save_seconds}")
        self.model, self.tokenizer, self.mode, self.piece = model.eval(), tokenizer, mode, piece
        self.memory = None if memory is None else Path(memory)
        self.save_seconds = save_seconds
        exists = self.memory is not None and self.memory.exists()
        with torch.no_grad():
            self.state = TitansState.load(self.memory, model) if exists and self.memory else model.initial_state(1)

    def read(self, *texts: Text) -> "Reader":
        """Read these to their end. Raises as `reading` does."""
        for _ in self.reading(*texts):
            pass
        return self

    def reading(self, *texts: Text) -> Iterator[Progress]:
        """Read these, piece by piece. If the memory holds a reading of the same that was interrupted, it goes on.

        Raises ValueError for a text that is empty, or cannot be read, before anything is read; and where the memory
        holds an interrupted reading of something else (`abandon` forgets that there was one).
        """
        plan, first = self._plan([_source(text, self.mode) for text in texts])
        clock, saved = _Clock(plan), time.monotonic()
        try:
            for i, text in enumerate(texts):
                if plan[i].done:
                    continue
                for ids, share, whole in self._pieces(text, plan[i]):
                    surprise = self._read(ids, first + i, whole)
                    yield clock.tick(self.state.sources[first + i], i, len(ids), share, surprise)
                    if time.monotonic() - saved >= self.save_seconds:
                        self.save()
                        saved = time.monotonic()
        finally:
            self.save()

    def abandon(self) -> None:
        """Forget that a reading was interrupted, not what was learned of it."""
        self.state.sources = [replace(s, abandoned=not s.done) for s in self.state.sources if s.tokens]

    def ask(self, *prompts: str, frozen: bool = False, remember: bool = False, **options: Any) -> list[str]:
        """What the model says after each prompt, each to a fork of this memory. `options` are those of `generate`.

        What a fork learns of its prompt is gone afterwards, unless there is one prompt and `remember`. `frozen`: it
        learns nothing of it in the first place. Raises ValueError without a tokenizer, for an empty prompt, or several
        to remember.
        """
        if not prompts:
            raise ValueError("there is no prompt to answer")
        if remember and (frozen or len(prompts) != 1):
            raise ValueError(f"one prompt can be remembered, and not frozen; got {len(prompts)}, frozen={frozen}")
        if self.tokenizer is None:
            raise ValueError("a reader without a tokenizer cannot be asked")
        fork = self.state.select([0] * len(prompts))
        fork.frozen = frozen
        answers, fork = answer(self.model, self.tokenizer, fork, list(prompts), **options)
        if remember:
            fork.columns = self.state.columns
            self.state = fork
        return answers

    def save(self) -> None:
        """Write the memory file, if there is one; whole or not at all."""
        if self.memory is not None:
            self.state.save(self.memory)

    # ------------------------------------------------------------------------------------------ parts

    def _plan(self, sources: list[Source]) -> tuple[list[Source], int]:
        """How far each is, where a reading of them was interrupted, else not begun; and where their records begin."""
        known = self.state.sources
        open_ = next((i for i, s in enumerate(known) if not (s.done or s.abandoned)), None)
        if open_ is None:
            self.state.sources = [*known, *sources]
            return sources, len(known)
        for first in range(open_, -1, -1):
            old = known[first:]
            if len(old) == len(sources) and all(map(_same, old, sources)):
                return old, first
        missing = known[open_]
        raise ValueError(
            f"this memory is in the middle of {missing.name} ({missing.tokens:,} tokens read, mode {missing.mode}): "
            f"give the same texts again to go on, or abandon that reading"
        )

    def _pieces(self, text: Text, source: Source) -> Iterator[tuple[NDArray[np.int64], float, Source]]:
        """Tokens not read before, the share of the text that is read with them, and the record then."""
        digest, tokens, units, rest = hashlib.sha256(), 0, 0, source.tokens
        for content, ids in _encoded(text, self.tokenizer):
            if source.size < 0:
                digest.update(content)
            for start in range(0, len(ids), self.piece):
                part = ids[start : start + self.piece]
                tokens += len(part)
                skipped = min(rest, len(part))
                rest -= skipped
                if source.size < 0 and tokens == source.tokens and digest.hexdigest() != source.sha256:
                    raise ValueError(f"{source.name} is not the stream that this memory began to read")
                if skipped < len(part):
                    done = (units + len(content) * (start + len(part)) / len(ids)) / max(source.size, 1)
                    yield (
                        part[skipped:],
                        min(done, 1.0),
                        replace(source, tokens=tokens, sha256=digest.hexdigest() if source.size < 0 else source.sha256),
                    )
            units += len(content)
        if tokens < source.tokens:
            raise ValueError(f"{source.name} ends before the {source.tokens:,} tokens that this memory read of it")
        yield np.zeros(0, np.int64), 1.0, replace(
            source, tokens=tokens, done=True,
            sha256=digest.hexdigest() if source.size < 0 else source.sha256,
        )  # fmt: skip

    @torch.no_grad()
    def _read(self, ids: NDArray[np.int64], record: int, source: Source) -> Tensor | None:
        """One piece, and its record, together or not at all. -> the mean surprise"""
        state, surprise = self.state.shared(), None
        if self.mode == "reset" and not self.state.sources[record].tokens:
            sources = state.sources
            state.reset()
            state.sources = sources
        if len(ids):
            state.frozen = self.mode == "frozen"
            tokens = torch.from_numpy(ids)[None].to(self.model.device)
            told = self.model.config.surprise_threshold is None  # else what is not written need not be computed
            out = self.model(tokens, past_key_values=state, logits_to_keep=1, output_surprise=told)
            state.frozen = False
            if out.surprise:
                surprise = torch.stack([s.loss.mean() for s in out.surprise]).mean()
        state.sources[record] = replace(source, when=datetime.now(UTC).isoformat(timespec="seconds"))
        self.state = state  # nothing above changed it
        return surprise


class _Clock:
    """Rate and what is left."""

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
            if not self.started:  # what an earlier process read is not this one's work
                self.first, self.started = read - self.sizes[i] * share * min(1.0, tokens / max(source.tokens, 1)), True
            left = seconds * (sum(self.sizes) - read) / max(read - self.first, 1e-9)
        return Progress(
            source, self.tokens, self.tokens / seconds, left, self.total / self.count if self.count else None
        )


# ------------------------------------------------------------------------------------------------ reading and going on


@torch.no_grad()
def read(model: TitansForCausalLM, ids: Tensor, state: TitansState, piece: int = PIECE) -> Iterator[tuple[Tensor, Any]]:
    """Read ids `[B, T]` on from `state`, which is updated, `piece` tokens a call; yields (ids, output) of each call.

    Outputs have all logits and the surprise of each layer.
    """
    for part in ids.split(piece, 1):
        yield part, model(part, past_key_values=state, output_surprise=True)


def go_on(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, prompt: Tensor, **options: Any
) -> Tensor:
    """Generate after `prompt` `[1, T]`, T >= 1, which the state has not read; returns prompt and continuation.

    `options` are those of transformers' `generate`. The state itself is left as it is.
    """
    return model.generate(prompt, past_key_values=state.continuation(), pad_token_id=tokenizer.pad_token_id, **options)


def answer(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, prompts: list[str], **options: Any
) -> tuple[list[str], TitansState]:
    """What the model says after each prompt, row by row of `state` (as many as prompts), which reads them.

    `options` are those of transformers' `generate`; greedy unless they say otherwise. -> the texts, and the memory
    after prompts and answers (its frozen rows as they were). Raises ValueError for a prompt without tokens.
    """
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    if not all(len(row) for row in ids):
        raise ValueError("a prompt is empty: give at least one character to go on from")
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    padded = torch.stack(
        [torch.cat([torch.zeros(width - len(row), dtype=torch.long), torch.as_tensor(row)]) for row in ids]
    )
    state = state.continuation()
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer
    out = model.generate(
        padded.to(model.device), attention_mask=mask.to(model.device), past_key_values=state,
        pad_token_id=tokenizer.pad_token_id, **{"do_sample": False, **options},
    )  # fmt: skip
    with torch.no_grad():
        model.read_pending(state)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), state


# ------------------------------------------------------------------------------------------------ texts


def _same(old: Source, new: Source) -> bool:
    """Whether the record `old` is of the text `new`. A stream is compared when it is read."""
    return (old.name, old.size, old.mode) == (new.name, new.size, new.mode) and (
        new.size < 0 or old.sha256 == new.sha256
    )


def _source(text: Text, mode: Mode) -> Source:
    """The record of a text before it is read; raises ValueError or OSError for one that cannot be."""
    if isinstance(text, Path):
        next(text_pieces(text))  # as a text
        with text.open("rb") as file:
            return Source(
                text.name[-NAME_LENGTH:], text.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest(), mode
            )
    content = text.encode() if isinstance(text, str) else _tokens(text).tobytes() if _is_tokens(text) else None
    if content is None:
        return Source("stream", -1, "", mode)
    if not content:
        raise ValueError("there is nothing to read: a text is empty")
    name = "text" if isinstance(text, str) else "tokens"
    return Source(name, len(content), hashlib.sha256(content).hexdigest(), mode)


def _is_tokens(text: object) -> TypeGuard[Tensor | Sequence[int]]:
    """Nothing at all is no stream either."""
    return isinstance(text, Tensor) or (
        isinstance(text, Sequence) and not isinstance(text, str) and (not text or isinstance(text[0], int))
    )


def _encoded(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[bytes, NDArray[np.int64]]]:
    """Content and its tokens, bit by bit, the same bits each time."""
    if isinstance(text, Path):
        parts: Iterable[object] = text_pieces(text)
    elif isinstance(text, str) or _is_tokens(text):
        parts = [text]
    else:
        parts = iter(text)
    for part in parts:
        if not isinstance(part, str):
            ids = _tokens(part)  # type: ignore[arg-type]
            yield ids.tobytes(), ids
        elif tokenizer is None:
            raise ValueError("a reader without a tokenizer reads tokens, not texts")
        else:
            yield part.encode(), encode(tokenizer, part)


def _tokens(ids: Tensor | Sequence[int]) -> NDArray[np.int64]:
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens must be whole numbers [T], got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, np.int64)


# ------------------------------------------------------------------------------------------------ titans read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", type=Path, nargs="+", metavar="FILE", help="text files, read in this order")
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, required=True, help="the file to go on from, if it exists, and to write")
    parser.add_argument("--mode", choices=get_args(Mode), default="learning", help="reset: forget before each text")
    parser.add_argument("--save-seconds", type=float, default=30.0, help="at most so much is lost at a kill")
    parser.add_argument("--abandon", action="store_true", help="do not go on with what was interrupted")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.memory.absolute().parent.is_dir():
        raise ValueError(f"--memory {arguments.memory}: its folder does not exist")
    console = Console(stderr=True)
    model, tokenizer = load(arguments.model)
    reader = Reader(model, tokenizer, memory=arguments.memory, mode=arguments.mode, save_seconds=arguments.save_seconds)
    if arguments.abandon:
        reader.abandon()
    show(reader, arguments.texts, console)
    state = reader.state
    console.print(f"{int(state.position[0]):,} tokens read; {arguments.memory} holds {state.nbytes / 2**20:.1f} MiB")


def show(reader: Reader, texts: list[Path], console: Console) -> None:
    """Read, with rate, surprise and time left."""
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[told]}"),
               TimeElapsedColumn()]  # fmt: skip
    total = sum(text.stat().st_size for text in texts)
    with Bars(*columns, console=console) as bars:
        bar = bars.add_task("reading", total=total, told="")
        for progress in reader.reading(*texts):
            left = progress.left or 0.0
            spent = time.monotonic() - (bars.tasks[0].start_time or 0)
            told = f"{progress.tokens:,} tokens, {progress.rate:,.0f} a second, {left:,.0f} s left"
            if progress.surprise is not None:
                told += f", surprise {progress.surprise:.3f}"
            done = total * spent / max(spent + left, 1e-9)
            bars.update(bar, description=progress.source.name, completed=done, told=told)
