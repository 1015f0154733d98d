"""bAbI's facts in a long text (BABILong, arXiv:2406.10149): facts in order among sentences of books.

A bAbI file holds stories. Lines are numbered from 1 in each story. A line with tabs is a question: its text, the
answer, and the numbers of supporting facts. Each question is an example; its facts are all lines of the story before
it."""

import dataclasses
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from titans_lm.models.tokenizer import encode, load_tokenizer
from titans_lm.tasks import IGNORED, Batch, at_least
from titans_lm.utils.corpora import STDLIB, text_files
from titans_lm.utils.text_file import read_text

Split = Literal["train", "test"]
FOLDERS = ("en-10k", "en")
"""Folders of bAbI in order of preference: 10,000 training stories rather than 1,000; the tests are the same."""
Tokens = NDArray[np.int64]


Asked = Literal["last", "all"]


class Part(NamedTuple):
    """A piece of a row."""

    ids: Tokens
    labels: Tokens


class Question(NamedTuple):
    """A question that a story asks before its last one."""

    place: int
    """Facts of the story before it."""
    question: str
    answer: str


class Example(NamedTuple):
    facts: tuple[str, ...]
    question: str
    answer: str
    earlier: tuple[Question, ...] = ()
    """The story's questions before this one."""


@dataclasses.dataclass(frozen=True)
class Babilong:
    """Rows of facts scattered among background sentences, then the question, then its answer. Answers have the only
    labels.

    The background continues sentence by sentence from a random one, book after book, and wraps around; a blank line
    ends a sentence too. Its last sentence is cut to the row's length. Facts are placed uniformly between sentences, as
    in BABILong (where the length counts background and facts only). Examples too long for a row are left out.

    Raises ValueError if the task is not in `babi`, the background has no text, or no example fits.
    """

    babi: str
    """A folder with bAbI's files, at any depth, or an archive of it (.tar.xz)."""
    task: str = "qa1"
    """qa1 to qa20."""
    length: int = 1024
    """Tokens of a row: background, facts, question and answer. 0, without a background: those of the longest
    example."""
    split: str = "train"
    background: Sequence[str] = (STDLIB,)
    """Text files, folders of .txt files, or "python-stdlib". Without any, rows have facts only ("0k"), and a `batch`
    pads shorter rows with line breaks in front."""
    tokenizer: str = "bytes"
    """"bytes", or the name or folder of a tokenizer."""
    questions: str = "last"
    """last: a row of a `batch` has one question. all: it has also those that the story asks before, with answers, each
    after the fact that it follows there, as bAbI's files have them: two or three times as many labels to learn from. A
    `prompt` has one question always."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"qa([1-9]|1\d|20)", self.task):
            raise ValueError(f"task must be one of qa1 to qa20, got {self.task!r}")
        if self.split not in get_args(Split):
            raise ValueError(f"split={self.split!r} is not one of: {', '.join(get_args(Split))}")
        if self.questions not in get_args(Asked):
            raise ValueError(f"questions={self.questions!r} is not one of: {', '.join(get_args(Asked))}")
        at_least(1 if self.background else 0, length=self.length)
        if not self.length:
            object.__setattr__(self, "length", int(self._data.sizes.max()))
        if not (self._data.sizes <= self.length).any():
            raise ValueError(
                f"length={self.length} is too short for {self.task}: its shortest example takes "
                f"{self._data.sizes.min()} tokens"
            )
        if self.background:
            _sentences(self._files)

    @property
    def vocab_size(self) -> int:
        return len(_tokenizer(self.tokenizer))

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers of the task's files, sorted; for answers that are lists, their members."""
        return self._data.labels

    @property
    def examples(self) -> list[Example]:
        """Examples that fit into a row, in the file's order."""
        return [
            example for example, size in zip(self._data.examples, self._data.sizes, strict=True) if size <= self.length
        ]

    @property
    def answer_tokens(self) -> int:
        """Tokens of the longest answer, which `prompt` reserves."""
        return self._data.room

    def batch(self, rng: np.random.Generator, rows: int) -> Batch:
        fitting = np.flatnonzero(self._data.sizes <= self.length)
        ids = np.empty((rows, self.length), np.int64)
        labels = np.empty_like(ids)
        for row in range(rows):
            example = self._data.examples[rng.choice(fitting)]
            answer = _encoded(self.tokenizer, _answer(example.answer))
            context = self._context(example, rng, self.length - len(answer), with_earlier=self.questions == "all")
            parts = [*context, Part(answer, answer)]
            ids[row], labels[row] = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Batch(ids, labels)

    def prompt(self, example: Example, rng: np.random.Generator) -> Tokens:
        """Tokens `[T]` of a prompt: T = `length` - `answer_tokens`; without background, facts and question only."""
        size = self.length - self.answer_tokens if self.background else None
        return np.concatenate([part.ids for part in self._context(example, rng, size)])

    def _context(
        self, example: Example, rng: np.random.Generator, size: int | None, with_earlier: bool = False
    ) -> list[Part]:
        """Background, facts and question in `size` tokens; None: facts and question. Earlier questions are left out
        from the first one for which there is no room."""
        facts = [self._part(_fact(fact)) for fact in example.facts]
        question = self._part(_question(example.question))
        room = 0 if size is None else size - sum(len(part.ids) for part in (*facts, question))
        if with_earlier:
            room -= self._insert_earlier(facts, example.earlier, room)
        parts = [self._unlabelled(ids) for ids in self._background(room, rng)]
        least = 0 if self.background else len(parts)
        places = np.sort(rng.integers(least, len(parts) + 1, size=len(facts)))
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            parts.insert(place, fact)
        return [*parts, question]

    def _insert_earlier(self, facts: list[Part], earlier: Sequence[Question], room: int) -> int:
        """Append each question and its answer to the fact before it. Returns the tokens that they take of `room`."""
        taken = 0
        for place, question, answer in earlier:
            asked, said = self._part(_question(question)), _encoded(self.tokenizer, _answer(answer))
            size = len(asked.ids) + len(said)
            if not place or taken + size > room:
                break
            columns = zip(facts[place - 1], asked, (said, said), strict=True)
            facts[place - 1] = Part(*map(np.concatenate, columns))
            taken += size
        return taken

    def _part(self, text: str) -> Part:
        return self._unlabelled(_encoded(self.tokenizer, text))

    @staticmethod
    def _unlabelled(ids: Tokens) -> Part:
        return Part(ids, np.full_like(ids, IGNORED))

    def _background(self, room: int, rng: np.random.Generator) -> Iterator[Tokens]:
        """Yields sentences, the last one cut, of `room` tokens in total."""
        tokenizer = _tokenizer(self.tokenizer)
        if not self.background:
            yield np.full(room, encode(tokenizer, "\n")[-1])
            return
        sentences = _sentences(self._files)
        at = int(rng.integers(len(sentences)))
        while room > 0:
            ids = encode(tokenizer, sentences[at])[:room]
            room, at = room - len(ids), (at + 1) % len(sentences)
            yield ids

    @property
    def _data(self) -> "_Data":
        return _data(self.babi, self.task, self.split, self.tokenizer)

    @property
    def _files(self) -> tuple[str, ...]:
        return (self.background,) if isinstance(self.background, str) else tuple(self.background)


