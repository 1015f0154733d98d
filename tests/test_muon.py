"""Muon: each matrix's update is that of `torch.optim.Muon`, each other weight's that of AdamW."""

import copy
import json
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from conftest import tiny_model
from titans_lm.models.graft_config import graft_config
from titans_lm.models.graft_files import make_graft
from titans_lm.training.config import parse_settings
from titans_lm.training.muon import muon, orthogonalized
from titans_lm.training.train import train
from titans_lm.training.trainer import TitansTrainer

RATE, DECAY, BETAS = 0.02, 0.3, (0.9, 0.95)


def optimizer_of(model: Any) -> Any:
    return muon(model, TitansTrainer.get_decay_parameter_names(None, model), RATE, DECAY, BETAS)  # type: ignore[arg-type]


def step_twice(model: Any, *optimizers: Any) -> None:
    """Two updates, with gradients that depend on the name of a weight and the step alone."""
    for step in range(2):
        for number, (_, p) in enumerate(sorted(model.named_parameters(), key=itemgetter(0))):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (1, 8, 24)])
def test_an_update_is_nearly_orthogonal_along_the_same_singular_vectors(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonalized(x) @ v.mT
    sizes = inside.diagonal(dim1=1, dim2=2)
    assert ((sizes > 0.5) & (sizes < 1.3)).all()
    assert (inside - torch.diag_embed(sizes)).abs().max() < 1e-4
    assert orthogonalized(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_updates_are_those_of_torch(variant):
    model = tiny_model(variant).float()
    again, own = copy.deepcopy(model), optimizer_of(model)
    step_twice(model, own)
    named = dict(again.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    orthogonal, *others = (
        {"params": [named[names[id(p)]] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in own.param_groups
    )
    step_twice(
        again,
        torch.optim.Muon(**orthogonal, lr=RATE, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=BETAS),
    )
    for name, p in model.named_parameters():
        if any(p is one for one in own.param_groups[0]["params"]):
            assert (p - named[name]).norm() < 0.02 * (p - tiny_model(variant).float().get_parameter(name)).norm(), (
                name
            )  # bf16
        else:
            assert torch.equal(p, named[name]), name


def test_matrices_of_the_blocks_alone_are_orthogonalized():
    model = tiny_model("mag", surprise_threshold=0.1, surprise_threshold_on="prediction")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer_of(model).param_groups]
    assert set.union(*groups) == set(names.values())
    assert sum(map(len, groups)) == len(names)
    kinds = {name.removeprefix("model.layers.").split(".", 1)[1].removesuffix(".weight") for name in groups[0]}
    assert kinds == {
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"attention.{x}_proj" for x in "qkvo"),
        *(f"memory.{x}_proj" for x in "qkvo"), "memory.output_gate",
    }  # fmt: skip
    assert all(name.endswith(".weight") and "norm" not in name for name in groups[1])
    assert not any(name.endswith("proj.weight") for name in groups[2])


def test_of_a_graft_the_memory_and_lora_are_trained(tmp_path: Path):
    base = hf.LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    hf.LlamaForCausalLM(base).save_pretrained(tmp_path)
    fields = {"graft": str(tmp_path), "layers": [1], "memory_head_dim": 16, "memory_dim": 16, "lora_rank": 2}
    model = make_graft(graft_config(fields))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer_of(model).param_groups]
    assert set.union(*groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in groups[0])
    assert any(name.endswith("memory.q_proj.weight") for name in groups[0])
    step_twice(model, optimizer_of(model))


def test_a_weight_without_a_gradient_stays_and_frozen_ones_are_not_taken():
    model = tiny_model("mag").float()
    model.get_input_embeddings().requires_grad_(False)
    before, optimizer = copy.deepcopy(model.state_dict()), optimizer_of(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.get_input_embeddings().weight) not in held
    named = dict(model.named_parameters())
    learns = next(name for name in named if name.endswith("up_proj.weight"))
    named[learns].grad = torch.ones_like(named[learns])
    optimizer.step()
    assert [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])] == [learns]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    def settings(folder: str, **training: Any) -> Any:
        model = {"variant": "mag", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "intermediate_size": 32, "window_size": 8, "memory_head_dim": 8, "memory_dim": 16}  # fmt: skip
        task = {"name": "streams", "length": 16, "sources": {"logs": 1}}
        return parse_settings({
            "model": model, "data": {"task": task},
            "training": {"output_dir": str(tmp_path / folder), "max_steps": 4, "batch_size": 2, "logging_steps": 1,
                         "save_steps": 2, "optimizer": "muon", "report_to": [], **training},
        })  # fmt: skip

    whole = copy.deepcopy(train(settings("whole")).state_dict())
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    parts = train(settings("whole", resume=True)).state_dict()
    other = train(settings("adamw", optimizer="adamw")).state_dict()
    history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name
    assert any(not torch.allclose(other[name], tensor, atol=1e-4) for name, tensor in whole.items())
