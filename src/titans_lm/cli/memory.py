"""`titans memory`: show, verify, fork and compare memory files."""

import argparse
import os
import re
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
        if arguments.picture is not None:
            _check_picture(arguments.picture)
        other, its_card = load_file(arguments.other)
        if arguments.picture is not None:
            _draw_diff(tensors, other, arguments.picture)
        return _diff(console, (tensors, card), (other, its_card))
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


def _check_picture(path: Path) -> None:
    """Raises ValueError for a name that is not of a PNG, and for a file that is not a picture of this package."""
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(f"--picture {path}: give the name of a file that ends in .png, in a folder that exists")
    if path.exists() and b"Matplotlib" not in path.read_bytes()[:1024]:
        raise ValueError(f"{path} is not a picture of this command; give --picture another name")


def head_changes(one: "dict[str, Tensor]", two: "dict[str, Tensor]") -> "Tensor":
    """How much each head's memory differs, by layer with a memory, `[L, H]`: || A - B || / || A || over its weights.

    Raises ValueError for files without memories of the same shape."""
    import torch

    layers: dict[int, list[str]] = {}
    for name in one:
        found = re.fullmatch(r"layers\.(\d+)\.memory\.memory\.weights\.\d+", name)
        if found is not None:
            layers.setdefault(int(found[1]), []).append(name)
    if not layers or any(
        name not in two or two[name].shape != one[name].shape for names in layers.values() for name in names
    ):
        raise ValueError("a picture compares memories of the same shape, which these two files do not have")
    rows = []
    for _, names in sorted(layers.items()):
        apart = torch.stack([(one[n].double() - two[n].double()).square().sum((0, 2, 3)) for n in names]).sum(0)
        size = torch.stack([one[n].double().square().sum((0, 2, 3)) for n in names]).sum(0)
        rows.append((apart / size.clamp(min=1e-60)).sqrt())
    return torch.stack(rows)


def _draw_diff(one: "dict[str, Tensor]", two: "dict[str, Tensor]", path: Path) -> None:
    from titans_lm.utils.figures import figure_file

    changes = head_changes(one, two).numpy()
    size = (2.6 + 0.7 * min(changes.shape[1], 24), 1.8 + 0.5 * min(changes.shape[0], 32))
    with figure_file(path, figsize=size) as axis:
        image = axis.imshow(changes, cmap="cividis", aspect="auto", vmin=0)
        axis.set(title="Relative difference of each memory", xlabel="head", ylabel="layer")
        axis.set_xticks(range(changes.shape[1]))
        axis.set_yticks(range(changes.shape[0]))
        axis.figure.colorbar(image, ax=axis)
