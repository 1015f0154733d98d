"""`titans evaluate forecast`: long-horizon forecasting by the standard protocol, the memory beside published rivals.

Values are standardised by the training part. MSE and MAE are over all windows of the test part. The last batch counts:
many published numbers leave it out, which changes them (arXiv:2403.20150).
"""

import argparse
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from titans_lm.evaluate.forecasting.candidates import load_candidates
from titans_lm.evaluate.forecasting.cells import Cell
from titans_lm.evaluate.forecasting.contenders import CONTENDERS, Contender, Task
from titans_lm.evaluate.forecasting.report import TITLE, choice, errors, markdown, older
from titans_lm.evaluate.forecasting.series import SPLITS, load_series, split_of
from titans_lm.utils.record import Lines, check_least, check_output, command_line, write_text
from titans_lm.utils.terminal import PlainConsole

HORIZONS = (96, 192, 336, 720)
PROTOCOL = {"values": "standardised by the training part", "test": "all windows"}
SEARCH = {"values": "standardised by the training part", "test": "none: the test part is cut off"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="CSV",
                        help="files whose first column is a date and whose others are numbers")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="MODEL",
                        help=f"some of: {', '.join(CONTENDERS)}")  # fmt: skip
    parser.add_argument("--candidates", type=Path, metavar="YAML",
                        help="instead of models: settings of ours to choose among, such as studies/forecast.yaml; "
                             "measured on the validation part, without the test part")  # fmt: skip
    parser.add_argument("--horizons", type=int, nargs="+", default=list(HORIZONS), help="steps to forecast")
    parser.add_argument("--look-back", type=int, default=96, help="steps that a model sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=SPLITS, default="auto",
                        help="auto: ETT's months by the file's name, else 70/10/20")  # fmt: skip
    parser.add_argument("--season", type=int, default=24, help="steps that seasonal_naive repeats")
    parser.add_argument("--epochs", type=int, help="the most epochs of a training (default: each model's own)")
    parser.add_argument("--out", type=Path, default=Path("results/forecast.jsonl"),
                        help="JSON lines: each file, horizon, model and seed; finished ones are kept")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "horizons", "look_back", "season", "epochs")
    check_least(arguments, 0, "seeds")
    check_output(arguments.out, ours=False)
    search, page = arguments.candidates is not None, arguments.out.with_suffix(".md")
    if page == arguments.out or (page.exists() and not page.read_text().startswith(TITLE)):
        raise ValueError(f"{page} is not a page of this command; give --out another name, one that ends in .jsonl")
    with Lines(arguments.out, SEARCH if search else PROTOCOL, command_line("evaluate forecast", arguments)) as lines:
        candidates: dict[str, Contender] = load_candidates(arguments.candidates) if search else {}
        cells = _cells(arguments, candidates)
        left = [cell for cell in cells if not _is_done(cell, lines)]
        console = PlainConsole()
        _run_cells(left, lines, console)
    keys = [cell.key() for cell in cells]
    rows = [row for row in lines.rows if {name: row[name] for name in keys[0]} in keys]
    reports = [choice(rows)] if search else [*errors(rows), *older(rows)]
    console.print(*(report.on_screen() for report in reports))
    if not search:
        write_text(page, markdown(lines.head, lines.rows))
    console.print(f"{len(left)} of {len(cells)} lines are new: {arguments.out}")


def _cells(arguments: argparse.Namespace, candidates: dict[str, Contender]) -> list[Cell]:
    """All cells, checked before the first is trained: of models, or of candidates where there are any."""
    cells = []
    for path in arguments.data:
        series = load_series(path)
        parts = split_of(series, arguments.split)
        for seed in arguments.seeds:
            for horizon in arguments.horizons:
                task = Task(arguments.look_back, horizon, len(series.columns), arguments.season)
                given = (series, parts, task)
                cells += [
                    Cell(*given, model, seed, arguments.epochs, candidates.get(model))
                    for model in candidates or arguments.models
                ]
    for cell in cells:
        cell.check()
    return cells


def _is_done(cell: Cell, lines: Lines) -> bool:
    """Raises ValueError if the line of this cell has another file, split or training."""
    row = lines.find(**cell.key())
    if row is not None and row["settings"] != cell.settings():
        other = [name for name, value in cell.settings().items() if row["settings"].get(name) != value]
        raise ValueError(f"{lines.path} has {cell.model} on {cell.series.name} at horizon {cell.task.horizon} with "
                         f"another {' and '.join(other)}; give --out another name")  # fmt: skip
    return row is not None


def _run_cells(cells: list[Cell], lines: Lines, console: PlainConsole) -> None:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[status]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("forecasts", total=len(cells), status="")
        for cell in cells:
            name = f"{cell.series.name}, {cell.model}, horizon {cell.task.horizon}, seed {cell.seed}"

            def tell(text: str, name: str = name) -> None:
                progress.update(bar, status=f"{name}: {text}")

            tell("")
            lines.add(cell.run(tell))
            progress.advance(bar)