# ------------------------------------------------------------------------------------------------ templates


def _fact(fact: str) -> str:
    return f" {fact}"


def _question(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"


def _answer(answer: str) -> str:
    return f" {answer}."


# ------------------------------------------------------------------------------------------------ bAbI


class _Data(NamedTuple):
    """The examples of a task, and the tokens of each with the longest answer: independent of the row length."""

    examples: list[Example]
    sizes: Tokens
    labels: tuple[str, ...]
    room: int


@lru_cache(maxsize=64)
def _data(babi: str, task: str, split: str, tokenizer: str) -> _Data:
    files = {name: parse(text, f"{babi}: {name}") for name, text in _texts(babi, task).items()}
    examples = next((file for name, file in files.items() if name.endswith(f"_{split}.txt")), None)
    if not examples:
        raise ValueError(
            f"{babi} has no question of {task} to {split}: there is no {task}_..._{split}.txt, or nothing in it"
        )
    answers = {example.answer for file in files.values() for example in file}
    room = max(len(_encoded(tokenizer, _answer(answer))) for answer in answers)
    sizes = [
        sum(len(_encoded(tokenizer, _fact(fact))) for fact in example.facts)
        + len(_encoded(tokenizer, _question(example.question)))
        + room
        for example in examples
    ]
    labels = {part for answer in answers for part in members(answer)}
    return _Data(examples, np.asarray(sizes, np.int64), tuple(sorted(labels)), room)


def parse(text: str, name: str) -> list[Example]:
    """Parse all questions of a bAbI file. Raises ValueError for a malformed line, with the `name` of the file."""
    examples: list[Example] = []
    facts: list[str] = []
    asked: list[Question] = []
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)(?:\t[\d ]*)?)?", line)
        if match is None:
            raise ValueError(f"{name}, line {number}: not a numbered fact, nor a question with its answer after a tab")
        if match[1] == "1":
            facts, asked = [], []
        if match[3] is None:
            facts.append(match[2].strip())
        else:
            question = Question(len(facts), match[2].strip(), match[3].strip())
            examples.append(Example(tuple(facts), question.question, question.answer, tuple(asked)))
            asked.append(question)
    return examples


