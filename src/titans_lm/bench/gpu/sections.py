"""The cells of a section, within its time: results are written as they come, and what is there is skipped."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from typing import Any

from titans_lm.bench.gpu.cell_worker import CellProcess, OutOfTime
from titans_lm.bench.gpu.cells import Cell, Section
from titans_lm.utils.record import Lines
from titans_lm.utils.terminal import PlainConsole

LEAST_SECONDS = 5.0
"""A cell is not begun with less time."""


def run_section(section: Section, lines: Lines, ends: float, device: str, console: PlainConsole) -> None:
    """Run the cells that have no result yet until `ends`, of `time.monotonic`."""
    waiting: Queue[Cell] = Queue()
    for cell in section.cells:
        if lines.find(name=cell.name) is None:
            waiting.put(cell)
    if waiting.empty():
        console.print(f"{section.name}: all {len(section.cells)} results are there")
        return
    runner = _Runner(section, lines, ends, device, console, waiting)
    count = min(section.parallel, waiting.qsize())
    processes = [CellProcess(device) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            work = [pool.submit(runner.work, process) for process in processes]
            try:
                for one in work:
                    one.result()
            except BaseException:  # Ctrl-C too: threads that wait for a cell go on when its process ends
                runner.stopped.set()
                _end(processes)
                raise
    finally:
        _end(processes)


def _end(processes: list[CellProcess]) -> None:
    for process in processes:
        process.end()


class _Runner:
    """Takes cells from a queue, by one thread for each process."""

    def __init__(
        self, section: Section, lines: Lines, ends: float, device: str, console: PlainConsole, waiting: "Queue[Cell]"
    ):
        self.section, self.lines, self.ends, self.device = section, lines, ends, device
        self.console, self.waiting = console, waiting
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def work(self, process: CellProcess) -> None:
        while not self.stopped.is_set():
            left = self.ends - time.monotonic()
            try:
                cell = self.waiting.get_nowait()
            except Empty:
                return
            if left < LEAST_SECONDS:
                self._say(cell, "not begun: the section's time is over; call again to continue")
                return
            self._run(cell, process, left)

    def _run(self, cell: Cell, process: CellProcess, left: float) -> None:
        begun = time.monotonic()
        try:
            if cell.contender == "streams":  # trains for as long as it is told
                cell = cell._replace(options={**cell.options, "seconds": left})
            result = process.run(cell, min(left, cell.limit))
        except OutOfTime:
            if left < cell.limit:
                self._say(cell, "stopped: the section's time is over; call again to continue")
                return
            result = {"error": f"took more than {cell.limit:.0f} s"}
        if self.stopped.is_set():
            return
        row = {"name": cell.name, "dtype": cell.dtype, "backend": cell.backend, "options": cell.options,
               "error": None, "actions": {}, **result, "wall_seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
        with self.lock:
            self.lines.add(row)
        self._say(cell, _said(row))

    def _say(self, cell: Cell, words: str) -> None:
        total, left = len(self.section.cells), max(0.0, self.ends - time.monotonic())
        with self.lock:
            done = len(self.lines.rows)
            self.console.print(f"{self.section.name} {done}/{total}, {left:.0f} s left: {cell.name}: {words}")


def _said(row: dict[str, Any]) -> str:
    """A result in a line."""
    if row["error"]:
        return f"error: {row['error']}"
    words = [f"{action} {1e3 * m['seconds']:,.2f} ms" for action, m in row["actions"].items()]
    if "right" in row:
        words.append("right" if row["right"] else "WRONG")
    if isinstance(row.get("largest_error"), float):
        words.append(f"error {row['largest_error']:.1e} of {row['worst']}")
    if "decision" in row:
        words.append(row["decision"])
    return ", ".join(words) or f"{row['wall_seconds']} s"
