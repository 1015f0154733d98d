"""Training: what a user's mistake says, what resuming gives, what is carried and what is not."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import commands
from conftest import exhaustive
from titans_lm import TitansState
from titans_lm.cli import main
from titans_lm.models.hub import SHIPPED, load
from titans_lm.training.config import load_settings, parse_settings
from titans_lm.training.train import model_for, train, trainer_for
from titans_lm.training.trainer import TitansTrainer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODEL = {
    "variant": "mag", "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "window_size": 8, "num_persistent_tokens": 2, "memory_head_dim": 16, "memory_dim": 16,
}  # fmt: skip


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text("".join(f"line {n * (i + 3)} of many, and so on\n" for n in range(60)))
    return folder


def tree(texts, output, model=(), data=(), **training):
    return {
        "model": {**MODEL, **dict(model)},
        "data": {"files": [str(texts)], "sequence_length": 32, **dict(data)},
        "training": {
            "output_dir": str(output), "max_steps": 6, "batch_size": 2, "logging_steps": 1, "save_steps": 2,
            "eval_steps": 3, "eval_blocks": 4, **training,
        },
    }  # fmt: skip


def losses(output, name="loss"):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_whole(path):
    settings = load_settings(path, [])
    assert settings.training.output_dir == f"runs/{path.stem}"
    config = settings.config()
    assert path.stem not in ("mac", "mag", "mal", "lmm") or config.variant == path.stem


@pytest.mark.parametrize("name", ["books", "needle"])
def test_the_settings_of_shipped_models_are_read(name):
    with pytest.warns(FutureWarning, match=r"training\.carried_steps is now training\.tbptt_steps"):
        settings = load_settings(SHIPPED / name / "run.yaml", [])
    written = yaml.safe_load((SHIPPED / name / "run.yaml").read_text())["training"]["carried_steps"]
    assert settings.training.tbptt_steps == (written if isinstance(written, list) else [written])


def test_a_key_under_its_old_name_changes_the_new_one_and_not_both_are_given(texts, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(texts, tmp_path / "out", tbptt_steps=3)))
    with pytest.warns(FutureWarning, match="tbptt_steps"):
        assert load_settings(config, ["training.carried_steps=2"]).training.tbptt_steps == [2]
    with (
        pytest.warns(FutureWarning, match="tbptt_steps"),
        pytest.raises(ValueError, match=r"training\.tbptt_steps is given twice"),
    ):
        parse_settings(tree(texts, tmp_path / "out", tbptt_steps=3, carried_steps=2))


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("model", [{"baseline": "mamba2", "size": "tiny"}, MODEL])
def test_a_model_may_take_all_of_the_memory_and_no_byte_more(texts, tmp_path, monkeypatch, model, missing):
    """Weights that are tied are counted once."""
    settings = parse_settings({**tree(texts, tmp_path / "out"), "model": model})
    size = sum(p.nbytes for p in model_for(settings).parameters())
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else size - missing)
    if missing:
        with pytest.raises(ValueError, match="its weights take"):
            model_for(settings)
    else:
        model_for(settings)


def test_a_run_leaves_a_model_that_loads_and_says_how_it_was_made(texts, tmp_path):
    settings = parse_settings(tree(texts, tmp_path / "out"))
    model = train(settings)
    loaded, tokenizer = load(tmp_path / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == 258
    assert parse_settings(yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())) == settings
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_bits_per_byte" in entry for entry in history)
    assert all(entry["tokens_per_second"] > 0 for entry in history if "loss" in entry)
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.parametrize("carried", [1, [2, 5]])
def test_an_interrupted_run_goes_on_to_the_same_losses(texts, tmp_path, carried):
    """Ctrl-C in the middle, in a process of its own; then on, with the memory where it was."""
    training = {"max_steps": 40, "tbptt_steps": carried, "save_steps": 100, "eval_steps": 20}
    train(parse_settings(tree(texts, tmp_path / "whole", **training)))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(texts, tmp_path / "cut", **training)))
    process = commands.started(["train", str(config)], tmp_path / "said")
    log = tmp_path / "cut" / "runs"
    while not list(log.rglob("events*")) and process.is_alive():
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    status, message = commands.ended(process), (tmp_path / "said").read_text()
    assert status == 130, message
    assert "training.resume=true" in message.splitlines()[-1]
    done = max(int(p.name.split("-")[1]) for p in (tmp_path / "cut").glob("checkpoint-*"))
    assert 0 < done < 40
    assert main(["train", str(config), "--set", "training.resume=true"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("step", [exhaustive(6), 8, exhaustive(10)])
def test_a_run_goes_on_past_an_epoch_whose_last_update_has_fewer_batches(texts, tmp_path, step):
    """Epochs of nine batches, by twos: five updates."""
    data = {"sequence_length": 256}
    training = {"max_steps": 12, "tbptt_steps": 3, "accumulation": 2, "save_steps": step, "eval_steps": 12}
    settings = parse_settings(tree(texts, tmp_path / "out", data=data, **training))
    train(settings)
    whole = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    assert (tmp_path / "out" / f"checkpoint-{step}").is_dir()
    settings.training.resume = True
    train(settings)
    assert losses(tmp_path / "out") == whole
    assert len(whole) == 12


def test_a_second_run_of_a_trainer_warms_up_anew_also_by_time(texts, tmp_path):
    """As in a search: the first learning rate is computed before the clock of the run starts."""
    settings = parse_settings(tree(texts, tmp_path / "out", max_minutes=10, max_steps=5, warmup=0.5))
    trainer = trainer_for(settings)
    trainer.train()
    first = trainer.state.log_history[0]["learning_rate"]
    trainer.clock.now = trainer.clock.limit  # as after a run that its time ended
    trainer._reset_run_state()
    assert trainer._lr_factor(0) == pytest.approx(1 / 5 / 0.5)
    assert first > 0


@pytest.mark.parametrize("spans", [[3, 3], [1, 3], [2, 3]])
def test_carried_batches_know_what_came_before_and_begin_anew_after(texts, tmp_path, spans):
    """The losses are those of a loop by hand, row by row, that drops the state after the row's number of batches, and
    where the row's text begins."""
    carried = 3 if spans == [3, 3] else spans
    settings = parse_settings(tree(texts, tmp_path / "a", max_steps=6, tbptt_steps=carried, learning_rate=1e-12))
    model = train(settings).eval()
    from titans_lm.models.tokenizer import byte_tokenizer
    from titans_lm.training.data import Blocks, TBPTTSampler
    from titans_lm.utils.text_file import read_text

    files = sorted(texts.iterdir())[:-1]
    blocks = Blocks([read_text(f) for f in files], byte_tokenizer(), 32)
    order = torch.tensor(list(TBPTTSampler(len(blocks), 2, 3, 0)))[:12].view(6, 2)
    by_row = []
    for span, blocks_of_row in zip(spans, order.t(), strict=True):
        by_row.append([])
        for step, block in enumerate(blocks_of_row):
            if step % 3 % span == 0:
                state = None
            ids = blocks.blocks[None, block].long()
            with torch.no_grad():
                out = model(ids, labels=ids, past_key_values=state, use_cache=True)
            state = out.past_key_values
            by_row[-1].append(float(out.loss))
    by_hand = [sum(both) / 2 for both in zip(*by_row, strict=True)]
    assert losses(tmp_path / "a") == pytest.approx(by_hand, rel=1e-5)
    plain = train(parse_settings(tree(texts, tmp_path / "b", max_steps=6, learning_rate=1e-12)))
    assert plain is not None
    assert losses(tmp_path / "b") != pytest.approx(by_hand, rel=1e-3)


