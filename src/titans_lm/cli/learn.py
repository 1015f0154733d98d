"""`titans learn`: train a small model, read a long held-out text, and measure what its memory adds.

Uses the source files of the Python standard library; the last ones are held out.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.inference.generate import generate_from, prefill
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_card import load_card
from titans_lm.models.hub import load
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.training.config import Settings, parse_settings
from titans_lm.training.train import earlier, train
from titans_lm.utils.corpora import STDLIB, stdlib_files
from titans_lm.utils.figures import figure_file
from titans_lm.utils.nats import target_nats
from titans_lm.utils.record import check_folder, provenance, write_json
from titans_lm.utils.terminal import PlainConsole
from titans_lm.utils.text_file import read_text

RESET_EVERY = 4096
"""Bytes after which the third reading resets its memory, and over which bits are averaged."""
ROWS = 4
"""Pieces that the third reading reads as rows of a batch: they are independent."""


@dataclass
class Reading:
    """The results of reading the text once."""

    bits: Tensor  # [N], bits per byte of each piece
    surprise: Tensor | None  # [N], mean reconstruction loss of each piece
    state: TitansState | None  # the memory at the end


def run(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes must be above 0, got {arguments.minutes}")
    if arguments.bytes < 10 * RESET_EVERY:
        raise ValueError(f"--bytes must be at least {10 * RESET_EVERY}, got {arguments.bytes}")
    console = PlainConsole()
    output: Path = arguments.output
    memory = output / "memory.safetensors"
    check_folder("--output", output, "learn.json", "learn.png")
    _check_memory(memory)
    files, held_out = _held_out(arguments.bytes)
    if (output / "model" / "model.safetensors").is_file():
        console.print(f"Reading with the model in {output}/model; remove {output} to train again.")
    else:
        console.print(
            f"Training a small MAG for {arguments.minutes:g} minutes on {files - len(held_out)} source files."
        )
        _train(_settings(output / "model", arguments.minutes, len(held_out)))
    model, tokenizer = load(output / "model")
    ids = torch.as_tensor(encode(tokenizer, "".join(map(read_text, held_out))))[: arguments.bytes][None]
    console.print(f"Reading {ids.shape[1]:,} bytes of {len(held_out)} files that were not trained on, as one stream.")
    readings = read_three_ways(model, ids)
    console.print(_table(readings))
    same, sample = _save_load_continue(model, tokenizer, readings["learning"], memory)
    console.print(f"Memory saved, loaded, and continued with: {'identical' if same else 'DIFFERENT'}. It continues:")
    console.print(sample, style="dim")
    command = f"titans learn --minutes {arguments.minutes:g} --bytes {arguments.bytes}"
    write_json(output / "learn.json", {**provenance(command), **summary(readings), "identical_after_loading": same})
    plot(readings, output / "learn.png")
    console.print(f"The figure is {output}/learn.png; the numbers are in {output}/learn.json.")
    if not same:
        raise ValueError("the loaded memory did not continue as the saved one did; please report this")


def _check_memory(path: Path) -> None:
    """Raises ValueError for a file that this command did not write, or that `titans read` continued."""
    if path.exists() and load_card(path)[1].sources:
        raise ValueError(f"{path} has read more texts since, and is not overwritten: move it, or give another --output")


def _train(settings: Settings) -> None:
    """Train, or resume an interrupted training."""
    settings.training.resume = earlier(settings) is not None
    try:
        train(settings)
    except KeyboardInterrupt as interruption:
        if interruption.args:  # a checkpoint was saved
            raise KeyboardInterrupt(f"saved in {settings.training.output_dir}; the same command continues") from None
        raise


def _held_out(size: int) -> tuple[int, list[Path]]:
    """Number of files, and the last of them, which have at least `size` bytes in total."""
    files = stdlib_files()
    count = total = 0
    while total < size and count < len(files) // 2:
        count += 1
        total += files[-count].stat().st_size
    if total < size:
        raise ValueError(f"--bytes {size} is more than half of the standard library's text")
    return len(files), files[-count:]


def _settings(output: Path, minutes: float, held_out: int) -> Settings:
    return parse_settings({
        "model": {"size": "tiny", "variant": "mag", "memory_chunk_size": 32, "memory_dim": 128,
                  "memory_alpha_bias": -5.0},
        "data": {"files": [STDLIB], "held_out": held_out, "sequence_length": 256},
        "training": {
            "output_dir": str(output), "max_minutes": minutes, "max_steps": 100_000, "batch_size": 8,
            "tbptt_steps": 32, "learning_rate": 4e-3, "warmup": 0.03, "final_rate": 0.02,
            "logging_steps": 25, "eval_steps": 100_000, "save_steps": 100_000,
        },
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------ reading


def read_three_ways(model: TitansForCausalLM, ids: Tensor) -> dict[str, Reading]:
    """Read ids `[1, T]` with the memory learning, frozen (no writes), and reset every RESET_EVERY tokens. The first
    token of a piece is never counted: the third reading has no context for it."""
    learning, frozen = model.initial_state(1), model.initial_state(1)
    frozen.frozen = True
    pieces = ids[:, : ids.shape[1] // RESET_EVERY * RESET_EVERY].view(-1, RESET_EVERY)
    return {
        "learning": _read(model, pieces[:, None], learning, "memory learning"),
        "frozen": _read(model, pieces[:, None], frozen, "memory frozen"),
        "reset": _read(model, pieces.split(ROWS), None, f"memory reset every {RESET_EVERY}"),
    }


@torch.no_grad()
def _read(model: TitansForCausalLM, batches: Any, state: TitansState | None, name: str) -> Reading:
    """Read batches `[R, RESET_EVERY]` one after another; without a state each row starts anew."""
    bits, surprise = [], []
    for batch in track(batches, f"{name:25}"):
        ((_, out),) = prefill(model, batch, state if state is not None else model.initial_state(len(batch)))
        loss = target_nats(out.logits[:, :-1], batch[:, 1:])
        bits.append(loss.mean(1) / math.log(2))
        if out.surprise:
            surprise.append(torch.stack([s.loss.mean((1, 2)) for s in out.surprise]).mean(0))
    return Reading(torch.cat(bits), torch.cat(surprise) if surprise else None, state)


@torch.no_grad()
def _save_load_continue(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, reading: Reading, path: Path
) -> tuple[bool, str]:
    """Save and load the memory, and continue from both. Returns whether they agree to the last bit, and the text."""
    assert reading.state is not None
    reading.state.save(path)
    prompt = torch.as_tensor(encode(tokenizer, "\n    def "))[None]
    options = {"max_new_tokens": 120, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before: Any = generate_from(model, tokenizer, reading.state, prompt, **options)
    after: Any = generate_from(model, tokenizer, TitansState.load(path, model), prompt, **options)
    same = torch.equal(before.sequences, after.sequences)
    same = same and all(map(torch.equal, before.logits, after.logits))
    return same, tokenizer.decode(before.sequences[0])


# ------------------------------------------------------------------------------------------------ output


def tenths(values: Tensor) -> list[float]:
    """The mean of each tenth of the text."""
    return [float(part.mean()) for part in values.tensor_split(10)]


def summary(readings: dict[str, Reading]) -> dict[str, Any]:
    """Bits per byte: over the whole text and by tenths."""
    return {
        "bits_per_byte": {name: round(float(r.bits.mean()), 4) for name, r in readings.items()},
        "by_tenths": {name: [round(b, 4) for b in tenths(r.bits)] for name, r in readings.items()},
        "bytes_read": sum(len(r.bits) for r in readings.values()) // len(readings) * RESET_EVERY,
    }


def _table(readings: dict[str, Reading]) -> Table:
    table = Table("bits per byte", *readings, title="Along the text, in tenths: what the memory adds")
    for i, row in enumerate(zip(*(tenths(r.bits) for r in readings.values()), strict=True)):
        table.add_row(f"{i + 1}", *(f"{b:.3f}" for b in row))
    table.add_section()
    table.add_row("all", *(f"{float(r.bits.mean()):.3f}" for r in readings.values()))
    return table


def plot(readings: dict[str, Reading], path: Path) -> None:
    """Bits per byte along the text for each way to read it, and the surprise of the memory that learns."""
    with figure_file(path, 2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 2), layout="tight") as (above, below):
        for (name, reading), colour in zip(readings.items(), ("C0", "C3", "C1"), strict=True):
            kilobytes = (torch.arange(len(reading.bits)) + 0.5) * RESET_EVERY / 1000
            above.plot(kilobytes, reading.bits, color=colour, alpha=0.2, linewidth=0.8)
            style = "--" if name == "reset" else "-"  # lines may coincide
            above.plot(kilobytes, _smooth(reading.bits), style, color=colour, label=f"memory {name}")
        above.set_ylabel("bits per byte")
        above.legend(frameon=False)
        above.set_title("Reading a text that was never seen, as one stream")
        surprise = readings["learning"].surprise
        if surprise is not None:
            kilobytes = (torch.arange(len(surprise)) + 0.5) * RESET_EVERY / 1000
            below.plot(kilobytes, surprise, color="C0", alpha=0.3, linewidth=0.8)
            below.plot(kilobytes, _smooth(surprise), color="C0")
        below.set_ylabel("surprise (reconstruction loss)")
        below.set_xlabel("kilobytes read")


def _smooth(values: Tensor, width: int = 15) -> Tensor:
    """Running mean with a shorter window at the ends."""
    ones = torch.ones(1, 1, width)
    total = torch.nn.functional.conv1d(values[None, None], ones, padding=width // 2)
    count = torch.nn.functional.conv1d(torch.ones_like(values)[None, None], ones, padding=width // 2)
    return (total / count)[0, 0]
