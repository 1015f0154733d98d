"""Flags of verbs whose modules load torch, so that help and argument errors do not load it."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from titans_lm.models.model_files import MODEL_HELP
from titans_lm.utils.text_file import Errors

ERRORS_HELP = "strict: refuse files that are not UTF-8; replace: read invalid bytes as U+FFFD"
READ_MODES = ("learning", "frozen", "reset")
"""The values of `Mode` of the reader, which loads torch."""
LEARN_BYTES = 1_000_000


def add_kinds(
    parser: argparse.ArgumentParser,
    kinds: dict[str, str],
    chosen: str | None,
    add_arguments: Callable[[argparse.ArgumentParser, str], None],
) -> None:
    """A subparser per kind, with flags only for the `chosen` one (None: for all), because its module loads torch."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, text in kinds.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if chosen in (None, name):
            add_arguments(subparser, name)


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/titans.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="change one value, such as training.max_steps=100; may be repeated")  # fmt: skip


def graft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="the folder or Hub name of a pretrained causal language model of transformers")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write: the graft, without its base")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N",
                        help="the layers that get a memory, counted from 0; default: all")  # fmt: skip
    parser.add_argument("--window-size", type=int, metavar="TOKENS",
                        help="cut attention to this many tokens; default: as the base has it")  # fmt: skip
    parser.add_argument("--lora-rank", type=int, metavar="N", help="train LoRA of this rank on the base's linear maps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="another key of its configuration, such as memory_dim=256; may be repeated")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the memory's first weights")


def infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--context", type=Path, nargs="+", default=[], help="texts to read first; -: standard input")
    parser.add_argument("--prompt", nargs="+", help="text to continue; each of several gets a fork of the memory")
    parser.add_argument(
        "--interactive", action="store_true", help="read prompts from standard input, one per line, into one memory"
    )
    parser.add_argument("--load-memory", type=Path, help="start from this memory file")
    parser.add_argument(
        "--save-memory", type=Path, help="write the memory after the context to this file: a new one, or the loaded one"
    )
    parser.add_argument("--frozen", action="store_true", help="read prompts without writing to the memory")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="maximum tokens of an answer")
    parser.add_argument(
        "--stop", nargs="+", metavar="TEXT", help=r"end an answer at one of these; \n, \t, \r and \\ as in Python"
    )
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")


def read(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", type=Path, nargs="+", metavar="FILE", help="text files, read in this order; -: standard input"
    )
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, help="memory file to load, if it exists, and to write")
    listed = "list the N lines with most bits per byte, given the memory and the lines before"
    parser.add_argument("--surprising", type=int, metavar="N", help=listed)
    parser.add_argument(
        "--mode",
        choices=READ_MODES,
        default="learning",
        help="learning: write; frozen: read only; reset: reset the memory before each text",
    )
    parser.add_argument("--save-seconds", type=float, default=30.0, help="time between saves")
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)
    parser.add_argument(
        "--abandon",
        action="store_true",
        help="do not resume an interrupted reading; keep what the memory learned from it",
    )


def analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="texts, read in this order; -: standard input",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the page and the numbers")
    parser.add_argument("--memory", type=Path, help="memory file to begin with; it stays as it is")
    parser.add_argument("--tokens", type=int, default=100_000, help="most tokens that are read and shown")
    parser.add_argument(
        "--what-if", nargs="+", metavar="CASE",
        help="frozen:START, memory frozen from this token on; skip:A-B, this passage not written",
    )  # fmt: skip
    parser.add_argument(
        "--compare",
        metavar="MODEL",
        help="another model beside this one, from its own beginning; frozen: this one, frozen",
    )
    parser.add_argument("--sources", metavar="A-B", help="show where the predictions of these tokens come from")
    parser.add_argument("--passage", metavar="A-B", help="draw what the memory holds of this passage later (held.png)")
    parser.add_argument("--figures", action="store_true", help="draw figures too, as PNG and SVG")
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)


def memory(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|verify|fork|diff")
    show = commands.add_parser("show", help="show model, texts and sizes of a memory file")
    verify = commands.add_parser("verify", help="check that a file is complete, finite, and of this model")
    verify.add_argument("--model", type=Path, help=MODEL_HELP)
    fork = commands.add_parser("fork", help="copy a file; the copy records its origin")
    diff = commands.add_parser("diff", help="compare two files; exit status 1 if they differ")
    for command in (show, verify, fork, diff):
        command.add_argument("file", type=Path, help="a memory file")
    fork.add_argument("to", type=Path, help="the file to write; it must not exist")
    diff.add_argument("other", type=Path, help="the memory file to compare with")
    diff.add_argument("--picture", type=Path, metavar="FILE.png", help="draw which heads changed most")


def learn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("learn"), help="folder for model, memory and figure")
    parser.add_argument("--minutes", type=float, default=2.0, help="training time")
    parser.add_argument("--bytes", type=int, default=LEARN_BYTES, help="length of the text to read")


def stability(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5000, help="training steps per run")
    parser.add_argument("--sweep", action="store_true", help="all forms, steps, depths and chunks")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="parallel runs, one thread each")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file, written after each run; an existing one is continued"
    )
