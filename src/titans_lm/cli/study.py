"""`titans study STUDY.yaml`: train and test each combination of models, tasks and seeds; print a table and a figure.

A result is a line of `results/NAME.jsonl` and is never computed twice: an interrupted study resumes, and one with a new
model or seed runs only what is missing. A failed run is a line too.
"""

import argparse
from pathlib import Path

from titans_lm.utils.record import cores
from titans_lm.utils.terminal import PlainConsole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="YAML file, such as studies/parity.yaml")
    change = "change a value of all runs, such as training.max_steps=100; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    parser.add_argument("--processes", type=int, default=cores(), help="parallel runs")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder for result lines, table and figure"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for runs in progress")
    parser.add_argument("--keep", action="store_true", help="keep the trained models")
    parser.add_argument(
        "--search",
        type=int,
        metavar="TRIALS",
        help="instead of the study, search each model's best values with this many trials",
    )


def run(arguments: argparse.Namespace) -> None:
    from titans_lm.evaluate.cell import check_files
    from titans_lm.study.grid import load_study
    from titans_lm.study.report import write_report
    from titans_lm.study.scheduler import run_cells, train_and_test
    from titans_lm.training.train import earlier
    from titans_lm.utils.record import RESULTS, Lines, check_least, check_output, command_line

    study = load_study(arguments.study, arguments.changes)
    check_least(arguments, 1, "processes")
    if not arguments.results.is_dir() and (arguments.results != RESULTS or RESULTS.exists()):
        raise ValueError(f"--results {arguments.results}: this folder does not exist")
    command = command_line("study", argparse.Namespace(study=arguments.study, changes=arguments.changes), ["study"])
    if arguments.search is not None:
        from titans_lm.study.search import run_search

        return run_search(study, arguments, command)
    with Lines(arguments.results / f"{study.name}.jsonl", {"study": study.name}, command) as lines:
        missing = [cell for cell in study.cells if cell.result(lines.rows) is None]
        check_output(lines.path, picture=study.figure is not None, ours=False)
        for cell in missing:
            check_files(cell.tests)
            earlier(cell.settings(arguments.runs / study.name))
        console = PlainConsole()
        console.print(
            f"{study.name}: {len(study.cells)} runs, {len(missing)} to do, {arguments.processes} side by side"
        )
        try:
            run_cells(missing, train_and_test, arguments, command, lines, console)
        finally:
            rows = [row for cell in study.cells if (row := cell.result(lines.rows)) is not None]
            if rows:
                write_report(study, rows, arguments.results, console)
