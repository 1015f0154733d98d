"""`titans analyze`: a page that shows what a memory did with a text, figures, and the numbers."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from titans_lm.analyze.arrays import Trace
from titans_lm.analyze.display import token_bytes
from titans_lm.analyze.page import PageData, PageText, Series, page
from titans_lm.analyze.trace import Span, read_bits, trace
from titans_lm.models.cache import TitansState
from titans_lm.models.hub import load
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.utils.record import check_least, command_line, provenance, write_json, write_text
from titans_lm.utils.terminal import PlainConsole, shown
from titans_lm.utils.text_file import Errors, examine, name_of, text_pieces

PAGE, NUMBERS, ABOUT = "index.html", "trace.npz", "analyze.json"


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 2, "tokens")
    what_if = [what_if_of(text) for text in arguments.what_if]
    for text in arguments.text:
        examine(text, arguments.errors)  # before the model is loaded
    check_folder(arguments.out)
    console = PlainConsole(stderr=True)
    model, tokenizer = load(arguments.model)
    ids, texts, left = read_tokens(arguments.text, tokenizer, arguments.tokens, arguments.errors)
    spans = [spans_of(one, len(ids)) for one in what_if]
    state = None if arguments.memory is None else TitansState.load(arguments.memory, model)
    with _bar(console, (2 + len(spans)) * len(ids)) as progress:
        found = trace(model, ids, state, progress=progress)
        others = [
            Series(label, read_bits(model, torch.from_numpy(ids), state, [span], progress=progress)[0], span[0])
            for label, span in spans
        ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(arguments.model, model, found, texts)
    data = PageData(
        f"{arguments.model.name} reads {', '.join(text.name for text in texts)}", found,
        token_bytes(tokenizer, ids), vocabulary_of(tokenizer, found), texts, facts, others,
    )  # fmt: skip
    write_text(arguments.out / PAGE, page(data))
    found.to_npz(arguments.out / NUMBERS)
    write_json(arguments.out / ABOUT, {**provenance(command_line("analyze", arguments)), **summary(found, others)})
    if left:
        console.print(f"Shown are the first {len(ids):,} tokens, as --tokens says; the texts have more.")
    bits, frozen = (float(np.nanmean(found[name])) for name in ("bits", "bits_frozen"))
    console.print(f"{len(ids):,} tokens: {bits:.3f} bits each, {frozen:.3f} with the memory frozen.")
    print(shown(f"Open {arguments.out / PAGE} in a browser; {NUMBERS} beside it has the numbers."))


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
    """The tokens of the files, one after another, at most `most`; the texts that they are of; whether more is left."""
    parts, texts, used = list[NDArray[np.int64]](), list[PageText](), 0
    for file in files:
        before = used
        for piece in text_pieces(file, errors=errors):
            if used > most:
                break
            parts.append(encode(tokenizer, piece))
            used += len(parts[-1])
        texts.append(PageText(name_of(file), min(used, most) - min(before, most)))
    return np.concatenate(parts)[:most], [text for text in texts if text.tokens], used > most


def check_folder(out: Path) -> None:
    """Raises ValueError if `out` is a file, or a folder with files of others by the names of this command's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder; give the name of one")
    for name in (PAGE, NUMBERS):
        if (out / name).exists() and not (out / ABOUT).exists():
            raise ValueError(f"{out / name} is not of this command; give --out another folder")


def facts_of(name: Path, model: TitansForCausalLM, found: Trace, texts: list[PageText]) -> dict[str, str]:
    """What the top of a page says."""
    bits = f"{float(np.nanmean(found['bits'])):.3f} a token"
    if "bits_frozen" in found:
        bits += f", {float(np.nanmean(found['bits_frozen'])):.3f} with the memory frozen"
    threshold = model.config.surprise_threshold
    facts = {
        "model": f"{name.name} ({model.config.variant}, {found.layers} layers, {found.heads} memory heads)",
        "text": ", ".join(text.name for text in texts),
        "tokens": f"{len(found):,}",
        "bits": bits,
    }
    if threshold is not None and "theta" in found:
        facts["written"] = f"{float((found['theta'] > 0).mean()):.1%} (surprise above {threshold:g})"
    return facts | {"made": datetime.now(UTC).strftime("%Y-%m-%d")}


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, found: Trace) -> dict[int, bytes | str]:
    """The bytes of each token that was predicted."""
    seen = [found[name].ravel() for name in ("prediction", "prediction_frozen") if name in found]
    ids = np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int64)
    ids = ids[ids >= 0].astype(np.int64)
    return dict(zip(ids.tolist(), token_bytes(tokenizer, ids), strict=True))


def summary(found: Trace, others: list[Series]) -> dict[str, object]:
    """The result in numbers."""
    return {
        "tokens": len(found),
        "bits": {name: float(np.nanmean(found[name])) for name in ("bits", "bits_frozen") if name in found},
        "what_if": [
            {"label": one.label, "bits_from_there": float(np.nanmean(one.bits[one.start :]))} for one in others
        ],
    }


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
