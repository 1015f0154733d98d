"""One cell of the study: a model on a series, at a horizon, with a seed; and the table of all."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from titans_lm.evaluate.forecasting.contenders import CONTENDERS, Task, build, parameters
from titans_lm.evaluate.forecasting.fit import Recipe, fit, measure
from titans_lm.evaluate.forecasting.metrics import Errors
from titans_lm.evaluate.forecasting.series import Parts, Series, standardised
from titans_lm.evaluate.forecasting.stream import fit_stream, measure_stream
from titans_lm.evaluate.forecasting.windows import check_no_leak, windows_of


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

    @property
    def recipe(self) -> Recipe:
        own = CONTENDERS[self.model].recipe
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
        return {"digest": self.series.digest, "parts": list(self.parts), "season": self.task.season, "recipe": recipe}

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
        data = windows_of(values, self.parts, self.task.look_back, self.task.horizon)
        check_no_leak(data, self.parts)
        stream = CONTENDERS[self.model].stream
        train = fit_stream if stream else fit
        fitted = train(lambda: build(self.model, self.task, self.seed), data, self.recipe, self.seed, tell)
        test = (measure_stream if stream else measure)(fitted.model, data.test)
        alone = measure_stream(fitted.model, data.test, carried=False) if stream else None
        return {
            **self.key(),
            **self._errors(fitted.val, test),
            **({} if alone is None else {"mse_look_back_alone": alone.mse, "mae_look_back_alone": alone.mae}),
            "parameters": parameters(fitted.model),
            "rate": fitted.rate,
            "epochs": fitted.epochs,
            "seconds": round(time.monotonic() - begun, 1),
            "settings": self.settings(),
        }

    def _errors(self, val: Errors, test: Errors) -> dict[str, Any]:
        return {"mse": test.mse, "mae": test.mae, "windows": test.windows, "val_mse": val.mse, "val_mae": val.mae}


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
