"""Sources from texts: unchanged, encoded in a way that is new for each stream, or with repeated passages."""

from collections.abc import Iterator

import numpy as np

from titans_lm.tasks.streams.parts import SourceInputs, log_uniform
from titans_lm.tasks.streams.texts import Bytes

PRINTABLE = np.arange(32, 127)
LETTERS = [*range(97, 123), *range(65, 91)]
BLOCKS = [
    (0xC0, 0x17F), (0x180, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x587), (0x5D0, 0x5EB), (0x620, 0x6FF),
    (0x905, 0x97F), (0xE01, 0xE5C), (0x10D0, 0x1100), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0x1F300, 0x1F650),
]  # fmt: skip
"""Ranges of code points that UTF-8 writes in two bytes (Europe and the Near East), three (Asia) and four."""


def text(inputs: SourceInputs) -> Iterator[Bytes]:
    """The texts from a random place, unchanged."""
    return inputs.texts().reading(inputs.rng)


def cipher(inputs: SourceInputs) -> Iterator[Bytes]:
    """A text under a substitution cipher: of the 95 printable characters, or of letters only, the same for both
    cases."""
    rng = inputs.rng
    table = np.arange(256, dtype=np.uint8)
    if rng.random() < 0.7:
        table[PRINTABLE] = rng.permutation(PRINTABLE)
    else:
        order = rng.permutation(26)
        table[65:91], table[97:123] = 65 + order, 97 + order
    for piece in inputs.texts().reading(rng):
        yield table[piece]


def alphabets(inputs: SourceInputs) -> Iterator[Bytes]:
    """A text in another alphabet, in UTF-8 or a one-byte code; or under a permutation of all bytes."""
    rng = inputs.rng
    reading = inputs.texts().reading(rng)
    kind = rng.random()
    if kind < 0.4:
        table = rng.permutation(256).astype(np.uint8)
        if kind < 0.15:  # letters only, in a one-byte code
            table = np.arange(256, dtype=np.uint8)
            table[LETTERS] = 128 + rng.permutation(128)[:52]
        for piece in reading:
            yield table[piece]
    low, high = BLOCKS[rng.integers(len(BLOCKS))] if rng.random() < 0.4 else BLOCKS[rng.integers(7)]
    names = low + (
        rng.permutation(high - low)
        if rng.random() < 0.5
        else np.roll(np.arange(high - low), -int(rng.integers(1 << 14)))
    )
    letters = dict(zip(LETTERS, np.resize(names, 52).tolist(), strict=True))
    if rng.random() < 0.3:  # capital letters as small ones
        letters.update({large: letters[large + 32] for large in range(65, 91)})
    for piece in reading:
        yield np.frombuffer(bytes(piece).decode("latin-1").translate(letters).encode(), np.uint8)


def repeat(inputs: SourceInputs) -> Iterator[Bytes]:
    """A passage of another source, then other text, then the passage again, sometimes repeatedly or at once."""
    rng = inputs.rng
    while True:
        passage = inputs.other(rng).take(round(log_uniform(rng, 16, min(inputs.length / 4, 1 << 14))))
        between = inputs.other(rng)
        yield passage
        for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 7))):
            if rng.random() < 0.7:
                yield between.take(round(log_uniform(rng, 8, inputs.length / 2)))
            yield passage
