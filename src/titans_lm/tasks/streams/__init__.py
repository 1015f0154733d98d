"""Streams of bytes that become predictable only by reading them: each follows rules that no other stream has.

A stream has one source, or switches between several. It may be longer than a row: truncated BPTT then reads it over
many batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from titans_lm.models.tokenizer import load_tokenizer
from titans_lm.tasks import Batch, Task, at_least, make_task
from titans_lm.tasks.streams import chains, disguises, languages, logs, tables
from titans_lm.tasks.streams.parts import Part, Source, SourceInputs
from titans_lm.tasks.streams.texts import Bytes, Files, Texts, load_texts
from titans_lm.utils.corpora import STDLIB

SOURCES: dict[str, Source] = {
    "text": disguises.text,
    "cipher": disguises.cipher,
    "alphabets": disguises.alphabets,
    "language": languages.language,
    "logs": logs.logs,
    "tables": tables.tables,
    "markov": chains.markov,
    "automata": chains.automata,
    "letters": chains.letters,
    "noise": chains.noise,
    "repeat": disguises.repeat,
}
WEIGHTS = {
    "text": 4.0, "cipher": 2.0, "alphabets": 1.0, "language": 1.0, "logs": 4.0, "tables": 1.0, "markov": 1.0,
    "automata": 0.5, "letters": 0.7, "noise": 0.3, "repeat": 2.0,
}  # fmt: skip
"""The default weights of the sources."""
RETURN = 1 / 3
"""Probability that a switch returns to an earlier source of the stream."""


@dataclass(frozen=True)
class Streams:
    """Each row of a batch is the beginning of a stream. Labels are the tokens.

    Raises ValueError for an unknown source and for files that cannot be read.
    """

    length: int = 1024
    """Tokens of a row."""
    sources: Any = None
    """Name -> weight; or one name, or a list of names with equal weights. None: `WEIGHTS`."""
    files: Any = (STDLIB,)
    """Sources of text: text files, folders, archives (.tar.xz and the like), "python-stdlib". A list, or path ->
    weight. Within one, passages are drawn uniformly by bytes."""
    suffixes: Any = (".txt", ".md", ".py")
    """File name endings that are read from a folder or an archive."""
    held_out: int = 0
    """Number of files of each folder and archive, the last by name, that are not read. Of the standard library a fixed
    share is never read (`utils.corpora.stdlib_held_out`)."""
    tasks: Any = ()
    """Other tasks as further sources, each one example after another: their options with a `weight` relative to those
    of the sources, such as {name: needle, length: 4096, weight: 1}. Their tokens must be bytes."""
    switch: int = 0
    """Mean number of bytes after which a stream switches to another source or back to an earlier one. 0: never."""

    def __post_init__(self) -> None:
        at_least(1, length=self.length)
        at_least(0, held_out=self.held_out, switch=self.switch)
        suffixes = (self.suffixes,) if isinstance(self.suffixes, str) else self.suffixes
        if not (isinstance(suffixes, Sequence) and suffixes and all(map(_is_text, suffixes))):
            raise ValueError(f"suffixes must be texts such as .txt, got {self.suffixes!r}")
        object.__setattr__(self, "suffixes", tuple(suffixes))
        object.__setattr__(self, "sources", _weights("sources", WEIGHTS if self.sources is None else self.sources))
        for name in self.sources:
            if name not in SOURCES:
                raise ValueError(f"sources: {name!r} is not one of: {', '.join(SOURCES)}")
        object.__setattr__(self, "files", _weights("files", self.files))
        _ = self._tasks
        self._texts()  # raises for a file that cannot be read

    @property
    def tokenizer(self) -> str:
        return "bytes"

    @property
    def vocab_size(self) -> int:
        """The 256 bytes and the tokenizer's special tokens."""
        return len(load_tokenizer(self.tokenizer))

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        ids = np.stack([self.stream(rng, self.length) for _ in range(rows)]).astype(np.int64)
        return Batch(ids, ids)

    def stream(self, rng: np.random.Generator, length: int) -> Bytes:
        """The bytes of one stream, `[length]`."""
        parts: list[Part] = []
        pieces, left = [], length
        while left:
            part = self._next(rng, parts, length)
            span = min(left, 1 + int(rng.exponential(self.switch))) if self.switch else left
            pieces.append(part.take(span))
            left -= span
        return np.concatenate(pieces)

    def _next(self, rng: np.random.Generator, parts: list[Part], length: int) -> Part:
        """A new part, or an earlier one that continues. `parts` are those so far; the last one is running."""
        if len(parts) > 1 and rng.random() < RETURN:
            parts.append(parts.pop(int(rng.integers(len(parts) - 1))))
        else:
            parts.append(self._begin(rng, self._shares, length))
        return parts[-1]

    def _begin(self, rng: np.random.Generator, shares: Mapping[str, float], length: int) -> Part:
        at = np.searchsorted(np.array(list(shares.values())), rng.random(), "right")
        name = list(shares)[int(at)]
        (own,) = rng.spawn(1)
        inputs = SourceInputs(own, self._texts, length, lambda rng: self._begin(rng, self._others, length))
        task = self._tasks.get(name)
        return Part(name, SOURCES[name](inputs) if task is None else _examples(task[0], own))

    @cached_property
    def _shares(self) -> dict[str, float]:
        return _cumulative(self._all)

    @property
    def _all(self) -> dict[str, float]:
        """Sources and tasks, and their weights."""
        return {**self.sources, **{name: weight for name, (_, weight) in self._tasks.items()}}

    @cached_property
    def _tasks(self) -> dict[str, tuple[Task, float]]:
        """ "tasks[0]" and so on -> the task, its weight."""
        if isinstance(self.tasks, str | Mapping) or not all(isinstance(options, Mapping) for options in self.tasks):
            raise ValueError(f"tasks must be a list such as [{{name: needle, weight: 1}}], got {self.tasks!r}")
        made = {}
        for i, options in enumerate(self.tasks):
            name = f"tasks[{i}]"
            weights = _weights("tasks", {name: options.get("weight", 1.0)})
            task = make_task({key: value for key, value in options.items() if key != "weight"})
            if getattr(task, "tokenizer", None) != self.tokenizer:
                raise ValueError(f"tasks: {options['name']} has tokens that are not bytes")
            made[name] = task, weights[name]
        return made

    @cached_property
    def _others(self) -> dict[str, float]:
        """Of what repeats: the other sources of the streams, or, where there are none, all others."""
        others = {name: weight for name, weight in self._all.items() if name != "repeat"}
        return _cumulative(others or {name: weight for name, weight in WEIGHTS.items() if name != "repeat"})

    def _texts(self) -> Texts:
        files = tuple(Files(path, weight) for path, weight in self.files.items())
        return load_texts(files, self.suffixes, self.held_out)


def _examples(task: Task, rng: np.random.Generator) -> Iterator[Bytes]:
    while True:
        yield task.batch(rng, 1).input_ids[0].astype(np.uint8)


def _weights(name: str, weights: Any) -> dict[str, float]:
    """Parse one name, a list, or name -> weight. Drops names of weight 0."""
    weights = [weights] if isinstance(weights, str) else weights
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(weights, 1.0) if isinstance(weights, Sequence) and all(map(_is_text, weights)) else {}
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{name}: the weight of {key} must be a number of at least 0, got {weight!r}")
    kept = {str(key): float(weight) for key, weight in weights.items() if weight}
    if not kept:
        raise ValueError(f"{name} must be a name, a list of names, or names with weights above 0")
    return kept


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _cumulative(weights: Mapping[str, float]) -> dict[str, float]:
    shares = np.cumsum(list(weights.values())) / sum(weights.values())
    return dict(zip(weights, shares.tolist(), strict=True))
