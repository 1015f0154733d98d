"""Figures: drawn without a display, written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans_lm.utils.memory_lock import beside


@contextmanager
def figure_file(path: Path, *grid: int, dpi: int = 130, svg: bool = False, **options: Any) -> Iterator[Any]:
    """Yields the axes of `pyplot.subplots(*grid, **options)`. Writes `path`, a PNG, if the block raises nothing; with
    `svg`, an SVG beside it too."""
    import matplotlib  # a second, and only commands that draw need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(*grid, **{"layout": "constrained", **options})
    part = beside(path, "part")
    try:
        yield axes
        for goal in (path, path.with_suffix(".svg")) if svg else (path,):
            figure.savefig(part, format="svg" if goal.suffix == ".svg" else "png", dpi=dpi)
            part.replace(goal)
    finally:
        part.unlink(missing_ok=True)
        plt.close(figure)
