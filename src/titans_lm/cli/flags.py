"""Flags of the verbs whose modules load torch: help and errors of a command line need nothing but these."""

import argparse
import os
from pathlib import Path
from typing import get_args

from titans_lm.models.model_files import MODEL_HELP
from titans_lm.utils.text_file import Errors

ERRORS_HELP = "replace: what is not UTF-8 in a file is read as U+FFFD; strict: such a file is refused"
READ_MODES = ("learning", "frozen", "reset")
"""`Mode` of the reader, which loads torch."""
LEARN_BYTES = 1_000_000


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/titans.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="change one value, such as training.max_steps=100; may be repeated")  # fmt: skip


def infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--context", type=Path, nargs="+", default=[], help="texts to read first; -: standard input")
    parser.add_argument("--prompt", nargs="+", help="text to go on from; of several each has a fork of the memory")
    parser.add_argument("--interactive", action="store_true", help="converse: a prompt a line, all in one memory")
    parser.add_argument("--load-memory", type=Path, help="go on from this memory file")
    parser.add_argument("--save-memory", type=Path, help="write what was learned from the context to this file")
    parser.add_argument("--frozen", action="store_true", help="prompts are read without writing to the memory")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument(
        "--stop",
        nargs="+",
        metavar="TEXT",
        help=r"an answer ends with one of these; \n, \t, \r and \\ are as in Python",
    )
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)


def read(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", type=Path, nargs="+", metavar="FILE", help="text files, read in this order; -: standard input"
    )
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, help="the file to go on from, if it exists, and to write")
    listed = "list the N lines that took most bits per byte: with a memory of earlier texts, what is new since then"
    parser.add_argument("--surprising", type=int, metavar="N", help=listed)
    parser.add_argument("--mode", choices=READ_MODES, default="learning", help="reset: forget before each text")
    parser.add_argument("--save-seconds", type=float, default=30.0, help="at most so much is lost at a kill")
    parser.add_argument("--errors", choices=get_args(Errors), default="strict", help=ERRORS_HELP)
    parser.add_argument("--abandon", action="store_true", help="do not go on with what was interrupted")


def memory(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|verify|fork|diff")
    show = commands.add_parser("show", help="what a file remembers: model, texts, sizes")
    verify = commands.add_parser("verify", help="whether a file is whole, finite, and belongs to a model")
    verify.add_argument("--model", type=Path, help=MODEL_HELP)
    fork = commands.add_parser("fork", help="a copy to go on from, which says where it came from")
    diff = commands.add_parser("diff", help="where two files differ; exit status 1 if they do")
    for command in (show, verify, fork, diff):
        command.add_argument("file", type=Path)
    fork.add_argument("to", type=Path, help="the file to write; it must not exist")
    diff.add_argument("other", type=Path)


def learn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("learn"), help="folder for the model, the memory, the picture"
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="time to train")
    parser.add_argument("--bytes", type=int, default=LEARN_BYTES, help="length of the text that is read")


def stability(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=5000, help="training steps of each run")
    parser.add_argument("--sweep", action="store_true", help="all forms, steps, depths and chunks")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side, one thread each")
    parser.add_argument(
        "--output", type=Path, required=True, help="the JSON file, written after each run; continued if it exists"
    )
