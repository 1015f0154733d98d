"""A memory that is made once and asked later, from a script.

    python examples/ask.py learn notes.memory book.txt     # reads the text once, saves what was learned
    python examples/ask.py ask notes.memory "It was"       # another process, another day: does not read the text again
    python examples/ask.py compare notes.memory book.txt   # bits per byte of a text, with this memory and without

The memory file has the same size whatever was read. Asking reads a fork of it, so no question changes the file.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from titans_lm import Reader, TitansForCausalLM, TitansState, load


def learn(model_name: str, memory: Path, texts: list[Path]) -> int:
    """Read the texts into the memory file, which is made or gone on with -> tokens that it has read in all."""
    model, tokenizer = load(model_name)
    reader = Reader(model, tokenizer, memory=memory)
    reader.read(*texts)
    return int(reader.state.position)


def ask(model_name: str, memory: Path, prompts: list[str], new_tokens: int = 60) -> list[str]:
    """What the model says after each prompt, each on a fork of the memory."""
    model, tokenizer = load(model_name)
    return Reader(model, tokenizer, memory=memory).ask(*prompts, max_new_tokens=new_tokens)


@torch.no_grad()
def bits_per_token(model: TitansForCausalLM, ids: Tensor, state: TitansState) -> float:
    """Mean bits of the tokens `[1, T]` after the first, each given all before it. Updates `state`."""
    loss = model(ids, labels=ids, past_key_values=state).loss
    return float(loss) / math.log(2)


def compare(model_name: str, memory: Path, text: Path) -> tuple[float, float]:
    """Bits per token of a text, begun with the memory and begun without one."""
    model, tokenizer = load(model_name)
    ids = tokenizer(text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids
    return (
        bits_per_token(model, ids, TitansState.load(memory, model)),
        bits_per_token(model, ids, model.initial_state(1)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="streams", help="a model folder, or the name of a shipped model")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rest in (("learn", "text"), ("ask", "prompt"), ("compare", "text")):
        command = commands.add_parser(name)
        command.add_argument("memory", type=Path)
        if name == "compare":
            command.add_argument(rest, type=Path)
        else:
            command.add_argument(f"{rest}s", type=Path if rest == "text" else str, nargs="+", metavar=rest)
    arguments = parser.parse_args()
    if arguments.command == "learn":
        count = learn(arguments.model, arguments.memory, arguments.texts)
        print(f"{arguments.memory}: {count:,} tokens read, {arguments.memory.stat().st_size:,} bytes")
    elif arguments.command == "ask":
        for prompt, said in zip(
            arguments.prompts, ask(arguments.model, arguments.memory, arguments.prompts), strict=True
        ):
            print(f"{prompt}{said}")
    else:
        with_memory, without = compare(arguments.model, arguments.memory, arguments.text)
        print(f"bits per token: {with_memory:.3f} with the memory, {without:.3f} without")


if __name__ == "__main__":
    main()
