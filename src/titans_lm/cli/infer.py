"""`titans infer`: answer prompts, or converse, with a memory of texts read before."""

import argparse
import io
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TextStreamer

from titans_lm.cli.read import show
from titans_lm.inference.generate import answer
from titans_lm.inference.known_files import KnownFiles
from titans_lm.inference.reader import Reader
from titans_lm.models.cache import TitansState
from titans_lm.models.hub import load
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.memory_lock import MemoryLock
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import PlainConsole
from titans_lm.utils.text_file import examine, is_standard_input

HELP = "/save FILE writes the memory, /reset restores the memory of the beginning, /quit or Ctrl-D ends"


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    console = PlainConsole(stderr=True)
    for path in arguments.context:
        examine(path, arguments.errors)  # fail before the model is loaded
    model, tokenizer = load(arguments.model)
    files = KnownFiles()
    with MemoryLock(arguments.save_memory) if arguments.save_memory else nullcontext() as lock:
        state = _remember(arguments, Reader(model, tokenizer, errors=arguments.errors), console, files, lock)
    torch.manual_seed(arguments.seed)
    state.frozen = arguments.frozen
    if arguments.prompt:
        _answer(model, tokenizer, state.select([0] * len(arguments.prompt)), arguments.prompt, _options(arguments))
    if arguments.interactive:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape" if arguments.errors == "strict" else "replace")
        _converse(model, tokenizer, state, console, files, _options(arguments))


def _remember(
    arguments: argparse.Namespace, reader: Reader, console: Console, files: KnownFiles, lock: MemoryLock | None
) -> TitansState:
    """Load the memory and read the context into it. Save it if requested, also when interrupted."""
    if arguments.load_memory:
        reader.state = reader.model.with_pending_read(files.load(arguments.load_memory, reader.model))
    if arguments.save_memory:
        files.check(arguments.save_memory)  # again: another process may have written it before this one had the lock
    try:
        if arguments.context:
            show(reader, arguments.context, console)
    except KeyboardInterrupt:
        if not arguments.save_memory:
            raise
        files.save(reader.state, arguments.save_memory, lock)
        raise KeyboardInterrupt(
            f"the memory so far is in {arguments.save_memory}; continue with --load-memory"
        ) from None
    state = reader.state
    console.print(f"{int(state.position[0]):,} tokens read; the memory takes {state.nbytes / 2**20:.1f} MiB")
    if arguments.save_memory:
        files.save(state, arguments.save_memory, lock)
        console.print(f"memory saved to {arguments.save_memory}")
    return state


def _check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "max_new_tokens")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature must be finite and not negative, got {arguments.temperature}")
    if not (arguments.prompt or arguments.interactive or (arguments.context and arguments.save_memory)):
        raise ValueError(
            "nothing to do: give --prompt TEXT or --interactive, or --context FILE with --save-memory FILE"
        )
    if arguments.prompt and not all(arguments.prompt):
        raise ValueError("--prompt is empty: give at least one character to continue from")
    if arguments.stop and not all(arguments.stop):
        raise ValueError("--stop is empty: give at least one character to stop at")
    if arguments.interactive and any(map(is_standard_input, arguments.context)):
        raise ValueError("--context - and --interactive would both read standard input: give the context as a file")
    if arguments.save_memory:
        files = KnownFiles()
        if arguments.load_memory:
            files.add(arguments.load_memory)
        files.check(arguments.save_memory)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate`."""
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {}
    stop = {"stop_strings": [_unescaped(text) for text in arguments.stop]} if arguments.stop else {}
    return {"max_new_tokens": arguments.max_new_tokens, **sampling, **stop}


def _unescaped(text: str) -> str:
    """Replace the escape sequences of newline, tab, carriage return and backslash, which a shell passes unchanged."""
    escapes = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: escapes[match[1]], text)


def _answer(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    state: TitansState,
    prompts: list[str],
    options: dict[str, Any],
) -> TitansState:
    """Print prompts and answers, streaming a single one. Returns the memory after them."""
    if len(prompts) == 1:
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        _, state = answer(model, tokenizer, state, prompts, streamer=streamer, **options)
        sys.stdout.flush()
        return state
    answers, state = answer(model, tokenizer, state, prompts, **options)
    for prompt, text in zip(prompts, answers, strict=True):
        print(prompt + text)
    return state


def _converse(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    begin: TitansState,
    console: Console,
    files: KnownFiles,
    options: dict[str, Any],
) -> None:
    """Answer prompts from standard input, one per line, until it ends."""
    state = begin
    console.print(HELP)
    while line := _line(console):
        command, _, file = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            state = begin
        elif command == "/save":
            _save(state, file.strip(), console, files)
        else:
            state = _answer(model, tokenizer, state, [line], options)


def _line(console: Console) -> str | None:
    """The next non-blank line; None at the end."""
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return None
        if any("\udc80" <= c <= "\udcff" for c in line):  # invalid bytes, by surrogateescape
            console.print("this line is not text and was not read: it is not UTF-8 (--errors replace reads it)")
        elif line.strip():
            return line


def _save(state: TitansState, file: str, console: Console, files: KnownFiles) -> None:
    """Save the memory. Prints an error rather than end the conversation."""
    try:
        if not file:
            raise ValueError("/save needs the name of a file")
        files.save(state, Path(file))
        console.print(f"memory saved to {file}")
    except (ValueError, OSError) as error:
        console.print(str(error), style="red")
