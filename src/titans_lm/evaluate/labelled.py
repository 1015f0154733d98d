"""Labelled DNA: folders of GenomicBenchmarks, FASTA, CSV, and a made task; folds and scores."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAD, LETTERS = 0, "ACGTN"
"""Tokens are 1 to 5; N is a base that is not known."""
MOTIFS = "motifs"
"""The name of the made task."""
MOTIF_A, MOTIF_B = "TTGACATC", "GGAATCCA"
_COMPLEMENT = str.maketrans("ACGTN", "TGCAN")


class Labelled(NamedTuple):
    """Sequences with the class of each."""

    sequences: list[str]
    labels: NDArray[np.int64]


class DataSet(NamedTuple):
    """What a classifier is trained and tested on."""

    name: str
    classes: list[str]
    train: Labelled
    test: Labelled | None
    """None: there is no test part, and folds take its place."""


class _Record(NamedTuple):
    place: str
    sequence: str
    label: str
    part: str


def load_labelled(data: str, *, made: int = 2000, length: int = 64, seed: int = 0) -> DataSet:
    """A folder with train/CLASS/*.txt and test/CLASS/*.txt, a FASTA or CSV file, or "motifs": `made` sequences of
    `length` bases for each of training and test.

    Raises ValueError for a letter that is no base, with its place; and for data without two classes.
    """
    path = Path(data)
    if data == MOTIFS and not path.exists():
        return DataSet(
            MOTIFS, ["b before a", "a before b"], planted(made, length, seed), planted(made, length, seed + 10**6)
        )
    if path.is_dir():
        records = list(_of_folder(path))
    elif path.suffix.lower() == ".csv":
        records = list(_of_csv(path))
    else:
        records = list(_of_fasta(path))
    classes = sorted({record.label for record in records})
    if len(classes) < 2:
        raise ValueError(f"{path} has {len(classes)} classes; a classifier needs two or more")
    parts = {name: _labelled((r for r in records if r.part == name), classes) for name in ("train", "test")}
    if not parts["train"].sequences:
        raise ValueError(f"{path} has no sequence for training")
    return DataSet(path.stem, classes, parts["train"], parts["test"] if parts["test"].sequences else None)


def _labelled(records: Iterable[_Record], classes: list[str]) -> Labelled:
    sequences, labels = [], []
    for record in records:
        sequence = record.sequence.upper()
        wrong = next((i for i, letter in enumerate(sequence) if letter not in LETTERS), None)
        if wrong is not None:
            raise ValueError(f"{record.place}, letter {wrong + 1}: {record.sequence[wrong]!r} is no base; bases are "
                             f"A, C, G, T and N")  # fmt: skip
        if not sequence:
            raise ValueError(f"{record.place}: the sequence is empty")
        sequences.append(sequence)
        labels.append(classes.index(record.label))
    return Labelled(sequences, np.array(labels, dtype=np.int64))


def _of_folder(folder: Path) -> Iterator[_Record]:
    """GenomicBenchmarks: a folder for each part, in it one for each class, in it a file for each sequence."""
    if not (folder / "train").is_dir():
        raise ValueError(f"{folder} has no folder train/; it should hold train/CLASS/*.txt and test/CLASS/*.txt")
    for part in ("train", "test"):
        for file in sorted((folder / part).glob("*/*.txt")):
            yield _Record(str(file), file.read_text().strip(), file.parent.name, part)


