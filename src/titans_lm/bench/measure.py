"""Seconds, CPU seconds and peak memory of an action, and the contenders that actions belong to.

`torch.utils.benchmark` is not used: its timer measures neither CPU seconds nor memory, and it repeats one statement in
one process, where contenders are to take turns in processes of their own.
"""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from titans_lm.utils.matmul import width_within

LEAST_SECONDS = 0.2
"""A shorter action is repeated within a repetition, for the resolution of clock and scheduler."""
MATMUL = 2048
"""Width of the large matmul that measures what the machine can do."""
MATMUL_OPERATIONS = 2 * MATMUL**3
"""Of that matmul."""
MATMUL_SECONDS = 4.0
"""What it may take. In bfloat16 a processor without instructions for it would take half a minute."""


@dataclass(frozen=True)
class Setting:
    """Settings that all contenders of a run share."""

    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    threads: int = 1
    memory_limit: float = 0.0
    """GiB that a process may allocate on a CPU; 0: no limit."""

    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def autocast(self) -> torch.autocast:
        """Mixed precision as in `titans train`: float32 parameters, computation in the run's type."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")


@dataclass(frozen=True)
class Action:
    """A timed action: `run(prepare())`. `prepare` is not timed. `report` returns figures of the result."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    report: Callable[[Any], dict[str, Any]] = lambda _: {}
    once: bool = False
    """Run once per repetition."""


@dataclass
class Contender:
    """A contender in its worker: its actions and facts about it. `small` runs all code once on small inputs, so that
    lazily loaded code does not count as an action's memory."""

    actions: dict[str, Action]
    about: dict[str, Any] = field(default_factory=dict)
    small: Callable[[], None] = lambda: None


def matmul(setting: Setting) -> tuple[Action, dict[str, int]]:
    """The large matmul, in the run's type, and what to say about it. It is smaller where it would take too long."""
    device, dtype = torch.device(setting.device), setting.torch_dtype()
    width = width_within(MATMUL, MATMUL_SECONDS, device, dtype)
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in "ab")
    out = torch.empty_like(a)
    return Action(lambda _: torch.mm(a, b, out=out)), {"matmul_operations": 2 * width**3}


def matmul_operations(row: dict[str, Any]) -> int:
    """Of the matmul that a row of a result compares with; rows of earlier versions do not say it."""
    operations: int = row.get("matmul_operations", MATMUL_OPERATIONS)
    return operations


class Meter:
    """Measures actions of one process. Memory is relative to that of the process when the meter was made."""

    def __init__(self, setting: Setting):
        self.cuda = setting.device == "cuda"
        _trim()
        self.base = torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")
        self.calls: dict[Action, int] = {}

    def measure(self, action: Action) -> dict[str, Any]:
        """One repetition: seconds and CPU seconds per call, peak bytes, and the action's report."""
        calls = self.calls.get(action, 1)
        ready = action.prepare()
        self._forget_peak()
        before = time.process_time()
        seconds, result = (self._on_cuda if self.cuda else _on_cpu)(action, ready, calls)
        cpu = time.process_time() - before
        if action not in self.calls:  # from the first call, which also loads and allocates: a rough guess
            self.calls[action] = 1 if action.once else max(1, min(1000, round(LEAST_SECONDS / max(seconds, 1e-6))))
        figures = {"seconds": seconds / calls, "cpu_seconds": cpu / calls, "peak_bytes": self._peak(), "calls": calls}
        return {**figures, **action.report(result)}

    def _on_cuda(self, action: Action, ready: Any, calls: int) -> tuple[float, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            result = action.run(ready)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result

    def _forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then that since the process began
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value

    def _peak(self) -> int | None:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")
        return None if peak is None or self.base is None else peak - self.base


def _on_cpu(action: Action, ready: Any, calls: int) -> tuple[float, Any]:
    begun = time.perf_counter()
    for _ in range(calls):
        result = action.run(ready)
    return time.perf_counter() - begun, result


def _trim() -> None:
    """Return freed memory to the system, so that it does not hide later allocations."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int | None:
    """Bytes of a line of /proc/self/status; None without that file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def resident() -> int | None:
    """Resident bytes of this process; None if unknown."""
    return _status("VmRSS")


def limit_memory(setting: Setting) -> None:
    """Make allocations above the limit fail; and if the machine runs out of memory, make the system kill this process
    first."""
    if setting.device != "cpu" or not Path("/proc/self").exists():
        return
    import resource

    Path("/proc/self/oom_score_adj").write_text("1000")
    if setting.memory_limit:
        size = int(setting.memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def available_memory() -> float:
    """GiB of memory available without swapping; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:"))


def summarise(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, minimum and maximum over repetitions; peak memory of the first."""
    seconds = [r["seconds"] for r in repetitions]
    timed = seconds[1:] or seconds
    cpu = [r["cpu_seconds"] for r in repetitions][1:] or [repetitions[0]["cpu_seconds"]]
    return {
        "seconds": statistics.median(timed), "least": min(timed), "most": max(timed),
        "cpu_seconds": statistics.median(cpu), "peak_bytes": repetitions[0]["peak_bytes"], "runs": len(timed),
        "warm_up_seconds": seconds[0], "each": timed,
    }  # fmt: skip
