"""The folder of a training run: what goes on, what is refused, what stays of the user's, and what a signal leaves."""

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import commands
from titans_lm.cli import main
from titans_lm.training.config import load_settings, parse_settings
from titans_lm.training.not_finite import NotFinite
from titans_lm.training.run_folder import RunLock, remove_run
from titans_lm.training.train import train

MODEL = {
    "variant": "mag", "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 16, "memory_dim": 16,
}  # fmt: skip


def tree(folder, **training):
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(2):
        (texts / f"{i}.txt").write_text("".join(f"line {n * (i + 3)} of many, and so on\n" for n in range(60)))
    return {
        "model": MODEL,
        "data": {"files": [str(texts)], "sequence_length": 32, "held_out": 0},
        "training": {
            "output_dir": str(folder / "out"), "max_steps": 4, "batch_size": 2, "logging_steps": 1, "save_steps": 2,
            **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with checkpoints after two and four, in `out`; its settings in `run.yaml`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree(folder)))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, capsys):
    """The run after two steps, and what `titans train` says when it goes on with it: status and last line."""
    shutil.copytree(trained / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    return tmp_path / "out", lambda *changes: go_on(trained, tmp_path, capsys, changes)


def go_on(trained, folder, capsys, changes):
    words = [f"training.output_dir={folder / 'out'}", "training.resume=true", *changes]
    status = main(["train", str(trained / "run.yaml"), *(word for change in words for word in ("--set", change))])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, error.strip().splitlines()[-1] if error.strip() else ""


def logged(output, name):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(trained, run):
    output, resume = run
    assert resume()[0] == 0
    assert logged(output, "loss") == logged(trained / "out", "loss")
    ours, whole = (load_file(folder / "model.safetensors") for folder in (output, trained / "out"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert not [p.name for p in output.iterdir() if p.name.startswith(".")]


def test_another_learning_rate_takes_effect_on_resume(trained, run):
    output, resume = run
    assert resume("training.learning_rate=1e-2", "training.weight_decay=0.3", "training.save_steps=1")[0] == 0
    rates, before = logged(output, "learning_rate"), logged(trained / "out", "learning_rate")
    assert rates[:2] == before[:2]
    assert rates[2:] == pytest.approx([10 * rate for rate in before[2:]])
    settings = load_settings(output / "run.yaml", [])
    assert (settings.training.learning_rate, settings.training.weight_decay) == (0.01, 0.3)
    assert sorted(p.name for p in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    groups = torch.load(output / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    step = [load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (output, trained / "out")]
    assert not torch.equal(
        step[0]["lm_head.weight" if "lm_head.weight" in step[0] else "model.embed_tokens.weight"],
        step[1]["lm_head.weight" if "lm_head.weight" in step[1] else "model.embed_tokens.weight"],
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.seed=1", "training.seed=1 (was 0)"),
        ("training.optimizer=muon", "training.optimizer='muon' (was 'adamw')"),
        ("training.batch_size=4", "training.batch_size=4 (was 2)"),
        ("training.accumulation=2", "training.accumulation=2 (was 1)"),
        ("training.tbptt_steps=2", "training.tbptt_steps=[2] (was [1])"),
        ("data.sequence_length=16", "data.sequence_length=16 (was 32)"),
        ("data.held_out=1", "data.held_out=1 (was 0)"),
        ("model.window_size=4", "model.window_size=4 (was 8)"),
        ("model.memory_lr=0.2", "model.memory_lr=0.2 (was None)"),
        ("model.hidden_size=32", "model.hidden_size=32 (was 16)"),
    ],
)
def test_what_may_not_change_on_resume_is_named(run, change, words):
    output, resume = run
    before = content(output)
    status, said = resume(change)
    assert status == 2
    assert f"{words} cannot change on resume" in said
    assert content(output) == before


def test_a_checkpoint_with_a_key_s_old_name_goes_on(trained, run):
    output, resume = run
    saved = output / "checkpoint-2" / "run.yaml"
    assert "  tbptt_steps:" in saved.read_text()
    saved.write_text(saved.read_text().replace("tbptt_steps", "carried_steps"))
    with pytest.warns(FutureWarning, match="tbptt_steps"):
        assert resume()[0] == 0
    assert logged(output, "loss") == logged(trained / "out", "loss")


def test_the_same_model_in_other_words_goes_on(run):
    assert run[1]("model.hidden_dim=16", "model.memory_lr=0.1")[0] == 0


# ------------------------------------------------------------------------------------------------ damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("made",))


def poison(path):
    torch.save({"python": Malicious()}, path)


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "no digests"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", lambda path: path.write_text("")),
        ("trainer_state.json", lambda path: path.write_text("[]")),
        ("rng_state.pth", cut),
        ("rng_state.pth", Path.unlink),
        ("rng_state.pth", poison),
        ("optimizer.pt", cut),
        ("optimizer.pt", flip),
        ("optimizer.pt", Path.unlink),
        ("optimizer.pt", poison),
        ("optimizer.pt", lambda path: path.write_bytes(pickle.dumps(Malicious()))),
        ("scheduler.pt", poison),
        ("model.safetensors", cut),
        ("model.safetensors", flip),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(run, monkeypatch, name, damage, digests):
    output, resume = run
    monkeypatch.chdir(output.parent)
    (output / "checkpoint-best").mkdir()
    (output / "checkpoint-notes").mkdir()
    (output / "checkpoint-notes" / "notes.txt").write_text("mine")
    damage(output / "checkpoint-2" / name)
    if not digests:
        if damage is flip:
            return  # nothing else could tell
        for listed in output.glob("checkpoint-2/*digests.json"):
            listed.unlink()
    before = content(output)
    status, said = resume()
    assert status == 2, said
    assert "checkpoint-2" in said
    assert name in said or (name == "model.safetensors" and "cannot be loaded" in said)
    assert "cannot write" not in said
    assert not Path("made").exists()
    after = content(output)
    assert {path: after[path] for path in before} == before
    assert (output / "checkpoint-best").is_dir()


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.bin", "scaler.pt", "sharded/.metadata"])
def test_nothing_of_a_stranger_is_executed(run, monkeypatch, name):
    """Files that the run does not need, or does not write, are pickles that would make a folder."""
    output, resume = run
    monkeypatch.chdir(output.parent)
    path = output / "checkpoint-2" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Malicious()))
    resume()
    assert not Path("made").exists()


def test_folders_of_the_user_stay_and_are_no_checkpoints(run):
    """Also a copy of a whole checkpoint under a name of the user's own."""
    output, resume = run
    for name in ("checkpoint-best", "checkpoint-9-mine"):
        shutil.copytree(output / "checkpoint-2", output / name)
    (output / "checkpoint-notes").mkdir()
    (output / "notes.txt").write_text("mine")
    before = content(output / "checkpoint-9-mine")
    assert resume("training.save_steps=1", "training.max_steps=5")[0] == 0
    assert content(output / "checkpoint-9-mine") == content(output / "checkpoint-best") == before
    assert (output / "checkpoint-notes").is_dir()
    assert (output / "notes.txt").read_text() == "mine"
    assert {p.name for p in output.glob("checkpoint-*")} >= {"checkpoint-4", "checkpoint-5"}
    assert not (output / "checkpoint-2").exists()


def test_a_study_removes_of_a_run_what_the_run_wrote(tmp_path):
    ours = ("checkpoint-3/trainer_state.json", "checkpoint-3/optimizer.pt", "runs/events.out.tfevents.1", "run.yaml",
            "model.safetensors", "run-0/checkpoint-1/trainer_state.json")  # fmt: skip
    theirs = (
        "checkpoint-best/trainer_state.json",
        "checkpoint-9/notes.txt",
        "notes.txt",
        "run-notes/model.safetensors",
    )
    for name in (*ours, *theirs):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()
    (tmp_path / "else").mkdir()
    remove_run(tmp_path / "out", model=False)
    kept = {"run.yaml", "model.safetensors", *theirs}
    assert {str(path) for path in content(tmp_path / "out")} == kept
    remove_run(tmp_path / "out")
    assert {str(path) for path in content(tmp_path / "out")} == set(theirs)
    (tmp_path / "else" / "model.safetensors").touch()
    (tmp_path / "else" / "runs").mkdir()
    (tmp_path / "else" / "runs" / "notes.txt").touch()
    remove_run(tmp_path / "else")
    assert list(content(tmp_path / "else")) == [Path("runs/notes.txt")]
    (tmp_path / "else" / "runs" / "notes.txt").unlink()
    remove_run(tmp_path / "else")
    assert not (tmp_path / "else").exists()


def test_a_folder_in_the_way_of_a_checkpoint_is_not_overwritten(run):
    output, resume = run
    (output / "checkpoint-4").mkdir()
    (output / "checkpoint-4" / "mine.txt").write_text("mine")
    status, said = resume()
    assert status == 2
    assert "checkpoint-4 is not a whole checkpoint" in said
    assert (output / "checkpoint-4" / "mine.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ two runs, no run


def test_a_second_run_in_a_folder_says_who_has_it(run):
    output, resume = run
    with RunLock(output):
        status, said = resume()
    assert status == 2
    assert f"is in use by process {os.getpid()} on " in said
    assert resume()[0] == 0


@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(trained, tmp_path, capsys, resumed):
    output = tmp_path / "out"
    command = ["train", str(trained / "run.yaml"), "--set", f"training.output_dir={output}"]
    killed = commands.started(command, tmp_path / "said", commands.killed_as_it_saves)
    assert commands.ended(killed) == -signal.SIGKILL
    assert output.is_dir()
    (output / ".unfinished-checkpoint" / "checkpoint-2").mkdir(parents=True)
    assert main([*command, "--set", f"training.resume={str(resumed).lower()}"]) == 0
    assert logged(output, "loss") == logged(trained / "out", "loss")
    capsys.readouterr()


def test_a_folder_with_anything_else_in_it_is_not_begun(trained, tmp_path, capsys):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "notes.txt").write_text("mine")
    assert main(["train", str(trained / "run.yaml"), "--set", f"training.output_dir={tmp_path / 'out'}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "runs" / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("training", [{"max_steps": 2}, {"logging_steps": 100}], ids=str)
def test_a_run_that_diverges_saves_nothing(tmp_path, training):
    with pytest.raises(NotFinite, match="the loss is not a number at step"):
        train(parse_settings(tree(tmp_path, learning_rate=1e20, warmup=0.0, **training)))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_last_good_checkpoint_of_a_run_that_diverges_is_kept_and_named(run):
    output, resume = run
    before = content(output)
    status, said = resume("training.learning_rate=1e20")
    assert status == 2
    assert f"{output / 'checkpoint-2'} is from before, and good" in said
    after = content(output)
    assert {path: after[path] for path in before} == before
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (output / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_as_ctrl_c_does(tmp_path, number):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(tmp_path, max_steps=10_000, save_steps=10_000)))
    process = commands.started(["train", str(config)], tmp_path / "said")
    while not list((tmp_path / "out" / "runs").rglob("events*")) and process.is_alive():
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(process.pid, number)
    status, message = commands.ended(process), (tmp_path / "said").read_text()
    assert status == 128 + number, message
    assert "training.resume=true" in message.splitlines()[-1]
    assert "Traceback" not in message
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "optimizer.pt").is_file()
