"""A needle in a haystack: a sentence with a key and a value in a long text, which ends with a question for the value.

The three kinds are RULER's `niah_single_1`, `niah_single_2` and `niah_single_3` (arXiv:2404.06654; its repository for
the words of the prompt, the 40 depths and the 128 tokens that are kept for the answer), over any text and tokenizer.
Differences: a row has exactly `length` tokens and a part of the text of its own; RULER's rows have at most `length`
tokens, from the beginning of the same essays. Keys are made of other words.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from titans_lm.tasks import IGNORED, Batch, at_least
from titans_lm.tasks.haystack import PROSE, Encoder, Haystack, Window, encoder, make_haystack
from titans_lm.tasks.words import ADJECTIVES, NOUNS
from titans_lm.utils.corpora import STDLIB

Tokens = NDArray[np.int64]
Kind = Literal["passkey", "number", "uuid"]
Hay = Literal["noise", "words", "text"]
Style = Literal["ruler", "short"]
HAY: dict[str, str] = {"passkey": "noise", "number": "text", "uuid": "text"}
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
"""In percent; RULER's, for text."""
RULER_ANSWER = 128
_UUID = 36
_MOST_DIGITS = 18
_TRIES = 100


class Form(NamedTuple):
    """Templates of a prompt. Text between bars is encoded separately, so that key and value are the same tokens
    everywhere. `lead` is the space or the line break before a sentence."""

    intro: str
    needle: str
    question: str
    value: str


FORMS = {
    "ruler": Form(
        "A special magic {one} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {one} afterwards.",
        "{lead}One of the special magic {one}s for| {key}| is:|{value}|.",
        "\nWhat is the special magic {one} for| {key}| mentioned in the provided text? "
        "The special magic {one} for| {key}| mentioned in the provided text is",
        " {value}",
    ),
    "short": Form("", "{lead}{key}|=|{value}|.", "{lead}{key}|=", "{value}"),
}


class Examples(NamedTuple):
    """Prompts that end where the answer begins, and the right answers."""

    prompts: Tokens  # [B, T - kept]
    values: list[str]


