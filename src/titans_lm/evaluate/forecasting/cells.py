"""One cell of the study: a model on a series, at a horizon, with a seed; and the table of all."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table
from torch import nn

from titans_lm.evaluate.forecasting.contenders import CONTENDERS, Contender, Task, parameters, seeded
from titans_lm.evaluate.forecasting.fit import Recipe, fit, measure
from titans_lm.evaluate.forecasting.series import Parts, Series, standardised
from titans_lm.evaluate.forecasting.stream import fit_stream, measure_stream
from titans_lm.evaluate.forecasting.windows import Windows, check_no_leak, windows_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained and measured."""

    series: Series
    parts: Parts
    task: Task
    model: str
    seed: int
    epochs: int | None = None
    """At most so many; None: the model's own."""
    candidate: Contender | None = None
    """Settings to choose among, by the name `model`: trained, and measured on the validation part alone."""

    @property
    def contender(self) -> Contender:
        return self.candidate or CONTENDERS[self.model]

    @property
    def recipe(self) -> Recipe:
        own = self.contender.recipe
        return own if self.epochs is None else own._replace(epochs=self.epochs)

    def key(self) -> dict[str, Any]:
        """What tells it from others."""
        return {
            "data": self.series.name,
            "look_back": self.task.look_back,
            "horizon": self.task.horizon,
            "model": self.model,
            "seed": self.seed,
        }

    def settings(self) -> dict[str, Any]:
        """What must be equal for a line to be this cell's."""
        recipe = self.recipe._asdict() | {"rates": list(self.recipe.rates)}
        settings = {
            "digest": self.series.digest,
            "parts": list(self.parts),
            "season": self.task.season,
            "recipe": recipe,
        }
        fields = self.contender.fields
        return settings if fields is None else {**settings, "model": fields}

    def check(self) -> None:
        """Raises ValueError, before anything is trained, for a look-back or horizon that the series cannot give."""
        task = self.task
        windows_of(self.series.values, self.parts, task.look_back, task.horizon)
        if self.model == "seasonal_naive" and task.season > task.look_back:
            raise ValueError(f"seasonal_naive repeats the last --season {task.season} steps, and sees --look-back "
                             f"{task.look_back}: give a shorter season or a longer look-back")  # fmt: skip

    def run(self, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train and test -> its line. `tell` gets a line of progress now and then."""
        begun = time.monotonic()
        values = standardised(self.series, self.parts)
        if self.candidate is not None:
            values = values[: self.parts.val]  # the test part is not there
        data = windows_of(values, self.parts, self.task.look_back, self.task.horizon)
        check_no_leak(data, self.parts)
        train = fit_stream if self.contender.stream else fit
        fitted = train(lambda: seeded(self.contender, self.task, self.seed), data, self.recipe, self.seed, tell)
        return {
            **self.key(),
            **({} if self.candidate is not None else self._test(fitted.model, data.test)),
            "val_mse": fitted.val.mse,
            "val_mae": fitted.val.mae,
            "parameters": parameters(fitted.model),
            "rate": fitted.rate,
            "epochs": fitted.epochs,
            "seconds": round(time.monotonic() - begun, 1),
            "settings": self.settings(),
        }

    def _test(self, model: nn.Module, test: Windows) -> dict[str, Any]:
        """Errors on the test part; of a stream also those of its look-back alone."""
        found = (measure_stream if self.contender.stream else measure)(model, test)
        errors = {"mse": found.mse, "mae": found.mae, "windows": found.windows}
        if not self.contender.stream:
            return errors
        alone = measure_stream(model, test, carried=False)
        return {**errors, "mse_look_back_alone": alone.mse, "mae_look_back_alone": alone.mae}


def chosen(rows: list[dict[str, Any]]) -> Table:
    """Validation MSE of each candidate by series and horizon, the lowest geometric mean first."""
    places = list(dict.fromkeys((row["data"], row["horizon"]) for row in rows))
    found: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault((row["data"], row["horizon"]), []).append(row["val_mse"])
    means = {name: {place: statistics.mean(seeds) for place, seeds in own.items()} for name, own in found.items()}
    table = Table("", *(f"{data} {horizon}" for data, horizon in places), "geometric mean", title="validation MSE")
    order = sorted(means, key=lambda name: (-len(means[name]), statistics.geometric_mean(means[name].values())))
    for name in order:
        own = means[name]
        whole = f"{statistics.geometric_mean(own.values()):.4f}" if len(own) == len(places) else ""
        table.add_row(name, *(f"{own[place]:.4f}" if place in own else "" for place in places), whole)
    return table


def tables(rows: Iterable[dict[str, Any]]) -> list[Table]:
    """A table for each series and look-back: MSE / MAE by model and horizon, the mean over seeds, and over horizons."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["look_back"]), []).append(row)
    return [_table(f"{name}, look-back {look_back}: MSE / MAE", group) for (name, look_back), group in groups.items()]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    horizons = sorted({row["horizon"] for row in rows})
    table = Table("", "parameters", *map(str, horizons), "mean", "seeds", title=title)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        pairs = [_mean([row for row in own if row["horizon"] == horizon]) for horizon in horizons]
        whole = [pair for pair in pairs if pair is not None]
        mean = None if len(whole) < len(pairs) else tuple(statistics.mean(part) for part in zip(*whole, strict=True))
        sizes = [row["parameters"] for row in own]
        size = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        seeds = len({row["seed"] for row in own})
        table.add_row(model, size, *map(_shown, pairs), _shown(mean), str(seeds))
    return table


def _mean(rows: list[dict[str, Any]]) -> tuple[float, ...] | None:
    return (statistics.mean(r["mse"] for r in rows), statistics.mean(r["mae"] for r in rows)) if rows else None


def _shown(pair: tuple[float, ...] | None) -> str:
    return "" if pair is None else " / ".join(f"{error:.3f}" for error in pair)
