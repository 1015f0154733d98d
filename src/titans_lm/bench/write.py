"""`titans bench write`: the effect of `surprise_threshold` on predictable and unpredictable texts.

Measures share of tokens written, bits per byte, and speed relative to a bypassed memory, for each threshold.
"""

import argparse
import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.bench.race import Entrant, Heat
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import memories
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.tasks.haystack import NOISE
from titans_lm.utils.corpora import stdlib_files
from titans_lm.utils.nats import target_nats
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red
from titans_lm.utils.text_file import read_text


def log(size: int) -> str:
    """Lines of a server's log: constant but for a counter and a rare other value."""
    draw = random.Random(0)
    lines = (
        f"2026-11-21 08:{i // 60 % 60:02d}:{i % 60:02d} INFO request {i:06d} served in "
        f"{draw.choice(('12', '12', '12', '13'))} ms\n"
        for i in itertools.count()
    )
    return _cut(lines, size)


def haystack(size: int) -> str:
    """One line, repeated."""
    return _cut(itertools.repeat(NOISE + "\n"), size)


def sources(size: int) -> str:
    """The last source files of the Python standard library, which training on `python-stdlib` may hold out."""
    return _cut((read_text(file) for file in reversed(stdlib_files())), size)


def _cut(parts: Iterator[str], size: int) -> str:
    text = ""
    while len(text) < size:
        text += next(parts)
    return text[:size]


TEXTS = {"log": log, "haystack": haystack, "sources": sources}


def reading(options: dict[str, Any], setting: Setting) -> Contender:
    """A model with a threshold, without one, or with its memory bypassed, that reads a text."""
    model, tokenizer = load(Path(options["model"]))
    name = options["text"]
    text = TEXTS[name](options["tokens"]) if name in TEXTS else read_text(name)
    ids = torch.as_tensor(encode(tokenizer, text))[: options["tokens"]].to(setting.device)
    model.to(setting.device)
    for memory in memories(model):
        memory.backend, memory.surprise_threshold = setting.backend, options["threshold"]  # type: ignore[assignment]
    without = options["without"]
    written = None if without else share_written(model, ids[:PREFILL_TOKENS], options["threshold"])

    @torch.no_grad()
    def read(_: Any) -> float:
        with bypass_memory(model) if without else contextlib.nullcontext():
            return bits(model, ids) * len(ids) / len(text.encode())

    action = Action(read, report=lambda value: {"bits_per_byte": value}, once=True)
    return Contender({"read": action}, {"tokens_read": len(ids), "written": written})


def bits(model: TitansForCausalLM, ids: Tensor) -> float:
    """Bits per token of ids as one stream, without the first token of each piece."""
    state, total, count = model.initial_state(1), 0.0, 0
    for piece in ids.split(PREFILL_TOKENS):
        logits = model(piece[None], past_key_values=state).logits[0, :-1]
        total += float(target_nats(logits, piece[1:]).sum())
        count += len(piece) - 1
    return total / max(count, 1) / math.log(2)


@torch.no_grad()
def share_written(model: TitansForCausalLM, ids: Tensor, threshold: float | None) -> float:
    """Share of tokens, over layers and heads, whose surprise is above the threshold."""
    if threshold is None:
        return 1.0
    written: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        predictors = [m.predictor for m in memories(model) if m.predictor is not None]
        for predictor in predictors:
            hook = predictor.register_forward_hook(lambda _, __, error: written.append(error > threshold))
            hooks.callback(hook.remove)
        out = model(ids[None], use_cache=True, output_surprise=True)
    if not predictors:
        written = [s.loss > threshold for s in out.surprise]
    return float(torch.stack([x.float().mean() for x in written]).mean())


BUILD = {"reading": reading}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--texts", nargs="+", default=list(TEXTS), help=f"{', '.join(TEXTS)}, which are generated, or text files"
    )
    parser.add_argument("--thresholds", type=float, nargs="+", required=True, help="values of surprise_threshold")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of each text")


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 2, "tokens")
    if any(math.isnan(threshold) for threshold in arguments.thresholds):
        raise ValueError("--thresholds must be numbers, got nan")
    find(arguments.model)
    for text in arguments.texts:
        if text not in TEXTS:
            read_text(text)


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    return [Heat(text, _entrants(text, arguments), arguments.runs, warm_up=False) for text in arguments.texts]


WITHOUT, ALL = "no memory", "all written"


def _entrants(text: str, arguments: argparse.Namespace) -> list[Entrant]:
    settings = [(WITHOUT, None), (ALL, None), *((f"above {tau:g}", tau) for tau in arguments.thresholds)]
    common = {"model": str(arguments.model), "text": text, "tokens": arguments.tokens}
    return [
        Entrant(name, "write", "reading", ["read"], {**common, "threshold": tau, "without": name == WITHOUT})
        for name, tau in settings
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By text and threshold: share written, bits per byte, tokens per second, and overhead over the bypassed memory."""
    results: dict[str, Any] = {}
    for row in rows:
        if not row["repetitions"]:
            continue
        read = row["actions"]["read"]
        text = results.setdefault(row["heat"], {})
        bare = text.get(WITHOUT, {}).get("tokens_per_second")
        rate = row["tokens_read"] / read["seconds"]
        text[row["name"]] = {
            "written": row["written"], "bits_per_byte": row["repetitions"]["read"][-1]["bits_per_byte"],
            "tokens_per_second": rate, "overhead": None if bare is None else bare / rate - 1,
        }  # fmt: skip
    return results


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("text", "written are", "share", "bits per byte", "tokens/s", "over no memory")
    for text, settings in results.items():
        for name, r in settings.items():
            share = "-" if r["written"] is None else f"{100 * r['written']:.1f} %"
            over = "-" if r["overhead"] is None else f"{100 * r['overhead']:+.0f} %"
            table.add_row(text, name, share, f"{r['bits_per_byte']:.3f}", f"{r['tokens_per_second']:,.0f}", over)
    for row in rows:
        if row["error"]:
            table.add_row(row["heat"], row["name"], red(row["error"]))
    return [table]