def _of_csv(path: Path) -> Iterator[_Record]:
    """Columns `sequence` and `label`; where there is a column `split`, it says train or test."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = {"sequence", "label"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {min(missing)!r}; it needs sequence and label, and may have split")
        for number, row in enumerate(rows, 2):
            part = (row.get("split") or "train").strip()
            if part not in ("train", "test") or None in row or None in row.values():
                short = "the row has not as many values as the header"
                what = short if part in ("train", "test") else f"split must be train or test, got {part!r}"
                raise ValueError(f"{path}, line {number}: {what}")
            yield _Record(f"{path}, line {number}", row["sequence"].strip(), row["label"].strip(), part)


def _of_fasta(path: Path) -> Iterator[_Record]:
    """Records whose header is `>name label` or `>name label train|test`."""
    head: list[str] = []
    place, lines = "", list[str]()
    for number, line in enumerate([*path.read_text().splitlines(), ">"], 1):
        if not line.startswith(">"):
            if line.strip() and not head:
                raise ValueError(f"{path}, line {number}: a FASTA file begins with a header '>name label'")
            lines.append(line.strip())
            continue
        if head:
            part = head[2] if len(head) == 3 else "train"
            yield _Record(place, "".join(lines), head[1], part)
        place, lines, head = f"{path}, record of line {number}", [], line[1:].split()
        if line != ">" and (len(head) not in (2, 3) or (len(head) == 3 and head[2] not in ("train", "test"))):
            raise ValueError(f"{path}, line {number}: {line!r} is no header '>name label' or '>name label train|test'")


def reverse_complement(sequence: str) -> str:
    return sequence.translate(_COMPLEMENT)[::-1]


def planted(count: int, length: int, seed: int) -> Labelled:
    """Random bases with two motifs, A before B or B before A, and each sequence as it is or reverse-complemented. The
    class is the order on the motifs' own strand.

    Both classes have the same motifs, each way equally often, far from each other and from both ends: a convolution
    sees no difference, however its features are pooled. Raises ValueError for sequences that are too short.
    """
    width = len(MOTIF_A)
    if length < 2 * width:
        raise ValueError(f"{length} bases hold no two motifs of {width}: give --length {2 * width} or more")
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 2
    free = length - 2 * width
    least = np.array([free // 6, free // 3, free // 6])  # bases before, between and after
    sequences = []
    for label in labels:
        left, gap, right = least + rng.multinomial(free - least.sum(), [1 / 3] * 3)
        bases = ["".join(rng.choice(list("ACGT"), n)) for n in (left, gap, right)]
        first, second = (MOTIF_A, MOTIF_B) if label else (MOTIF_B, MOTIF_A)
        sequence = bases[0] + first + bases[1] + second + bases[2]
        sequences.append(reverse_complement(sequence) if rng.integers(2) else sequence)
    return Labelled(sequences, labels)


def folds(labels: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """The indices of each fold, where each class is spread evenly. Raises ValueError for a class with too few."""
    rare = min(Counter(labels.tolist()).values())
    if not 2 <= count <= rare:
        raise ValueError(f"--folds must be from 2 to {rare}, the sequences of the rarest class, got {count}")
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        fold[own] = np.arange(len(own)) % count
    return [np.flatnonzero(fold == i) for i in range(count)]


def tokens(sequences: list[str], longest: int) -> NDArray[np.int64]:
    """Rows `[B, T]` of the first `longest` bases, padded on the right."""
    cut = [sequence[:longest] for sequence in sequences]
    rows = np.full((len(cut), max(map(len, cut))), PAD, dtype=np.int64)
    for row, sequence in zip(rows, cut, strict=True):
        row[: len(sequence)] = [LETTERS.index(letter) + 1 for letter in sequence]
    return rows


def accuracy(true: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    return float((true == predicted).mean())


def matthews(true: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Matthews' correlation of any number of classes (Gorodkin, 2004), in [-1, 1]; 0 where it is not defined."""
    classes = max(true.max(), predicted.max()) + 1
    table = np.zeros((classes, classes))
    np.add.at(table, (true, predicted), 1)
    right, total, of_true, of_predicted = np.trace(table), table.sum(), table.sum(1), table.sum(0)
    above = right * total - of_true @ of_predicted
    below = np.sqrt((total**2 - of_true @ of_true) * (total**2 - of_predicted @ of_predicted))
    return float(above / below) if below else 0.0
