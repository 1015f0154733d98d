"""`titans stability`: which forms of the memory stay finite when they train on text that repeats.

A key that repeats within a chunk makes a memory diverge (README of `ops`), so the text consists of repeated phrases. It
is also a task: after one repetition a working memory predicts the phrase.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.nats import target_nats
from titans_lm.utils.record import check_least, provenance, write_json
from titans_lm.utils.terminal import PlainConsole

VOCABULARY, TOKENS, BATCH, LONGEST_PHRASE = 32, 128, 4, 24
LEARNING_RATE = 2e-3
BASE = {
    "variant": "lmm", "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "memory_head_dim": 64, "memory_dim": 128, "num_persistent_tokens": 4,
}  # fmt: skip

# The sweep changes one thing at a time from the default, and pairs that are expected to interact.
FORMS = [{"memory_form": f, "memory_clip": c} for f in ("plain", "residual") for c in (None, 1.0)]
STEPS_OF_MEMORY = [0.1, 1.0]
DEPTHS, CHUNKS = (1, 2, 3, 4), (1, 16, 64)


def phrases(batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random phrases of 8 to LONGEST_PHRASE tokens, each repeated to `tokens` tokens; and a mask, True where a token is
    predictable."""
    length = torch.randint(8, LONGEST_PHRASE + 1, (batch, 1), generator=generator)
    phrase = torch.randint(0, VOCABULARY, (batch, LONGEST_PHRASE), generator=generator)
    time_ = torch.arange(tokens)
    return phrase.gather(1, time_ % length), time_ >= length


def train_on_phrases(
    changes: dict[str, Any], steps: int, read: int, dtype: str = "float32", seed: int = 0
) -> dict[str, Any]:
    """Train a small memory model for `steps` steps. Returns losses in nats and outer gradient norms.

    `dtype` "bfloat16" trains under autocast. At the end one token is read `read` times. Stops at the
    first loss or gradient that is not finite.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    model = TitansForCausalLM(TitansConfig(**{**BASE, **changes}))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    losses_of_known, largest, begun = [], 0.0, time.perf_counter()
    finite, step = True, 0
    for step in range(1, steps + 1):  # noqa: B007 - reported at the end
        ids, mask = phrases(BATCH, TOKENS, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids, use_cache=False).logits[:, :-1]
        losses = target_nats(logits, ids[:, 1:])
        optimizer.zero_grad()
        losses.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        finite = math.isfinite(norm) and math.isfinite(float(losses.detach().mean()))
        if not finite:
            break
        largest = max(largest, norm)
        optimizer.step()
        schedule.step()
        losses_of_known.append(float(losses.detach()[mask[:, 1:]].mean()))
    last = losses_of_known[-max(1, len(losses_of_known) // 20) :]
    return {
        "changes": changes, "dtype": dtype, "seed": seed, "finite": finite, "steps": step, "tokens_read": read,
        "loss_of_known_tokens": sum(last) / len(last) if finite else None,
        "largest_gradient_norm": largest, "seconds": round(time.perf_counter() - begun, 1),
        **(_read_long(model, read) if finite else {}),
    }  # fmt: skip


@torch.no_grad()
def _read_long(model: TitansForCausalLM, tokens: int, piece: int = PREFILL_TOKENS) -> dict[str, Any]:
    """Read one token `tokens` times as one stream: are all logits and the whole memory finite?"""
    model.eval()
    state, finite = model.initial_state(1), True
    for _ in range(-(-tokens // piece)):
        out = model(torch.ones(1, piece, dtype=torch.long), past_key_values=state, logits_to_keep=1)
        finite = finite and bool(torch.isfinite(out.logits).all())
    memories = state.memory_states()
    weights = [w for memory in memories for w in memory.weights]
    return {
        "finite_after_reading": finite and all(bool(torch.isfinite(w).all()) for w in weights),
        "largest_weight_after_reading": max(float(w.abs().max()) for w in weights),
    }


Run = tuple[dict[str, Any], int, int, str]
"""Arguments of `train_on_phrases`: changes, steps, tokens to read, dtype."""


def sweep(steps: int) -> list[Run]:
    """Forms x memory steps x depths at chunk 16; then the default at every depth and chunk, in both precisions."""
    runs: list[Run] = []
    for form, theta, depth in itertools.product(FORMS, STEPS_OF_MEMORY, (2, 4)):
        runs.append(({**form, "memory_lr": theta, "memory_layers": depth}, steps, 16_384, "float32"))
    for depth, chunk, dtype in itertools.product(DEPTHS, CHUNKS, ("float32", "bfloat16")):
        short = max(1, steps // 4) if chunk == 1 else steps  # one token at a time is slow
        runs.append(({"memory_layers": depth, "memory_chunk_size": chunk}, short, 16_384, dtype))
    return runs


def long_runs(steps: int) -> list[Run]:
    """The default at depth 2 and 4, chunk 16, in both precisions."""
    shapes = itertools.product((2, 4), ("float32", "bfloat16"))
    return [({"memory_layers": depth, "memory_chunk_size": 16}, steps, 100_000, dtype) for depth, dtype in shapes]


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "steps", "processes")
    if arguments.output.exists() and not arguments.output.is_file():
        raise ValueError(f"--output {arguments.output} is not a file; give the name of one")
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output {arguments.output}: the folder {arguments.output.parent} does not exist")
    runs = (sweep if arguments.sweep else long_runs)(arguments.steps)
    record = _record(arguments)
    try:
        _fill(record, runs, arguments)
    except KeyboardInterrupt:
        done = f"{len(record['runs'])} of {len(runs)} runs are in {arguments.output}"
        raise KeyboardInterrupt(f"{done}; the same command continues") from None
    PlainConsole().print(_table(record["runs"]))


def _record(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record in the output file, or a new one. Raises ValueError for other settings or another kind of file."""
    path, settings = arguments.output, f"titans stability --steps {arguments.steps}{' --sweep' * arguments.sweep}"
    if not path.exists():
        return {**provenance(f"{settings} --output {path}"), "base": BASE, "runs": []}
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        same = record["base"] == BASE and record["command"].partition(" --output ")[0] == settings
        same = same and all(map(_key_of, record["runs"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a result file of this command; give another name") from None
    if not same:
        raise ValueError(f"{path} has results of other settings ({record['command']}); give another name")
    return record


def _fill(record: dict[str, Any], runs: list[Run], arguments: argparse.Namespace) -> None:
    """Run what `record` lacks, and write it after each run."""
    order = [(changes, dtype) for changes, _, _, dtype in runs]
    done = [_key_of(result) for result in record["runs"]]
    missing = [run for run, place in zip(runs, order, strict=True) if place not in done]
    with Progress() as progress, ProcessPoolExecutor(arguments.processes, initializer=_default_signals) as pool:
        bar = progress.add_task("training", total=len(runs), completed=len(done))
        try:
            for future in as_completed([pool.submit(train_on_phrases, *run) for run in missing]):
                record["runs"].append(future.result())
                record["runs"].sort(key=lambda result: order.index(_key_of(result)))
                write_json(arguments.output, record)
                progress.advance(bar)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _default_signals() -> None:
    """Initializer of a worker, which leaves it to the command to report an interruption."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _key_of(result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The key of a run."""
    return result["changes"], result["dtype"]


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
