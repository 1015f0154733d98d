"""Slots: the variable parts of lines of logs and tables. A slot is a function that returns its next value as text. Its
parameters (width, range, repetition) are drawn once, when it is made."""

import math
import uuid
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

Slot = Callable[[], str]
_UNITS = ["ms", " ms", "s", " sec", "us", "ns", "m", "%", "KB", " KB", " bytes", "B", "MB", "GiB", "C", "x", " rows"]
_ENDS = ["log", "txt", "so", "conf", "dat", "java", "py", "c", "cpp", "xml", "html", "gz", "tmp", "jar", "js", "png"]
_ROOTS = ["", "", "", "C:", ".", "..", "~", "hdfs:/", "http:/", "https:/", "file:/"]


class Slots:
    """Makes slots of many kinds; those of one log share words and identifiers."""

    def __init__(self, random: Random, words: Sequence[str]):
        self.random, self.words = random, words
        self.shared: list[Slot] = []
        """Slots that several places of a line share: the same value until it changes (`entity`)."""
        self.kinds: list[Callable[[], Slot]] = [
            self.whole, self.whole, self.counter, self.hexadecimal, self.choice, self.choice, self.address, self.path,
            self.fraction, self.amount, self.host, self.name, self.unique, self.version, self.walk, self.clock_like,
            self.reused, self.reused, self.entity, self.entity, self.nested,
        ]  # fmt: skip
        self.weights = list(accumulate(random.expovariate(1) for _ in self.kinds))
        """Each log prefers some kinds."""

    def any(self) -> Slot:
        (kind,) = self.random.choices(self.kinds, cum_weights=self.weights)
        return kind()

    # ------------------------------------------------------------------------------------------ words

    def word(self) -> str:
        return self.random.choice(self.words)

    def identifier(self) -> str:
        """Words joined to an identifier: CamelCase, snake_case, dotted, and others."""
        r = self.random
        parts = [self.word() for _ in range(r.randint(1, 3))]
        style = r.randrange(6)
        if style == 0:
            return "".join(p.capitalize() for p in parts)
        if style == 1:
            return parts[0].lower() + "".join(p.capitalize() for p in parts[1:])
        if style == 2:
            return "_".join(p.upper() for p in parts)
        return "_-."[style - 3].join(p.lower() for p in parts)

    # ------------------------------------------------------------------------------------------ numbers

    def whole(self) -> Slot:
        r, digits = self.random, self.random.randint(1, 9)
        low, high, style = 10 ** (digits - 1) if r.random() < 0.5 else 0, 10**digits - 1, r.randrange(5)
        if style == 0:
            width = r.randint(2, 10)
            return lambda: f"{r.randint(low, high):0{width}d}"
        if style == 1:  # mostly small ones
            return lambda: str(int(math.exp(r.random() * digits * 2.3)))
        if style == 2:  # close to one another
            base, spread = r.randint(low, high), max(2, high // 1000)
            return lambda: str(base + r.randrange(spread))
        if style == 3:
            sign = r.choice(["-", ",", ""])
            return lambda: f"{r.randint(low, high):,}" if sign == "," else f"{sign}{r.randint(low, high)}"
        return lambda: str(r.randint(low, high))

    def counter(self) -> Slot:
        r, at = self.random, self.random.randrange(10 ** self.random.randint(0, 8))
        step, some, width = r.choice([1, 1, 1, 2, 10, 4096]), r.random() < 0.3, r.choice([0, 0, 0, 6, 8])

        def count() -> str:
            nonlocal at
            at += r.randint(1, 1 + 2 * step) if some else step
            return f"{at:0{width}d}"

        return count

    def hexadecimal(self) -> Slot:
        r, width = self.random, self.random.choice([2, 4, 4, 8, 8, 8, 12, 16, 32, 40])
        lead, letter = r.choice(["0x", "0x", "", "", "#", "#"]), r.choice("xxX")
        fixed = r.getrandbits(4 * width) if r.random() < 0.5 else 0
        low = 4 * r.randint(1, width) if fixed else 4 * width  # addresses differ in their last digits
        return lambda: f"{lead}{fixed >> low << low | r.getrandbits(low):0{width}{letter}}"

    def fraction(self) -> Slot:
        r, digits, scale = self.random, self.random.randint(1, 6), 10 ** self.random.uniform(-1, 4)
        centre = r.choice([0.0, r.uniform(-scale, 10 * scale)])
        if r.random() < 0.3:
            return lambda: f"{r.expovariate(1 / scale):.{digits}f}"
        return lambda: f"{r.gauss(centre, scale):.{digits}f}"

    def walk(self) -> Slot:
        """A random walk, sometimes around a wave."""
        r, digits, step = self.random, self.random.randint(0, 4), 10 ** self.random.uniform(-2, 2)
        at, time, wave = r.uniform(0, 100 * step), 0, r.choice([0.0, 20 * step])
        period = r.uniform(5, 100)

        def go() -> str:
            nonlocal at, time
            at, time = at + r.gauss(0, step), time + 1
            return f"{at + wave * math.sin(time / period):.{digits}f}"

        return go

    def amount(self) -> Slot:
        number, unit = self.random.choice([self.whole, self.fraction, self.counter])(), self.random.choice(_UNITS)
        return lambda: number() + unit

    def clock_like(self) -> Slot:
        r, parts, mark = self.random, self.random.randint(2, 4), self.random.choice([":", ":", ":", ".", "/", "-"])
        return lambda: mark.join(f"{r.randrange(60):02d}" for _ in range(parts))

    # ------------------------------------------------------------------------------------------ names

    def skewed(self, values: Sequence[str]) -> Slot:
        """One of `values`, earlier ones more often."""
        r, power = self.random, self.random.uniform(0, 2)
        weights = list(accumulate((i + 1) ** -power for i in range(len(values))))
        return lambda: r.choices(values, cum_weights=weights)[0]

    def choice(self) -> Slot:
        r = self.random
        make = r.choice(
            [self.word, self.word, self.identifier, lambda: str(r.randrange(300)), lambda: r.choice("TF01")]
        )
        return self.skewed([make() for _ in range(r.randint(2, 12))])

    def name(self) -> Slot:
        return self.skewed([self.identifier() for _ in range(self.random.randint(2, 60))])

    def address(self) -> Slot:
        r = self.random
        net = [r.choice([10, 127, 172, 192, r.randrange(256)]), r.randrange(256), r.randrange(256)][: r.randint(0, 3)]

        def fresh() -> str:
            return ".".join(map(str, [*net, *(r.randrange(256) for _ in range(4 - len(net)))]))

        if r.random() < 0.15:
            fresh = self._hardware_address
        known = self.skewed([fresh() for _ in range(r.randint(1, 40))])
        mark, lead, fixed = r.choice(["", "", ":", ":", "/", "#"]), r.choice(["", "", "", "/"]), r.randrange(65536)
        new, same = r.choice([0.0, 0.1, 1.0]), r.random() < 0.4

        def address() -> str:
            host = fresh() if r.random() < new else known()
            return f"{lead}{host}{mark}{fixed if same else r.randrange(1024, 65536)}" if mark else lead + host

        return address

    def _hardware_address(self) -> str:
        return ":".join(f"{self.random.randrange(256):02x}" for _ in range(6))

    def path(self) -> Slot:
        r, mark = self.random, self.random.choice("/////\\")
        roots = [mark.join([r.choice(_ROOTS), *(self.word() for _ in range(r.randint(1, 4)))]) for _ in range(3)]
        known = [mark.join([r.choice(roots), self.identifier(), ""]) for _ in range(r.randint(1, 12))]
        folder, last = self.skewed(known), r.choice([self.name, self.whole, self.hexadecimal])()
        end = r.choice(["", "", "." + r.choice(_ENDS), "." + r.choice(_ENDS)])
        return lambda: folder() + last() + end

    def host(self) -> Slot:
        r, stem, marks = self.random, self.word().lower()[:8], self.random.choice([("", ""), ("-", "."), ("-r", "-n")])
        tail, many, width = (
            r.choice(["", "", ".local", f".{self.word().lower()}.com"]),
            r.randint(2, 200),
            r.randint(1, 3),
        )
        known = self.skewed([
            f"{stem}{marks[0]}{r.randrange(many):0{width}d}" + (f"{marks[1]}{r.randrange(64)}" if marks[1] else tail)
            for _ in range(r.randint(1, 50))
        ])  # fmt: skip
        return known

    def version(self) -> Slot:
        r = self.random
        return self.skewed([".".join(str(r.randrange(20)) for _ in range(r.randint(2, 4))) for _ in range(3)])

    def _fresh_identity(self) -> Slot:
        """A slot whose values hardly ever repeat."""
        r = self.random
        lead = r.choice(["", self.word().lower() + r.choice("_-#"), r.choice(["id", "req-", "tx", "J", "@"])])
        kind = r.randrange(5)
        if kind == 0:
            return lambda: str(uuid.UUID(int=r.getrandbits(128), version=4))
        if kind == 1:
            counter = self.counter()
            return lambda: lead + counter()
        if kind == 2:
            top = 10 ** r.randint(3, 19)
            sign = r.choice(["", "", "-"])
            return lambda: f"{lead}{sign if r.random() < 0.5 else ''}{r.randrange(top)}"
        if kind == 3:
            width = r.choice([6, 8, 12, 16, 24])
            return lambda: f"{lead}{r.getrandbits(4 * width):0{width}x}"
        letters, size = r.choice(["ABCDEFGHJKLMNPQRSTUVWXYZ23456789", "abcdefghijklmnopqrstuvwxyz"]), r.randint(3, 12)
        return lambda: lead + "".join(r.choices(letters, k=size))

    def unique(self) -> Slot:
        return self._fresh_identity()

    def reused(self, fresh: Slot | None = None) -> Slot:
        """A new value or, more often, a recent one."""
        r, fresh = self.random, fresh or self._fresh_identity()
        new, many, known = r.choice([0.02, 0.1, 0.3, 0.5]), r.choice([2, 8, 64]), [fresh()]

        def value() -> str:
            if r.random() < new:
                known.append(fresh())
                del known[:-many]
            return known[-1 - int(len(known) * r.random() ** 2)]

        return value

    def entity(self) -> Slot:
        """A value that stays for some lines, shared across the log."""
        if len(self.shared) < self.random.randint(1, 3):
            source, change = (
                self.random.choice([self.reused, self.unique, self.address])(),
                self.random.uniform(0.02, 0.5),
            )
            value, r = source(), self.random

            def look() -> str:
                nonlocal value
                if r.random() < change:
                    value = source()
                return value

            self.shared.append(look)
        return self.random.choice(self.shared)

    def nested(self) -> Slot:
        """Several values of one kind in brackets, or one in quotation marks."""
        r, inner = (
            self.random,
            self.random.choice([self.whole, self.name, self.choice, self.address, self.hexadecimal])(),
        )
        most, left, right = r.randint(1, 4), *r.choice(["[]", "()", "{}", "<>", '""', "''", '""'])
        mark = r.choice([",", ", ", " ", "; "])
        return lambda: f"{left}{mark.join(inner() for _ in range(r.randint(1, most)))}{right}"
