"""One contender in a process of its own: `python -m titans_lm.bench.worker`, controlled by lines of JSON.

First line: {"module", "contender", "options", "setting"}; then {"do": action} each. Each line gets a reply,
{"error"} or the figures. Output of the contender goes to standard error.
"""

import importlib
import json
import os
import sys
from typing import Any, TextIO

from titans_lm.bench.measure import Contender, Meter, Setting, limit_memory
from titans_lm.utils.machine import end_quickly, keep_freed_memory


def build(order: dict[str, Any], setting: Setting) -> Contender:
    """The contender that `BUILD` of a module of this package makes from its options."""
    module = importlib.import_module(f"titans_lm.bench.{order['module']}")
    contender: Contender = module.BUILD[order["contender"]](order["options"], setting)
    return contender


def serve(orders: TextIO, answers: TextIO) -> None:
    """Handle orders until they end. An error is reported and ends the loop."""

    def answer(words: dict[str, Any]) -> None:
        answers.write(json.dumps(words) + "\n")
        answers.flush()

    try:
        order = json.loads(orders.readline())
        setting = Setting(**order["setting"])
        importlib.import_module(f"titans_lm.bench.{order['module']}")  # what libraries take is not the contender's
        _prepare(setting)
        contender = build(order, setting)
        contender.small()
        meter = Meter(setting)
        answer({"about": contender.about})
        for line in orders:
            answer(meter.measure(contender.actions[json.loads(line)["do"]]))
    except Exception as error:  # whatever it is, it is this contender's result
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


def _prepare(setting: Setting) -> None:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(setting.threads)
    keep_freed_memory()
    end_quickly()
    limit_memory(setting)


if __name__ == "__main__":
    # The pipe is kept for answers alone: a library that prints must not speak in between.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, pipe)
