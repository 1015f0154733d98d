"""Tables (mean and standard deviation over seeds, on screen and as Markdown) and the figure of a study."""

import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from titans_lm.study.grid import Study
from titans_lm.utils.figures import figure_file
from titans_lm.utils.record import write_text
from titans_lm.utils.terminal import PlainConsole

SCORE_KEYS = ("score", "bits_per_byte")
"""Keys of the score to report: the first one that a test has."""

Scores = dict[tuple[str, str], dict[str, list[float]]]
"""(task, model) -> label of the test -> scores, one per seed."""


_HEAD = "Mean and standard deviation over seeds."


def write_report(study: Study, rows: list[dict[str, Any]], results: Path, console: Console) -> None:
    """Write `NAME.md`, and `NAME.png` if the study names an axis, in `results`. Print the tables."""
    scores = collect(rows)
    for task in dict.fromkeys(task for task, _ in scores):
        for table in tables(task, scores, rows, console.width):
            console.print(table, "")
    path = results / f"{study.name}.md"
    if path.exists() and not path.read_text().startswith(f"# {study.name}\n\n{_HEAD}"):
        raise ValueError(f"{path} is not a table of this study; move it away")
    write_text(path, markdown(study.name, scores, rows))
    if study.figure is not None:
        plot(rows, study.figure, results / f"{study.name}.png")


def collect(rows: list[dict[str, Any]]) -> Scores:
    """Scores by task and model, also for models without a successful run."""
    scores: Scores = {}
    for row in rows:
        tests = scores.setdefault((row["task"], row["model"]), {})
        for score in row["scores"]:
            tests.setdefault(label_of(score), []).append(score_of(score))
    return scores


def label_of(score: dict[str, Any]) -> str:
    """The label of a test from its options, without scores: "length 64", after its name, if any."""
    options = {key: value for key, value in score.items() if isinstance(value, str | int) and key not in _NOT_OPTIONS}
    return ", ".join(str(value) if key == "test" else f"{key} {value}" for key, value in options.items()) or "score"


_NOT_OPTIONS = ("samples", "rows", "seconds")


def score_of(score: dict[str, Any]) -> float:
    """The score of a row. Raises KeyError if it has none of SCORE_KEYS."""
    name = next(name for name in SCORE_KEYS if name in score)
    return float(score[name])


def mean_and_spread(values: list[float]) -> str:
    """ "0.95 ± 0.02": mean and, for several values, standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _cells(scores: Scores, rows: list[dict[str, Any]], task: str) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row per model."""
    models = [model for t, model in scores if t == task]
    tests = list(dict.fromkeys(test for model in models for test in scores[task, model]))
    lines = []
    for model in models:
        mine = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        good = [row for row in mine if row["status"] == "ok"]
        figures = [mean_and_spread(values) if (values := scores[task, model].get(test)) else "-" for test in tests]
        parameters = f"{good[0]['parameters']:,}" if good else "-"
        rate = f"{statistics.median(row['tokens_per_second'] for row in good):,.0f}" if good else "-"
        lines.append([model, *figures, parameters, rate, f"{len(good)}/{len(mine)}"])
    return ["model", *tests, "parameters", "tokens/s in training", "runs"], lines


def tables(task: str, scores: Scores, rows: list[dict[str, Any]], width: int) -> list[Table]:
    """Tables of at most `width` columns of text: columns that do not fit go to further tables, with the models
    repeated."""
    head, lines = _cells(scores, rows, task)
    models, *columns = zip(head, *lines, strict=True)
    parts = [[models]]
    for column in columns:
        needed = PlainConsole(width=10**6).measure(_table(task, [*parts[-1], column])).maximum
        if needed > width and len(parts[-1]) > 1:
            parts.append([models])
        parts[-1].append(column)
    return [_table(task, part) for part in parts]


LONGEST_NAME = 24
"""Maximum width of a model's name on screen; a longer one wraps."""


def _table(task: str, columns: list[tuple[str, ...]]) -> Table:
    """A table as narrow as possible without breaking a number or a word."""
    table = Table(title=task or None, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading, *cells in columns:
        longest = max(map(len, [*heading.split(), *cells]))
        table.add_column(heading, width=min(longest, LONGEST_NAME))
    for line in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*line)
    return table


def markdown(name: str, scores: Scores, rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown, with provenance."""
    out = [f"# {name}", "", f"{_HEAD} {_provenance(rows)}", ""]
    for task in dict.fromkeys(task for task, _ in scores):
        head, lines = _cells(scores, rows, task)
        out += [f"## {task}", ""] if task else []
        out += [_line(head), _line(["---"] * len(head)), *map(_line, lines), ""]
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        out += ["Runs without a score:", ""]
        out += [
            f"* {row['model']} {row['task']}, seed {row['seed']}: {row['status']}: {row['error']}" for row in failed
        ]
        out.append("")
    return "\n".join(out)


def _provenance(rows: list[dict[str, Any]]) -> str:
    def each(key: str) -> str:
        return " and ".join(dict.fromkeys(str(row[key]) for row in rows))

    hours = sum(row["seconds"] for row in rows) / 3600
    return f"`{each('command')}`, {each('machine')}, {each('date')}, commit {each('commit')}; {hours:.1f} core hours."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_MARKERS, _DASHES = "os^vDPX*<>", ("-", "--", "-.", ":")
TITLE_WIDTH = 48
"""Characters in a line of a panel's title, so that titles side by side do not overlap."""


def plot(rows: list[dict[str, Any]], axis: str, path: Path) -> None:
    """Each model's score along `axis`, an option of the tests. The band is the range over seeds."""
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in rows:
        for score in (score for score in row["scores"] if axis in score):
            others = {key: value for key, value in score.items() if key != axis}
            label = "" if label_of(others) == "score" else label_of(others)
            panel = panels.setdefault(", ".join(filter(None, [row["task"], label])), {})
            panel.setdefault(row["model"], {}).setdefault(score[axis], []).append(score_of(score))
    kinds = {name for row in rows for score in row["scores"] for name in SCORE_KEYS if name in score}
    with figure_file(
        path, 1, max(len(panels), 1), figsize=(2 + 4 * max(len(panels), 1), 4), squeeze=False, layout="tight"
    ) as axes:
        for ax, (title, models) in zip(axes[0], panels.items(), strict=False):
            for number, (model, points) in enumerate(models.items()):
                x, colour = sorted(points), f"C{number % 10}"
                style = {"marker": _MARKERS[number % 10], "linestyle": _DASHES[number % 4]}  # lines may coincide
                ax.plot(
                    x,
                    [statistics.mean(points[p]) for p in x],
                    label=model,
                    color=colour,
                    markersize=5,
                    alpha=0.8,
                    **style,
                )
                ax.fill_between(x, [min(points[p]) for p in x], [max(points[p]) for p in x], color=colour, alpha=0.12)
            ax.set_xscale("log", base=2)
            ax.set_xlabel(axis)
            ticks = sorted({x for points in models.values() for x in points})
            ax.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=8)
            ax.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=9)
            ax.grid(alpha=0.3)
            if kinds == {"score"}:  # shares: all of the scale, so that a little less does not look like nothing
                ax.set_ylim(-0.03, 1.03)
        axes[0][0].set_ylabel(" or ".join(sorted(kinds)).replace("_", " "))
        axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
