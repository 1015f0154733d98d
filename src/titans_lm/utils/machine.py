"""The machine that a process runs on: what others take of its cores, how threads wait there, and freed memory."""

import atexit
import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables by which users say how the threads of OpenMP wait."""


def wait_policy(others: float | None, threads: int, cores: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for how the threads of OpenMP, which are PyTorch's, wait for each other.

    By default they spin, which is fastest where each has a core. Where `others`, the cores that other processes use,
    leave too few, a thread spins in the time that the one it waits for would need: then they are to sleep. Nothing is
    changed for one thread, where the load is not known (None), and where `environment` has one of `WAIT_VARIABLES`.
    """
    if threads < 2 or others is None or any(name in environment for name in WAIT_VARIABLES):
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE"} if is_busy(others, threads, cores) else {}


def is_busy(others: float, threads: int, cores: int) -> bool:
    """Whether `threads` threads do not have a core each beside what `others` use."""
    return others + threads > cores + 0.3


class _Snapshot(NamedTuple):
    """Seconds at one moment."""

    time: float
    all: float
    """CPU seconds of all processes."""
    own: float
    """CPU seconds of this process and its children."""


class OtherLoad:
    """The cores that other processes than this one and its children use, from when it is made."""

    def __init__(self) -> None:
        self._begun = _snapshot()

    def cores(self) -> float | None:
        """Since it was made; None where the system does not say, as outside Linux."""
        before, now = self._begun, _snapshot()
        if before is None or now is None or now.time <= before.time:
            return None
        return max(0.0, (now.all - before.all) - (now.own - before.own)) / (now.time - before.time)


def other_cores(seconds: float = 0.1) -> float | None:
    """The cores that other processes use, measured for some time."""
    load = OtherLoad()
    if load.cores() is None and not Path("/proc/stat").exists():
        return None
    time.sleep(seconds)
    return load.cores()


def _snapshot() -> _Snapshot | None:
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, *others = map(int, words)  # without idle and iowait; with interrupts and steal
    return _Snapshot(time.monotonic(), (user + nice + system + sum(others)) / tick, own_seconds())


def own_seconds() -> float:
    """CPU seconds of this process and its children, running or ended and waited for."""
    total, pending = 0, [os.getpid()]
    while pending:
        folder = Path("/proc") / str(pending.pop())
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            total += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for children in folder.glob("task/*/children"):
                pending += map(int, children.read_text().split())
    return total / os.sysconf("SC_CLK_TCK")


def keep_freed_memory() -> bool:
    """Keep freed memory (up to 2 GiB at a time) in this process instead of returning it to the system.

    On a CPU each step of a model frees and allocates the same memory. The system zeroes its pages each time, which can
    take a third of the time. Fragmentation may raise peak memory by a third. It sets `M_MMAP_MAX` and
    `M_TRIM_THRESHOLD` of glibc's malloc for the whole process, for good. The `titans` commands call it.

    Returns whether it has an effect: with another C library than glibc it has none.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # 0: no allocation of its own mapping, which free would return
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def end_quickly() -> None:
    """Let this process end without a last search for garbage, which takes a second with torch and transformers."""
    atexit.unregister(gc.freeze)  # once is enough
    atexit.register(gc.freeze)
