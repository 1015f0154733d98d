"""One cell of an experiment: train a model, test it, and return a row of results, also for a failure."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from titans_lm.evaluate import adapt, babilong, needle, perplexity
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import load_tokenizer
from titans_lm.tasks import IGNORED, Task, at_least, make_task
from titans_lm.tasks.babilong import Babilong
from titans_lm.tasks.needle import Needle
from titans_lm.training.config import Settings
from titans_lm.training.not_finite import NotFinite
from titans_lm.training.train import earlier, train
from titans_lm.utils.corpora import split_held_out, text_files
from titans_lm.utils.record import provenance

SAMPLES, ROWS = 256, 32
"""Default number of examples of a test, and of rows per batch."""
TEST_SEED = 1_000_003
"""Added to the cell's seed for tests, so that they differ from training."""
MEASURES = ("task", "perplexity", "adapt")


def run_cell(settings: Settings, tests: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Train, or resume an interrupted training in `training.output_dir`, then test.

    Returns a row of plain values: `status` is "ok", or "not finite" with an `error`; `scores` has a row per test.
    Raises as `train` does for other errors."""
    begun = time.monotonic()
    row: dict[str, Any] = {**provenance(command), "status": "ok", "error": None, "scores": []}
    try:
        model = _trained(settings)
    except NotFinite as error:
        return {**row, "status": "not finite", "error": str(error), "seconds": round(time.monotonic() - begun, 1)}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), **_training(settings)}
    row["training_seconds"] = round(time.monotonic() - begun, 1)
    for test in tests:
        row["scores"] += run_test(model, settings, test)
    return {**row, "seconds": round(time.monotonic() - begun, 1)}


def check_tests(settings: Settings, tests: list[dict[str, Any]]) -> list[str]:
    """Names of the numeric options of the tests, which a figure can have as its axis. Raises ValueError for an invalid
    test."""
    axes: list[str] = []
    for test in tests:
        measure = test.get("measure", "task")
        if measure not in MEASURES:
            raise ValueError(f"tests: measure {measure!r} is not one of: {', '.join(MEASURES)}")
        if measure == "task":
            at_least(1, samples=test.get("samples", SAMPLES), rows=test.get("rows", ROWS))
            axes += [
                key for options, _ in _tasks(settings, test) for key in options if type(options[key]) in (int, float)
            ]
        elif measure == "perplexity":
            _check_perplexity(settings, test)
            axes.append("until")
        else:
            _check_adapt(test)
    return list(dict.fromkeys(axes))


def check_files(tests: list[dict[str, Any]]) -> None:
    """Raises ValueError if texts of tests are missing: before training, which may take hours."""
    for test in tests:
        if test.get("measure", "task") != "task" and test.get("files"):
            text_files(test["files"], test.get("suffixes", adapt.SUFFIXES))


def run_test(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a test for each combination of its options that are lists. Returns rows of options and scores."""
    if test.get("measure") == "perplexity":
        return _perplexity(model, settings, test)
    if test.get("measure") == "adapt":
        return _adapt(model, settings, test)
    samples, rows = test.get("samples", SAMPLES), test.get("rows", ROWS)
    seed = TEST_SEED + settings.training.seed
    return [{**options, **score(model, task, samples, seed, rows)} for options, task in _tasks(settings, test)]


def _tasks(settings: Settings, test: dict[str, Any]) -> list[tuple[dict[str, Any], Task]]:
    """The trained task, or the one that the test names, with each combination of the test's options, and the options to
    report: all of them, or for a named test its name and those with several values."""
    if not settings.data.task and "name" not in test:
        raise ValueError("tests: without data.task a test needs the name of a task, or measure: perplexity or adapt")
    options = {key: value for key, value in test.items() if key not in ("called", "measure", "samples", "rows")}
    keys = list(options)
    lists = [value if isinstance(value, list) and key not in ("files", "background") else [value]
             for key, value in options.items()]  # fmt: skip
    if [] in lists:
        raise ValueError(f"tests: {keys[lists.index([])]} is an empty list")
    changes = [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]
    trained = settings.data.task
    if test.get("name") not in (None, trained.get("name")):  # options of one task do not apply to another
        trained = {}
    return [(_shown_options(test, change), make_task({**trained, **change})) for change in changes]


def _shown_options(test: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if "called" not in test:
        return change
    return {"test": test["called"], **{key: value for key, value in change.items() if isinstance(test[key], list)}}


def score(model: PreTrainedModel, task: Task, samples: int, seed: int, rows: int) -> dict[str, Any]:
    """Score `model` on `task` with the field's metric: `score` in [0, 1], and `samples`."""
    if isinstance(task, Needle):
        return needle.score(model, task, samples, seed, rows)
    if isinstance(task, Babilong):
        result = babilong.score(model, task, samples, seed, rows)
        details = {key: result[key] for key in ("substring", "exact", "samples")}
        return {"score": result["babilong"], "task": task.task, "length": task.length, **details}
    return accuracy(model, task, samples, seed, rows)


_PERPLEXITY = ("measure", "files", "tokens", "modes", "bucket", "reset_every")


def _check_perplexity(settings: Settings, test: dict[str, Any]) -> None:
    _check_stream_test(test, _PERPLEXITY)
    data = settings.data
    if not test.get("files") and not (data.files and data.held_out):
        raise ValueError("tests: perplexity needs files, or data.files of which some are held out")


def _check_stream_test(test: dict[str, Any], options: tuple[str, ...]) -> None:
    """The checks that measures along streams share. Raises ValueError."""
    for key in test:
        if key not in options:
            raise ValueError(f"tests: {test['measure']} has no option {key!r}; it has {', '.join(options[1:])}")
    at_least(1, bucket=test.get("bucket", perplexity.BUCKET), reset_every=test.get("reset_every", perplexity.RESET))
    at_least(2, tokens=test.get("tokens", 2))
    modes = test.get("modes", perplexity.MODES)
    if not isinstance(modes, list | tuple) or not modes or not all(mode in perplexity.MODES for mode in modes):
        raise ValueError(f'tests: modes must be a list of "on", frozen, reset, "off" (so quoted), got {modes!r}')


def _perplexity(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte along `files` (default: those held out from training) as one stream, in modes that the model
    has."""
    if not isinstance(model, TitansForCausalLM):
        raise ValueError("measure perplexity reads through the carried state, which only a Titans model has")
    data = settings.data
    files = text_files(test["files"], data.suffixes) if test.get("files") else _held_out(settings)
    ids, sizes = perplexity.stream(files, _tokenizer(settings), test.get("tokens"))
    options = {key: test[key] for key in ("bucket", "reset_every") if key in test}
    possible = perplexity.possible_modes(model)
    modes = [mode for mode in test.get("modes", possible) if mode in possible]
    rows = perplexity.measure(model, ids, modes, sizes=sizes, **options)
    return [{"mode": row["mode"], "until": row["to"], "bits_per_byte": row["bits_per_byte"]} for row in rows]


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """That of the data which the model was trained on; of bytes, where a task's tokens are numbers."""
    data = settings.data
    return load_tokenizer(
        (getattr(make_task(data.task), "tokenizer", None) or "bytes") if data.task else data.tokenizer
    )


_ADAPT = ("measure", "called", "files", "suffixes", "tokens", "modes", "bucket", "reset_every")


def _check_adapt(test: dict[str, Any]) -> None:
    _check_stream_test(test, _ADAPT)
    if not test.get("files"):
        raise ValueError("tests: adapt needs files, each a stream")


def _adapt(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of each of `files` as a stream, and their mean, in modes that the model has."""
    files = text_files(test["files"], test.get("suffixes", adapt.SUFFIXES))
    tokenizer = _tokenizer(settings)
    options = {
        "bucket": test.get("bucket", perplexity.BUCKET),
        "reset_every": test.get("reset_every", perplexity.RESET),
    }
    label = {"test": test["called"]} if "called" in test else {}
    rows = []
    for file in files:
        stream = adapt.read_stream(file, tokenizer, test.get("tokens"))
        for mode in _available_modes(model, test):
            lengths = adapt.code_lengths(model, stream, mode, options)
            first = lengths["buckets"][0][2]
            rows.append({**label, "stream": stream.name, "mode": mode, "bits_per_byte": lengths["bits_per_byte"],
                         "first_bucket": first, "last_half": lengths["last_half"]})  # fmt: skip
    return rows if len(files) == 1 else rows + _means(rows, label)


def _means(rows: list[dict[str, Any]], label: dict[str, str]) -> list[dict[str, Any]]:
    """Means over streams, per mode."""
    figures = ("bits_per_byte", "first_bucket", "last_half")
    by_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in dict.fromkeys(r["mode"] for r in rows)}
    return [
        {
            **label,
            "stream": "mean",
            "mode": mode,
            **{key: sum(r[key] for r in of_mode) / len(of_mode) for key in figures},
        }
        for mode, of_mode in by_mode.items()
    ]


def _available_modes(model: PreTrainedModel, test: dict[str, Any]) -> list[str]:
    """The test's modes that this model has."""
    possible = perplexity.possible_modes(model) if isinstance(model, TitansForCausalLM) else ["on"]
    return [mode for mode in test.get("modes", possible) if mode in possible]


def _held_out(settings: Settings) -> list[Path]:
    data = settings.data
    return split_held_out(text_files(data.files, data.suffixes), data.held_out)[1]


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Task, samples: int, seed: int, rows: int) -> dict[str, Any]:
    """`score`: share of labels predicted right; `whole`: share of rows without a mistake."""
    model.eval()
    right, total, whole_rows, done = 0, 0, 0, 0
    for number in itertools.count():
        if done >= samples:
            break
        count = min(rows, samples - done)
        ids, labels = map(torch.from_numpy, task.batch(np.random.default_rng((seed, number)), count))
        mask = labels[:, 1:] != IGNORED
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]
        hits = (logits.argmax(-1).cpu() == labels[:, 1:]) & mask
        right, total, done = right + int(hits.sum()), total + int(mask.sum()), done + count
        whole_rows += int((hits.sum(1) == mask.sum(1)).sum())
    return {"score": right / total, "whole": whole_rows / done, "samples": done, "length": task.length}


# ------------------------------------------------------------------------------------------------ training


def _trained(settings: Settings) -> PreTrainedModel:
    """Train, or resume from the last checkpoint, or load the model of a finished run."""
    output, saved = Path(settings.training.output_dir), earlier(settings)
    if saved == output:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
        return model
    training = dataclasses.replace(settings.training, resume=saved is not None)
    return train(dataclasses.replace(settings, training=training))


def _training(settings: Settings) -> dict[str, Any]:
    """Steps, last loss and speed of the run, from the trainer's state."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(Path(settings.training.output_dir) / "trainer_state.json"))
    losses = [(log["loss"], log["tokens_per_second"]) for log in state.log_history if "loss" in log]
    last = losses[-max(1, len(losses) // 20) :]
    loss = sum(x for x, _ in last) / len(last)
    return {
        "steps": state.global_step,
        "loss": round(loss, 5) if math.isfinite(loss) else None,
        "tokens_per_second": round(float(np.median([rate for _, rate in losses]))),
    }