@dataclass(frozen=True)
class Needle:
    """Rows of exactly `length` tokens: an introduction (ruler), haystack with the needle, filling, question, value.

    The needle occurs once, and the value nowhere else. The haystack begins at a sentence and ends at a word; line
    breaks fill the rest. Of its n sentences (noise: lines; words: words), the last of which may be cut, floor(n * depth
    / 100) come before the needle. Other needles do not count.

    Raises ValueError for a length too short for needle, question and answer, naming the minimum.
    """

    length: int = 1024
    """Tokens of a row, question and answer included."""
    kind: Kind = "passkey"
    """A number in noise, a number in text, a uuid in text: S-NIAH-1, 2, 3."""
    haystack: Hay | None = None
    """One line repeated, random words, or text from `files`. None: the default of the kind."""
    files: Sequence[str] = (PROSE, STDLIB)
    """Text files, folders, "prose" (made by a grammar), "python-stdlib" (its docstrings), "python-code" (its code),
    "numbers" (docstrings with many numbers)."""
    digits: int = 7
    depth: int | float | None = None
    """Depth of the needle in percent; 0 is the beginning. None: drawn from RULER's 40 depths in text, uniform over
    words or lines otherwise."""
    style: Style = "ruler"
    """RULER's sentences, or `key=value.` and `key=` only, for short rows."""
    tokenizer: str = "bytes"
    """ "bytes", or the name or folder of any Hugging Face tokenizer."""
    everywhere: bool = False
    """Label every token of a batch, as in language modelling; else the value's tokens only."""
    answer: int | None = None
    """Tokens of a row reserved for the model's answer (`examples`). None: RULER's 128, or with style short as many as
    the value has characters, which is enough for any tokenizer."""
    keys: int = 1
    """Needles, each with a key and a value of its own. The question is for one; the others' places are drawn as without
    `depth`, and those at one place are in any order. Above 1 it is RULER's first multi-key task."""

    def __post_init__(self) -> None:
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files)
        object.__setattr__(self, "files", files)
        self._check_values()
        if self.depth is not None:
            object.__setattr__(self, "depth", float(self.depth))
        self._check_length(self._value_length)
        self._haystack(0)  # raises for a file that cannot be read

    def _check_values(self) -> None:
        for name, choices in (
            ("kind", get_args(Kind)),
            ("haystack", (None, *get_args(Hay))),
            ("style", get_args(Style)),
        ):
            if getattr(self, name) not in choices:
                names = ", ".join(word for word in choices if word)
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of: {names}")
        at_least(1, length=self.length, digits=self.digits, keys=self.keys)
        at_least(1, answer=self.kept)
        if self.digits > _MOST_DIGITS:
            raise ValueError(f"digits must be at most {_MOST_DIGITS}, got {self.digits}")
        values = 2**122 if self.kind == "uuid" else 9 * 10 ** (self.digits - 1)
        if self.keys > (most := min(len(ADJECTIVES) * len(NOUNS), values)):
            raise ValueError(f"keys must be at most {most}, so that keys and values differ, got {self.keys}")
        number = isinstance(self.depth, int | float) and not isinstance(self.depth, bool)
        if self.depth is not None and not (number and 0 <= self.depth <= 100):
            raise ValueError(f"depth must be from 0 to 100 percent, got {self.depth!r}")
        if not isinstance(self.everywhere, bool):
            raise ValueError(f"everywhere must be true or false, got {self.everywhere!r}")
        if not all(isinstance(text, str) for text in (self.tokenizer, *self.files)):
            raise ValueError(f"tokenizer and files must be texts, got {self.tokenizer!r} and {self.files!r}")
        if self._hay == "text" and not self.files:
            raise ValueError("files: a haystack of text needs at least one")

    # ------------------------------------------------------------------------------------------ examples

    @property
    def vocab_size(self) -> int:
        return len(self._encoder.tokenizer)

    @property
    def kept(self) -> int:
        """Tokens of a row that `examples` reserves for the answer."""
        if self.answer is not None:
            return self.answer
        return RULER_ANSWER if self.style == "ruler" else self._value_length

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        """A batch whose labels are the value's tokens only, unless `everywhere`."""
        ids = np.empty((rows, self.length), np.int64)
        labels = np.full_like(ids, IGNORED)
        for i in range(rows):
            prompt, value, _ = self._row(rng, None)
            ids[i] = np.concatenate([prompt, value])
            labels[i, len(prompt) :] = value
        return Batch(ids, ids.copy() if self.everywhere else labels)

    def examples(self, rng: np.random.Generator, rows: int) -> Examples:
        """Prompts of `length - kept` tokens. Rows are drawn one after another, so that the batch size changes nothing.
        Raises ValueError as `check_examples` does."""
        self.check_examples()
        drawn = [self._row(rng, self.kept) for _ in range(rows)]
        return Examples(np.stack([prompt for prompt, _, _ in drawn]), [value for _, _, value in drawn])

    def decode(self, ids: Tokens) -> str:
        """The text of ids `[T]`, without special tokens."""
        return self._encoder.decode(ids)

    def check_examples(self) -> None:
        """Raises ValueError for a length too short for the tokens reserved for the answer."""
        self._check_length(self.kept)

    # ------------------------------------------------------------------------------------------ parts

    @property
    def _hay(self) -> str:
        return self.haystack or HAY[self.kind]

    @property
    def _encoder(self) -> Encoder:
        return encoder(self.tokenizer)

    @property
    def _value_length(self) -> int:
        """Characters of the value, with the space before it. No tokenizer needs more tokens."""
        return (_UUID if self.kind == "uuid" else self.digits) + len(FORMS[self.style].value.format(value=""))

    def _haystack(self, room: int) -> Haystack:
        return make_haystack(self._hay, tuple(self.files), self.tokenizer, room)

    def _check_length(self, answer: int) -> None:
        whole, needle = _least(self.kind, self.style, self._hay, self.tokenizer)
        least = whole + self._value_length + answer + (self.keys - 1) * (needle + self._value_length)
        if self.length < least:
            raise ValueError(
                f"length={self.length} is too short for needle, question and {answer} tokens of answer; "
                f"it must be at least {least}"
            )

    def _row(self, rng: np.random.Generator, kept: int | None) -> tuple[Tokens, Tokens, str]:
        """-> a prompt that leaves `kept` tokens (None: as many as the value has), the value's tokens, the value"""
        for _ in range(_TRIES):
            key, value = _key(rng), self._value(rng)
            value_ids = self._encoder.fresh(FORMS[self.style].value.format(value=value))
            parts = Prompt(self.kind, self.style, self._hay, self._encoder, key, value_ids)
            others = self._others(rng, key, value, parts)
            length = self.length - (len(value_ids) if kept is None else kept)
            room = length - parts.least - sum(other.needle_length for other in others)
            window = self._haystack(room).window(rng, room, self._encoder)
            if value not in window.text:
                last = len(window.borders) - 1
                needles = [(self._place(rng, last, self.depth), parts)]
                needles += [(self._place(rng, last, None), other) for other in others]
                needles = [needles[i] for i in rng.permutation(len(needles))] if others else needles
                return parts.around(window, needles, length), value_ids, value
        raise ValueError(f"digits={self.digits} is too few: the haystack has nearly every such number")

    def _others(self, rng: np.random.Generator, key: str, value: str, parts: "Prompt") -> list["Prompt"]:
        """Needles of other keys and values."""
        keys, values = {key}, {value}
        others: list[Prompt] = []
        while len(others) + 1 < self.keys:
            key, value = _key(rng), self._value(rng)
            if key not in keys and value not in values:
                keys.add(key)
                values.add(value)
                ids = self._encoder.fresh(FORMS[self.style].value.format(value=value))
                others.append(parts._replace(key=key, value=ids))
        return others

    def _value(self, rng: np.random.Generator) -> str:
        if self.kind == "uuid":
            return str(uuid.UUID(bytes=rng.bytes(16), version=4))
        return str(rng.integers(10 ** (self.digits - 1), 10**self.digits))

    def _place(self, rng: np.random.Generator, count: int, depth: float | None) -> int:
        """How many of `count` sentences come before a needle at `depth`; None: drawn."""
        if depth is not None:
            return int(count * depth / 100)
        if self._hay == "text":
            return int(count * rng.choice(DEPTHS) / 100)
        return int(rng.integers(max(1, count + (self._hay == "words"))))


