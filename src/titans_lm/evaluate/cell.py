"""One cell of an experiment: train what the settings say, test it, and tell what came of it, failure as well."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from titans_lm.data import load_tokenizer, split_held_out, text_files
from titans_lm.evaluate import adapt, babilong, needle, perplexity
from titans_lm.model import TitansForCausalLM
from titans_lm.record import provenance
from titans_lm.settings import Settings
from titans_lm.tasks import IGNORED, Task, at_least, make_task
from titans_lm.tasks.babilong import Babilong
from titans_lm.tasks.needle import Needle
from titans_lm.train import earlier, train
from titans_lm.trainer import NotFinite

SAMPLES, ROWS = 256, 32
"""Examples of a test and rows read at once, where a test does not say."""
TEST_SEED = 1_000_003
"""Tests are made from other seeds than training: this one and the cell's."""
MEASURES = ("task", "perplexity", "adapt")


def run_cell(settings: Settings, tests: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Train, or go on with an interrupted training in `training.output_dir`, then test.

    Returns a row of plain values: `status` is "ok", or "not finite" where training ended so, with its `error`; `scores`
    has a row for each test. Raises as `train` does for everything else.
    """
    begun = time.monotonic()
    told: dict[str, Any] = {**provenance(command), "status": "ok", "error": None, "scores": []}
    try:
        model = _trained(settings)
    except NotFinite as error:
        return {**told, "status": "not finite", "error": str(error), "seconds": round(time.monotonic() - begun, 1)}
    told |= {"parameters": sum(p.numel() for p in model.parameters()), **_training(settings)}
    told["training_seconds"] = round(time.monotonic() - begun, 1)
    for test in tests:
        told["scores"] += run_test(model, settings, test)
    return {**told, "seconds": round(time.monotonic() - begun, 1)}


def check_tests(settings: Settings, tests: list[dict[str, Any]]) -> list[str]:
    """Options with numbers that the tests tell: what a figure can have as its axis. Raises ValueError for a test that
    cannot be, before anything is trained."""
    axes: list[str] = []
    for test in tests:
        measure = test.get("measure", "task")
        if measure not in MEASURES:
            raise ValueError(f"tests: measure {measure!r} is not one of: {', '.join(MEASURES)}")
        if measure == "task":
            at_least(1, samples=test.get("samples", SAMPLES), rows=test.get("rows", ROWS))
            axes += [key for told, _ in _tasks(settings, test) for key in told if type(told[key]) in (int, float)]
        elif measure == "perplexity":
            _check_perplexity(settings, test)
            axes.append("until")
        else:
            _check_adapt(test)
    return list(dict.fromkeys(axes))


def run_test(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """A test with options as lists is each of them in turn. -> rows of the options and their figures"""
    if test.get("measure") == "perplexity":
        return _perplexity(model, settings, test)
    if test.get("measure") == "adapt":
        return _adapt(model, settings, test)
    samples, rows = test.get("samples", SAMPLES), test.get("rows", ROWS)
    seed = TEST_SEED + settings.training.seed
    return [{**told, **score(model, task, samples, seed, rows)} for told, task in _tasks(settings, test)]


def _tasks(settings: Settings, test: dict[str, Any]) -> list[tuple[dict[str, Any], Task]]:
    """The task that was trained, or another that the test names, with each combination of the test's options. What is
    told of each are these options; where the test is called something, that and those of which there are several."""
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
    if test.get("name") not in (None, trained.get("name")):  # its options say nothing of another's
        trained = {}
    return [(_told(test, change), make_task({**trained, **change})) for change in changes]


def _told(test: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if "called" not in test:
        return change
    return {"test": test["called"], **{key: value for key, value in change.items() if isinstance(test[key], list)}}


def score(model: PreTrainedModel, task: Task, samples: int, seed: int, rows: int) -> dict[str, Any]:
    """How well `model` does `task`, as its field scores it: `score` in [0, 1], and `samples`."""
    if isinstance(task, Needle):
        return needle.score(model, task, samples, seed, rows)
    if isinstance(task, Babilong):
        found = babilong.score(model, task, samples, seed, rows)
        told = {key: found[key] for key in ("substring", "exact", "samples")}
        return {"score": found["babilong"], "task": task.task, "length": task.length, **told}
    return accuracy(model, task, samples, seed, rows)


_PERPLEXITY = ("measure", "files", "tokens", "modes", "bucket", "reset_every")


def _check_perplexity(settings: Settings, test: dict[str, Any]) -> None:
    for key in test:
        if key not in _PERPLEXITY:
            raise ValueError(f"tests: perplexity has no option {key!r}; it has {', '.join(_PERPLEXITY[1:])}")
    data = settings.data
    if not test.get("files") and not (data.files and data.held_out):
        raise ValueError("tests: perplexity needs files, or data.files of which some are held out")
    at_least(1, bucket=test.get("bucket", perplexity.BUCKET), reset_every=test.get("reset_every", perplexity.RESET))
    at_least(2, tokens=test.get("tokens", 2))
    _check_modes(test)


def _check_modes(test: dict[str, Any]) -> None:
    modes = test.get("modes", perplexity.MODES)
    if not isinstance(modes, list | tuple) or not modes or not all(mode in perplexity.MODES for mode in modes):
        raise ValueError(f'tests: modes must be a list of "on", frozen, reset, "off" (so quoted), got {modes!r}')


def _perplexity(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """Along `files` (default: those held out from training) as one stream; only modes that the model has."""
    if not isinstance(model, TitansForCausalLM):
        raise ValueError("measure perplexity reads through the carried state, which only a Titans model has")
    data = settings.data
    files = text_files(test["files"], data.suffixes) if test.get("files") else _held_out(settings)
    ids, sizes = perplexity.stream(files, load_tokenizer(data.tokenizer), test.get("tokens"))
    options = {key: test[key] for key in ("bucket", "reset_every") if key in test}
    possible = perplexity.possible_modes(model)
    modes = [mode for mode in test.get("modes", possible) if mode in possible]
    rows = perplexity.perplexity(model, ids, modes, sizes=sizes, **options)
    return [{"mode": row["mode"], "until": row["to"], "bits_per_byte": row["bits_per_byte"]} for row in rows]


_ADAPT = ("measure", "called", "files", "suffixes", "tokens", "modes", "bucket", "reset_every")


def _check_adapt(test: dict[str, Any]) -> None:
    for key in test:
        if key not in _ADAPT:
            raise ValueError(f"tests: adapt has no option {key!r}; it has {', '.join(_ADAPT[1:])}")
    text_files(test.get("files") or [], test.get("suffixes", adapt.SUFFIXES))
    at_least(1, bucket=test.get("bucket", perplexity.BUCKET), reset_every=test.get("reset_every", perplexity.RESET))
    at_least(2, tokens=test.get("tokens", 2))
    _check_modes(test)


def _adapt(model: PreTrainedModel, settings: Settings, test: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte of each of `files`, a stream of its own, and, of several, their mean; in modes that the model has."""
    files = text_files(test["files"], test.get("suffixes", adapt.SUFFIXES))
    tokenizer = load_tokenizer(getattr(make_task(settings.data.task), "tokenizer", settings.data.tokenizer))
    options = {"bucket": test.get("bucket", perplexity.BUCKET), "reset_every": test.get("reset_every", perplexity.RESET)}
    named = {"test": test["called"]} if "called" in test else {}
    rows = []
    for file in files:
        stream = adapt.read_stream(file, tokenizer, test.get("tokens"))
        for mode in _possible(model, test):
            found = adapt.code_lengths(model, stream, mode, options)
            first = found["buckets"][0][2]
            rows.append({**named, "stream": stream.name, "mode": mode, "bits_per_byte": found["bits_per_byte"],
                         "first_bucket": first, "last_half": found["last_half"]})  # fmt: skip
    return rows if len(files) == 1 else rows + _means(rows, named)


def _means(rows: list[dict[str, Any]], named: dict[str, str]) -> list[dict[str, Any]]:
    """Over streams, for each mode."""
    figures = ("bits_per_byte", "first_bucket", "last_half")
    by_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in dict.fromkeys(r["mode"] for r in rows)}
    return [
        {**named, "stream": "mean", "mode": mode, **{key: sum(r[key] for r in own) / len(own) for key in figures}}
        for mode, own in by_mode.items()
    ]


