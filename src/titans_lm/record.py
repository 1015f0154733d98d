"""Result files: what was found, with when, where and from which source; written whole or not at all."""

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
