"""Tables: records with columns of numbers, names and counters, as CSV, JSON, and others."""

from collections.abc import Iterator
from random import Random

from titans_lm.tasks.streams.parts import SourceInputs, as_bytes
from titans_lm.tasks.streams.slots import Slot, Slots
from titans_lm.tasks.streams.texts import Bytes

BLOCK = 32


class Records:
    """A table. `lines()` returns the next lines."""

    def __init__(self, random: Random, slots: Slots):
        r = random
        kinds = [slots.walk, slots.walk, slots.fraction, slots.whole, slots.counter, slots.choice, slots.any]
        self.names = [slots.identifier() for _ in range(r.randint(2, 12))]
        alike = r.choice(kinds) if r.random() < 0.4 else None
        self.columns: list[Slot] = [(alike or r.choice(kinds))() for _ in self.names]
        form = r.choice(["marks", "marks", "marks", "json", "fixed", "markup", "statement"])
        self.before, self.between, self.after, self.head = getattr(self, f"_{form}")(r, slots.identifier())
        self.width = r.randint(6, 16) if form == "fixed" else 0

    def lines(self, count: int) -> str:
        return "".join(self._line() for _ in range(count))

    def _line(self) -> str:
        parts = [self.before]
        for i, (column, between) in enumerate(zip(self.columns, self.between, strict=True)):
            parts += [between if i or between.strip(",;|\t ") else "", column().rjust(self.width)]
        return "".join([*parts, self.after])

    def _marks(self, r: Random, _: str) -> tuple[str, list[str], str, str]:
        mark = r.choice([",", ",", ",", ";", "\t", "|", ", ", " "])
        return "", [mark] * len(self.names), "\n", mark.join(self.names) + "\n"

    def _fixed(self, r: Random, _: str) -> tuple[str, list[str], str, str]:
        return "", [r.choice([" ", "|", " | "])] * len(self.names), "\n", ""

    def _json(self, r: Random, _: str) -> tuple[str, list[str], str, str]:
        space, quote = r.choice(["", " "]), r.choice(['"', ""])
        parts = [
            f'{quote if i else ""}{f",{space}" if i else ""}"{n}":{space}{quote}' for i, n in enumerate(self.names)
        ]
        return "{", parts, quote + "}" + r.choice(["\n", ",\n"]), ""

    def _markup(self, r: Random, name: str) -> tuple[str, list[str], str, str]:
        parts = [f'{chr(34) if i else ""} {n}="' for i, n in enumerate(self.names)]
        return f"{r.choice(['', '  '])}<{name}", parts, '"/>\n', ""

    def _statement(self, r: Random, name: str) -> tuple[str, list[str], str, str]:
        quote = r.choice(["'", ""])
        parts = [quote if i == 0 else f"{quote}, {quote}" for i in range(len(self.names))]
        return f"INSERT INTO {name} VALUES (", parts, f"{quote});\n", ""


def tables(inputs: SourceInputs) -> Iterator[Bytes]:
    """An endless table, mostly with a header line."""
    random = Random(int(inputs.rng.integers(1 << 62)))
    words = inputs.texts().words(inputs.rng)
    records = Records(random, Slots(random, random.sample(words, min(len(words), 100))))
    if random.random() < 0.8:
        yield as_bytes(records.head)
    while True:
        yield as_bytes(records.lines(BLOCK))
