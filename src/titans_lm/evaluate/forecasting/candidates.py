"""Settings of our forecaster to choose among by validation error, from a YAML file."""

from pathlib import Path
from typing import Any

from titans_lm.evaluate.forecasting.contenders import Contender, ours
from titans_lm.evaluate.forecasting.fit import Recipe
from titans_lm.models.time_series import LOSSES
from titans_lm.models.time_series_configuration import TitansTimeSeriesConfig
from titans_lm.utils.yaml_values import read_yaml

_SECTIONS = ("model", "recipe")


def load_candidates(path: Path) -> dict[str, Contender]:
    """`{shared: SETTINGS, candidates: {NAME: SETTINGS}}` with SETTINGS `{model: FIELDS, recipe: FIELDS}`: fields of
    `TitansTimeSeriesConfig` and of `Recipe`. A candidate's go before those that are shared.

    Raises ValueError naming file, candidate and key.
    """
    tree = read_yaml(path, "studies/forecast.yaml")
    if not isinstance(tree, dict) or not isinstance(tree.get("candidates"), dict) or not tree["candidates"]:
        raise ValueError(f"{path} must have the key candidates, such as {{small: {{model: {{hidden_size: 16}}}}}}")
    odd = tree.keys() - {"shared", "candidates"}
    if odd:
        raise ValueError(f"{path}: unknown key {min(odd)!r}; a file of candidates has shared and candidates")
    shared = _settings(path, "shared", tree.get("shared"))
    return {name: _candidate(path, name, shared, settings) for name, settings in tree["candidates"].items()}


def _settings(path: Path, name: str, settings: Any) -> dict[str, dict[str, Any]]:
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or settings.keys() - set(_SECTIONS):
        raise ValueError(f"{path}: {name} must have the keys model and recipe alone, got {settings!r}")
    return {section: dict(settings.get(section) or {}) for section in _SECTIONS}


def _candidate(path: Path, name: str, shared: dict[str, dict[str, Any]], settings: Any) -> Contender:
    own = _settings(path, name, settings)
    model, recipe = (shared[section] | own[section] for section in _SECTIONS)
    try:
        TitansTimeSeriesConfig(**model)
        return ours(_recipe(recipe), model)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _recipe(fields: dict[str, Any]) -> Recipe:
    odd = fields.keys() - set(Recipe._fields)
    if odd:
        raise ValueError(f"unknown key {min(odd)!r} in recipe; it has {', '.join(Recipe._fields)}")
    recipe = Recipe(**fields)
    if recipe.loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {recipe.loss!r}")
    return recipe._replace(rates=tuple(recipe.rates))
