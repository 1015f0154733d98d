"""Haystacks: long texts as tokens, with the positions at which words and sentences begin.

Texts, and what is inserted into them, are encoded word by word, each with the space or line break before it. So the
tokens of the parts are the tokens of the whole, even if the tokenizer would merge across parts.
"""

import math
import random
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titans_lm.models.tokenizer import is_bytes, load_tokenizer
from titans_lm.tasks.words import ADJECTIVES, NOUNS, PEOPLE, VERBS, prose
from titans_lm.utils.corpora import STDLIB, is_held_out, stdlib_files, text_files
from titans_lm.utils.deprecation import renamed
from titans_lm.utils.text_file import read_text

__getattr__ = renamed(__name__, {"haystack": "make_haystack"})
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The line that RULER's first needle task repeats (arXiv:2404.06654)."""
PROSE = "prose"
"""In place of a path: sentences made by a small grammar."""
CODE = "python-code"
"""In place of a path: the lines of some modules of the standard library, none of them held out. 2.2 % of it are digits,
0.9 % of docstrings, nothing of prose (Python 3.11): a memory has to tell them from the number that is asked for."""
NUMBERS = "numbers"
"""In place of a path: prose and docstrings of the standard library, with a number after one word in eight. 7 % of it
are digits, about as many in 1,024 bytes as in 16,384 of docstrings: a memory has to learn to pass over them."""
SUFFIXES = (".txt", ".md")
"""File name endings that are read from a folder."""
_SENTENCES, _WORDS = 1 << 14, 1 << 17
"""Number of sentences of prose and of random words; longer texts repeat them."""
_NUMBERS = ("{}", "{}", "{}", "({})", "{}.", "={}", "{}=", "x={},")
"""How a number stands among words; none as a needle's value does."""
_LONG = 400
"""Letters. A longer text without a full stop, such as a log, is split into sentences at line ends."""
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]\u201d\u2019]))\s+|\n\s*\n""")
_DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
_SAMPLE = ("\nOne of the special magic uuids for", " brave-otter", " is:", " 1f0e-43a7", ".", "\nWhat is")


class Encoder:
    """Encodes parts of texts separately, in any order.

    Raises ValueError for a tokenizer that does not decode to the same text, or has no single token for a gap.
    """

    def __init__(self, name: str):
        self.tokenizer = load_tokenizer(name)
        self._bytes, self._anchor, self._known = is_bytes(self.tokenizer), "", dict[str, NDArray[np.int64]]()
        if self.decode(np.tile(self.fresh("x"), 2)) != "xx":
            self._anchor = "\n"  # prepended, because some tokenizers encode the start of a text differently
        if self.decode(np.concatenate([self.fresh(part) for part in _SAMPLE])).strip() != "".join(_SAMPLE).strip():
            raise ValueError(f"tokenizer {name!r} does not give back the text it is given; no answer could be found")
        gaps = [ids for ids in map(self.fresh, ("\n", " ", ".")) if len(ids) == 1]
        if not gaps:
            raise ValueError(f"tokenizer {name!r} has no single token for a line break, a space or a full stop")
        self.gap = int(gaps[0][0])
        """A token without meaning that fills gaps."""

    def __call__(self, part: str) -> NDArray[np.int64]:
        """Tokens `[T]`, cached."""
        if part not in self._known:
            self._known[part] = self.fresh(part)
        return self._known[part]

    def fresh(self, part: str) -> NDArray[np.int64]:
        """Tokens `[T]`, not cached."""
        return self._encode([part])[0]

    def each(self, parts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of many parts, encoded in one call, which is faster. Cached."""
        new = sorted(set(parts) - self._known.keys())
        self._known.update(zip(new, self._encode(new), strict=True))
        return [self._known[part] for part in parts]

    def decode(self, ids: NDArray[np.int64]) -> str:
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, parts: list[str]) -> list[NDArray[np.int64]]:
        if self._bytes:
            return [np.frombuffer(part.encode(), np.uint8).astype(np.int64) for part in parts]
        rows = self.tokenizer([self._anchor, *(self._anchor + part for part in parts)], add_special_tokens=False)
        first, *rest = rows["input_ids"]
        if any(ids[: len(first)] != first for ids in rest):
            raise ValueError(f"tokenizer {self.tokenizer.name_or_path!r} joins what follows to a line break")
        return [np.asarray(ids[len(first) :], np.int64) for ids in rest]


class Window(NamedTuple):
    """A part of a haystack that begins with a sentence and ends where a word does."""

    text: str
    ids: NDArray[np.int64]  # [T]
    first: int
    """Tokens of its first word."""
    head: str
    """That word, with the space or line break before it."""
    borders: NDArray[np.int64]  # [n + 1]
    """Of n sentences, the tokens before each, and T."""


