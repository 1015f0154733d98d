"""`kill -9` at any moment loses no more than the steps since the last checkpoint, and no bit of what follows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from titans_lm.training.config import parse_settings
from titans_lm.training.train import train

MODEL = {
    "variant": "mag", "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 8, "memory_dim": 8,
}  # fmt: skip


def tree(folder, output, **training):
    (folder / "texts").mkdir(exist_ok=True)
    for i in range(3):
        (folder / "texts" / f"{i}.txt").write_text("".join(f"line {n * (i + 3)} of many\n" for n in range(60)))
    training = {"max_steps": 16, "batch_size": 4, "logging_steps": 1, "save_steps": 2, **training}
    return {
        "model": MODEL,
        "data": {"files": [str(folder / "texts")], "sequence_length": 16, "held_out": 0},
        "training": {"output_dir": str(folder / output), "tbptt_steps": [2, 3, 4, 1], **training},
    }


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_that_is_killed_again_and_again_is_one_that_was_not(tmp_path):
    train(parse_settings(tree(tmp_path, "whole")))
    plan = tmp_path / "settings.json"
    plan.write_text(json.dumps(tree(tmp_path, "killed", keep=3)))
    worker = [sys.executable, str(Path(__file__).with_name("killed_worker.py")), str(plan), "3", "1", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(worker, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("killed ") for line in done.stdout.splitlines()) >= 2
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(one[name].equal(other[name]) for name in other)
    assert not (tmp_path / "killed" / ".unfinished-checkpoint").exists()
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 3  # training.keep


@pytest.mark.parametrize("keep", [0, -1])
def test_some_checkpoint_is_kept(tmp_path, keep):
    with pytest.raises(ValueError, match=r"training\.keep must be at least 1"):
        parse_settings(tree(tmp_path, "out", keep=keep))