CARRIED, CHECKPOINTED = {"tbptt_steps": 3}, {"activation_checkpointing": True}


@pytest.mark.parametrize(
    ("variant", "more"),
    [
        ("mac", {}), ("mag", CARRIED), ("mal", CHECKPOINTED),
        *(exhaustive("mac", more) for more in (CARRIED, CHECKPOINTED)),
        *(exhaustive("mag", more) for more in ({}, CHECKPOINTED)),
        *(exhaustive("mal", more) for more in ({}, CARRIED)),
    ],
    ids=str,
)  # fmt: skip
def test_the_core_learns_first_and_then_all_of_the_model(texts, tmp_path, variant, more):
    model, training = {"variant": variant, "segment_size": 8}, {"max_steps": 5, "save_steps": 3, **more}
    settings = parse_settings(tree(texts, tmp_path / "out", model, core_steps=3, **training))
    begun = model_for(settings).state_dict()
    ended = train(settings).state_dict()
    for name, core in load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors").items():
        if ".memory." in name:
            assert torch.equal(core, begun[name]), name
            assert not torch.equal(ended[name], begun[name]), name
        elif ".attention." in name or ".mlp." in name:
            assert not torch.equal(core, begun[name]), name
    train(parse_settings(tree(texts, tmp_path / "longer", model, core_steps=4, **training)))
    found, longer = losses(tmp_path / "out"), losses(tmp_path / "longer")
    assert found[:3] == longer[:3]
    assert found[3] != longer[3]  # the memory speaks
    assert losses(tmp_path / "out", "eval_loss")[0] != losses(tmp_path / "longer", "eval_loss")[0]  # after 3 steps


