"""`titans stability`: which forms of the memory stay finite when they train on text that repeats.

A key that comes again and again within a chunk is what makes a memory diverge (README of `ops`), so the text is phrases
that repeat. It is also a task: after a phrase was seen once, a memory that works predicts it.
"""

import argparse
import itertools
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from titans_lm.config import TitansConfig
from titans_lm.model import TitansForCausalLM
from titans_lm.record import provenance, write_json

VOCABULARY, TOKENS, BATCH, LONGEST_PHRASE = 32, 128, 4, 24
LEARNING_RATE = 2e-3
BASE = {
    "variant": "lmm", "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "memory_head_dim": 64, "memory_dim": 128, "num_persistent_tokens": 4,
}  # fmt: skip

# The sweep changes one thing at a time from the default, and the pairs that are said to matter together.
FORMS = [{"memory_form": f, "memory_clip": c} for f in ("plain", "residual") for c in (None, 1.0)]
STEPS_OF_MEMORY = [0.1, 1.0]
DEPTHS, CHUNKS = (1, 2, 3, 4), (1, 16, 64)


def phrases(batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random phrases of 8 to LONGEST_PHRASE tokens, each repeated to `tokens`; True where a token was to be known."""
    length = torch.randint(8, LONGEST_PHRASE + 1, (batch, 1), generator=generator)
    phrase = torch.randint(0, VOCABULARY, (batch, LONGEST_PHRASE), generator=generator)
    time_ = torch.arange(tokens)
    return phrase.gather(1, time_ % length), time_ >= length


def train_on_phrases(
    changes: dict[str, Any], steps: int, read: int, dtype: str = "float32", seed: int = 0
) -> dict[str, Any]:
    """Train a small memory model `steps` steps; what came of it: losses in nats, outer gradient norms.

    `dtype` "bfloat16" trains under autocast. At the end one token is read `read` times. Stops at the first loss or
    gradient that is not finite.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    model = TitansForCausalLM(TitansConfig(**{**BASE, **changes}))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    known, largest, begun = [], 0.0, time.perf_counter()
    finite, step = True, 0
    for step in range(1, steps + 1):  # noqa: B007 - told at the end
        ids, mask = phrases(BATCH, TOKENS, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        finite = math.isfinite(norm) and math.isfinite(float(losses.detach().mean()))
        if not finite:
            break
        largest = max(largest, norm)
        optimizer.step()
        schedule.step()
        known.append(float(losses.detach()[mask[:, 1:]].mean()))
    last = known[-max(1, len(known) // 20) :]
    return {
        "changes": changes, "dtype": dtype, "seed": seed, "finite": finite, "steps": step, "tokens_read": read,
        "loss_of_known_tokens": sum(last) / len(last) if finite else None,
        "largest_gradient_norm": largest, "seconds": round(time.perf_counter() - begun, 1),
        **(_read_long(model, read) if finite else {}),
    }  # fmt: skip


@torch.no_grad()
def _read_long(model: TitansForCausalLM, tokens: int, piece: int = 4096) -> dict[str, Any]:
    """One token repeated `tokens` times, read as one stream: are all logits and the whole memory finite?"""
    model.eval()
    state, finite = model.initial_state(1), True
    for _ in range(-(-tokens // piece)):
        out = model(torch.ones(1, piece, dtype=torch.long), past_key_values=state, logits_to_keep=1)
        finite = finite and bool(torch.isfinite(out.logits).all())
    memories = [layer.memory.memory for layer in state.memories if layer.memory is not None]
    weights = [w for memory in memories for w in memory.weights]
    return {
        "finite_after_reading": finite and all(bool(torch.isfinite(w).all()) for w in weights),
        "largest_weight_after_reading": max(float(w.abs().max()) for w in weights),
    }


def sweep(steps: int) -> list[tuple[dict[str, Any], int, int, str]]:
    """Forms x memory steps x depths at chunk 16; then the default at every depth and chunk, in both precisions."""
    runs = []
    for form, theta, depth in itertools.product(FORMS, STEPS_OF_MEMORY, (2, 4)):
        runs.append(({**form, "memory_lr": theta, "memory_layers": depth}, steps, 16_384, "float32"))
    for depth, chunk, dtype in itertools.product(DEPTHS, CHUNKS, ("float32", "bfloat16")):
        short = max(1, steps // 4) if chunk == 1 else steps  # one token at a time is slow
        runs.append(({"memory_layers": depth, "memory_chunk_size": chunk}, short, 16_384, dtype))
    return runs


def long_runs(steps: int) -> list[tuple[dict[str, Any], int, int, str]]:
    """The default at depth 2 and 4, chunk 16, in both precisions."""
    shapes = itertools.product((2, 4), ("float32", "bfloat16"))
    return [({"memory_layers": depth, "memory_chunk_size": 16}, steps, 100_000, dtype) for depth, dtype in shapes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5000, help="training steps of each run")
    parser.add_argument("--sweep", action="store_true", help="all forms, steps, depths and chunks")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.steps < 1 or arguments.processes < 1:
        raise ValueError("--steps and --processes must be at least 1")
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist")
    runs = (sweep if arguments.sweep else long_runs)(arguments.steps)
    results: list[dict[str, Any]] = []
    console = Console()
    with Progress(console=console) as progress, ProcessPoolExecutor(arguments.processes) as pool:
        bar = progress.add_task("training", total=len(runs))
        for result in pool.map(train_on_phrases, *zip(*runs, strict=True)):
            results.append(result)
            progress.advance(bar)
    write_json(arguments.output, {**provenance(_command(arguments)), "base": BASE, "runs": results})
    console.print(_table(results))


def _command(arguments: argparse.Namespace) -> str:
    return f"titans stability --steps {arguments.steps}{' --sweep' * arguments.sweep} --output {arguments.output}"


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(
        "memory", "dtype", "steps", "finite", "loss of known tokens", "largest gradient norm", "finite after reading"
    )
    words = {True: "yes", False: "NO", None: "-"}
    for r in results:
        loss = "-" if r["loss_of_known_tokens"] is None else f"{r['loss_of_known_tokens']:.3f}"
        name = ", ".join(f"{k.removeprefix('memory_')} {v}" for k, v in r["changes"].items())
        norm = f"{r['largest_gradient_norm']:.1f}"
        after = words[r.get("finite_after_reading")]
        table.add_row(name, r["dtype"], str(r["steps"]), words[r["finite"]], loss, norm, after)
    return table
