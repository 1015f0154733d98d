"""Logs: lines from random templates. Each log draws its format, words, slots, and frequency and order of templates."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import accumulate
from random import Random

from titans_lm.tasks.streams.parts import SourceInputs, as_bytes
from titans_lm.tasks.streams.slots import Slot, Slots
from titans_lm.tasks.streams.texts import Bytes

LEVELS = [
    ["INFO", "WARN", "ERROR", "DEBUG"], ["info", "warning", "error", "debug"], ["INFO", "WARNING", "ERROR", "CRITICAL"],
    ["I", "W", "E", "D"], ["notice", "error", "warn", "crit"], ["INFO", "FATAL", "SEVERE", "FAILURE"], ["6", "4", "3"],
    ["Info", "Warning", "Error", "Fatal"], ["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"], ["<6>", "<4>", "<3>"],
    ["-", "-", "-", "ALERT"], ["level=info", "level=warn", "level=error"], ["OK", "FAIL"],
]  # fmt: skip
TIMES = [
    "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%b %d %H:%M:%S", "%d/%b/%Y:%H:%M:%S", "%y/%m/%d %H:%M:%S", "%H:%M:%S",
    "%y%m%d %H%M%S", "%a %b %d %H:%M:%S %Y", "%m-%d %H:%M:%S", "%Y%m%d-%H:%M:%S", "%Y-%m-%d-%H.%M.%S", "%Y.%m.%d",
    "%d/%m/%Y %H:%M:%S", "%Y/%m/%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%b %d, %Y %I:%M:%S %p", "%s", "%s",
]  # fmt: skip
LINKS = [
    "to", "from", "for", "of", "at", "in", "on", "by", "with", "is", "was", "not", "and", "the", "no", "as", "after",
]  # fmt: skip
ROUND = ["", "", "", "", "[]", "[]", "()", "<>", "{}", '""', "''", "||"]
BLOCK = 64


class Clock:
    """The time of the lines, which advances randomly from line to line."""

    def __init__(self, random: Random):
        self.random, self.now = random, random.uniform(0.9e9, 1.9e9)
        self.step, self.still, self.begun = 10 ** random.uniform(-3, 1.8), random.choice([0.0, 0.3, 0.7]), self.now

    def advance(self) -> None:
        if self.random.random() >= self.still:
            self.now += self.random.expovariate(1 / self.step)

    def shown(self) -> Slot:
        """A slot with the time in a random format."""
        r = self.random
        if r.random() < 0.08:
            return lambda: f"{self.now - self.begun:12.6f}"
        form, digits, mark = r.choice(TIMES), r.choice([0, 0, 0, 3, 3, 6]), r.choice(".,:.")
        zone = r.choice(["", "", "", "Z", " +0000", "+01:00", " UTC"]) if "%s" not in form else ""
        known: dict[int, str] = {}

        def show() -> str:
            second = int(self.now)
            if second not in known:
                known.clear()
                known[second] = str(second) if form == "%s" else datetime.fromtimestamp(second, UTC).strftime(form)
            if not digits:
                return known[second] + zone
            return f"{known[second]}{mark}{int((self.now - second) * 10**digits):0{digits}d}{zone}"

        return show


class Template:
    """A message: fixed parts and slots, with a level and a component."""

    def __init__(self, log: "Log", parts: Sequence[str | Slot]):
        r = log.random
        self.parts = parts
        self.level = log.levels[int(len(log.levels) * r.random() ** 2)]
        self.component = r.choice(log.components)

    def message(self) -> str:
        return "".join([part if isinstance(part, str) else part() for part in self.parts])


class Log:
    """A log. `lines()` returns the next lines."""

    def __init__(self, random: Random, words: Sequence[str]):
        self.random, r = random, random
        self.words = random.sample(words, min(len(words), r.randint(20, 300)))
        self.slots, self.clock = Slots(r, self.words), Clock(r)
        self.levels = r.choice(LEVELS) if r.random() < 0.85 else [self.slots.word() for _ in range(3)]
        self.components = [self.slots.identifier() for _ in range(r.randint(1, 8))]
        self.end = r.choice(["\n"] * 9 + ["\r\n"])
        self.header = self._header()
        self.templates = self._templates()
        self.at = 0
        """Index of the current line's template."""
        self._order()

    def lines(self, count: int) -> str:
        lines = []
        for _ in range(count):
            self.at = self._next()
            self.clock.advance()
            template = self.templates[self.at]
            lines.append(self._head(template) + template.message() + self.end)
        return "".join(lines)

    # ------------------------------------------------------------------------------------------ order

    def _order(self) -> None:
        r, count = self.random, len(self.templates)
        power = r.uniform(0.3, 2.5)
        self._weights = list(accumulate((i + 1) ** -power for i in range(count)))
        self._stay, self._follow = r.choice([0.0, 0.0, 0.0, 0.5, 0.9]), r.choice([0.0, 0.0, 0.5, 0.9])
        self._after = [r.randrange(count) for _ in range(count)]

    def _next(self) -> int:
        """The next template: the same again, a habitual successor, or one drawn by frequency."""
        u = self.random.random()
        if u < self._stay:
            return self.at
        if u < self._stay + (1 - self._stay) * self._follow:
            return self._after[self.at]
        return self.random.choices(range(len(self._weights)), cum_weights=self._weights)[0]

    # ------------------------------------------------------------------------------------------ heads

    def _header(self) -> list[str | Callable[[Template], str]]:
        """The parts of a line before the message."""
        r, slots = self.random, self.slots
        menu: list[Callable[[], Callable[[Template], str]]] = [
            lambda: _level(r.choice([0, 0, 5, 7])), lambda: lambda t: t.component, lambda: _plain(self.clock.shown()),
            lambda: _plain(slots.host()), lambda: _plain(slots.entity()), lambda: _plain(slots.counter()),
            lambda: _plain(slots.choice()), lambda: _plain(slots.any()),
            lambda: _component(slots.reused(slots.whole())),
        ]  # fmt: skip
        made = [make() for make in r.sample(menu, r.choice([0, 1, 1, 2, 2, 3, 3, 4, 5]))]
        if r.random() < 0.85:  # mostly with the time first
            made.insert(0 if r.random() < 0.8 else r.randint(0, len(made)), _plain(self.clock.shown()))
        mark = r.choice([" ", " ", " ", " - ", " | ", "|", "\t", ",", ": ", ";", "  "])
        parts: list[str | Callable[[Template], str]] = []
        for part in made:
            around = r.choice(ROUND)
            own = mark if r.random() < 0.85 else r.choice([": ", " - ", " "])
            parts += [around[:1], part, around[1:] + own]
        if parts and r.random() < 0.4:
            parts.append(r.choice([": ", "- ", ":", "> ", "-- "]))
        return [part for part in parts if part != ""]

    def _head(self, template: Template) -> str:
        return "".join([part if isinstance(part, str) else part(template) for part in self.header])

    # ------------------------------------------------------------------------------------------ messages

    def _templates(self) -> list[Template]:
        r = self.random
        styles = r.sample([self._sentence, self._pairs, self._record, self._call, self._request, self._mixed], 2)
        often = r.choice([0.5, 0.9, 1.0])
        if r.random() < 0.6:
            styles[0] = self._sentence
        density = r.uniform(0.1, 0.5)
        count = min(30, max(3, round(3 * 10 ** r.random())))
        made = [Template(self, styles[0 if r.random() < often else 1](density)) for _ in range(count)]
        if r.random() < 0.15:  # a stack trace after some messages
            for template in made[:: r.randint(2, 5)]:
                template.parts = [*template.parts, *self._trace()]
        return made

    def _sentence(self, density: float) -> list[str | Slot]:
        r, slots = self.random, self.slots
        parts: list[str | Slot] = []
        for i in range(r.randint(1, 14)):
            parts.append(" " if i else "")
            if i and r.random() < density:
                around, lead = r.choice(ROUND), r.choice(["", "", slots.word() + r.choice([": ", "=", ":", " "])])
                parts += [lead + around[:1], slots.any(), around[1:] + r.choice(["", "", "", ",", ":", ";"])]
            else:
                word = r.choice(LINKS) if r.random() < 0.25 else slots.word()
                parts.append(slots.identifier() if r.random() < 0.15 else word if i else word.capitalize())
        return [*parts, r.choice(["", "", "", ".", "!", "..."])]

    def _pairs(self, density: float) -> list[str | Slot]:
        """Pairs such as key=value."""
        r, slots = self.random, self.slots
        is_, mark, around = (
            r.choice(["=", "=", ": ", ":", " "]),
            r.choice([" ", " ", ", ", ",", "; ", "|"]),
            r.choice(ROUND),
        )
        parts: list[str | Slot] = [slots.identifier() + " "] if r.random() < 0.6 else []
        for i in range(r.randint(1, 8)):
            parts += [(mark if i else "") + slots.identifier() + is_ + around[:1]]
            parts += [slots.any() if r.random() < density + 0.4 else slots.word(), around[1:]]
        return parts

    def _record(self, density: float) -> list[str | Slot]:
        """JSON, or similar."""
        r, slots = self.random, self.slots
        quote, is_, mark = r.choice(['"', '"', "'", ""]), r.choice([":", ": "]), r.choice([",", ", "])
        parts: list[str | Slot] = ["{"]
        for i in range(r.randint(2, 8)):
            value = r.choice([quote, quote, ""])
            parts += [f"{mark if i else ''}{quote}{slots.identifier()}{quote}{is_}{value}"]
            parts += [slots.any() if r.random() < density + 0.4 else slots.word(), value]
        return [*parts, "}"]

    def _call(self, density: float) -> list[str | Slot]:
        r, slots = self.random, self.slots
        parts: list[str | Slot] = [f"{slots.identifier()}{r.choice(['.', '::', '->', '#'])}{slots.identifier()}("]
        for i in range(r.randint(0, 4)):
            parts += [", " if i else "", slots.any()]
        return [*parts, ")", r.choice([" ", ": ", " -> "]), *self._sentence(density)]

    def _request(self, density: float) -> list[str | Slot]:  # noqa: ARG002 - as the other styles
        """A request as in a web server's log."""
        r, slots = self.random, self.slots
        method = slots.skewed(["GET", "POST", "PUT", "HEAD", "DELETE"][: r.randint(1, 5)])
        status = slots.skewed(["200", "304", "404", "301", "500", "403"][: r.randint(1, 6)])
        parts: list[str | Slot] = ['"', method, " ", slots.path(), r.choice(["", "?id=1"]), ' HTTP/1.1" ', status, " "]
        parts.append(slots.whole())
        if r.random() < 0.5:
            parts += [' "', slots.path(), '" "', slots.choice(), '"']
        return parts

    def _mixed(self, density: float) -> list[str | Slot]:
        return [*self._sentence(density), self.random.choice([" ", ": ", " | "]), *self._pairs(density)]

    def _trace(self) -> list[str | Slot]:
        r, slots = self.random, self.slots
        lead = r.choice(["\tat ", "    at ", '  File "', "  #"])
        frames = [f"{self.end}{lead}{slots.identifier()}.{slots.identifier()}:{r.randrange(900)}" for _ in range(4)]
        return [*frames[: r.randint(1, 4)]]


def _plain(slot: Slot) -> Callable[[Template], str]:
    return lambda _: slot()


def _level(width: int) -> Callable[[Template], str]:
    return lambda template: f"{template.level:<{width}}" if width else template.level


def _component(slot: Slot) -> Callable[[Template], str]:
    return lambda template: f"{template.component}[{slot()}]"


def logs(inputs: SourceInputs) -> Iterator[Bytes]:
    """A log with 3 to 30 templates."""
    rng = inputs.rng
    log = Log(Random(int(rng.integers(1 << 62))), inputs.texts().words(rng))
    count = 8
    while True:
        yield as_bytes(log.lines(count))
        count = min(2 * count, BLOCK)
