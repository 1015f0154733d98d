"""Training in several processes gives what one gives with the same batches, and its checkpoints go on anywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed, nn

from conftest import exhaustive
from titans_lm import TitansConfig, TitansForCausalLM
from titans_lm.training.arithmetic import Arithmetic
from titans_lm.training.config import parse_settings
from titans_lm.training.run_folder import check_checkpoint
from titans_lm.training.train import train

MODEL = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 8, "memory_dim": 8,
}  # fmt: skip
VARIANTS = ("mac", "mag", "mal", "lmm")
SPANS = [2, 3, 4, 1]
MODES = {
    **{
        f"{variant}-apart": (
            {"variant": variant, "memory_loss_weight": 0.1, "memory_theta_weight": 0.1},
            {"accumulation": 2},
        )
        for variant in VARIANTS
    },
    **{f"{variant}-carried": ({"variant": variant}, {"tbptt_steps": SPANS}) for variant in VARIANTS},
    "stages": (
        {"variant": "mag", "surprise_threshold": 0.5},
        {"core_steps": 1, "memory_steps": 1, "activation_checkpointing": True, "accumulation": 2},
    ),
}
"""Name -> the model's section and the training's."""
USUAL = ("mac-apart", "mag-apart", "mag-carried", "mal-carried", "stages")
"""What is always run: each way of training in two variants. The others are for `make test-all`."""


HALF = {"bf16": True, "activation_checkpointing": True, "accumulation": 2, "learning_rate": 0.01}
CURRICULUM = [{"until": 0.5, "sequence_length": 8}, {"until": 1.0, "sequence_length": 16}]
MANY = {
    "max_steps": 4, "save_steps": 1, "keep": 3, "tbptt_steps": [2], "core_steps": 1, "memory_steps": 1,
    "activation_checkpointing": True, "accumulation": 2,
}  # fmt: skip
FULL = ("full-ddp-0", "full-ddp-1", "full-fsdp-0", "full-fsdp-1")
"""Runs in which the disk of one process, the last number, is full."""


def tree(folder, output, model, **training):
    training = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "save_steps": 99, "warmup": 0.0, **training}
    return {
        "model": {**MODEL, **model},
        "data": {"files": [str(folder / "texts")], "sequence_length": 16, "held_out": 0},
        "training": {"output_dir": str(folder / output), **training},
    }


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def difference(one, other):
    """The largest of losses, and of weights."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert len(losses(one)) == len(losses(other))
    apart = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    return apart, max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """All runs: of one process, of two, and of four that go on with what two have saved."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "texts").mkdir()
    for i in range(3):
        (folder / "texts" / f"{i}.txt").write_text("".join(f"line {n * (i + 3)} of many\n" for n in range(60)))
    two = {"batch_size": 2}
    alone, pairs = {}, {}
    selected = {item.name for item in request.session.items}
    modes = [mode for mode in MODES if mode in USUAL or any(mode in name for name in selected)]
    for name, (model, training) in ((mode, MODES[mode]) for mode in modes):
        alone[name] = tree(folder, f"one/{name}", model, **training)
        pairs[f"ddp/{name}"] = tree(folder, f"ddp/{name}", model, **training, **two)
        pairs[f"fsdp/{name}"] = tree(folder, f"fsdp/{name}", model, **training, **two, fsdp=True)
    task = {"name": "streams", "length": 16, "files": [str(folder / "texts")], "sources": {"markov": 1}}
    streams = {**tree(folder, "one/streams", {"variant": "mag"}, tbptt_steps=SPANS), "data": {"task": task}}
    alone["streams"] = streams
    for how in ("ddp", "fsdp"):
        training = {"output_dir": str(folder / how / "streams"), **two, "fsdp": how == "fsdp"}
        pairs[f"{how}/streams"] = {**streams, "training": {**streams["training"], **training}}
    alone["many"] = streamed(folder, "one/many", workers=2, curriculum=CURRICULUM, **MANY)
    pairs["fsdp/many"] = streamed(folder, "fsdp/many", workers=1, curriculum=CURRICULUM, **MANY, **two, fsdp=True)
    alone["half"] = tree(folder, "one/half", {"variant": "mac"}, **HALF)
    alone["begun"] = tree(folder, "one/begun", {"variant": "mac"}, **{**HALF, "learning_rate": 1e-12}, max_steps=1)
    alone["streamed"] = streamed(folder, "one/streamed", workers=2)
    pairs["ddp/half"] = tree(folder, "ddp/half", {"variant": "mac"}, **HALF, **two)
    pairs["fsdp/half"] = tree(folder, "fsdp/half", {"variant": "mac"}, **HALF, **two, fsdp=True)
    pairs["ddp/streamed"] = streamed(folder, "ddp/streamed", **two)
    pairs["stopped"] = tree(folder, "stopped", {"variant": "mag"}, tbptt_steps=SPANS, **two, fsdp=True, save_steps=2)
    pairs["taken"] = tree(folder, "one/mag-apart", {"variant": "mag"}, **two)
    late = {"max_minutes": 0.03, "max_steps": 100000, "logging_steps": 1}
    pairs["skewed"] = tree(folder, "skewed", {"variant": "mag"}, **two, **late)
    again = {"tbptt_steps": SPANS, "save_steps": 2, "resume": True}
    fours = {"four": tree(folder, "four", {"variant": "mag"}, **again, batch_size=1, fsdp=True)}
    on = {"ddp/again": streamed(folder, "ddp/again", **two, resume=True)}
    on |= {name: streamed(folder, name, **two, resume=True) for name in FULL if "ddp" in name}
    on |= {name: tree(folder, name, {"variant": "mag"}, **again, **two, fsdp=True) for name in FULL if "fsdp" in name}
    plan = folder / "plan.json"
    taken = {str(folder / name / "checkpoint-2"): str(folder / _begun(name) / "checkpoint-2") for name in (*on, "four")}
    plan.write_text(json.dumps([[1, alone, {}], [2, pairs, {}], [4, fours, taken], [2, on, {}]]))
    worker = [sys.executable, str(Path(__file__).with_name("processes_worker.py")), str(plan)]
    done = subprocess.run(worker, capture_output=True, text=True, env=environment(), check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    return folder, [line for line in said.splitlines() if line.startswith("raised")]


def streamed(folder, output, workers=0, curriculum=(), **training):
    """Text that each process reads from the disk, or each worker of one process."""
    model = {"variant": "mag", "memory_loss_weight": 0.1}
    settings = tree(folder, output, model, **{"save_steps": 2, **training})
    files = {"files": [str(folder / "texts")], "stream": True, "workers": workers, "curriculum": list(curriculum)}
    return {**settings, "data": {**settings["data"], **files}}


def _begun(name):
    """The run with the checkpoint that another goes on from."""
    return "ddp/streamed" if "ddp" in name else "stopped"


@pytest.mark.parametrize("mode", [mode if mode in USUAL else exhaustive(mode) for mode in MODES])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_same_batches(runs, how, mode):
    folder, _ = runs
    loss, weight = difference(folder / "one" / mode, folder / how / mode)
    assert loss <= 2e-6
    assert weight <= 1e-6


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_rows_of_a_task_go_on_in_their_process(runs, how):
    folder, _ = runs
    assert max(difference(folder / "one/streams", folder / how / "streams")) <= 2e-6


def test_sharded_weights_go_with_every_other_key(runs):
    folder, _ = runs
    assert max(difference(folder / "one/many", folder / "fsdp/many")) <= 2e-6
    assert len(list((folder / "fsdp/many").glob("checkpoint-*"))) == MANY["keep"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_in_bfloat16_are_one_to_its_rounding(runs, how):
    folder, _ = runs
    loss, _ = difference(folder / "one/half", folder / how / "half")
    begun, ours, theirs = (
        torch.cat([t.flatten() for t in load_file(folder / name / "model.safetensors").values()])
        for name in ("one/begun", "one/half", f"{how}/half")
    )
    assert 0 < loss <= 3e-3  # of 5.6; the gradients of two rows are rounded apart from those of four
    assert (ours - theirs).norm() <= 0.03 * (ours - begun).norm()


def test_each_process_streams_a_part_of_its_own_and_goes_on_in_it(runs):
    """A worker reads the part that a process with its number reads."""
    folder, _ = runs
    assert max(difference(folder / "one/streamed", folder / "ddp/streamed")) <= 2e-6
    places = [json.loads((folder / f"ddp/streamed/checkpoint-2/data-0000{i}.json").read_text()) for i in range(2)]
    assert places[0]["places"] != places[1]["places"]
    weights = [load_file(folder / name / "model.safetensors") for name in ("ddp/streamed", "ddp/again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_of_one_process_ends_all_and_leaves_the_last_checkpoint(runs, name):
    folder, said = runs
    own = sorted(line.removeprefix(f"raised {name} ") for line in said if line.startswith(f"raised {name} "))
    full = int(name[-1])
    assert len(own) == 2
    assert own[1 - full] == f"{1 - full} FailedElsewhere 2"
    assert own[full].startswith(f"{full} OSError cannot write to {folder / name}: ")
    assert own[full].endswith("the last whole checkpoint there is untouched")
    assert [path.name for path in (folder / name).glob("*checkpoint*")] == ["checkpoint-2"]
    check_checkpoint(folder / name / "checkpoint-2")


def test_a_sharded_checkpoint_of_two_goes_on_in_four_and_in_one(runs):
    folder, _ = runs
    shards = folder / "stopped" / "checkpoint-2" / "sharded"
    assert len(list(shards.glob("*.safetensors"))) == 2
    assert not list(shards.glob("*.metadata"))  # which would be a pickle
    assert max(difference(folder / "one/mag-carried", folder / "four")) <= 2e-6
    shutil.copytree(folder / "stopped" / "checkpoint-2", folder / "alone" / "checkpoint-2")
    settings = tree(folder, "alone", {"variant": "mag"}, tbptt_steps=SPANS, save_steps=2, resume=True)
    train(parse_settings(settings))
    assert max(difference(folder / "one/mag-carried", folder / "alone")) <= 2e-6


def test_other_batches_than_those_of_a_checkpoint_are_refused(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "stopped" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    settings = tree(folder, tmp_path / "out", {"variant": "mag"}, tbptt_steps=SPANS, save_steps=2, resume=True)
    with pytest.raises(ValueError, match="batches of 4 rows in all, not 2"):
        train(parse_settings({**settings, "training": {**settings["training"], "batch_size": 2}}))


def test_shards_that_were_changed_are_named(runs, tmp_path):
    folder, _ = runs
    shutil.copytree(folder / "stopped" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    shard = next((tmp_path / "out" / "checkpoint-2" / "sharded").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    settings = tree(folder, tmp_path / "out", {"variant": "mag"}, tbptt_steps=SPANS, save_steps=2, resume=True)
    with pytest.raises(ValueError, match=shard.name):
        train(parse_settings(settings))


def test_one_process_says_why_and_the_others_end_without_words(runs):
    _, said = runs
    first = [line for line in said if line.startswith("raised taken 0")]
    assert len(first) == 1
    assert "ValueError" in first[0]
    assert "is not empty" in first[0]
    others = [line for line in said if line.startswith("raised taken") and line not in first]
    assert others == ["raised taken 1 FailedElsewhere 2"]


def test_the_first_clock_ends_all_and_sets_the_rate(runs):
    """The other process's clock is a thousand times as fast: by it, the run would end in its first step."""
    folder, _ = runs
    state = json.loads((folder / "skewed" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert state["global_step"] > 1
    assert rates[1] > 0.5 * rates[0]


def test_torchrun_and_the_module_train_and_say_it_once(runs, tmp_path):
    folder, _ = runs
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(tree(folder, tmp_path / "out", {"variant": "mag"}, tbptt_steps=SPANS, batch_size=2))
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "titans_lm", "train", str(config)],
        capture_output=True, text=True, env=environment(), check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("a model of") == 1
    assert max(difference(folder / "one/mag-carried", tmp_path / "out")) <= 2e-6


def test_one_process_where_several_were_asked_for_is_refused(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="started one"):
        train(parse_settings(tree(tmp_path, "out", {"variant": "mag"})))


def test_sharding_needs_processes(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a line of many\n" * 50)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        train(parse_settings(tree(tmp_path, "out", {"variant": "mag"}, fsdp=True)))


@pytest.mark.parametrize("variant", ["mag", "lmm"])
def test_the_arithmetic_is_that_of_real_tensors(variant):
    config = TitansConfig(variant=variant, **MODEL)
    arithmetic, model = Arithmetic(config), TitansForCausalLM(config)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    sent = []

    def count(_, bucket):
        sent.append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(None, count)
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.zeros(1, 16, dtype=torch.long)
        parallel(ids, labels=ids).loss.backward()
        optimizer.step()
    finally:
        distributed.destroy_process_group()
    state = model.initial_state(1)
    assert arithmetic.memory_state() + arithmetic.window_state() == state.nbytes
    tensors = [t for p in model.parameters() for t in (p, p.grad)]
    moments = [t for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
    assert arithmetic.training_state() == sum(t.nbytes for t in [*tensors, *moments])
    assert arithmetic.all_reduce(2) == sum(sent)  # two GPUs: each sends half, twice
