"""Keys of a run side by side: each pair is obeyed, or refused in a line with the reason."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_processes import MODEL, difference
from titans_lm.cli import main
from titans_lm.training.config import parse_settings
from titans_lm.training.train import train, trainer_for

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTHS = (8, 16)
KEYS: dict[str, dict[str, dict[str, Any]]] = {
    "streams": {"data": {"task": {"name": "streams", "length": 16, "files": ["text"], "sources": "text"}}},
    "files": {"data": {"files": ["text"], "sequence_length": 16, "held_out": 0}},
    "stream": {"data": {"files": ["text"], "sequence_length": 16, "held_out": 0, "stream": True}},
    "sources": {"data": {"sources": [{"files": ["text"]}, {"files": ["text"]}], "sequence_length": 16}},
    "workers": {"data": {"workers": 2}},
    "documents": {"data": {"documents": "reset"}},
    "curriculum": {
        "data": {"curriculum": [{"until": 0.5, "sequence_length": 8}, {"until": 1.0, "sequence_length": 16}]}
    },
    "tbptt": {"training": {"tbptt_steps": [2]}},
    "stages": {"training": {"core_steps": 1, "memory_steps": 1}},
    "price": {"model": {"memory_theta_weight": 0.5}},
    "keep": {"training": {"keep": 4}},
    "compile": {"training": {"compile": True, "compile_backend": "eager"}},
    "fsdp": {"training": {"fsdp": True}},
    "muon": {"training": {"optimizer": "muon"}},
    "minutes": {"training": {"max_minutes": 60.0}},
}
SOURCES = ("streams", "files", "stream", "sources")
"""A run has one of these."""
RUNS = {
    "streams": ("streams", "curriculum", "tbptt", "stages", "price", "keep", "muon"),
    "compiled": ("streams", "tbptt", "price", "keep", "compile", "muon"),
    "files": ("files", "documents", "curriculum", "tbptt", "stages", "price", "keep", "muon"),
    "stream": ("stream", "workers", "documents", "curriculum", "tbptt", "stages", "price", "keep"),
    "sources": ("sources", "workers", "documents", "curriculum", "stages", "price", "keep", "muon"),
    "files for a time": ("files", "documents", "tbptt", "stages", "price", "keep", "minutes"),
    "stream for a time": ("stream", "workers", "keep", "minutes", "muon"),
    "streams for a time": ("streams", "minutes"),
    "sources for a time": ("sources", "minutes"),
}
"""Each pair of keys that go together is in one of these, which are trained; with `fsdp` in test_processes.py."""
REFUSED = {
    ("streams", "workers"): "data.workers=2 has an effect only with data.stream, data.dataset or data.sources",
    ("streams", "documents"): "data.documents='reset' has an effect only with texts",
    ("files", "workers"): "data.workers=2 has an effect only with data.stream, data.dataset or data.sources",
    ("sources", "tbptt"): "training.tbptt_steps above 1 needs data.files",
    ("curriculum", "minutes"): "data.curriculum has shares of max_steps, which training.max_minutes may end early",
    ("documents", "fsdp"): "training.fsdp gathers weights as often in each process: data.documents=reset needs DDP",
    ("fsdp", "muon"): "training.fsdp shards matrices, and training.optimizer=muon needs them whole: use adamw",
}
BY_HAND = {
    ("compile", other)
    for other in ("files", "stream", "sources", "workers", "documents", "curriculum", "stages", "minutes", "fsdp")
}
"""Pairs that were compared once (docs/scaling.md): compiling takes seconds."""


def sections(names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    training = {"max_steps": 4, "batch_size": 4, "logging_steps": 1, "save_steps": 1, "warmup": 0.0, "report_to": []}
    made: dict[str, Any] = {"model": {"variant": "mag", **MODEL}, "data": {}, "training": training}
    made["training"]["output_dir"] = str(folder)
    for section, values in ((s, v) for name in names for s, v in KEYS[name].items()):
        made[section] |= values
    return made


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"line {n * (i + 3)} of many\n" for n in range(60)))
    return tmp_path


def test_every_pair_is_in_a_run_or_refused():
    together = {frozenset(pair) for names in RUNS.values() for pair in itertools.combinations(names, 2)}
    named = together | {frozenset(pair) for pair in (*REFUSED, *BY_HAND)}
    for pair in itertools.combinations(KEYS, 2):
        if not set(pair) <= set(SOURCES) and "fsdp" not in pair:
            assert frozenset(pair) in named, pair
    assert not together & {frozenset(pair) for pair in REFUSED}


@pytest.mark.parametrize("pair", REFUSED, ids=" and ".join)
def test_a_pair_that_does_not_go_together_is_refused_with_the_reason(pair, text):
    source = () if set(pair) & set(SOURCES) else ("stream",)
    with pytest.raises(ValueError, match=REFUSED[pair].replace("(", r"\(")) as raised:
        parse_settings(sections((*source, *pair), text / "out"))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_keys_of_a_run_are_all_obeyed(name, text):
    names, out = RUNS[name], text / "out"
    made = sections(names, out)
    trainer = trainer_for(parse_settings({**made, "training": {**made["training"], "output_dir": "no"}}))
    first = next(iter(trainer.get_train_dataloader()))
    begun = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    assert first["input_ids"].shape == ((8, 8) if "curriculum" in names else (4, 16))
    assert ("position_ids" in first) == ("documents" in names)
    train(parse_settings(made))
    saved = sorted(out.glob("checkpoint-*"))
    assert len(saved) == (4 if "keep" in names else 2)
    last = saved[-1]
    assert (last / "memory.safetensors").exists() == ("tbptt" in names)
    if "workers" in names:
        assert len(json.loads((last / "data-00000.json").read_text())["places"]) == 2
    if "stages" in names:
        core, memory, whole = (load_file(folder / "model.safetensors") for folder in saved[:3])
        for key in core:
            own = ".memory." in key
            assert torch.equal(core[key], begun[key]) or not own, key
            assert torch.equal(memory[key], core[key]) or own, key
        assert not all(torch.equal(memory[key], core[key]) for key in core)
        assert not any(torch.equal(whole[key], memory[key]) for key in core if "proj" in key)
    key = "compile" if "compile" in names else "price"  # one of them: compiling takes long
    if key in names:
        others = tuple(one for one in names if one != key)
        train(parse_settings(sections(others, text / key)))
        apart = difference(out, text / key)
        assert max(apart) <= 1e-6 if key == "compile" else min(apart) > 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.variant=mal", "model.gate=convex"], "gate=convex has no effect in variant 'mal', it is of mac, mag"),
        (["model.variant=lmm", "model.window_size=8"], "model.window_size=8 has no effect in variant 'lmm'"),
        (["model.segment_size=8"], "model.segment_size=8 has no effect in variant 'mag', it is of mac"),
        (["model.variant=attention", "model.memory_dim=8"], "model.memory_dim=8 has no effect in variant 'attention'"),
        (["training.eval_steps=3"], "training.eval_steps=3 has an effect only with files that are held out"),
        (["training.compile=true", "training.compile_backend=inducto"], "did you mean 'inductor'?"),
        (["training.compile_backend=eager"], "training.compile_backend=eager has an effect only with compile: true"),
        (["data.distillation=0.5"], "data.distillation=0.5 is for one of data.sources"),
    ],
)  # fmt: skip
def test_a_key_without_an_effect_in_a_run_by_itself_is_refused(changes, words, text, capsys):
    made = sections(("files",), text / "out")
    (text / "run.yaml").write_text(json.dumps({**made, "model": {"size": "tiny"}}))
    assert main(["train", "run.yaml", *(word for change in changes for word in ("--set", change))]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (text / "out").exists()
