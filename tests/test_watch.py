"""What a run shows while it trains: figures by layer, histograms and samples in trackers; lines of progress."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from conftest import each_titan, tiny_model, tokens
from titans_lm.analyze.trace import trace
from titans_lm.models.hub import load
from titans_lm.training.config import parse_settings
from titans_lm.training.progress import line
from titans_lm.training.resume import check_resumed
from titans_lm.training.run_folder import is_begun
from titans_lm.training.train import train
from titans_lm.training.watch import memory_statistics, operations_per_token
from titans_lm.utils.matmul import WIDTHS, matmul_rate, width_within

pytestmark = pytest.mark.usefixtures("unchecked")

MODEL = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "window_size": 8, "segment_size": 8, "memory_head_dim": 8, "memory_dim": 8, "num_persistent_tokens": 2,
}  # fmt: skip
EACH = ("theta", "eta", "alpha", "memory_norm", "momentum_norm", "surprise", "surprise_gradient")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The end of it was near, and nobody knew. " * 60)
    return path


def settings(text: Path, output: Path, model: dict[str, Any] | None = None, **training: Any) -> Any:
    small = {"max_steps": 4, "batch_size": 3, "logging_steps": 2, "save_steps": 2, "output_dir": str(output)}
    data = {"files": [str(text)], "held_out": 0, "sequence_length": 24}
    return parse_settings({"model": {**MODEL, **(model or {})}, "data": data, "training": {**small, **training}})


def events(output: Path) -> EventAccumulator:
    (file,) = (output / "runs").rglob("events.out.tfevents*")
    return EventAccumulator(str(file), {"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


# ------------------------------------------------------------------------------------------------ statistics


@each_titan
@pytest.mark.parametrize("changes", [{}, {"gate": "convex", "num_persistent_tokens": 0, "memory_forgetting": False}])
def test_statistics_are_those_of_a_trace_of_the_rows(kind, changes):
    model, ids = tiny_model(kind, **changes), tokens(2, 19)
    found = memory_statistics(model, {"input_ids": ids, "labels": ids}, None)
    traces = [trace(model, row, frozen=False) for row in ids]
    names = {"memory_gate": "gate", "gradient_norm": "surprise_gradient"}
    for name in ("theta", "eta", "alpha", "surprise", "gradient_norm", "memory_gate"):
        if name == "memory_gate" and kind in ("mal", "lmm"):
            continue
        for layer in range(2):
            ours = found.scalars.get(f"{names.get(name, name)}/layer_{layer:02}")
            mean = sum(t[name][:, layer].mean() for t in traces) / 2
            if name == "alpha" and changes:
                assert ours is None  # a memory that does not forget has no such gate
            elif name == "memory_gate" and changes:
                assert ours == pytest.approx(1 - mean, rel=1e-4)  # the convex gate is attention's share
            else:
                assert ours == pytest.approx(mean, rel=1e-4), name
    for name in ("memory_norm", "momentum_norm"):
        for layer in range(2):
            mean = sum(t[name][-1, layer].mean() for t in traces) / 2
            assert found.scalars[f"{name}/layer_{layer:02}"] == pytest.approx(mean, rel=1e-4)
    heads = model.config.num_memory_heads
    assert {name: len(values) for name, values in found.surprise.items()} == {
        f"surprise_of_tokens/layer_{layer:02}": 2 * 19 * heads for layer in range(2)
    }
    assert float(found.surprise["surprise_of_tokens/layer_01"].mean()) == pytest.approx(
        found.scalars["surprise/layer_01"], rel=1e-6
    )


@each_titan
def test_statistics_go_on_from_a_state_and_leave_all_as_it_was(kind):
    model, ids = tiny_model(kind).train(), tokens(3, 20)
    state = model(ids[:, :9], use_cache=True).past_key_values.detach()
    before = model(ids[:, 9:], past_key_values=state.clone()).logits
    kept, random = state.clone(), torch.get_rng_state()
    found = memory_statistics(model, {"input_ids": ids[:, 9:]}, state)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(ids[:, 9:], past_key_values=state.clone()).logits, before)
    assert state.position.tolist() == kept.position.tolist() == [9, 9, 9]
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    fresh = memory_statistics(model, {"input_ids": ids[:, 9:]}, None)
    assert found.scalars["surprise/layer_01"] != fresh.scalars["surprise/layer_01"]
    whole = memory_statistics(model, {"input_ids": ids}, None)
    assert found.scalars["memory_norm/layer_01"] == pytest.approx(whole.scalars["memory_norm/layer_01"], rel=1e-6)


def test_a_matmul_runs_at_a_rate_and_tokens_take_the_products_of_linear_maps():
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    model = tiny_model("mag")
    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert operations_per_token(model) == 6 * sum(m.weight.numel() for m in maps)
    assert any(m is model.lm_head for m in maps)


def test_a_device_that_is_slow_is_measured_by_small_products(monkeypatch):
    monkeypatch.setattr("titans_lm.utils.matmul.time.perf_counter", map(float, itertools.count()).__next__)
    device, least = torch.device("cpu"), WIDTHS[0]
    with FlopCounterMode(display=False) as counter:
        assert matmul_rate(device, torch.bfloat16) == 2 * least**3  # a second a product
    assert counter.get_total_flops() == 4 * 2 * least**3
    for seconds, width in ((1e9, 2048), (512.0, 1024), (511.0, 512), (1e-9, least)):
        assert width_within(2048, seconds, device, torch.bfloat16) == width


# ------------------------------------------------------------------------------------------------ trackers


def test_tensorboard_has_figures_histograms_and_samples_of_a_run(text, tmp_path):
    made = settings(
        text, tmp_path / "run", {"variant": "mag"}, tbptt_steps=[1, 2, 2], sample_steps=2, sample_prompts=["The e"],
        sample_tokens=3,
    )  # fmt: skip
    model = train(made)
    shown = events(tmp_path / "run")
    tags = shown.Tags()
    for layer in ("layer_00", "layer_01"):
        assert {f"{name}/{layer}" for name in (*EACH, "gate")} <= set(tags["scalars"])
        assert f"surprise_of_tokens/{layer}" in tags["histograms"]
    wanted = {"loss", "bits_per_byte", "grad_norm", "tokens_per_second", "part_of_matmul_rate", "learning_rate"}
    assert {f"train/{name}" for name in wanted} <= set(tags["scalars"])
    steps = [event.step for event in shown.Scalars("theta/layer_01")]
    assert steps == [1, 2, 4]  # logging steps alone
    assert 0 < shown.Scalars("train/part_of_matmul_rate")[-1].value < 1
    samples = shown.Tensors("samples/0/text_summary")
    assert [event.step for event in samples] == [2, 4]
    tokenizer = load(tmp_path / "run")[1]
    ids = tokenizer("The e", return_tensors="pt", add_special_tokens=False).input_ids
    wrote = tokenizer.decode(model.eval().generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert samples[-1].tensor_proto.string_val[0].decode() == "\n".join(f"    {part}" for part in wrote.split("\n"))


def test_watching_changes_no_bit_of_a_run(text, tmp_path):
    watched = train(settings(text, tmp_path / "a", sample_steps=1, sample_prompts=["T"], logging_steps=1))
    alone = train(settings(text, tmp_path / "b", report_to=[], logging_steps=1))
    assert not (tmp_path / "b" / "runs").exists()
    for (name, ours), theirs in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "model",
    [
        {**MODEL, "variant": "attention"},
        {"baseline": "mamba2", "size": "tiny"},
    ],
)
def test_models_without_a_memory_are_watched_too(model, text, tmp_path):
    made = parse_settings(
        {
            "model": model,
            "data": {"files": [str(text)], "held_out": 0, "sequence_length": 24},
            "training": {"max_steps": 1, "batch_size": 2, "output_dir": str(tmp_path / "run")},
        }
    )
    train(made)
    tags = events(tmp_path / "run").Tags()
    assert "train/loss" in tags["scalars"]
    assert not any("layer_" in name for name in tags["scalars"])


def test_a_core_without_its_memory_is_watched(text, tmp_path):
    train(settings(text, tmp_path / "run", {"variant": "mag"}, core_steps=2))
    shown = events(tmp_path / "run")
    assert [event.step for event in shown.Scalars("theta/layer_00")] == [2, 4]  # not while it is bypassed
    assert [event.value > 0 for event in shown.Scalars("surprise/layer_00")] == [False, True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"report_to": ["tensorbord"]}, r"report_to: 'tensorbord' is not one of.*did you mean 'tensorboard'"),
        ({"report_to": ["wandb", "wandb"]}, r"report_to names a tracker twice"),
        ({"sample_steps": 5}, r"sample_steps=5 needs training\.sample_prompts"),
        ({"sample_steps": 5, "sample_prompts": ["a"], "report_to": []}, r"sample_steps=5 needs.*report_to"),
        ({"sample_prompts": ["a"]}, r"sample_prompts has an effect only with training\.sample_steps"),
        ({"sample_steps": 1, "sample_prompts": ["a", ""]}, r"sample_prompts has an empty text"),
        ({"sample_steps": -1}, r"sample_steps must be at least 0"),
        ({"sample_tokens": 0}, r"sample_tokens must be at least 1"),
        ({"progress_seconds": 0}, r"progress_seconds must be above 0"),
    ],
)
def test_settings_that_show_nothing_are_refused(change, words, text, tmp_path):
    with pytest.raises(ValueError, match=words):
        settings(text, tmp_path, **change)


def test_samples_of_a_task_of_numbers_are_refused(tmp_path):
    training = {"output_dir": str(tmp_path), "sample_steps": 1, "sample_prompts": ["a"]}
    with pytest.raises(ValueError, match=r"sample_prompts are texts, and the tokens of this data\.task are numbers"):
        parse_settings({"model": MODEL, "data": {"task": {"name": "mqar"}}, "training": training})


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    made = settings(text, tmp_path / "run", report_to=["trackio"])
    with pytest.raises(ValueError, match=r"report_to: trackio is not installed; pip install trackio"):
        train(made)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ progress


LINE = re.compile(
    r"step (\d+) of 6, (\d+) % of the run(, loss \d+\.\d{4}, [\d,]+ tokens/s)?, 0:00:\d\d taken"
    r"(, about 0:00:\d\d left)?(?:, busy machine: .*)?"
)


@pytest.mark.parametrize("limit", [{}, {"max_minutes": 5}])
def test_a_run_whose_output_is_a_file_prints_lines_and_keeps_them_in_its_folder(limit, text, tmp_path, capfd):
    train(settings(text, tmp_path, max_steps=6, logging_steps=1, progress_seconds=1e-6, **limit))
    out, errors = capfd.readouterr()
    found = [match for match in map(LINE.fullmatch, errors.splitlines()) if match]
    assert [int(match[1]) for match in found] == [1, 2, 3, 4, 5, 6, 6]
    assert [match[3] is not None for match in found] == [False] + 6 * [True]  # a step's loss is logged after the step
    assert all(match[4] for match in found)
    assert [int(match[2]) for match in found] == [17, 33, 50, 67, 83, 100, 100]
    assert "| 6/6" not in errors + out  # a bar
    kept = json.loads((tmp_path / "progress.json").read_text())
    assert line(kept) == found[-1][0]
    assert kept["seconds_left"] == 0
    assert kept["part"] == 1


def test_lines_are_as_rare_as_asked_for(text, tmp_path, capfd):
    train(settings(text, tmp_path, max_steps=6, progress_seconds=3600))
    assert [m[1] for m in map(LINE.fullmatch, capfd.readouterr().err.splitlines()) if m] == ["6"]


def test_what_is_left_is_estimated_from_this_part_of_a_run_and_files_of_progress_stop_no_start(text, tmp_path, capfd):
    (tmp_path / "progress.json").write_text("{}")
    assert is_begun(tmp_path)  # of a run that was killed before its first checkpoint
    train(settings(text, tmp_path, max_steps=2))
    whole = settings(text, tmp_path, max_steps=6, resume=True, progress_seconds=1e-6, report_to=[])
    check_resumed(tmp_path / "checkpoint-2", whole, whole.training.batch_size)  # what is shown may change
    capfd.readouterr()
    train(whole)
    steps = [match[1] for match in map(LINE.fullmatch, capfd.readouterr().err.splitlines()) if match]
    assert steps == ["3", "4", "5", "6", "6"]


def test_a_line_without_a_loss_or_an_estimate():
    found = {"step": 1, "max_steps": 2000, "part": 0.0, "seconds": 3725, "seconds_left": None}
    assert line(found) == "step 1 of 2,000, 0 % of the run, 1:02:05 taken"