def test_a_run_goes_on_within_its_first_stage(texts, tmp_path):
    settings = parse_settings(tree(texts, tmp_path / "out", max_steps=6, core_steps=4, tbptt_steps=3, save_steps=2))
    train(settings)
    whole = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    settings.training.resume = True
    train(settings)
    assert losses(tmp_path / "out") == whole


def test_accumulated_batches_are_one_batch(texts, tmp_path):
    for name, changes in {"one": {"batch_size": 4}, "two": {"batch_size": 2, "accumulation": 2}}.items():
        train(parse_settings(tree(texts, tmp_path / name, {"memory_loss_weight": 0.1}, max_steps=4, **changes)))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


@pytest.mark.usefixtures("unchecked")  # accelerate builds outputs in a way of its own
def test_bf16_and_checkpointed_activations_train(texts, tmp_path):
    train(parse_settings(tree(texts, tmp_path / "out", bf16=True, activation_checkpointing=True)))
    assert all(map(torch.isfinite, torch.tensor(losses(tmp_path / "out"))))


def test_a_time_limit_ends_a_run_with_the_rate_at_its_end(texts, tmp_path):
    train(parse_settings(tree(texts, tmp_path / "out", max_steps=100_000, max_minutes=0.03, save_steps=100_000)))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert len(rates) < 100_000
    assert rates[-1] < 0.3 * max(rates)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_time_limit_is_that_of_all_parts_of_a_run(texts, tmp_path):
    settings = parse_settings(tree(texts, tmp_path / "out", max_minutes=10, max_steps=5))
    train(settings)
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    path = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < 600
    shutil.copytree(tmp_path / "out", tmp_path / "late")
    settings.training.resume = True
    settings.training.max_steps = 8
    train(settings)
    assert len(losses(tmp_path / "out")) == 8
    state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 601
    (tmp_path / "late" / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    settings.training.output_dir = str(tmp_path / "late")
    train(settings)
    assert len(losses(tmp_path / "late")) == 5


def test_only_linear_maps_decay(texts, tmp_path):
    from titans_lm import TitansForCausalLM
    from titans_lm.models.tokenizer import byte_tokenizer
    from titans_lm.training.data import Blocks

    settings = parse_settings(tree(texts, tmp_path / "out"))
    model = TitansForCausalLM(settings.config())
    trainer = TitansTrainer(model, settings, Blocks(["x" * 999], byte_tokenizer(), 32), None, byte_tokenizer())
    names = set(trainer.get_decay_parameter_names(model))
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.0.memory.theta.weight" in names
    for part in ("norm", "bias", "embed", "lm_head", "persistent", "initial_memory", "convs"):
        assert not [name for name in names if part in name]
    assert names <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.max_stepz=3", "unknown key 'max_stepz' in training; did you mean 'max_steps'"),
        ("model.hiden_size=3", "unknown key 'hiden_size' in model; did you mean 'hidden_size'"),
        ("modl.size=tiny", "unknown key 'modl' in the run; did you mean 'model'"),
        ("training.max_steps=many", "training.max_steps must be a whole number, got 'many'"),
        ("training.max_steps=0", "training.max_steps must be at least 1"),
        ("training.tbptt_steps=[4, 0]", "training.tbptt_steps must be at least 1, got 0"),
        ("training.tbptt_steps=[]", "one number, or at most one for each row of a batch, got []"),
        (
            "training.tbptt_steps=[2, 3, 4]",
            "at most one for each of the 2 rows of a batch",
        ),
        ("training.tbptt_steps=[4, many]", "training.tbptt_steps must be a whole number, or a list of them"),
        ("training.core_steps=6", "training.core_steps must be below max_steps=6, got 6"),
        ("training.core_steps=-1", "training.core_steps must be at least 0, got -1"),
        ("training.learning_rate=-1", "training.learning_rate must be above 0"),
        ("training.bf16=1", "training.bf16 must be true or false"),
        ("model.memory_lr=2", "memory_lr must be in (0, 1]"),
        ("model.hidden_size=wide", "hidden_size"),
        ("model.size=huge", "model.size='huge' is not one of tiny"),
        ("model.vocab_size=100", "model.vocab_size=100 is below the tokenizer's 259"),
        ("data.files=nowhere", "nowhere does not exist"),
        ("data.held_out=9", "data.held_out=9 leaves nothing"),
        ("data.sequence_length=99999", "fewer than one block"),
        ("data.tokenizer=no/such", "tokenizer 'no/such' cannot be loaded"),
        ("training.resume=true", "no checkpoint to resume from"),
        ("training.output_dir=", "training.output_dir"),
        ("training.optimizer=sgd", "training.optimizer='sgd' is not one of adamw, muon"),
        ("training", "must be section.key=value"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(texts, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(texts, tmp_path / "out")))
    assert main(["train", str(config), "--set", change]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("titans train: ")
    assert words in error
    assert not (tmp_path / "out").exists()


def test_training_begins_with_the_weights_of_a_saved_model(texts, tmp_path):
    train(parse_settings(tree(texts, tmp_path / "first")))
    changed = tree(texts, tmp_path / "second", max_steps=1)
    changed["model"] = {"pretrained": str(tmp_path / "first")}
    first, begun = load(tmp_path / "first")[0], model_for(parse_settings(changed))
    assert begun.training
    assert begun.config.to_dict() == first.config.to_dict()
    for (name, a), b in zip(first.named_parameters(), begun.parameters(), strict=True):
        assert torch.equal(a, b), name
    second = train(parse_settings(changed))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert load_settings(tmp_path / "second" / "run.yaml", []).pretrained == str(tmp_path / "first")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"pretrained": "nowhere"}, "model.pretrained: nowhere is not a model"),
        ({"pretrained": 3}, "model.pretrained must be a folder or a shipped model's name, got 3"),
        ({"pretrained": "books", "size": "tiny"}, "model.size has no effect beside model.pretrained=books"),
    ],
)
def test_weights_that_cannot_be_begun_with_are_named(texts, tmp_path, model, words):
    changed = tree(texts, tmp_path)
    changed["model"] = model
    with pytest.raises(ValueError, match=words):
        parse_settings(changed)


