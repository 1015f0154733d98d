"""The tables of the study: on the screen and as Markdown."""

import statistics
from typing import Any, NamedTuple

from rich.table import Table

TITLE = "# Forecasting"
Row = dict[str, Any]
"""A line of the results."""


class Report(NamedTuple):
    """A table of texts."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def on_screen(self) -> Table:
        table = Table(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def markdown(head: Row, rows: list[Row]) -> str:
    """A file of all tables of `rows`, whose file begins with `head`."""
    where = f"{head['machine']}, begun {head['date']}, {sum(row['seconds'] for row in rows) / 3600:.1f} hours"
    reports = [*errors(rows), *older(rows)]
    return "\n\n".join([TITLE, f"`{head['command']}` and more; {where}.", *(r.markdown() for r in reports)]) + "\n"


def errors(rows: list[Row]) -> list[Report]:
    """For each series and look-back, MSE / MAE by model and horizon, the mean over seeds, and over horizons."""
    return [
        _errors(f"{data}, look-back {look_back}: MSE / MAE", group)
        for (data, look_back), group in _groups(rows, "data", "look_back").items()
    ]


def _errors(title: str, rows: list[Row]) -> Report:
    horizons = sorted({row["horizon"] for row in rows})
    found = []
    for (model,), own in _groups(rows, "model").items():
        pairs = [_pair([row for row in own if row["horizon"] == horizon]) for horizon in horizons]
        whole = [pair for pair in pairs if pair is not None]
        mean = None if len(whole) < len(pairs) else tuple(statistics.mean(part) for part in zip(*whole, strict=True))
        sizes = [row["parameters"] for row in own]
        size = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        found.append([model, size, *map(_shown, pairs), _shown(mean), str(len({row["seed"] for row in own}))])
    return Report(title, ["", "parameters", *map(str, horizons), "mean", "seeds"], found)


def older(rows: list[Row]) -> list[Report]:
    """Of models in a stream: errors with a memory carried from the first row, and with the look-back alone."""
    streams = [row for row in rows if "mse_look_back_alone" in row]
    if not streams:
        return []
    found = []
    for (data, look_back, model, horizon), own in _groups(streams, "data", "look_back", "model", "horizon").items():
        alone = _pair(own, "mse_look_back_alone", "mae_look_back_alone")
        carried = _pair(own)
        assert alone is not None
        assert carried is not None
        change = f"{100 * (carried[0] / alone[0] - 1):+.1f} % / {100 * (carried[1] / alone[1] - 1):+.1f} %"
        found.append([data, str(look_back), model, str(horizon), _shown(carried), _shown(alone), change])
    columns = ["series", "look-back", "model", "horizon", "carried", "look-back alone", "change"]
    return [Report("What is older than the look-back: MSE / MAE of the same weights", columns, found)]


def choice(rows: list[Row]) -> Report:
    """Validation MSE of each candidate by series and horizon, the lowest geometric mean first."""
    places = list(_groups(rows, "data", "horizon"))
    means: dict[str, dict[tuple[Any, ...], float]] = {}
    for (name,), own in _groups(rows, "model").items():
        parts = _groups(own, "data", "horizon").items()
        means[name] = {place: statistics.mean(row["val_mse"] for row in seeds) for place, seeds in parts}
    found = []
    for name in sorted(means, key=lambda name: (-len(means[name]), statistics.geometric_mean(means[name].values()))):
        mean = means[name]
        whole = f"{statistics.geometric_mean(mean.values()):.4f}" if len(mean) == len(places) else ""
        found.append([name, *(f"{mean[place]:.4f}" if place in mean else "" for place in places), whole])
    columns = ["", *(f"{data} {horizon}" for data, horizon in places), "geometric mean"]
    return Report("MSE on the validation part", columns, found)


def _groups(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _pair(rows: list[Row], mse: str = "mse", mae: str = "mae") -> tuple[float, ...] | None:
    return (statistics.mean(r[mse] for r in rows), statistics.mean(r[mae] for r in rows)) if rows else None


def _shown(pair: tuple[float, ...] | None) -> str:
    return "" if pair is None else " / ".join(f"{error:.3f}" for error in pair)
