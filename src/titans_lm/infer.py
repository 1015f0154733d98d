"""`titans infer`: read texts of any length in constant memory, remember them, and go on."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TextStreamer

from titans_lm.config import TitansConfig
from titans_lm.data import encode, text_pieces
from titans_lm.model import TitansForCausalLM
from titans_lm.state import TitansState

PIECE = 4096
"""Tokens of one call: enough to keep the processor busy; memory use does not depend on the text's length."""


def load(folder: Path) -> tuple[TitansForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer that `titans train` or `save_pretrained` wrote.

    Raises ValueError for a folder that is not a Titans checkpoint, or whose files are damaged.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model: it has no config.json; `titans train` writes such folders")
    try:
        kind = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
        if kind != TitansConfig.model_type:
            raise ValueError(f"its config.json is of a model of type {kind!r}")
        model, report = TitansForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{folder} cannot be loaded as a Titans model: {error}") from error
    foreign = sorted(report["missing_keys"] | report["unexpected_keys"])
    if foreign:
        raise ValueError(
            f"{folder} does not hold the weights of this model: {foreign[0]!r} does not match its config.json"
        )
    return model.eval(), tokenizer


@torch.no_grad()
def read(model: TitansForCausalLM, ids: Tensor, state: TitansState, piece: int = PIECE) -> Iterator[tuple[Tensor, Any]]:
    """Read ids `[B, T]` on from `state`, which is updated, `piece` tokens a call; yields (ids, output) of each call.

    Outputs have all logits and the surprise of each layer.
    """
    for part in ids.split(piece, 1):
        yield part, model(part, past_key_values=state, output_surprise=True)


@torch.no_grad()
def remember(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, path: Path, console: Console
) -> None:
    """Read the text file `path` into `state`, of any length, with progress and rate; raises as `text_pieces` does."""
    columns = [
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    before, begun = int(state.position[0]), time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"reading {path.name}", total=path.stat().st_size, rate="")
        for text in text_pieces(path):
            ids = torch.as_tensor(encode(tokenizer, text))[None].to(model.device)
            for part in ids.split(PIECE, 1):
                model(part, past_key_values=state, logits_to_keep=1)
                tokens = int(state.position[0]) - before
                rate = f"{tokens:,} tokens, {tokens / (time.monotonic() - begun):,.0f} a second"
                progress.update(bar, advance=len(text.encode()) * part.shape[1] / ids.shape[1], rate=rate)


def go_on(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, prompt: Tensor, **options: Any
) -> Tensor:
    """Generate after `prompt` `[1, T]`, T >= 1, which the state has not read; returns prompt and continuation.

    `options` are those of transformers' `generate`. The state itself is left as it is.
    """
    return model.generate(prompt, past_key_values=state.continuation(), pad_token_id=tokenizer.pad_token_id, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a folder that titans train wrote")
    parser.add_argument("--context", type=Path, nargs="+", default=[], help="texts to read first, in this order")
    parser.add_argument("--prompt", help="text to go on from; none: nothing is generated")
    parser.add_argument("--load-memory", type=Path, help="go on from this memory file")
    parser.add_argument("--save-memory", type=Path, help="write what was learned from the context to this file")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {arguments.temperature}")
    if arguments.prompt is None and not (arguments.context and arguments.save_memory):
        raise ValueError("nothing to do: give --prompt TEXT, or --context FILE with --save-memory FILE, or both")
    if arguments.prompt == "":
        raise ValueError("--prompt is empty: give at least one character to go on from")
    if arguments.save_memory and not arguments.save_memory.absolute().parent.is_dir():
        raise ValueError(f"--save-memory {arguments.save_memory}: its folder does not exist")
    for path in arguments.context:
        next(text_pieces(path))  # all can be read, before the work begins
    model, tokenizer = load(arguments.model)
    state = TitansState.load(arguments.load_memory, model) if arguments.load_memory else model.initial_state(1)
    for path in arguments.context:
        remember(model, tokenizer, state, path, console)
    read_so_far = int(state.position[0])
    console.print(f"{read_so_far:,} tokens read; the memory takes {state.nbytes / 2**20:.1f} MiB")
    if arguments.save_memory:
        state.save(arguments.save_memory)
        console.print(f"memory saved to {arguments.save_memory}")
    if arguments.prompt is not None:
        _answer(model, tokenizer, state, arguments)


def _answer(
    model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, arguments: argparse.Namespace
) -> None:
    torch.manual_seed(arguments.seed)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {}
    prompt = torch.as_tensor(encode(tokenizer, arguments.prompt))[None].to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    go_on(model, tokenizer, state, prompt, max_new_tokens=arguments.max_new_tokens, streamer=streamer,
          **(sampling or {"do_sample": False}))  # fmt: skip
    sys.stdout.flush()
