"""Hyperparameter search for each model, with `Trainer.hyperparameter_search` and Optuna, by evaluation loss."""

import argparse
import dataclasses
import functools
import importlib.util
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from titans_lm.models.configuration import TitansConfig
from titans_lm.study.grid import SECTIONS, Cell, Study
from titans_lm.study.scheduler import run_cells
from titans_lm.training.config import Settings
from titans_lm.training.not_finite import NotFinite
from titans_lm.training.train import model_for, trainer_for
from titans_lm.utils.record import Lines, provenance
from titans_lm.utils.terminal import PlainConsole

TRAINING_KEYS = ("learning_rate", "weight_decay", "max_grad_norm")
"""Keys of `training` that can be searched; of `model` every key can."""
FRACTIONS = {*TRAINING_KEYS, *(f.name for f in dataclasses.fields(TitansConfig) if f.type in (float, float | None))}
"""Keys whose values are any numbers, also in a range between whole ones."""


def run_search(study: Study, arguments: argparse.Namespace, command: str) -> None:
    """Search for each model and task, with the first seed. Writes a line each to `NAME_search.jsonl`; existing lines
    are kept."""
    space, trials = study.search, arguments.search
    _check(space, trials)
    first = study.cells[0].seed
    cells = [cell for cell in study.cells if cell.seed == first]
    for cell in cells:
        _check_values(cell.settings(arguments.runs), space)
    command = f"{command} --search {trials}"
    with Lines(arguments.results / f"{study.name}_search.jsonl", {"search": space, "trials": trials}, command) as lines:
        missing = [cell for cell in cells if cell.result(lines.rows) is None]
        console = PlainConsole()
        job = functools.partial(search_cell, space=space, trials=trials)
        run_cells(missing, job, arguments, command, lines, console)
    for cell in cells:
        row = cell.result(lines.rows)
        if row is not None and row["status"] == "ok":
            console.print(f"{cell.name}: loss {row['loss']:.4f} with {row['best']}")


def search_cell(cell: Cell, runs: Path, command: str, space: dict[str, Any], trials: int) -> dict[str, Any]:
    """The best of `trials` trials, including those of an interrupted search."""
    import optuna

    begun, settings = time.monotonic(), cell.settings(runs)
    never = dataclasses.replace(settings.training, eval_steps=10**9, save_steps=10**9)
    settings = dataclasses.replace(settings, training=never)
    storage = f"sqlite:///{(runs / cell.name).absolute()}.db"
    optuna.create_study(study_name="search", storage=storage, load_if_exists=True)
    earlier = optuna.load_study(study_name="search", storage=storage).trials
    done = sum(trial.state.is_finished() for trial in earlier)  # one that was interrupted is not, and stays as it is
    sampler = optuna.samplers.TPESampler(seed=cell.seed + len(earlier))  # must not repeat the same draws

    def make(trial: Any) -> PreTrainedModel:
        return model_for(settings if trial is None else _changed(settings, suggested(trial, space)))

    trainer = trainer_for(settings, make)
    trainer.hyperparameter_search(
        hp_space=lambda trial: _arguments(suggested(trial, space)),
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=max(trials - done, 0), direction="minimize", backend="optuna", catch=(NotFinite, ValueError),
        study_name="search", storage=storage, load_if_exists=True, sampler=sampler,
    )  # fmt: skip
    search_study = optuna.load_study(study_name="search", storage=storage)
    Path(storage.removeprefix("sqlite:///")).unlink()
    finished = [trial for trial in search_study.trials if trial.state.is_finished()]
    if all(trial.value is None for trial in finished):
        raise ValueError(f"none of {len(finished)} trials ended with a loss: {[trial.params for trial in finished]}")
    tried = [{"loss": t.value, "state": t.state.name.lower(), **t.params} for t in finished]
    return {
        **provenance(command), "status": "ok", "error": None, "scores": [], "loss": search_study.best_value,
        "best": search_study.best_params, "trials": tried, "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def suggested(trial: Any, space: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of this trial."""
    values = {}
    for key, choice in space.items():
        if isinstance(choice, dict):
            values[key] = trial.suggest_categorical(key, choice["choices"])
        else:
            low, high, *log = choice
            draw = trial.suggest_int if _is_whole(key, low, high) else trial.suggest_float
            values[key] = draw(key, low, high, log=bool(log))
    return values


def _is_whole(key: str, *values: Any) -> bool:
    """Whether whole numbers are drawn: where both ends are, and the key does not take fractions."""
    return key.partition(".")[2] not in FRACTIONS and all(isinstance(value, int) for value in values)


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith("training.")}


def _changed(settings: Settings, values: dict[str, Any]) -> Settings:
    model = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("model.")}
    return dataclasses.replace(settings, model={**settings.model, **model})


def _check(space: dict[str, Any], trials: int) -> None:
    if trials < 1:
        raise ValueError(f"--search must be at least 1, got {trials}")
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("--search needs Optuna: pip install 'titans-lm[search]'")
    if not space:
        raise ValueError("the study has no search section, such as {training.learning_rate: [0.0003, 0.01, log]}")
    for key, choice in space.items():
        section, _, name = str(key).partition(".")
        if section not in SECTIONS[::2] or (section == "training" and name not in TRAINING_KEYS):
            raise ValueError(f"search: {key!r} must be model.KEY, or training. and one of {', '.join(TRAINING_KEYS)}")
        if not (_is_range(choice) or (isinstance(choice, dict) and list(choice) == ["choices"])):
            raise ValueError(
                f"search: {key} must be [low, high], [low, high, log] or {{choices: [...]}}, got {choice!r}"
            )


def _check_values(settings: Settings, space: dict[str, Any]) -> None:
    """Raises ValueError for an end of a range, or a choice, that is no value of its key."""
    for key, choice in space.items():
        for value in choice["choices"] if isinstance(choice, dict) else choice[:2]:
            try:
                _changed(settings, {key: value}).config()
                dataclasses.replace(settings.training, **_arguments({key: value})).check()
            except ValueError as error:
                raise ValueError(f"search: {error}") from None


def _is_range(choice: Any) -> bool:
    if not isinstance(choice, list) or len(choice) not in (2, 3) or choice[2:] not in ([], ["log"]):
        return False
    low, high = choice[:2]
    return all(isinstance(x, int | float) for x in (low, high)) and low < high and (low > 0 or len(choice) == 2)
