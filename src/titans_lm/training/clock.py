"""The time limit of a run, its progress, and the time of all its parts."""

import math
import sys
import time
from typing import Any

from rich.progress import Progress, TextColumn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from titans_lm.training.processes import Processes
from titans_lm.utils.terminal import PlainConsole


class Clock(TrainerCallback, ExportableState):
    """Stops the run at the time limit, and shows its progress. Counts the time of all parts of an interrupted run:
    checkpoints record it. The first process's clock is that of all: each follows it in schedule and end."""

    def __init__(self, max_steps: int, max_minutes: float | None, processes: Processes | None = None):
        self.processes, self.now = processes or Processes(), 0.0
        self.max_steps, self.limit, self.begun = max_steps, (max_minutes or math.inf) * 60, time.monotonic()
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[status]}", markup=False))
        self.bar = Progress(*columns, console=PlainConsole(stderr=True), disable=not sys.stderr.isatty())

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.elapsed()}}

    def elapsed(self) -> float:
        """Seconds, of this process's clock."""
        return time.monotonic() - self.begun

    def _agree(self) -> None:
        if self.limit < math.inf:
            self.now = self.processes.gather(self.elapsed())[0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        state.compute_steps(args, state.max_steps)  # a checkpoint holds the intervals of the run that wrote it
        saved = state.stateful_callbacks
        before = saved.setdefault("Clock", saved.pop("_Clock", self.state()))["attributes"]["seconds"]  # its old name
        self.begun = time.monotonic() - (before if state.global_step else 0)
        self._agree()
        if self.limit < math.inf and self.processes.is_first:
            self.bar.start()
            self.bar.add_task("training", total=self.limit, status="")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._agree()  # before the schedule's step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.now > self.limit:
            control.should_training_stop = True
        for task in self.bar.task_ids:
            self.bar.update(task, completed=min(self.now, self.limit))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            status = f"step {state.global_step}, loss {logs['loss']:.3f}, {logs['tokens_per_second']:,} tokens/s"
            for task in self.bar.task_ids:
                self.bar.update(task, status=status)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.bar.stop()

    def progress(self, step: int) -> float:
        """The part of the run that is done at `step`, by steps or by time, from 0 to 1."""
        return min(1.0, max(step / self.max_steps, self.now / self.limit))
