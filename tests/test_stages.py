"""Stages of a run: each leaves the weights that it does not train as they are, to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from titans_lm.training.config import parse_settings
from titans_lm.training.train import model_for, train

MODEL = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "segment_size": 8,
    "intermediate_size": 16, "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 8, "memory_dim": 8,
}  # fmt: skip


def settings(output, model=(), **training):
    return parse_settings(
        {
            "model": {"variant": "mag", **MODEL, **dict(model)},
            "data": {"task": {"name": "streams", "length": 32, "sources": "markov"}},
            "training": {
                "output_dir": str(output), "max_steps": 6, "batch_size": 2, "logging_steps": 1, "save_steps": 2,
                "weight_decay": 0.1, **training,
            },
        }
    )  # fmt: skip


def changed(before, after):
    """Names of the weights that differ in any bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("variant", "more"), [("mac", {}), ("mag", {"tbptt_steps": 2, "accumulation": 2}), ("mal", {})]
)
def test_each_stage_trains_its_own_weights_and_no_others(tmp_path, variant, more):
    stages = {"core_steps": 2, "memory_steps": 2, "max_steps": 4, **more}
    run = settings(tmp_path, {"variant": variant, "memory_loss_weight": 0.1}, **stages)
    begun = model_for(run).state_dict()
    train(run)
    core, memory = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    run.training.max_steps, run.training.resume = 5, True
    ended = train(run).state_dict()
    begun = {name: begun[name] for name in core}
    memories = {name for name in begun if ".memory." in name}
    cores = {name for name in begun if ".attention." in name or ".mlp." in name}
    assert cores <= changed(begun, core) <= begun.keys() - memories  # a norm before the memory alone has no gradient
    assert changed(core, memory) == memories
    assert cores | memories <= changed(memory, {name: ended[name] for name in begun})


def test_a_run_goes_on_within_a_stage(tmp_path):
    run = settings(tmp_path, core_steps=1, memory_steps=2, max_steps=4)
    whole = train(run).state_dict()
    shutil.rmtree(tmp_path / "checkpoint-4")
    run.training.resume = True
    assert not changed(whole, train(run).state_dict())


@pytest.mark.parametrize(
    ("model", "training", "words"),
    [
        (
            {},
            {"core_steps": 3, "memory_steps": 4},
            r"training\.memory_steps must be at most max_steps - core_steps=3, got 4",
        ),
        ({}, {"memory_steps": -1}, r"training\.memory_steps must be at least 0, got -1"),
        ({"variant": "lmm"}, {"memory_steps": 1}, r"training\.memory_steps is for a core beside a memory .*got lmm"),
        ({"variant": "attention"}, {"memory_steps": 1}, "for a core beside a memory .*got attention"),
    ],
)
def test_a_stage_that_cannot_be_is_named(tmp_path, model, training, words):
    with pytest.raises(ValueError, match=words):
        settings(tmp_path, model, **training)