def test_memories_that_cannot_be_carried_are_refused(tmp_path):
    sections = {
        "model": {"size": "tiny", "baseline": "mamba2"},
        "data": {"task": {"name": "streams", "length": 16}},
        "training": {"output_dir": str(tmp_path / "out"), "tbptt_steps": 2},
    }
    with pytest.raises(ValueError, match="tbptt_steps must be 1 with model"):
        parse_settings(sections)


@pytest.mark.parametrize("model", [{"variant": "lmm"}, {"baseline": "sliding_window"}])
def test_a_first_stage_needs_a_core_and_a_memory(texts, tmp_path, model):
    with pytest.raises(ValueError, match="is for a core beside a memory"):
        parse_settings(tree(texts, tmp_path, model, core_steps=1))


def test_files_that_are_no_configuration_are_named(tmp_path, capsys):
    bad = {"missing.yaml": None, "list.yaml": "- 1\n- 2\n", "broken.yaml": "model: [1,\n", "word.yaml": "model: tiny\n"}
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        assert main(["train", str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err


def test_a_configuration_runs_no_code(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert main(["train", str(path)]) == 2
    assert not (tmp_path / "made").exists()


def test_a_run_that_is_there_is_not_overwritten(texts, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(texts, tmp_path / "out")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert main(["train", str(config)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(texts, tmp_path):
    """Files may not grow beyond what the model needs: the optimizer's state does not fit."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree(texts, tmp_path / "out", max_steps=2)))
    assert main(["train", str(config)]) == 0
    size = (tmp_path / "out" / "checkpoint-2" / "model.safetensors").stat().st_size
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "checkpoint-2").iterdir()}
    changes = ["--set", "training.resume=true", "--set", "training.max_steps=4"]
    command = ["train", str(config), *changes]
    status = commands.ended(commands.started(command, tmp_path / "said", commands.full_disk, size + 4096))
    said = (tmp_path / "said").read_text()
    assert status == 2, said
    assert "Traceback" not in said
    assert "titans train: cannot write to" in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "checkpoint-2").iterdir()} == before
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_checkpoint_has_the_memory_that_goes_on(texts, tmp_path):
    train(parse_settings(tree(texts, tmp_path / "out", max_steps=4, tbptt_steps=3, save_steps=4)))
    model, _ = load(tmp_path / "out")
    state = TitansState.load(tmp_path / "out" / "checkpoint-4" / "memory.safetensors", model)
    assert state.position.tolist() == [32, 32]
