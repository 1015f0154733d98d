"""Result files: what was found, with when, where and from which source; written whole or not at all. Also the process
that a command is."""

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def provenance(command: str) -> dict[str, str]:
    """The command, the day, the commit, the machine and the torch that made a result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Beside, then renamed."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def keep_freed_memory() -> None:
    """What is freed stays with this process (up to 1 GiB at a time) instead of going back to the system.

    On a CPU each step of a model frees and takes the same memory again; the system zeroes every page of it anew, which
    can take a third of the time. For the commands' own processes, and where the C library is glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most that glibc takes
        libc.mallopt(trim_threshold, 2**30)
