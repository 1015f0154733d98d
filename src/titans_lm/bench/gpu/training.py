"""A run of `titans train` on streams, for the seconds that are left."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from titans_lm.bench.measure import Contender, Setting
from titans_lm.training.run_folder import STATE

STARTING, SAVING = 45.0, 20.0
"""Seconds that a run takes to start and to save, beside those that it trains."""
LEAST = 20.0
"""Seconds of training below which nothing is learned that could be told."""


def settings(options: dict[str, Any], setting: Setting, output: Path, minutes: float) -> dict[str, Any]:
    """The YAML of the run: streams, as `configs/streams.yaml` trains on them, with a model of `parameters`."""
    size: dict[str, Any] = {"size": "tiny"} if options["toy"] else {"size": "small", "memory_dim": 256}
    return {
        "model": {**size, "parameters": options["parameters"], "variant": "mag", "gate": "convex"},
        "data": {"task": {"name": "streams", "length": options["length"], "files": ["python-stdlib"],
                          "switch": 16 * options["length"]}},
        "training": {
            "output_dir": str(output), "max_steps": 4 if options["toy"] else 100_000, "max_minutes": minutes,
            "batch_size": options["batch_size"], "tbptt_steps": [1, 4, 16, 64][: options["batch_size"]],
            "learning_rate": 0.002, "bf16": setting.device == "cuda", "logging_steps": 1 if options["toy"] else 10,
            "save_steps": 100_000,
        },
    }  # fmt: skip


def streams(options: dict[str, Any], setting: Setting) -> Contender:
    """Train. `about` has the loss at the beginning and the end, and tokens a second."""
    trained = options["seconds"] - STARTING - SAVING
    if trained < LEAST and not options["toy"]:
        raise ValueError(f"{options['seconds']:.0f} s are too few for a run; call again with more --minutes")
    with tempfile.TemporaryDirectory() as folder:
        output, config = Path(folder, "run"), Path(folder, "run.yaml")
        config.write_text(yaml.safe_dump(settings(options, setting, output, max(trained, LEAST) / 60)))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else dict(os.environ)
        done = subprocess.run(
            [sys.executable, "-m", "titans_lm.cli", "train", str(config)],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"titans train: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        return Contender({}, _learned(json.loads((output / STATE).read_text()), options))


def _learned(state: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    log = [entry for entry in state["log_history"] if "loss" in entry]
    losses = [entry["loss"] for entry in log]
    few = max(1, len(losses) // 10)
    whole: dict[str, Any] = next((entry for entry in state["log_history"] if "train_runtime" in entry), {})
    tokens = state["global_step"] * options["batch_size"] * options["length"]
    seconds = whole.get("train_runtime")
    return {
        "steps": state["global_step"], "tokens": tokens, "train_seconds": seconds,
        "tokens_per_second": None if not seconds else tokens / seconds,
        "first_loss": statistics.mean(losses[:few]), "last_loss": statistics.mean(losses[-few:]), "losses": losses,
    }  # fmt: skip


BUILD = {"streams": streams}
