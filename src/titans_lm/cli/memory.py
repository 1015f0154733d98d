"""`titans memory`: show, verify, fork and compare memory files."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from titans_lm.models.cache_card import Card, StoredTensor, load_card, positions
from titans_lm.utils.terminal import PlainConsole, shown

if TYPE_CHECKING:
    from torch import Tensor


def run(arguments: argparse.Namespace) -> int | None:
    console = PlainConsole()
    if arguments.command == "show":
        stored, card = load_card(arguments.file)
        console.print(describe(stored, card))
        console.print(_sources(card))
        return None
    from titans_lm.models.cache_file import load_file, save_file  # imports torch, which `show` does not need

    tensors, card = load_file(arguments.file)
    if arguments.command == "verify":
        _verify(arguments.file, arguments.model)
        console.print(f"{arguments.file}: whole and finite{', of this model' if arguments.model else ''}")
    elif arguments.command == "fork":
        if os.path.lexists(arguments.to):
            raise ValueError(f"{arguments.to} exists; give a new name")
        save_file(arguments.to, tensors, Card(**{**vars(card), "parent": card.digest}))
        console.print(f"{arguments.to}: a fork of {arguments.file}")
    else:
        return _diff(console, (tensors, card), load_file(arguments.other))
    return None


def describe(tensors: dict[str, StoredTensor], card: Card) -> str:
    """A memory file's card as text."""
    rows, total = positions(tensors).tolist(), sum(len(t.data) for t in tensors.values())
    lines = {
        "model": shown(card.model),
        "tokens read": ", ".join(f"{p:,}" for p in rows),
        "memory": f"{total:,} bytes in {len(tensors)} tensors, {len(rows)} rows",
        "configuration": shown(card.configuration[:16]),
        "weights": shown(card.weights[:16]),
        "digest": shown(card.digest[:16]),
        "forked from": shown(card.parent[:16]) or "-",
    }
    return "\n".join(f"{name:14} {value}" for name, value in lines.items())


def _sources(card: Card) -> Table:
    table = Table("text", "bytes", "tokens read", "mode", "when", "SHA-256")
    for s in card.sources:
        size, state = "stream" if s.size < 0 else f"{s.size:,}", "" if s.done else " (not all)"
        table.add_row(shown(s.name), size, f"{s.tokens:,}{state}", *map(shown, (s.mode, s.when, s.sha256[:16])))
    return table


def _verify(path: Path, model: Path | None) -> None:
    """Beyond what loading checks: whether the memory is of this model."""
    if model is not None:
        from titans_lm.models.cache import TitansState
        from titans_lm.models.hub import load  # imports transformers, which the file alone does not need

        TitansState.load(path, load(model)[0])


def _diff(console: Console, one: "tuple[dict[str, Tensor], Card]", two: "tuple[dict[str, Tensor], Card]") -> int:
    import torch

    (a, first), (b, second) = one, two
    for part in ("model", "configuration", "weights"):
        if getattr(first, part) != getattr(second, part):
            console.print(shown(f"{part}: {getattr(first, part)} and {getattr(second, part)}"))
    old = {(s.name, s.sha256, s.tokens) for s in first.sources}
    new = {(s.name, s.sha256, s.tokens) for s in second.sources}
    for sign, only in (("-", old - new), ("+", new - old)):
        for name, sha256, tokens in sorted(only):
            console.print(shown(f"{sign} {name} ({tokens:,} tokens, {sha256[:16]})"))
    table = Table("tensor", "relative difference")
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            table.add_row(shown(name), "only in one file, or of another shape")
        elif not torch.equal(a[name], b[name]):
            apart = (a[name].double() - b[name].double()).norm() / a[name].double().norm().clamp(min=1e-30)
            table.add_row(shown(name), f"{float(apart):.3e}")
    console.print(table if table.rows else "the same numbers")
    return 1 if table.rows else 0
