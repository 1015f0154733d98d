"""Contenders in processes of their own, measured in turns (A B A B ...), so that other load affects all alike. One that
dies becomes a row with the reason."""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from titans_lm.bench.measure import Setting, summarise


@dataclass
class Entrant:
    """How a worker builds a contender, and its actions of a repetition, in order."""

    name: str
    module: str
    contender: str
    actions: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)
    """Environment variables of its process; None: without this one."""


@dataclass
class Heat:
    """Entrants measured in turns, `runs` repetitions after a warm-up."""

    name: str
    entrants: list[Entrant]
    runs: int
    warm_up: bool = True
    patience: float = float("inf")
    """Maximum seconds of a warm-up; a slower entrant has it as its only measurement."""


class Dead(Exception):
    """A contender failed, with the reason."""


class Worker:
    """The process of one entrant."""

    def __init__(self, entrant: Entrant, setting: Setting):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "titans_lm.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=_environment(entrant, setting),
            start_new_session=True,  # Ctrl-C reaches this process only, which ends the others
        )  # fmt: skip
        order = {k: getattr(entrant, k) for k in ("module", "contender", "options")}
        self._order = {**order, "setting": dataclasses.asdict(setting)}

    def begin(self) -> dict[str, Any]:
        """Build the contender. Returns facts about it."""
        about: dict[str, Any] = self._ask(self._order)["about"]
        return about

    def measure(self, action: str) -> dict[str, Any]:
        """One repetition of an action."""
        return self._ask({"do": action})

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the empty answer shows it
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Dead(self._why())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Dead(answer["error"])
        return answer

    def _why(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "killed, most likely for want of memory"
        self.log.seek(0)
        last = self.log.read().strip().splitlines()[-1:] or [""]
        return f"ended with status {code}: {last[0]}"


def _environment(entrant: Entrant, setting: Setting) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", **entrant.environment}
    return {name: value for name, value in {**os.environ, **own}.items() if value is not None}


class Lane:
    """A running entrant: its worker and its measurements."""

    def __init__(self, heat: Heat, entrant: Entrant, setting: Setting):
        self.entrant, self.left = entrant, heat.runs + heat.warm_up
        self.repetitions: dict[str, list[dict[str, Any]]] = {action: [] for action in entrant.actions}
        self.seconds: list[float] = []
        self.row: dict[str, Any] = {"heat": heat.name, "name": entrant.name, **entrant.options, "error": None}
        self.setting = setting
        self.worker: Worker | None = None

    def turn(self, patience: float) -> None:
        """Run one repetition of every action; the first call also starts the worker."""
        begun = time.monotonic()
        try:
            if self.worker is None:
                self.worker = Worker(self.entrant, self.setting)
                self.row.update(self.worker.begin())
                begun = time.monotonic()
            for action, repetitions in self.repetitions.items():
                repetitions.append(self.worker.measure(action))
            self.seconds.append(time.monotonic() - begun)
            self.left = 0 if self.seconds[0] > patience else self.left - 1
        except Dead as death:
            self.row["error"], self.left = str(death), 0
        if self.left == 0:
            self.end()

    def end(self) -> None:
        if self.worker is not None:
            self.worker.end()

    def result(self) -> dict[str, Any]:
        done = {action: repetitions for action, repetitions in self.repetitions.items() if repetitions}
        return {**self.row, "actions": {action: summarise(r) for action, r in done.items()}, "repetitions": done}

    def remaining(self, usual: float) -> float:
        """Estimated seconds left."""
        return self.left * (statistics.median(self.seconds) if self.seconds else usual)


def run_heats(heats: list[Heat], setting: Setting, rows: list[dict[str, Any]], console: Console) -> None:
    """Run heats one after another. Adds each entrant's result to `rows`, also when Ctrl-C ends a heat."""
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        total = sum(len(heat.entrants) * (heat.runs + heat.warm_up) for heat in heats)
        bar = progress.add_task("", total=total, left="")
        lanes = [[Lane(heat, entrant, setting) for entrant in heat.entrants] for heat in heats]
        for heat, heat_lanes in zip(heats, lanes, strict=True):
            try:
                _run(heat, heat_lanes, lambda name: _show(progress, bar, name, lanes))
            finally:
                for lane in heat_lanes:
                    lane.end()
                    if lane.seconds or lane.row["error"]:
                        rows.append(lane.result())


def _run(heat: Heat, lanes: list[Lane], show: Any) -> None:
    while any(lane.left for lane in lanes):
        for lane in lanes:
            if lane.left:
                show(f"{heat.name}: {lane.entrant.name}")
                lane.turn(heat.patience)


def _show(progress: Progress, bar: Any, name: str, lanes: list[list[Lane]]) -> None:
    every = [lane for heat in lanes for lane in heat]
    medians = [statistics.median(lane.seconds) for lane in every if lane.seconds]
    seconds = sum(lane.remaining(statistics.mean(medians)) for lane in every) if medians else 0.0
    left = f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
    total = progress.tasks[0].total or 0
    done = total - sum(lane.left for lane in every)
    progress.update(bar, completed=done, description=name, left=left if medians else "")