def _key(rng: np.random.Generator) -> str:
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


@lru_cache(maxsize=64)
def _least(kind: str, style: str, hay: str, tokenizer: str) -> tuple[int, int]:
    """Tokens of a prompt without its haystack and its value, and of a needle without its value, whatever the key."""
    encode, none = encoder(tokenizer), np.zeros(0, np.int64)
    keys = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    leads = [encode.each([f"{lead}{key}" for key in keys]) for lead in " \n"]
    kinds = {(len(one), len(other)): key for one, other, key in zip(*leads, keys, strict=True)}  # all else is the same
    prompts = [Prompt(kind, style, hay, encode, key, none) for key in kinds.values()]
    return max(prompt.least for prompt in prompts), max(prompt.needle_length for prompt in prompts)


class Prompt(NamedTuple):
    """The parts of a prompt around the haystack, as tokens."""

    kind: str
    style: str
    hay: str
    encode: Encoder
    key: str
    value: Tokens

    @property
    def least(self) -> int:
        """Tokens without haystack."""
        return len(self.intro) + self.needle_length + len(self.question)

    @property
    def needle_length(self) -> int:
        """Tokens of the needle, wherever it is."""
        return max(len(self.needle(first)) for first in (False, True))

    @property
    def intro(self) -> Tokens:
        return self._tokens(FORMS[self.style].intro)

    @property
    def question(self) -> Tokens:
        return self._tokens(FORMS[self.style].question)

    def needle(self, first: bool) -> Tokens:
        """`first`: after the introduction, and so a line break."""
        return self._tokens(FORMS[self.style].needle, "\n" if first and len(self.intro) else None)

    def around(self, window: Window, needles: Sequence[tuple[int, "Prompt"]], length: int) -> Tokens:
        """The window with needles, each after a number of its sentences, as many gaps as `length` needs, question."""
        needles = sorted(needles, key=lambda needle: needle[0])
        parts, start = [self.intro], 0
        if needles[0][0] and len(self.intro):
            parts, start = [self.intro, self.encode("\n" + window.head.lstrip())], window.first
        for i, (place, prompt) in enumerate(needles):
            end = window.borders[place]
            parts += [window.ids[start:end], prompt.needle(first=not i and not place)]
            start = end
        context, question = np.concatenate([*parts, window.ids[start:]]), self.question
        return np.concatenate([context, np.full(length - len(context) - len(question), self.encode.gap), question])

    def _tokens(self, text: str, lead: str | None = None) -> Tokens:
        words = {"lead": lead or ("\n" if self.hay == "noise" else " "), "key": self.key}
        words["one"] = "uuid" if self.kind == "uuid" else "number"
        parts = text.split("|")
        return np.concatenate(
            [self.value if part == "{value}" else self.encode(part.format(**words)) for part in parts]
        )
