"""Artificial languages: sentences of words from a random lexicon."""

from collections.abc import Iterator

import numpy as np

from titans_lm.tasks.streams.chains import Chain
from titans_lm.tasks.streams.parts import SourceInputs, as_bytes, log_uniform
from titans_lm.tasks.streams.texts import Bytes

BLOCK = 256
ACCENTED = [*range(0xDF, 0xF7), *range(0xF8, 0x100)]
"""Small letters of Western Europe; UTF-8 writes them in two bytes."""
ALPHABETS = [range(0x3B1, 0x3CA), range(0x430, 0x450), range(0x561, 0x587)]
"""Greek, Cyrillic, Armenian; two bytes each."""


class Language:
    """50 to 3,000 words with Zipf frequencies and preferred successors."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.count = rng, round(log_uniform(rng, 50, 3000))
        self.words = self._lexicon(_letters(rng))
        weights = np.arange(1, self.count + 1) ** -rng.uniform(0.8, 1.2)
        self._shares = np.cumsum(weights) / weights.sum()
        self._successors = self._drawn(4 * self.count).reshape(self.count, 4)
        self._successor_share, self._sentence = rng.uniform(0, 0.8), rng.uniform(4, 25)
        self._capitals, self._comma = rng.random() < 0.6, rng.uniform(0, 0.15)
        self._word = 0

    def text(self, count: int) -> str:
        """The next sentences, with at least `count` words."""
        sentences = []
        while count > 0:
            size = 1 + int(self.rng.exponential(self._sentence))
            sentences.append(self._next_sentence(size))
            count -= size
        return "".join(sentences)

    def _next_sentence(self, size: int) -> str:
        words, draws, word = [], self.rng.random((size, 2)).tolist(), self._word
        for fresh, (u, v) in zip(self._drawn(size).tolist(), draws, strict=True):
            word = int(self._successors[word, int(4 * v)]) if u < self._successor_share else fresh
            words.append(self.words[word])
        self._word = word
        if self._comma:
            words[:-1] = [w + "," if v < self._comma else w for w, (_, v) in zip(words[:-1], draws, strict=False)]
        text = " ".join(words)
        text = text[0].upper() + text[1:] if self._capitals else text
        return text + str(self.rng.choice([". ", ". ", ". ", ".\n", "? ", "! ", ".\n\n"]))

    def _drawn(self, count: int) -> np.ndarray:
        """Words drawn by frequency, `[count]`."""
        return np.minimum(np.searchsorted(self._shares, self.rng.random(count)), self.count - 1)

    def _lexicon(self, letters: str) -> list[str]:
        """Random words; the first, frequent ones are short."""
        chain = Chain(self.rng, 2, len(letters), log_uniform(self.rng, 0.05, 0.5))
        rank = np.log(np.arange(2, self.count + 2)) / np.log(self.count + 2)
        sizes = 1 + self.rng.poisson(1 + 6 * rank)
        spelt = "".join(letters[i] for i in chain.walk(int(sizes.sum())))
        ends = np.cumsum(sizes).tolist()
        return [spelt[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _letters(rng: np.random.Generator) -> str:
    """The letters of a language: Latin, some with accents, or another alphabet."""
    if rng.random() < 0.2:
        return "".join(map(chr, ALPHABETS[rng.integers(len(ALPHABETS))]))
    latin = rng.permutation(26)[: rng.integers(12, 27)] + ord("a")
    accented = rng.permutation(ACCENTED)[: rng.choice([0, 0, 3, 8])]
    return "".join(map(chr, [*latin.tolist(), *accented.tolist()]))


def language(inputs: SourceInputs) -> Iterator[Bytes]:
    """Sentences of a new language."""
    made = Language(inputs.rng)
    while True:
        yield as_bytes(made.text(BLOCK))
