"""`titans evaluate ...`: the experiments of the paper and of its field, each a command that leaves a file of figures.

Everything is read through the carried state, so the length of a test is not limited by memory. Each kind is a module of
this folder with `add_arguments(parser)` and `run(arguments)`.
"""

import argparse
import importlib

WHAT = {
    "needle": "a needle in a haystack: the three single-needle tasks of RULER, any length, depth, text and tokenizer",
    "babilong": "bAbI's facts in a long text (BABILong)",
    "perplexity": "bits per byte and perplexity along a stream: memory on, frozen, reset, off",
    "adapt": "how fast a model learns a stream: bits per byte as it reads, beside compressors and dynamic evaluation",
    "harness": "tasks of lm-evaluation-harness, RULER and BABILong among them, with the carried state",
    "synthetic": "train and test on recall or state tracking: MQAR, copying, parity, word problems",
    "probes": "what an untrained memory can hold: a nonlinear stream, capacity",
}


def add_arguments(parser: argparse.ArgumentParser, chosen: str | None = None) -> None:
    """Flags of each kind, or of the `chosen` one alone: its module loads torch."""
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, text in WHAT.items():
        one = what.add_parser(name, help=text, description=text)
        if chosen in (None, name):
            importlib.import_module(f"titans_lm.evaluate.{name}").add_arguments(one)


def run(arguments: argparse.Namespace) -> int | None:
    status: int | None = importlib.import_module(f"titans_lm.evaluate.{arguments.what}").run(arguments)
    return status
