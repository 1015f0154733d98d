"""The configurations that are shipped, at toy size: each trains. Settings that do not go together are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from titans_lm.models.baselines import build
from titans_lm.models.presets import SIZES
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import Settings, load_settings, parse_settings
from titans_lm.training.train import model_for, train

pytestmark = pytest.mark.usefixtures("unchecked")

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TOY = {
    "vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "window_size": 8,
    "segment_size": 8, "memory_head_dim": 8, "memory_dim": 8, "num_persistent_tokens": 1,
}  # fmt: skip


def toy(settings: Settings, folder: Path) -> list[str]:
    """Changes that make a run one of seconds, on texts of this machine: what `--set` takes."""
    text = folder / "one.txt"
    text.write_text("The end of it was near, and nobody knew. " * 40)
    (folder / "two.txt").write_text("A word, and another. " * 20)
    changes = [f"training.{key}" for key in ("max_steps=2", "batch_size=2", "accumulation=1", "logging_steps=1")]
    changes += ["training.max_minutes=null", "training.bf16=false", f"training.output_dir={folder / 'run'}"]
    spans = settings.training.tbptt_steps
    changes.append(f"training.tbptt_steps={spans[:2]}" if max(spans) < 3 else "training.tbptt_steps=[1, 2]")
    if max(spans) == 1:
        changes[-1] = "training.tbptt_steps=[1]"
    if not settings.pretrained:
        changes += [f"model.{key}={value}" for key, value in TOY.items()]
        changes += ["model.size=null", "model.parameters=null"]
    if settings.data.files:
        changes += [f"data.files=[{text}, {folder / 'two.txt'}]", "data.held_out=1", "data.sequence_length=32"]
    elif settings.data.dataset:
        rows = folder / "rows.jsonl"
        Dataset.from_list([{settings.data.text_column: "The end of it was near. " * 9}] * 9).to_json(str(rows))
        byte_tokenizer().save_pretrained(folder / "tokenizer")
        changes += ["data.dataset=json", "data.dataset_config=null", f"data.data_files=[{rows}]"]
        changes += [f"data.tokenizer={folder / 'tokenizer'}", "data.sequence_length=32"]
    else:
        task = {**settings.data.task, "length": 96}
        if "files" in task:
            task["files"] = [str(text)]
        changes += [f"data.task={task}", "data.shortest=null"]
    return changes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_builds_without_memory_for_its_weights_and_takes_two_steps_at_toy_size(path, tmp_path):
    whole = load_settings(path, [])
    config = whole.config()
    with torch.device("meta"):
        model = build(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if path.stem in SIZES and path.stem[0].isdigit():
        assert abs(sum(p.numel() for p in model.parameters()) / (1e6 * int(path.stem[:-1])) - 1) < 0.05
    small = load_settings(path, toy(whole, tmp_path))
    trained = train(small)
    before = model_for(small).state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert all(bool(weight.isfinite().all()) for weight in trained.state_dict().values())
    assert trained.config.variant == config.variant
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


FILES: dict[str, Any] = {"files": ["python-stdlib"], "sequence_length": 32}
TASK: dict[str, Any] = {"task": {"name": "mqar", "length": 64}}
TINY = {"size": "tiny"}


@pytest.mark.parametrize(
    ("model", "data", "training", "words"),
    [
        ({"parameters": 1e6, "intermediate_size": 64}, TASK, {}, r"model\.parameters=.* model\.intermediate_size"),
        ({**TINY, "variant": "attention", "memory_loss_weight": 0.1}, TASK, {}, r"weight=0\.1 is for a model with"),
        ({**TINY, "variant": "attention", "memory_theta_weight": 0.1}, TASK, {}, r"weight=0\.1 is for a model with"),
        ({**TINY, "baseline": "mamba2", "surprise_threshold": 0.1}, TASK, {}, r"threshold=0\.1 is for a model with"),
        ({**TINY, "baseline": "full_attention", "memory_loss_weight": 1}, TASK, {}, r"weight=1 is for a model with"),
        ({**TINY, "max_position_embeddings": 63}, TASK, {}, r"max_position_embeddings=63 is below the 64 tokens"),
        ({**TINY, "max_position_embeddings": 100}, FILES, {"tbptt_steps": [1, 4]}, r"=100 is below the 128 tokens"),
        (TINY, {**TASK, "tokenizer": "gpt2"}, {}, r"data\.tokenizer='gpt2' has no effect with data\.task"),
        (TINY, {**TASK, "sequence_length": 77}, {}, r"sequence_length=77 has no effect.*give data\.task a length"),
        (TINY, {**TASK, "dataset_split": "test"}, {}, r"dataset_split='test' has an effect only with data\.dataset"),
        (TINY, {**FILES, "dataset_split": "test"}, {}, r"dataset_split='test' has an effect only with data\.dataset"),
        (TINY, {**TASK, "held_out": 5}, {}, r"data\.held_out=5 is a number of data\.files"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_with_the_reason(model, data, training, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_settings({"model": model, "data": data, "training": {"output_dir": "unused", **training}})
    assert "\n" not in str(raised.value)


def test_settings_at_their_bounds_are_taken():
    for model, data, training in (
        ({**TINY, "max_position_embeddings": 128}, FILES, {"tbptt_steps": [1, 4]}),
        ({**TINY, "variant": "mac", "gate": "convex", "memory_loss_weight": 0.1}, TASK, {}),
    ):
        parse_settings({"model": model, "data": data, "training": {"output_dir": "unused", **training}})


def test_a_model_is_not_trained_on_with_another_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    data = {**FILES, "tokenizer": str(tmp_path)}
    settings = parse_settings({"model": {"pretrained": "streams"}, "data": data, "training": {"output_dir": "unused"}})
    model_for(settings)  # the same in another folder
    file.write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer=.*is not the one that model\.pretrained=streams learned with"
    ):
        model_for(settings)
