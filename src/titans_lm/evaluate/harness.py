"""`titans evaluate harness`: tasks of lm-evaluation-harness, read through the carried state.

    titans evaluate harness --model runs/titans --tasks paper
    titans evaluate harness --model runs/titans --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096, 16384]}'

Prompts, metrics and versions are lm-eval's own; `lm_eval_model` says how the model answers.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import logging
import numbers
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP
from titans_lm.models.model_identity import identity
from titans_lm.utils.record import Lines, check_least, check_output, command_line
from titans_lm.utils.terminal import PlainConsole

SHORTHANDS = {
    "paper": [
        "wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa",
        "boolq",
    ],
}  # fmt: skip
"""Names of groups of tasks. `paper`: language modelling and common sense as in arXiv:2501.00663."""
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's default seeds."""
WIDTH = 120
"""Width of a table that goes to a file."""
DRAWS = 1000
"""Bootstrap samples of a standard error that has no formula (a perplexity's)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help=f"lm-eval's names, or {', '.join(SHORTHANDS)}"
    )
    parser.add_argument("--limit", type=int, help="documents per task; for trials, not for reported results")
    parser.add_argument("--include-path", type=Path, help="folder of own tasks, whose code is run")
    parser.add_argument("--metadata", default="{}", help="for tasks that take it: '{\"max_seq_lengths\": [4096]}'")
    parser.add_argument("--batch", type=int, default=8, help="streams per batch")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: the GPU, if there is one)")
    parser.add_argument("--seed", type=int, help="seed of few-shot examples and generated data (default: lm-eval's)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/harness.jsonl"),
        help="JSON lines, one per task; tasks in it are not run again",
    )


def run(arguments: argparse.Namespace) -> None:
    metadata = _check(arguments)
    model, tokenizer = load(arguments.model)
    import lm_eval
    from lm_eval.utils import setup_logging

    setup_logging(logging.ERROR)  # LMEVAL_LOG_LEVEL=INFO says more
    options = {"limit": arguments.limit, **(SEEDS if arguments.seed is None else dict.fromkeys(SEEDS, arguments.seed))}
    settings = {**identity(model.model), "lm_eval": lm_eval.__version__, "metadata": metadata, **options}
    names = list(dict.fromkeys(name for task in arguments.tasks for name in SHORTHANDS.get(task, [task])))
    with Lines(arguments.out, settings, command_line("evaluate harness", arguments)) as lines:
        missing = [name for name in names if lines.find(task=name) is None]
        if missing:
            from titans_lm.evaluate.lm_eval_model import TitansLM

            with _as_data(tokenizer) as folder:
                manager = _manager(missing, arguments.include_path, {"tokenizer": folder, **metadata})
                tasks = {name: _load(name, manager, options) for name in missing}
            device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
            lm = TitansLM(model, tokenizer, batch_size=arguments.batch, device=device)
            _evaluate(lm, tasks, lines, {**options, "task_manager": manager})
    PlainConsole(width=None if sys.stdout.isatty() else WIDTH).print(
        _table([row for name in names if (row := lines.find(task=name))])
    )


def _evaluate(lm: Any, tasks: dict[str, list[Any]], lines: Lines, options: dict[str, Any]) -> None:
    """Evaluate task by task, and write each result. `options` are those of lm-eval's `simple_evaluate`."""
    from lm_eval import simple_evaluate

    console = PlainConsole(stderr=True)
    for number, (name, task) in enumerate(tasks.items(), 1):
        console.print(f"{name} ({number} of {len(tasks)})")
        begun = time.monotonic()
        try:
            results = simple_evaluate(lm, tasks=task, bootstrap_iters=DRAWS, log_samples=False, **options)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{lines.path} has the tasks that are done; the same command continues") from None
        lines.add({"task": name, "seconds": round(time.monotonic() - begun, 1), "results": _results(results)})


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments and parse the metadata. Raises ValueError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'titans-lm[eval]'")
    check_least(arguments, 1, "limit", "batch")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that PyTorch can use")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise ValueError(f"--include-path {arguments.include_path} is not a folder")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {arguments.seed}")
    check_output(arguments.out, ours=False)
    try:
        metadata = json.loads(arguments.metadata)
    except ValueError as error:
        raise ValueError(f"--metadata is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f'--metadata must be a JSON object like {{"max_seq_lengths": [4096]}}, got {metadata!r}')
    return metadata


# ------------------------------------------------------------------------------------------------ tasks


def _manager(names: list[str], folder: Path | None, metadata: dict[str, Any]) -> Any:
    """lm-eval's task manager. Raises ValueError for an unknown task, group or tag."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
        if set(names) <= set(own.all_subtasks):  # looking through lm-eval's 14,000 files takes seconds
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder), metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise ValueError(f"lm-eval has no task {name!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    return manager


def _load(name: str, manager: Any, seeds: dict[str, Any]) -> list[Any]:
    """Load the tasks of a name with their data. Raises ValueError if that fails."""
    from datasets.exceptions import DatasetsError

    random.seed(seeds["random_seed"])  # some tasks generate their data
    np.random.seed(seeds["numpy_random_seed"])
    try:
        loaded = manager.load([name])
    except (
        OSError,
        ValueError,
        ImportError,
        LookupError,
        TypeError,
        RuntimeError,
        AssertionError,
        DatasetsError,
    ) as error:
        raise ValueError(f"task {name!r} cannot be loaded: {error}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


@contextlib.contextmanager
def _as_data(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields a folder with the tokenizer only: RULER's tasks load it by path, and would run code of a model's
    folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config.pop("auto_map", None)
        path.write_text(json.dumps(config))
        yield folder


# ------------------------------------------------------------------------------------------------ results


def _results(output: Any) -> list[dict[str, Any]]:
    """Version, documents and metrics of each task and group; a metric has value and standard error, or None."""
    rows = []
    for name, values in output["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            # RULER's tasks name a metric by each length; -1 says that it was not asked.
            if not comma or metric.endswith("_stderr") or (metric.isdecimal() and value == -1):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            metrics[metric if kind == "none" else key] = {"value": _number(value), "stderr": _number(error)}
        rows.append({
            "name": name, "version": output["versions"].get(name), "shots": output["n-shot"].get(name),
            "documents": output["n-samples"].get(name, {}).get("effective"), "metrics": metrics,
        })  # fmt: skip
    return rows


def _number(value: Any) -> float | None:
    """None for lm-eval's "N/A"."""
    return float(value) if isinstance(value, numbers.Real) else None


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("task", "version", "shots", "documents", "metric", "value", "standard error")
    for result in (result for row in rows for result in row["results"]):
        labels = [result[key] for key in ("name", "version", "shots", "documents")]
        for metric, value in result["metrics"].items():
            figures = ["" if x is None else f"{x:.4f}" for x in (value["value"], value["stderr"])]
            table.add_row(*("" if one is None else str(one) for one in labels), metric, *figures)
            labels = [None] * len(labels)
    return table
