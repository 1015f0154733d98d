"""One cell of the study: a model on a series, at a horizon, with a seed."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

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

    def values(self) -> Tensor:
        """The rows that are there for training and test: of a candidate, none of the test part."""
        values = standardised(self.series, self.parts)
        return values if self.candidate is None else values[: self.parts.val]

    def run(self, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train and test -> its line. `tell` gets a line of progress now and then."""
        begun = time.monotonic()
        data = windows_of(self.values(), self.parts, self.task.look_back, self.task.horizon)
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
