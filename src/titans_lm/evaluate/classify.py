"""`titans evaluate classify`: train classifiers of DNA, and test them: accuracy and Matthews' correlation.

A tenth of the training part chooses the epoch. Without a test part, or with --folds, each fold is the test part once.
"""

import argparse
import copy
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from titans_lm.evaluate.labelled import (
    LETTERS,
    PAD,
    DataSet,
    Labelled,
    accuracy,
    folds,
    load_labelled,
    matthews,
    tokens,
)
from titans_lm.models.classification import TitansForSequenceClassification
from titans_lm.models.configuration import TitansConfig
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

CNN = "cnn"
MODELS = ("mac", "mag", "mal", "lmm", "attention", CNN)
EVAL_BATCH = 256


class Convolutions(nn.Module):
    """The rival: three convolutions and the largest value of each channel, as in GenomicBenchmarks' CNN."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS) + 1, width, PAD)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 9, padding=4) for _ in range(3))
        self.score = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        for conv in self.convs:
            x = F.relu(conv(x))
        logits: Tensor = self.score(x.amax(-1))
        return logits


class _Logits(nn.Module):
    def __init__(self, model: TitansForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def build(name: str, classes: int, hidden: int, layers: int) -> nn.Module:
    """A classifier of rows of tokens `[B, T]`, padded on the right."""
    if name == CNN:
        return Convolutions(classes, hidden)
    head = max(2, hidden // 4)
    return _Logits(TitansForSequenceClassification(TitansConfig(
        variant=name, vocab_size=len(LETTERS) + 1, pad_token_id=PAD, num_labels=classes, hidden_size=hidden,
        num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * hidden, window_size=32, segment_size=32,
        num_persistent_tokens=4, memory_head_dim=head, memory_dim=2 * head,
    )))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True,
                        help="folders with train/CLASS/*.txt and test/, FASTA or CSV files, or motifs")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mag", CNN], help="variants, or cnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, help="cross-validation with so many folds (without a test part: 5)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=32, help="width of the models, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2, help="layers of the variants")
    parser.add_argument("--longest", type=int, default=512, help="bases of a sequence that are read")
    parser.add_argument("--made", type=int, default=2000, help="sequences that are made for motifs")
    parser.add_argument("--length", type=int, default=96, help="their length")
    parser.add_argument("--out", type=Path, default=Path("results/classify.jsonl"),
                        help="JSON lines: each data set, model, seed and fold; finished ones are kept")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    least_one = ("epochs", "batch_size", "layers", "longest", "made", "length")
    check_least(arguments, 1, *least_one)
    check_least(arguments, 0, "seeds")
    if arguments.hidden < 4 or arguments.hidden % 4:
        raise ValueError(f"--hidden must be a multiple of 4, got {arguments.hidden}")
    if not arguments.learning_rate > 0:
        raise ValueError(f"--learning-rate must be above 0, got {arguments.learning_rate}")
    check_output(arguments.out, ours=False)
    names = (*least_one, "hidden", "learning_rate")
    settings = {name: getattr(arguments, name) for name in names}
    with Lines(arguments.out, settings, command_line("evaluate classify", arguments)) as lines:
        cells = [cell for data in arguments.data for cell in _cells(arguments, data)]
        left = [cell for cell in cells if lines.find(**cell["key"]) is None]
        console = PlainConsole()
        for cell in track(left, "classifiers", console=console):
            lines.add({**cell["key"], **_run_cell(cell, arguments)})
        console.print(_table(lines.rows))
    console.print(f"{len(left)} of {len(cells)} lines are new: {arguments.out}")


def _cells(arguments: argparse.Namespace, data: str) -> list[dict[str, Any]]:
    """The cells of a data set: its training and test part, model, seed and fold."""
    cells = []
    found = load_labelled(data, made=arguments.made, length=arguments.length)
    digest = hashlib.sha256("\n".join([*found.train.sequences, *map(str, found.train.labels)]).encode()).hexdigest()
    for seed in arguments.seeds:
        for fold, (train, test) in enumerate(_parts(found, arguments.folds, seed)):
            for model in arguments.models:
                key = {"data": found.name, "digest": digest[:16], "model": model, "seed": seed, "fold": fold}
                key["folds"] = arguments.folds or (0 if found.test is not None else 5)
                cells.append({"key": key, "train": train, "test": test, "classes": len(found.classes)})
    return cells


def _parts(data: DataSet, count: int | None, seed: int) -> list[tuple[Labelled, Labelled]]:
    """Training and test: as given, or each fold of all sequences once."""
    if count is None and data.test is not None:
        return [(data.train, data.test)]
    whole = data.train
    if data.test is not None:
        labels = np.concatenate([data.train.labels, data.test.labels])
        whole = Labelled(data.train.sequences + data.test.sequences, labels)
    parts = folds(whole.labels, count or 5, seed)
    everything = np.arange(len(whole.labels))
    return [(_take(whole, np.setdiff1d(everything, part)), _take(whole, part)) for part in parts]


def _take(data: Labelled, index: NDArray[np.int64]) -> Labelled:
    return Labelled([data.sequences[i] for i in index], data.labels[index])


def _run_cell(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    begun, seed = time.monotonic(), cell["key"]["seed"]
    torch.manual_seed(seed)
    model = build(cell["key"]["model"], cell["classes"], arguments.hidden, arguments.layers)
    epoch = _fit(model, cell["train"], arguments, seed)
    predicted = predict(model, cell["test"].sequences, arguments.longest)
    true = cell["test"].labels
    return {
        "accuracy": accuracy(true, predicted),
        "mcc": matthews(true, predicted),
        "sequences": len(true),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epoch,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _fit(model: nn.Module, data: Labelled, arguments: argparse.Namespace, seed: int) -> int:
    """Train, and keep the weights with the highest accuracy on a tenth of `data` that is set apart -> their epoch."""
    order = np.random.default_rng(seed)
    index = order.permutation(len(data.labels))
    cut = max(1, len(index) // 10)
    val, train = _take(data, index[:cut]), index[cut:]
    optimizer = torch.optim.AdamW(model.parameters(), arguments.learning_rate)
    best, weights, best_epoch = -1.0, model.state_dict(), 0
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        shuffled = order.permutation(train)
        for start in range(0, len(shuffled), arguments.batch_size):
            batch = _take(data, shuffled[start : start + arguments.batch_size])
            ids = torch.from_numpy(tokens(batch.sequences, arguments.longest))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(ids), torch.from_numpy(batch.labels)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        found = accuracy(val.labels, predict(model, val.sequences, arguments.longest))
        if found > best:
            best, weights, best_epoch = found, copy.deepcopy(model.state_dict()), epoch
    model.load_state_dict(weights)
    return best_epoch


@torch.no_grad()
def predict(model: nn.Module, sequences: list[str], longest: int) -> NDArray[np.int64]:
    """The class of each sequence."""
    model.eval()
    parts = [sequences[start : start + EVAL_BATCH] for start in range(0, len(sequences), EVAL_BATCH)]
    logits = [model(torch.from_numpy(tokens(part, longest))) for part in parts]
    return torch.cat(logits).argmax(-1).numpy()


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "data",
        "model",
        "parameters",
        "accuracy",
        "MCC",
        "runs",
        title="mean and standard deviation over seeds and folds",
    )
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in rows):
        own = [row for row in rows if (row["data"], row["model"]) == (data, model)]
        scores = (np.array([row[name] for row in own]) for name in ("accuracy", "mcc"))
        shown = (f"{score.mean():.3f} ± {score.std():.3f}" for score in scores)
        table.add_row(data, model, f"{own[0]['parameters']:,}", *shown, str(len(own)))
    return table
