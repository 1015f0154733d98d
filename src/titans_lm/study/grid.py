"""Studies from YAML files: every combination of models, tasks and seeds is a cell, a run with its tests."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_lm.evaluate.cell import check_tests
from titans_lm.models.configuration import unknown_key
from titans_lm.training.config import Settings, change_tree, current_key, parse_settings, with_current_keys
from titans_lm.utils.yaml_values import read_yaml

KEYS = ("name", "about", "shared", "models", "tasks", "seeds", "tests", "figure", "search")
SECTIONS = ("model", "data", "training")
OWN = ("output_dir", "seed", "resume")
"""Keys of `training` that the study sets itself."""


@dataclass
class Cell:
    """A run of the grid, with its tests."""

    model: str
    task: str
    seed: int
    sections: dict[str, dict[str, Any]]
    """`model`, `data` and `training`, as in `titans train`."""
    tests: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.model, self.task, str(self.seed)) if part)

    def settings(self, runs: Path) -> Settings:
        """Checked settings, with the run's folder in `runs`. Raises ValueError."""
        sections = copy.deepcopy(self.sections)
        sections["training"] |= {"output_dir": str(runs / self.name), "seed": self.seed}
        return parse_settings(sections)

    def result(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """This cell's row of `rows`, also one written when settings had other names; None if there is none."""
        about = self.about()
        return next((row for row in rows if {key: _current(row).get(key) for key in about} == about), None)

    def about(self) -> dict[str, Any]:
        """The values that identify this cell's result."""
        return {
            "model": self.model,
            "task": self.task,
            "seed": self.seed,
            "settings": self.sections,
            "tests": self.tests,
        }


def _current(row: dict[str, Any]) -> dict[str, Any]:
    """A row of results, its settings under their current names."""
    settings = {
        section: {current_key(section, key): value for key, value in values.items()}
        for section, values in row["settings"].items()
    }
    return {**row, "settings": settings}


@dataclass
class Study:
    """A whole study."""

    name: str
    cells: list[Cell]
    figure: str | None = None
    """Option of the tests that is the figure's horizontal axis, such as length."""
    search: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> [low, high], [low, high, log], or {choices: [...]}: the search space of `--search`."""


def load_study(path: Path, changes: list[str]) -> Study:
    """Read and check a file, and apply `section.key=value` changes to `shared`. Raises ValueError naming file and
    key."""
    tree = read_yaml(path, "studies/parity.yaml")
    try:
        return _study(tree, path.stem, changes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _study(tree: Any, stem: str, changes: list[str]) -> Study:
    if not isinstance(tree, dict):
        raise ValueError(f"must have the keys {', '.join(KEYS)}")
    for key in tree:
        if key not in KEYS:
            raise ValueError(unknown_key(str(key), list(KEYS), "the study"))
    models, tasks = _named(tree, "models", {}), _named(tree, "tasks", {"": {}})
    if not models:
        raise ValueError("models must name at least one, such as {mag: {model.variant: mag}}")
    seeds = tree.get("seeds", [0])
    valid = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a list of whole numbers, each once, got {seeds!r}")
    tests = _tests(tree)
    shared = {
        name: dict(_mapping(section, f"shared.{name}"))
        for name, section in _mapping(tree.get("shared", {}), "shared").items()
    }
    for change in changes:
        change_tree(shared, change)
    cells = [
        Cell(model, task, seed, _sections(shared, tasks[task], models[model]), _tests(tasks[task], tests))
        for task in tasks for seed in seeds for model in models
    ]  # fmt: skip
    title = tree.get("name", stem)
    if not isinstance(title, str) or "/" in title or title in ("", ".", ".."):
        raise ValueError(f"name must be a text that names files, without a slash, got {title!r}")
    study = Study(title, cells, tree.get("figure"), _mapping(tree.get("search", {}), "search"))
    _check_names(cells)
    axes = list(dict.fromkeys(axis for cell in cells for axis in _check(cell)))
    if study.figure is not None and study.figure not in axes:
        names = ", ".join(axes) or "none"
        raise ValueError(f"figure: {study.figure!r} must be an option of the tests with numbers; they have: {names}")
    return study


def _check_names(cells: list[Cell]) -> None:
    """Raises ValueError if two cells would share a folder, also on a file system that ignores case."""
    owners: dict[str, Cell] = {}
    for cell in cells:
        owner = owners.setdefault(cell.name.casefold(), cell)
        if owner is not cell:
            both = " and ".join(f"model {c.model!r}" + (f", task {c.task!r}" if c.task else "") for c in (owner, cell))
            raise ValueError(f"{both} would share the folder {cell.name}; rename one")


def _check(cell: Cell) -> list[str]:
    """Names of options that can be a figure's axis. Raises ValueError for an invalid cell."""
    try:
        return check_tests(cell.settings(Path("runs")), cell.tests)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from error


def _sections(shared: dict[str, Any], *changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`shared` with dotted keys of `changes` set."""
    sections = {name: with_current_keys(copy.deepcopy(shared.get(name, {})), name) for name in SECTIONS}
    for name in shared:
        if name not in SECTIONS:
            raise ValueError(unknown_key(str(name), list(SECTIONS), "shared"))
    for key, value in (item for change in changes for item in change.items() if item[0] != "tests"):
        section, dot, name = str(key).partition(".")
        if not dot or section not in SECTIONS:
            raise ValueError(f"{key!r} must be section.key, such as model.variant or training.learning_rate")
        sections[section] |= with_current_keys({name: value}, section)
    for name in OWN:
        if name in sections["training"]:
            raise ValueError(f"training.{name} is set by the study, which has seeds and a folder for each run")
    return sections


def _tests(tree: dict[str, Any], default: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    tests = tree.get("tests", default if default is not None else [{}])
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        raise ValueError(f"tests must be a list of keys and values, such as [{{length: [64, 128]}}], got {tests!r}")
    return tests


def _named(tree: dict[str, Any], key: str, default: dict[str, Any]) -> dict[str, dict[str, Any]]:
    entries = _mapping(tree.get(key, default), key)
    for name in entries:
        if "/" in str(name) or str(name) in (".", ".."):
            raise ValueError(f"{key}: the name {name!r} cannot have a slash, nor be . or ..; a run's folder has it")
    if len({str(name) for name in entries}) < len(entries):
        raise ValueError(f"{key}: the names must differ as texts, got {list(entries)}")
    return {str(name): _mapping({} if value is None else value, f"{key}.{name}") for name, value in entries.items()}


def _mapping(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be keys and values, got {value!r}")
    return value