def _possible(model: PreTrainedModel, test: dict[str, Any]) -> list[str]:
    """Of the test's modes those that this model has."""
    possible = perplexity.possible_modes(model) if isinstance(model, TitansForCausalLM) else ["on"]
    return [mode for mode in test.get("modes", possible) if mode in possible]


def _held_out(settings: Settings) -> list[Path]:
    data = settings.data
    return split_held_out(text_files(data.files, data.suffixes), data.held_out)[1]


@torch.no_grad()
def accuracy(model: PreTrainedModel, task: Task, samples: int, seed: int, rows: int) -> dict[str, Any]:
    """`score`: the share of asked positions that are answered right; `whole`: of rows with no mistake."""
    model.eval()
    right, asked, whole, done = 0, 0, 0, 0
    for number in itertools.count():
        if done >= samples:
            break
        count = min(rows, samples - done)
        ids, labels = map(torch.from_numpy, task.batch(np.random.default_rng((seed, number)), count))
        there = labels[:, 1:] != IGNORED
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]
        hits = (logits.argmax(-1).cpu() == labels[:, 1:]) & there
        right, asked, done = right + int(hits.sum()), asked + int(there.sum()), done + count
        whole += int((hits.sum(1) == there.sum(1)).sum())
    return {"score": right / asked, "whole": whole / done, "samples": done, "length": task.length}


# ------------------------------------------------------------------------------------------------ training


def _trained(settings: Settings) -> PreTrainedModel:
    """Trained now; or an earlier process's, whose training ended or goes on from its last checkpoint."""
    output, found = Path(settings.training.output_dir), earlier(settings)
    if found == output:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
        return model
    training = dataclasses.replace(settings.training, resume=found is not None)
    return train(dataclasses.replace(settings, training=training))


def _training(settings: Settings) -> dict[str, Any]:
    """What the trainer says of the run: its steps, tokens, rate and last loss."""
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
