"""`titans <verb>`: import only what the verb needs, and report a user's error in one line."""

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from titans_lm.utils.terminal import shown

VERBS = {
    "train": "train a model from a YAML file",
    "graft": "give a pretrained Hugging Face model a memory, which titans train then trains",
    "infer": "read a text of any length into a memory, answer prompts or continue",
    "read": "read texts into a memory file; resume after an interruption",
    "memory": "show, verify, fork and compare memory files",
    "serve": "an OpenAI-compatible server; each request forks one memory",
    "analyze": "a page that shows what a memory did with a text: surprise, gates, predictions",
    "evaluate": "needle, BABILong, perplexity, harness tasks, recall and state tracking",
    "study": "a grid of models, seeds and tests from a YAML file, resumable",
    "stability": "train on repeating text and report which forms of the memory stay finite",
    "bench": "measure time and memory: the operation, models, decoding, long texts, peers",
    "demo": "find a needle in a long haystack, then learn a text: both with shipped models",
    "learn": "train a small model, then compare its bits on a long text: memory on, frozen, reset",
}
"""Each verb is a module of this package with `run(arguments)`, which may return a status, and `add_arguments(parser)`
unless `flags` has a function of its name."""
_VERBS_WITH_KINDS = ("evaluate", "bench")
"""Verbs with kinds, of which only the requested one is loaded."""
_LONG = ("train", "learn")
"""Verbs whose threads never spin: a training run takes long, and others may come while it runs."""
_WITHOUT_COMPUTATION = ("memory",)
"""Verbs for which torch's threads do not matter: `titans memory show` does not load torch at all."""
_WITHOUT_WEIGHTS = (*_WITHOUT_COMPUTATION, "bench")
"""Verbs that read no model, some of which do without transformers."""


def main(arguments: list[str] | None = None) -> int:
    """Run `titans` with `arguments` (default: the process's).

    Returns 0, 2 for a user's error, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("titans", description="Language models that keep learning while they read.")
    version = importlib.import_module("titans_lm").__version__
    parser.add_argument("--version", action="version", version=f"titans-lm {version}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, help_text in VERBS.items():
        verbs.add_parser(verb, help=help_text, add_help=False)
    if not arguments or arguments[0] not in VERBS:
        parser.parse_args(arguments)  # prints help or the error, and exits
        return 2
    return _run(arguments[0], arguments[1:])


def _run(verb: str, arguments: list[str]) -> int:
    from titans_lm.utils.machine import end_quickly, keep_freed_memory
    from titans_lm.utils.record import Stopped, on_stop, stop

    parsed = _parsed(verb, arguments)  # help and errors end here, before torch is loaded
    module = _module(verb)
    if verb not in _WITHOUT_COMPUTATION:
        _no_more_threads_than_cores()
    if verb not in _WITHOUT_WEIGHTS:
        _delay_progress_bars()
    keep_freed_memory()
    end_quickly()
    run: Callable[[argparse.Namespace], int | None] = module.run
    try:
        with on_stop(stop):
            status = run(parsed) or 0
            sys.stdout.flush()  # reports a full disk now, not at exit
            return status
    except BrokenPipeError:  # `titans ... | head`: the reader has gone
        _drop_output()
        return 128 + 13  # SIGPIPE, as a shell has it
    except KeyboardInterrupt as interruption:
        print(": ".join([f"titans {verb}: interrupted", *map(str, interruption.args)]), file=sys.stderr)
        return Stopped.status(interruption)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        print(shown(f"titans {verb}: {' '.join(str(error).split()) or 'out of memory'}"), file=sys.stderr)
        _drop_output()
        return 2


def _module(verb: str) -> ModuleType:
    """The module of a verb, which may load torch: how its threads wait is decided before."""
    if verb not in _WITHOUT_COMPUTATION:
        _choose_wait_policy(verb in _LONG)
    return importlib.import_module(f"{__name__}.{verb}")


def _parsed(verb: str, arguments: list[str]) -> argparse.Namespace:
    from titans_lm.cli import flags

    parser = argparse.ArgumentParser(f"titans {verb}", description=VERBS[verb])
    add: Callable[..., None] = getattr(flags, verb, None) or _module(verb).add_arguments
    add(parser, *(arguments[:1] if verb in _VERBS_WITH_KINDS else []))
    return parser.parse_args(arguments)


def _out_of_memory(error: RuntimeError) -> bool:
    """torch has an exception class for GPU memory, and only a message for CPU memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _drop_output() -> None:
    """Discard unwritten output: flushing it again at exit would end in a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@functools.cache
def _choose_wait_policy(long: bool) -> None:
    """Let PyTorch's threads sleep while they wait for each other, in this process and those that it starts, where other
    processes use the cores, and in long runs. See `wait_policy`."""
    from titans_lm.utils.machine import other_cores, wait_policy
    from titans_lm.utils.record import cores

    threads = thread_count(os.environ, cores())
    others = float(cores()) if long else other_cores() if threads > 1 else 0.0
    os.environ.update(wait_policy(others, threads, cores(), os.environ))


def thread_count(environment: Mapping[str, str], cores: int) -> int:
    """The threads that PyTorch will have: those of OMP_NUM_THREADS, at most the cores."""
    words = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(int(words), cores) if words.isdecimal() and int(words) else cores


def _delay_progress_bars() -> None:
    """Let transformers' bars for reading and writing weights wait for a second: small models need none."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{"delay": 1.0, **options}))


def _no_more_threads_than_cores() -> None:
    """Limit threads to the cores of this process: more slow small matmuls a hundredfold."""
    import torch

    from titans_lm.utils.record import cores

    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def main_train() -> int:
    """`titans-train`"""
    return _run("train", sys.argv[1:])


def main_infer() -> int:
    """`titans-infer`"""
    return _run("infer", sys.argv[1:])


def main_analyze() -> int:
    """`titans-analyze`"""
    return _run("analyze", sys.argv[1:])