def members(answer: str) -> list[str]:
    """The members of an answer that is a list (qa8: "apple,milk"). A path (qa19: "n,w") is one answer, as in
    BABILong."""
    return answer.split(",") if len(answer) > len("n,w") else [answer]


@lru_cache(maxsize=64)
def _texts(babi: str, task: str) -> dict[str, str]:
    """The task's files by name, each from the preferred folder that has it. Raises ValueError if there are none."""
    path = Path(babi)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a folder with bAbI's files, or the archive of them")
    pattern = re.compile(rf"{task}_.*_(train|test)\.txt")
    texts = _in_folder(path, pattern) if path.is_dir() else _in_archive(path, pattern)
    if not texts:
        raise ValueError(f"{path} has no file of {task} ({task}_..._test.txt)")
    best: dict[str, str] = {}
    for place in sorted(texts, key=lambda place: _rank(path, place)):
        best.setdefault(place.name, texts[place])
    return best


def _rank(path: Path, place: PurePath) -> tuple[int, str]:
    """Order of preference: the folder itself, then English ones, then others (bAbI's Hindi and shuffled ones)."""
    folder = place.parent.name
    rank = 0 if place.parent == path else 1 + FOLDERS.index(folder) if folder in FOLDERS else 1 + len(FOLDERS)
    return rank, str(place)


def _in_folder(path: Path, pattern: re.Pattern[str]) -> dict[PurePath, str]:
    return {file: read_text(file) for file in path.rglob("*.txt") if pattern.fullmatch(file.name)}


def _in_archive(path: Path, pattern: re.Pattern[str]) -> dict[PurePath, str]:
    texts: dict[PurePath, str] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if pattern.fullmatch(PurePath(member.name).name) and (file := archive.extractfile(member)):
                    texts[PurePath(member.name)] = file.read().decode()
    except (tarfile.TarError, EOFError, UnicodeDecodeError):
        raise ValueError(f"{path} is neither a folder nor an archive of bAbI's files, or it is damaged") from None
    return texts


# ------------------------------------------------------------------------------------------------ background

_NO_TITLE = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "Prof", "[A-Z]"))
_STOP = re.compile(rf"[.!?]{_NO_TITLE}[.!?]*[\"'\u201d\u2019)\]]*(?=\s+[\"'\u201c\u2018(\[]*[A-Z0-9])")
"""End of a sentence: a stop before a capital letter, except after a title or an initial."""
_BLANK = re.compile(r"\s*\n\s*\n")


@lru_cache(maxsize=4)
def _sentences(files: tuple[str, ...]) -> list[str]:
    """Sentences of all texts, each with the space before it; joined they are the texts."""
    return [s for file in text_files(files, [".txt"]) for s in sentences("\n\n" + read_text(file).strip())]


def sentences(text: str) -> list[str]:
    """Split a text after the end of each sentence, and before blank lines."""
    ends = sorted({0, *(m.end() for m in _STOP.finditer(text)), *(m.start() for m in _BLANK.finditer(text)), len(text)})
    return [text[first:end] for first, end in itertools.pairwise(ends)]


# ------------------------------------------------------------------------------------------------ tokens


@lru_cache(maxsize=8)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)


@lru_cache(maxsize=1 << 16)
def _encoded(tokenizer: str, text: str) -> Tokens:
    """Tokens of a fact, a question or an answer. There are few, and they repeat: cached."""
    return encode(_tokenizer(tokenizer), text)
