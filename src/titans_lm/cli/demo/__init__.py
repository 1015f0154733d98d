"""`titans demo`: shipped models find a needle in a haystack of any length, and learn a text while reading it."""

import argparse
from pathlib import Path

from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.utils.record import check_folder, check_least, command_line, provenance, write_json
from titans_lm.utils.terminal import PlainConsole

TEXT_TOKENS = 65_536
"""Default number of tokens of the texts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "source files of Python's own library that the model was not trained on"
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help=f"texts for the second part (default: {default})"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the haystack, with question and answer")
    parser.add_argument(
        "--haystack", default="words", help="words: random words; noise: one line repeated; text: sentences"
    )
    parser.add_argument("--depth", type=float, default=30.0, help="depth of the needle in percent; 0 is the beginning")
    parser.add_argument("--seed", type=int, default=0, help="seed of key, value and haystack")
    parser.add_argument("--model", type=Path, default=Path("needle"), help=f"for the haystack: {MODEL_HELP}")
    parser.add_argument("--text-model", type=Path, default=Path("streams"), help="model for the texts")
    parser.add_argument(
        "--text-tokens", type=int, default=TEXT_TOKENS, help="maximum tokens of the texts; 0: skip the second part"
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for figures and results")


def run(arguments: argparse.Namespace) -> None:
    from titans_lm.cli.demo import learning, needle
    from titans_lm.models.hub import load
    from titans_lm.models.model_identity import identity

    check_least(arguments, 0, "seed", "text_tokens")
    others = ("demo.png", needle.PAGE, *(("learning.png", "learning.json") if arguments.text_tokens else ()))
    check_folder("--output", arguments.output, "demo.json", *others)
    folder, console = find(arguments.model), PlainConsole()
    task = needle.task_for(folder, arguments.tokens, arguments.haystack, arguments.depth)
    model, tokenizer = load(find(arguments.text_model))
    output, origin = arguments.output, provenance(command_line("demo", arguments, ["files"]))
    hidden, reading, needle_results = needle.show(folder, task, arguments.seed, console)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "demo.json", {**origin, **needle_results})  # first: by it the folder is known as the demo's
    needle.plot(hidden, reading, output / "demo.png")
    written = "demo.png and demo.json"
    if arguments.text_tokens:
        curves = learning.read_text(model, tokenizer, arguments.files, arguments.text_tokens, console)
        learning.plot(curves, output / "learning.png")
        results = learning.summary(curves)
        learning.print_summary(results, console)
        write_json(output / "learning.json", {**origin, **identity(model), **results})
        written += ", learning.png and learning.json"
    needle.write_page(folder, task, arguments.seed, output / needle.PAGE)
    console.print(f"In {output}: {written}.")
    console.print(f"Open {output / needle.PAGE} in a browser: it shows what the memory did with a shorter haystack.")