class Haystack(NamedTuple):
    """A text of N tokens, W words, S sentences."""

    text: str
    ids: NDArray[np.int64]  # [N]
    words: NDArray[np.int64]  # [W + 1], the token at which each begins, and N
    letters: NDArray[np.int64]  # [W + 1], the same in letters
    sentences: NDArray[np.int64]  # [S + 1], the word at which each begins, and W

    def repeated(self, times: int) -> "Haystack":
        """The text repeated `times` times."""

        def along(starts: NDArray[np.int64]) -> NDArray[np.int64]:
            each = starts[:-1] + starts[-1] * np.arange(times)[:, None]
            return np.append(each.ravel(), starts[-1] * times)

        starts = map(along, (self.words, self.letters, self.sentences))
        return Haystack(self.text * times, np.tile(self.ids, times), *starts)

    def window(self, rng: np.random.Generator, room: int, encode: Encoder) -> Window:
        """From a sentence drawn uniformly, as many words as fit in `room` tokens, also if a line break replaces the
        space before the first. Needs at least `room` tokens."""
        starts = self.words[self.sentences[:-1]]
        sentence = int(rng.integers(np.searchsorted(starts, len(self.ids) - room, "right")))
        word = int(self.sentences[sentence])
        head, first = self._text(word, word + 1), int(self.words[word + 1] - self.words[word])
        room -= max(0, len(encode("\n" + head.lstrip())) - first)
        end = max(word, int(np.searchsorted(self.words, self.words[word] + room, "right")) - 1)
        last = np.searchsorted(self.sentences, end)
        borders = self.words[np.append(self.sentences[sentence:last], end)]
        ids = self.ids[borders[0] : borders[-1]]
        return Window(self._text(word, end), ids, first, head, borders - borders[0])

    def _text(self, word: int, end: int) -> str:
        return self.text[self.letters[word] : self.letters[end]]


@lru_cache(maxsize=8)
def encoder(tokenizer: str) -> Encoder:
    """The encoder of a tokenizer, cached. Raises ValueError as `Encoder` and `models.tokenizer.load_tokenizer` do."""
    return Encoder(tokenizer)


def make_haystack(kind: str, files: tuple[str, ...], tokenizer: str, room: int) -> Haystack:
    """Build a haystack of a kind: "noise" (`NOISE`, line after line), "words" (random ones, a sentence each) or "text"
    (`files`). It has enough tokens for windows of `room` tokens to begin at many places.

    `files` are text files, folders, `PROSE`, `CODE`, or `STDLIB`, whose docstrings are read. Raises ValueError for a
    path that does not exist, is empty or is not text.
    """
    once = _repeated(kind, files, tokenizer, 1)
    doublings = max(0, math.ceil(math.log2(max(1, 2 * room) / len(once.ids))))  # few sizes, so that the cache is small
    return _repeated(kind, files, tokenizer, 2**doublings)


@lru_cache(maxsize=16)
def _repeated(kind: str, files: tuple[str, ...], tokenizer: str, times: int) -> Haystack:
    if times > 1:
        return _repeated(kind, files, tokenizer, 1).repeated(times)
    if kind == "noise":
        sentences = [[("" if i else "\n") + word for i, word in enumerate(re.findall(r" ?\S+", NOISE))]]
    elif kind == "words":
        vocabulary = [f" {word}" for word in (*ADJECTIVES, *NOUNS, *VERBS, *PEOPLE)]
        sentences = [[vocabulary[i]] for i in np.random.default_rng(0).integers(len(vocabulary), size=_WORDS)]
    else:
        sentences = [[f" {word}" for word in sentence.split()] for file in files for sentence in _sentences(file)]
    return _haystack(sentences, encoder(tokenizer))


def _haystack(sentences: Sequence[Sequence[str]], encode: Encoder) -> Haystack:
    words = [word for sentence in sentences for word in sentence]
    tokens = encode.each(words)
    return Haystack(
        "".join(words), np.concatenate(tokens), *(_starts(map(len, parts)) for parts in (tokens, words, sentences))
    )


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths])


def _sentences(source: str) -> list[str]:
    if source == PROSE:
        return prose(_SENTENCES)
    if source == NUMBERS:
        return _with_numbers([*prose(_SENTENCES // 2), *_sentences(STDLIB)])
    if source == CODE:
        files = [file for file in stdlib_files() if not is_held_out(file) and zlib.crc32(file.name.encode()) % 4 == 0]
        return [line for file in files for line in read_text(file).splitlines() if line.strip()]
    if source == STDLIB:
        texts = [text for file in stdlib_files() for text in _DOCSTRING.findall(read_text(file))]
    else:
        texts = [read_text(file) for file in text_files([source], SUFFIXES)]
    sentences = [sentence for text in texts for sentence in _END.split(text)]
    short = [part for s in sentences for part in (s.splitlines() if len(s) > _LONG else [s])]
    return [sentence for sentence in short if sentence.strip()]


def _with_numbers(sentences: list[str]) -> list[str]:
    """The sentences in a random order, with numbers of one to six digits among their words."""
    rng = random.Random(0)
    made = []
    for sentence in sentences:
        words = []
        for word in sentence.split():
            words.append(word)
            if rng.random() < 1 / 8:
                words.append(rng.choice(_NUMBERS).format("".join(rng.choices("0123456789", k=rng.randint(1, 6)))))
        made.append(" ".join(words))
    rng.shuffle(made)
    return made
