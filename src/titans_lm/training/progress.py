"""The progress of a run where no terminal shows it: a line each N seconds, and a small file in its folder."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from titans_lm.training.clock import Clock
from titans_lm.training.run_folder import PROGRESS
from titans_lm.utils.machine import OtherLoad, is_busy, own_seconds
from titans_lm.utils.memory_lock import beside
from titans_lm.utils.record import cores


def shows_bar() -> bool:
    """Whether progress goes to a terminal, where a bar moves; else there are lines."""
    return sys.stderr.isatty()


class Progress(TrainerCallback):
    """Each `seconds`, and at the end, prints how far the run is (not where a bar shows it), and writes that to
    `progress.json` in the run's folder. Only in the first process."""

    def __init__(self, output: Path, clock: Clock, seconds: float):
        self.file, self.clock, self.every = output / PROGRESS, clock, seconds
        self.logs: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.begun = time.monotonic()
        self.next, self.first = self.begun + self.every, self.clock.progress(state.global_step)
        self.use = _Use()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        self.logs |= {key: logs[key] for key in ("loss", "tokens_per_second") if logs and key in logs}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.every
            self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._tell(state)

    def _tell(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        part = self.clock.progress(state.global_step)
        took = time.monotonic() - self.begun
        left = took * (1 - part) / (part - self.first) if part > self.first else None
        found = {
            "step": state.global_step, "max_steps": state.max_steps, "part": round(part, 4), **self.logs,
            "seconds": round(self.clock.elapsed()), "seconds_left": None if left is None else round(left),
            **self._load(),
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        new = beside(self.file, "part")
        new.write_text(json.dumps(found) + "\n")
        new.replace(self.file)
        if not shows_bar():
            print(line(found), file=sys.stderr, flush=True)

    def _load(self) -> dict[str, float]:
        """What other processes use of the machine since the last line, where that slows this one, and the rate at most
        to be expected without them."""
        use, self.use = self.use, _Use()
        others, threads = use.load.cores(), torch.get_num_threads()
        if others is None or not is_busy(others, threads, cores()):
            return {}
        found = {"other_cores": round(others, 1), "cores": cores()}
        share = min(1.0, (own_seconds() - use.own) / (time.monotonic() - use.begun) / threads)
        if share > 0 and "tokens_per_second" in self.logs:
            found["idle_tokens_per_second"] = round(self.logs["tokens_per_second"] / share)
        return found


class _Use:
    """What this process and others use of the cores, from when it is made."""

    def __init__(self) -> None:
        self.load, self.own, self.begun = OtherLoad(), own_seconds(), time.monotonic()


def line(found: dict[str, Any]) -> str:
    """One line of what `progress.json` holds."""
    words = [f"step {found['step']:,} of {found['max_steps']:,}", f"{100 * found['part']:.0f} % of the run"]
    if "loss" in found:
        words.append(f"loss {found['loss']:.4f}")
    if "tokens_per_second" in found:
        words.append(f"{found['tokens_per_second']:,} tokens/s")
    words.append(f"{_duration(found['seconds'])} taken")
    if found["seconds_left"] is not None:
        words.append(f"about {_duration(found['seconds_left'])} left")
    if "other_cores" in found:
        words.append(f"busy machine: other processes use {found['other_cores']} of {found['cores']} cores")
    if "idle_tokens_per_second" in found:
        words.append(f"without them at most {found['idle_tokens_per_second']:,} tokens/s")
    return ", ".join(words)


def _duration(seconds: int | float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
