"""`titans evaluate KIND`: experiments of the paper and of its field, each with a file of results.

All read through the carried state, so memory does not limit the length of a test.
"""

import argparse
import importlib
from types import ModuleType

from titans_lm.cli.flags import add_kinds

WHAT = {
    "needle": "a needle in a haystack: the three single-needle tasks of RULER, any length, depth, text and tokenizer",
    "babilong": "bAbI's facts in a long text (BABILong)",
    "perplexity": "bits per byte and perplexity along a stream: memory on, frozen, reset, off",
    "adapt": "how fast a model learns a stream, compared with compressors and dynamic evaluation",
    "layers": "what the memory of each layer is worth on a text, and how much its keys are alike",
    "harness": "tasks of lm-evaluation-harness, RULER and BABILong among them, with the carried state",
    "synthetic": "train and test on recall or state tracking: MQAR, copying, parity, word problems",
    "forecast": "forecasting of series at long horizons: the memory and published rivals, by the standard protocol",
    "classify": "classifiers of DNA: folders of GenomicBenchmarks, FASTA, CSV, or planted motifs",
    "probes": "what an untrained memory can hold: a nonlinear stream, capacity",
}


def add_arguments(parser: argparse.ArgumentParser, chosen: str | None = None) -> None:
    """Flags of each kind, or of the `chosen` one only."""
    add_kinds(parser, WHAT, chosen, lambda subparser, name: _module(name).add_arguments(subparser))


def run(arguments: argparse.Namespace) -> int | None:
    status: int | None = _module(arguments.what).run(arguments)
    return status


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"titans_lm.evaluate.{name}")
