"""`titans analyze`: a page that shows what a memory did with a text, figures, and the numbers."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from titans_lm.analyze import figures
from titans_lm.analyze.arrays import Trace
from titans_lm.analyze.attribution import prediction_sources
from titans_lm.analyze.display import label, token_bytes
from titans_lm.analyze.page import PageText, Series, page
from titans_lm.analyze.probe import Probe, probe
from titans_lm.analyze.report import other_model_bits, page_data
from titans_lm.analyze.trace import Span, read_bits, trace
from titans_lm.models.cache import TitansState
from titans_lm.models.hub import load
from titans_lm.models.tokenizer import encode
from titans_lm.utils.record import check_folder, check_least, command_line, provenance, write_json, write_text
from titans_lm.utils.terminal import PlainConsole, shown
from titans_lm.utils.text_file import Errors, examine, name_of, text_pieces

PAGE, NUMBERS, ABOUT = "index.html", "trace.npz", "analyze.json"


def run(arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    check_least(arguments, 2, "tokens")
    what_if = [what_if_of(text) for text in arguments.what_if or ()]
    sources, passage = (passage_of(arguments, name) for name in ("sources", "passage"))
    for text in arguments.text:
        examine(text, arguments.errors)  # before the model is loaded
    check_folder("--out", arguments.out, ABOUT, PAGE, NUMBERS, *_pictures(arguments))
    console = PlainConsole(stderr=True)
    model, tokenizer = load(arguments.model)
    other = None if arguments.compare in (None, "frozen") else load(arguments.compare)
    ids, texts, left = read_tokens(arguments.text, tokenizer, arguments.tokens, arguments.errors)
    for name, span in (("sources", sources), ("passage", passage)):
        if span is not None and span[1] > len(ids):
            raise ValueError(f"--{name} {span[0]}-{span[1]}: the text has only {len(ids):,} tokens")
    spans = [spans_of(one, len(ids)) for one in what_if]
    state = None if arguments.memory is None else TitansState.load(arguments.memory, model)
    started = time.monotonic()
    with _bar(console, (2 + len(spans) + (other is not None)) * len(ids)) as progress:
        found = trace(model, ids, state, progress=progress)
        others = [
            Series(case, read_bits(model, torch.from_numpy(ids), state, [span], progress=progress)[0], span[0])
            for case, span in spans
        ]
        compared = None if arguments.compare is None else Series("memory frozen", found["bits_frozen"])
        if other is not None:
            parts = token_bytes(tokenizer, ids)
            compared = other_model_bits(Path(arguments.compare).name, *other, parts, progress)
    read = time.monotonic() - started
    places = [] if sources is None else list(range(*sources))
    attributions = prediction_sources(model, ids, places, state) if places else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.model.name
    data = page_data(name, model, tokenizer, found, texts, others, compared, attributions)
    write_text(arguments.out / PAGE, page(data))
    found.to_npz(arguments.out / NUMBERS)
    results = summary(found, others, compared)
    if arguments.figures:
        figures.draw(found, arguments.out)
    if attributions:
        figures.arcs(attributions, arguments.out / "sources.png", len(ids))
    if passage is not None:
        held = probe(model, ids, passage, state)
        figures.held(held, arguments.out / "held.png", [label(part) for part in data.parts[slice(*passage)]])
        results["passage"] = held_summary(held)
    size = (arguments.out / PAGE).stat().st_size
    results |= {"seconds": {"reading": round(read, 2), "all": round(time.monotonic() - begun, 2)}, "page_bytes": size}
    write_json(arguments.out / ABOUT, {**provenance(command_line("analyze", arguments)), **results})
    if left:
        console.print(f"Shown are the first {len(ids):,} tokens, as --tokens says; the texts have more.")
    bits, frozen = (float(np.nanmean(found[name])) for name in ("bits", "bits_frozen"))
    console.print(f"{len(ids):,} tokens: {bits:.3f} bits each, {frozen:.3f} with the memory frozen.")
    print(shown(f"Open {arguments.out / PAGE} in a browser; {NUMBERS} beside it has the numbers."))


def passage_of(arguments: argparse.Namespace, name: str) -> Span | None:
    """The tokens of a flag A-B, from A to before B. Raises ValueError for anything else."""
    text = getattr(arguments, name)
    if text is None:
        return None
    first, _, end = text.partition("-")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--{name} {text}: give A-B with A below B, in tokens from 0")
    return int(first), int(end)


def what_if_of(text: str) -> tuple[str, int, int | None]:
    """`frozen:START`, or `skip:A-B`, as its kind, first token and end. Raises ValueError for anything else."""
    kind, _, numbers = text.partition(":")
    first, dash, end = numbers.partition("-")
    if kind == "frozen" and first.isdecimal() and not dash:
        return kind, int(first), None
    if kind == "skip" and first.isdecimal() and end.isdecimal() and int(first) < int(end):
        return kind, int(first), int(end)
    raise ValueError(f"--what-if {text}: give frozen:START, or skip:A-B with A below B, in tokens from 0")


def spans_of(what_if: tuple[str, int, int | None], tokens: int) -> tuple[str, Span]:
    """A label, and the tokens in which the memory is frozen. Raises ValueError if the text does not have them."""
    kind, first, end = what_if
    name = f"{kind}:{first}" + ("" if end is None else f"-{end}")
    if first >= tokens or (end or 0) > tokens:
        raise ValueError(f"--what-if {name}: the text has only {tokens:,} tokens")
    if end is None:
        return f"memory frozen from {first:,}", (first, tokens)
    return f"{first:,} to {end:,} not written", (first, end)


def read_tokens(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, most: int, errors: Errors
) -> tuple[NDArray[np.int64], list[PageText], bool]:
    """The tokens of the files, one after another, at most `most`; the texts that they are of; whether more is left.

    Raises ValueError for a single token, which nothing predicts."""
    parts, texts, used = list[NDArray[np.int64]](), list[PageText](), 0
    for file in files:
        before = used
        for piece in text_pieces(file, errors=errors):
            if used > most:
                break
            parts.append(encode(tokenizer, piece))
            used += len(parts[-1])
        texts.append(PageText(name_of(file), min(used, most) - min(before, most)))
    if used < 2:
        raise ValueError(f"{files[0]} has one token; give a text with more")
    return np.concatenate(parts)[:most], [text for text in texts if text.tokens], used > most


def _pictures(arguments: argparse.Namespace) -> list[str]:
    """The names of the figures that these arguments ask for."""
    names = [*figures.FIGURES] if arguments.figures else []
    names += ["sources"] * (arguments.sources is not None) + ["held"] * (arguments.passage is not None)
    return [f"{name}.{kind}" for name in names for kind in ("png", "svg")]


def summary(found: Trace, others: list[Series], compared: Series | None) -> dict[str, Any]:
    """The result in numbers."""
    results: dict[str, Any] = {
        "tokens": len(found),
        "bits": {name: float(np.nanmean(found[name])) for name in ("bits", "bits_frozen") if name in found},
        "what_if": [
            {"label": one.label, "bits_from_there": float(np.nanmean(one.bits[one.start :]))} for one in others
        ],
    }
    if compared is not None:
        results["compared"] = {"label": compared.label, "bits": float(np.nanmean(compared.bits))}
    return results


def held_summary(held: Probe) -> dict[str, Any]:
    """What is held of a passage, by layer and head; a half-life is None where the text ends before."""
    lives = [[life if np.isfinite(life) else None for life in layer] for layer in held.half_life().tolist()]
    ranks = np.median(held.rank, 0).tolist()
    errors = held.error.mean(1)[[0, 1, -1]].tolist()
    return {"tokens": list(held.passage), "half_life": lives, "median_rank": ranks, "candidates": held.candidates,
            "error": dict(zip(("before", "after", "at_the_end"), errors, strict=True))}  # fmt: skip


class _bar:
    """A context with a progress bar of `total` tokens; it gives what advances it."""

    def __init__(self, console: PlainConsole, total: int):
        columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bars, self.total = Progress(*columns, console=console), total

    def __enter__(self) -> Callable[[int], None]:
        bar = self.bars.__enter__().add_task("", total=self.total)
        return lambda tokens: self.bars.advance(bar, tokens)

    def __exit__(self, *error: object) -> None:
        self.bars.__exit__(*error)  # type: ignore[arg-type]
