"""Grafts: at first the base to the bit; then every law of a Titans model, on transformers' own models."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
import transformers as hf
import yaml
from safetensors import safe_open
from torch import Tensor

from test_serve import LIMITS, serving
from titans_lm import Reader, TitansForCausalLM, TitansState, load, trace
from titans_lm.cli import main
from titans_lm.inference.serve.app import Service
from titans_lm.inference.serve.batch import growing_layers, last_logits
from titans_lm.inference.serve.prefill import prefill_pieces
from titans_lm.layers.bypass import bypass_memory
from titans_lm.models.graft import GraftForCausalLM
from titans_lm.models.graft_base import one_device
from titans_lm.models.graft_config import graft_config
from titans_lm.models.graft_files import make_graft, save_graft
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import parse_settings
from titans_lm.training.train import train, trainer_for
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")

TOKENS, OWN_WINDOW, LONGEST = 30, 8, 48
_SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LONGEST, "pad_token_id": 256, "bos_token_id": 257,
    "eos_token_id": 258,
}  # fmt: skip
_HEAD, _SLIDING = {"head_dim": 8}, {"sliding_window": OWN_WINDOW}
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _SIZES),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _SIZES),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, _SIZES | _HEAD),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _SIZES | _SLIDING),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, _SIZES | _HEAD),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, _SIZES | _HEAD | _SLIDING),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        _SIZES | _HEAD | _SLIDING | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST, "eos_token_id": 258,
         "bos_token_id": 257},
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
MEMORY = {"layers": [1], "memory_head_dim": 16, "memory_dim": 16, "memory_chunk_size": 4, "memory_lr_start": 0.05}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of random models."""
    root = tmp_path_factory.mktemp("bases")
    for family, (model, config, fields) in FAMILIES.items():
        torch.manual_seed(len(family))
        model(config(**fields, initializer_range=0.2)).save_pretrained(root / family)
        byte_tokenizer().save_pretrained(root / family)
    return {family: str(root / family) for family in FAMILIES}


def graft(base: str, *, opened: bool = True, **fields: Any) -> GraftForCausalLM:
    torch.manual_seed(1)
    model = make_graft(graft_config({"graft": base, **MEMORY, **fields}))
    if opened:
        for grafted in model.model.grafts():
            torch.nn.init.normal_(grafted.gate.scale)
    return model


def plain(base: str, **options: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(base, **options).eval()


def ids(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(scope="module")
def llama(bases) -> GraftForCausalLM:
    """With a window, and open gates."""
    return graft(bases["llama"], window_size=6)


# ------------------------------------------------------------------------------------------------ the laws


@each_family
@torch.no_grad()
def test_a_new_graft_is_its_base_to_the_bit_and_so_is_a_bypassed_one(bases, family):
    model, base, x = graft(bases[family], opened=False), plain(bases[family]), ids()
    expected = base(x)
    assert torch.equal(model(x).logits, expected.logits)
    state, cache = model.initial_state(2), base(x[:, :9], use_cache=True).past_key_values
    model(x[:, :9], past_key_values=state)
    for piece in x[:, 9:].split([1, 1, TOKENS - 11], 1):  # also in parts, with its cache
        theirs = base(piece, past_key_values=cache, use_cache=True)
        cache = theirs.past_key_values
        assert_close(model(piece, past_key_values=state).logits, theirs.logits)
    for grafted in model.model.grafts():
        torch.nn.init.ones_(grafted.gate.scale)
    assert (model(x).logits - expected.logits).abs().max() > 0.01
    with bypass_memory(model):
        assert torch.equal(model(x).logits, expected.logits)


@each_family
@pytest.mark.parametrize("window", [None, 6])
@torch.no_grad()
def test_cuts_and_padding_change_nothing(bases, family, window):
    model, x = graft(bases[family], window_size=window), ids()
    whole, end = model(x).logits, model.initial_state(2)
    model(x, past_key_values=end)
    mask = torch.ones(2, TOKENS + 6, dtype=torch.long)
    mask[0, :6], mask[1, 3:6], mask[1, 20:23] = 0, 0, 0
    padded = torch.full_like(mask, 7).masked_scatter(mask.bool(), x)
    for cuts in ([TOKENS + 6], [2, 1, 1, 10, 1, 21]):
        state, parts = model.initial_state(2), []
        for piece, part in zip(padded.split(cuts, 1), mask.split(cuts, 1), strict=True):
            parts.append(model(piece, attention_mask=part, past_key_values=state).logits)
        assert_close(torch.cat(parts, 1)[mask.bool()], whole.flatten(0, 1))
        for memory, expected in zip(state.memory_states(), end.memory_states(), strict=True):
            assert_close(memory.weights[0], expected.weights[0])
        assert_close(model(x[:, :5], past_key_values=state).logits, model(x[:, :5], past_key_values=end.clone()).logits)


@pytest.mark.parametrize(("family", "field"), [("mistral", "sliding_window"), ("gemma3", "sliding_window")])
@torch.no_grad()
def test_a_window_is_transformers_sliding_window(bases, family, field):
    kinds = {} if family == "mistral" else {"layer_types": ["sliding_attention"] * 2}
    x, model = ids(), graft(bases[family], opened=False, window_size=5)
    expected = plain(bases[family], **{field: 5}, **kinds)(x).logits
    if family == "gemma3":  # its types of layers have rotary angles of their own, so this base has both
        assert not torch.equal(model(x).logits, plain(bases[family])(x).logits)
    else:
        assert_close(model(x).logits, expected)


@torch.no_grad()
def test_rows_are_independent_and_can_be_selected_joined_and_reset(llama):
    x, state = ids(3, 11), llama.initial_state(3)
    llama(x, past_key_values=state)
    alone = llama.initial_state(1)
    llama(x[1:2], past_key_values=alone)
    later = ids(1, 8)
    expected = llama(later, past_key_values=alone.clone()).logits
    assert_close(llama(later, past_key_values=state.select([1])).logits, expected)
    both = TitansState.concat([alone.clone(), llama.initial_state(1)])
    logits = llama(later.expand(2, -1), past_key_values=both).logits
    assert_close(logits, torch.cat([expected, llama(later).logits]))
    state.reset([1])
    assert_close(llama(later.expand(3, -1), past_key_values=state).logits[1:2], llama(later).logits)


def test_the_closed_gate_has_a_gradient_and_the_base_has_none(bases):
    model = graft(bases["llama"], opened=False, window_size=6).train()
    state = model.initial_state(2)
    for piece in ids().split(10, 1):
        loss = model(piece, labels=piece, past_key_values=state).loss
    loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert graded == {"model.base.layers.1.self_attn.gate.scale"}
    with torch.no_grad():
        model.model.grafts()[0].gate.scale += 0.1
    model(ids(), labels=ids()).loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert len(graded) > 15
    assert graded <= model.own_state_dict().keys()


def test_a_long_call_reads_in_parts_what_it_reads_at_once(bases, monkeypatch):
    model, x = graft(bases["llama"], window_size=6), ids()
    whole = model(x, output_surprise=True)
    monkeypatch.setattr("titans_lm.models.graft.WINDOW_TOKENS", 7)
    with torch.no_grad():
        parts = model(x, output_surprise=True)
    assert_close(parts.logits, whole.logits)
    assert_close(parts.surprise[0].loss, whole.surprise[0].loss)


# ------------------------------------------------------------------------------------------------ generate, read, serve


@pytest.mark.parametrize("window", [None, 6])
def test_generate_is_token_by_token(bases, window):
    model = graft(bases["llama"], window_size=window)
    x, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    out = model.generate(x, attention_mask=mask, max_new_tokens=8, eos_token_id=None)
    for row in range(2):
        prompt = x[row : row + 1, mask[row].bool()]
        for token in out[row, 12:]:
            with torch.no_grad():
                assert int(model(prompt).logits[0, -1].argmax()) == int(token)
            prompt = torch.cat([prompt, token.view(1, 1)], 1)


def test_beams_of_a_closed_graft_are_the_base_s(bases):
    model, base, x = graft(bases["qwen3"], opened=False), plain(bases["qwen3"]), ids(2, 9)
    options = {"num_beams": 3, "max_new_tokens": 7, "eos_token_id": None, "attention_mask": torch.ones_like(x)}
    assert torch.equal(model.generate(x, **options), base.generate(x, **options))


def test_a_reader_resumes_a_memory_file_and_forks_it(llama, tmp_path):
    text, file = "It was a dark and stormy night. " * 9, tmp_path / "a.memory"
    Reader(llama, byte_tokenizer(), memory=file, piece=50).read(text[:100])
    reader = Reader(llama, byte_tokenizer(), memory=file).read(text[100:])
    whole = Reader(llama, byte_tokenizer()).read(text)
    for one, other in zip(reader.state.memory_states(), whole.state.memory_states(), strict=True):
        assert_close(one.weights[0], other.weights[0])
    assert reader.ask("night", max_new_tokens=6) == whole.ask("night", max_new_tokens=6)
    loaded = TitansState.load(file, llama)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.tensors().values(), reader.state.tensors().values(), strict=True)
    )
    with torch.no_grad():
        llama.model.grafts()[0].gate.scale += 0
        other = TitansState.load(file, llama)
    assert other.nbytes == loaded.nbytes
    assert TitansState.load(file, llama).layer_caches[0].attention.keys[0].shape[2] == 5  # a window keeps its size


def test_a_memory_belongs_to_its_graft(llama, bases, tmp_path):
    Reader(llama, byte_tokenizer(), memory=tmp_path / "a.memory").read("text")
    other = graft(bases["llama"], window_size=6, memory_lr=0.5)
    with pytest.raises(ValueError, match="belongs to another model"):
        TitansState.load(tmp_path / "a.memory", other)


def test_a_base_without_a_window_keeps_the_keys_of_all_tokens(bases, tmp_path):
    model = graft(bases["gpt2"])
    reader = Reader(model, byte_tokenizer(), memory=tmp_path / "a.memory").read("a" * (LONGEST - 8))
    assert TitansState.load(tmp_path / "a.memory", model).layer_caches[0].attention.keys[0].shape[2] == LONGEST - 8
    with pytest.raises(ValueError, match=f"{LONGEST + 2} tokens are more than .*max_position_embeddings={LONGEST}"):
        reader.read("b" * 10)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graft") / "saved"
    save_graft(llama, folder)
    return folder


def test_a_saved_graft_loads_on_its_base_and_holds_nothing_of_it(folder, llama, bases):
    model, tokenizer = load(folder)
    assert isinstance(model, TitansForCausalLM)
    assert torch.equal(model(ids()).logits, llama(ids()).logits)
    assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(".self_attn.memory." in n or ".self_attn.gate." in n or ".self_attn.norm." in n for n in names)
    assert json.loads((folder / "config.json").read_text())["base"] == bases["llama"]
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".py", ".pkl")]


def test_a_graft_is_refused_on_other_weights_and_when_damaged(folder, bases, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "digests.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "base": bases["llama"].replace("llama", "mistral")}))
    with pytest.raises(ValueError, match="trained on other weights"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "base": "nowhere/at all"}))
    with pytest.raises(ValueError, match="'nowhere/at all' is not the folder or the Hub name"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({**config, "layers": [0]}))
    with pytest.raises(ValueError, match="does not hold the weights of this graft"):
        load(copy)
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be loaded as a graft"):
        load(copy)


def test_lora_is_trained_and_saved_with_the_graft_and_starts_as_nothing(bases, tmp_path):
    model = graft(bases["llama"], opened=False, lora_rank=2, lora_targets=["q_proj", "v_proj"])
    x = ids()
    expected = plain(bases["llama"])(x).logits
    assert torch.equal(model(x).logits, expected)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert not torch.equal(model(x).logits, expected)
    assert torch.equal(model.base_logits(x), expected)
    assert {n.split(".")[-3] for n in model.own_state_dict() if "lora" in n} == {"lora_A", "lora_B"}
    assert all(p.requires_grad == (n in model.own_state_dict()) for n, p in model.named_parameters())
    model.save_pretrained(tmp_path / "lora")
    assert torch.equal(load(tmp_path / "lora")[0](x).logits, model(x).logits)


# ------------------------------------------------------------------------------------------------ training


def run(base: str, output: Path, steps: int = 4, **model: Any) -> Any:
    (output.parent / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 30)
    return parse_settings(
        {
            "model": model or {"graft": base, "window_size": 8, **MEMORY},
            "data": {"task": {"name": "streams", "length": 24, "files": [str(output.parent / "text.txt")],
                              "sources": "text"}},
            "training": {"output_dir": str(output), "max_steps": steps, "batch_size": 2, "tbptt_steps": [2, 4],
                         "save_steps": 3, "learning_rate": 0.02},
        }
    )  # fmt: skip


def test_training_changes_the_graft_alone_and_goes_on_from_a_graft(bases, tmp_path):
    before = plain(bases["llama"]).state_dict()
    model = train(run(bases["llama"], tmp_path / "run"))
    assert all(bool(grafted.gate.scale.any()) for grafted in model.model.grafts())
    assert all(
        torch.equal(t, before[f"model.{n}"]) for n, t in model.model.base.state_dict().items() if f"model.{n}" in before
    )
    again, _ = load(tmp_path / "run")
    assert torch.equal(again(ids()).logits, model.eval()(ids()).logits)
    resumed = run(bases["llama"], tmp_path / "run", steps=6)
    resumed.training.resume = True
    assert not torch.equal(train(resumed).eval()(ids()).logits, again(ids()).logits)
    more = train(run("", tmp_path / "more", pretrained=str(tmp_path / "run"), distillation=0.5))
    assert more.config.distillation == 0.5


def test_distillation_is_the_divergence_from_the_base(bases):
    x = ids()
    closed = graft(bases["llama"], opened=False, distillation=1.0).train()
    assert closed(x, labels=x).loss.abs() < 1e-6
    cut = graft(bases["llama"], distillation=0.25, window_size=4).train()
    base, logits = plain(bases["llama"])(x).logits, cut(x).logits
    p, q = base[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert_close(cut(x, labels=x).loss, 0.25 * divergence + 0.75 * own)
    assert_close(cut.eval()(x, labels=x).loss, own)
    each = torch.tensor([0.0, 0.5])
    last = (p.exp() * (p - q)).sum(-1)[1].mean()
    halves = [torch.nn.functional.cross_entropy(logits[i, :-1], x[i, 1:]) for i in range(2)]
    assert_close(cut.train()(x, labels=x, distillation=each).loss, (halves[0] + 0.5 * halves[1] + 0.5 * last) / 2)


def test_the_base_teaches_each_packed_document_by_itself(bases):
    x, lengths = ids(2, 12), (5, 7)
    cut = graft(bases["llama"], distillation=1.0, window_size=4).train()
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    labels = x.masked_fill(positions == 0, -100)
    packed = cut(x, labels=labels, position_ids=positions, distillation=torch.tensor([1.0, 0.0])).loss
    parts = [
        (cut(part[row : row + 1], labels=part[row : row + 1], distillation=torch.tensor([taught])).loss, n - 1)
        for row, taught in enumerate((1.0, 0.0))
        for part, n in zip(x.split(lengths, 1), lengths, strict=True)
    ]
    assert_close(packed, sum(loss * n for loss, n in parts) / sum(n for _, n in parts))
    with pytest.raises(ValueError, match="distillation needs labels"):
        cut(x, distillation=torch.tensor([1.0, 0.0]))


@each_family
def test_the_teacher_is_the_published_base_whatever_padding_and_dropout(bases, family):
    x, mask = ids(), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :4] = 0
    new = graft(bases[family], opened=False, distillation=1.0).train()
    for part in new.model.base.modules():  # as in GPT-2's published configuration
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    alone = plain(bases[family])(x[:1, 4:]).logits
    assert_close(new.base_logits(x, mask)[:1, 4:], alone)
    assert all(part.training for part in new.modules())
    assert_close(new.eval()(x, attention_mask=mask).logits[:1, 4:], alone)
    new.training = True  # it distils, and nothing below drops
    labels = x.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # what padding predicts
    assert new(x, attention_mask=mask, labels=labels).loss.abs() < 1e-5


def test_distillation_of_rows_longer_than_the_base_is_from_its_window(bases):
    x = ids(2, LONGEST + 5)
    cut = graft(bases["llama"], distillation=1.0, window_size=8).train()
    with bypass_memory(cut):
        p = cut.eval()(x).logits[:, :-1].log_softmax(-1)
        assert cut.train()(x, labels=x).loss.abs() < 1e-6
    q = cut(x).logits[:, :-1].log_softmax(-1)
    assert_close(cut(x, labels=x).loss, (p.exp() * (p - q)).sum(-1).mean())
    whole = graft(bases["llama"])
    with pytest.raises(ValueError, match=f"{LONGEST + 5} tokens are more than this model's max_position_embeddings"):
        whole.base_logits(x)


def test_a_source_has_a_distillation_of_its_own(bases, tmp_path):
    settings = run(bases["llama"], tmp_path / "run", steps=2)
    text = settings.data.task["files"][0]
    sources = [{"files": [text], "distillation": 1.0}, {"files": [text]}]

    def of(sources: list[Any], **model: Any) -> Any:
        training = {"output_dir": str(tmp_path / "own"), "max_steps": 2, "batch_size": 4, "learning_rate": 0.02}
        graft = {"graft": bases["llama"], **MEMORY}
        return parse_settings(
            {"model": model or graft, "data": {"sources": sources, "sequence_length": 24}, "training": training}
        )

    both = trainer_for(of(sources))
    batch = next(iter(both.get_train_dataloader()))
    assert set(batch["distillation"].tolist()) == {0.0, 1.0}
    model = both.model
    loss = model(**batch).loss
    rows = [model(batch["input_ids"][i : i + 1], labels=batch["labels"][i : i + 1]).loss for i in range(4)]
    taught = batch["distillation"] > 0  # a closed gate is the base, which has nothing to teach it
    assert_close(loss, torch.stack(rows)[~taught].sum() / 4)
    assert train(of(sources)).config.distillation == 0
    with pytest.raises(ValueError, match="distillation is for a graft"):
        of(sources, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"data.sources\[0\]: distillation must be in \[0, 1\], got 2.0"):
        of([{"files": [text], "distillation": 2.0}])


def test_the_command_makes_a_graft_that_the_other_commands_take(bases, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--layers", "1", "--window-size", "8", "--set", "memory_head_dim=16", "--set", "memory_dim=16"]
    assert main(["graft", bases["llama"], "--output", "g", *options]) == 0
    assert "a memory in layers 1; attention to 8 tokens; no limit of length" in capsys.readouterr().out
    assert main(["graft", bases["llama"], "--output", "g"]) == 2
    assert "--output g is not empty" in capsys.readouterr().err
    Path("a.txt").write_text("all work and no play " * 9)
    assert main(["read", "--model", "g", "--memory", "a.memory", "a.txt"]) == 0
    assert main(["memory", "verify", "a.memory", "--model", "g"]) == 0
    assert main(["infer", "--model", "g", "--load-memory", "a.memory", "--prompt", "all", "--max-new-tokens", "3"]) == 0
    adapt = ["a.txt", "--model", "g", "--out", "adapt.jsonl", "--modes", "on", "off", "--compressors", "zlib"]
    assert (
        main(["evaluate", "adapt", *adapt, "--rates", "0.1", "--lags", "60", "--passage", "20", "--passages", "1"]) == 0
    )
    rows = [json.loads(line) for line in Path("adapt.jsonl").read_text().splitlines()[1:]]
    bits = {row["predictor"]: row["bits_per_byte"] for row in rows if "predictor" in row}
    assert bits["on"] == bits["off"] != bits["dynamic 0.1"]  # its gates are closed
    needle = ["--style", "short", "--lengths", "128", "--depths", "2", "--samples", "1", "--out", "needle.jsonl"]
    assert main(["evaluate", "needle", "--model", "g", *needle]) == 0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [2]}, "layers must be different numbers from 0 to 1, got"),
        ({"layers": []}, "layers must be different numbers"),
        ({"window": 6}, "unknown key 'window' in a graft; did you mean 'window_size'"),
        ({"gate": "convex"}, "unknown key 'gate' in a graft"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"distillation": 2}, r"distillation must be in \[0, 1\], got 2"),
        ({"lora_rank": -1}, "lora_rank must be 0 or more, got -1"),
        ({"lora_alpha": 2.0}, "lora_alpha and lora_targets have an effect only with lora_rank"),
        ({"lora_rank": 2, "lora_targets": ["nothing"]}, "lora_targets=.*nothing"),
        ({"graft": "nowhere"}, "'nowhere' is not the folder or the Hub name"),
        ({"graft": "streams"}, "'streams' is not the folder or the Hub name"),
        ({"graft": 3}, "graft must be the folder or the Hub name of a pretrained model, got 3"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(bases, fields, message):
    with pytest.raises(ValueError, match=message):
        make_graft(graft_config({"graft": bases["llama"], "memory_head_dim": 16, **fields}))


def test_models_that_a_memory_cannot_go_to_are_refused(tmp_path):
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2))
    conv = hf.Lfm2ForCausalLM(hf.Lfm2Config(**small, intermediate_size=16, layer_types=["conv", "full_attention"]))
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2))
    opt = hf.OPTForCausalLM(hf.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16))
    for model, message in (
        (mamba, "a model of type 'mamba' is not a decoder of text with attention layers"),
        (conv, "'lfm2' has layers of type 'conv'; attention layers can be grafted"),
        (bloom, "BloomForCausalLM, does not work with transformers' caches and masks"),
        (opt, "OPTModel has no list of 2 decoder layers"),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            make_graft(graft_config({"graft": str(folder), "memory_head_dim": 16}))


def test_pickled_weights_and_titans_models_are_no_bases(bases, llama, tmp_path):
    copy = tmp_path / "pickled"
    plain(bases["llama"]).config.save_pretrained(copy)
    torch.save(plain(bases["llama"]).state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_graft(graft_config({"graft": str(copy), "memory_head_dim": 16}))
    llama.save_pretrained(tmp_path / "graft")
    with pytest.raises(ValueError, match="has a memory already"):
        graft_config({"graft": str(tmp_path / "graft")})


def test_auto_classes_open_a_graft_on_its_base(llama, tmp_path):
    """As `titans_lm.load` does, in a process that has imported the package and nothing else of it."""
    folder, x = tmp_path / "graft", ids()
    llama.save_pretrained(folder)
    expected = llama.eval()(x).logits
    maps = ("cpu", "auto", "balanced", "balanced_low_0", "sequential", {"": "cpu"}, {"": "auto"})
    for options in ({}, {"trust_remote_code": True, "dtype": "auto"}, *({"device_map": places} for places in maps)):
        found, report = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        assert torch.equal(found(x).logits, expected)
        assert not found.training
        assert not any(report.values())
    for options in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        half = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.base.config._attn_implementation == "eager"
    for options, words in (
        ({"windw_size": 8}, "unknown key 'windw_size' in the options of a graft"),
        ({"dtype": "int8"}, "dtype='int8' is not one of weights"),
        ({"device_map": ["cpu", "cuda"]}, "a graft is on one device"),
        ({"max_memory": {"cpu": "1GB"}}, "unknown key 'max_memory'"),
        ({"device_map": {"": "disk"}}, "a graft is on one device; give its name, such as 'cuda', or 'auto'"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "a graft is on one device"),
    ):
        with pytest.raises(ValueError, match=words):
            hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match=r"nowhere is not the folder of a graft: it has no config\.json"):
        GraftForCausalLM.from_pretrained(tmp_path / "nowhere")
    code = "import sys, titans_lm; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=300)


def test_auto_is_the_emptiest_accelerator_with_room():
    free = {0: 10_000, 1: 40_000, 2: 20_000, "cpu": 10**9}
    assert one_device("auto", 30_000, free) == 1
    assert one_device("auto", 35_000, free) == "cpu"
    assert one_device("auto", 30_000, {"cpu": 10_000}) == "cpu"
    assert one_device("cuda:0", 30_000, free) == "cuda:0"


def test_runs_that_make_no_sense_are_refused(bases, tmp_path):
    model = {"graft": bases["llama"], **MEMORY}
    tree = {"model": model, "data": {"task": {"name": "streams", "length": 24}}, "training": {"output_dir": "x"}}
    for key, value in (("core_steps", 3), ("memory_steps", 3), ("activation_checkpointing", True)):
        with pytest.raises(ValueError, match=rf"training.{key}"):
            parse_settings({**tree, "training": {"output_dir": "x", key: value}})
    with pytest.raises(ValueError, match="model: unknown key 'size' in a graft"):
        parse_settings({**tree, "model": {**model, "size": "tiny"}})
    save_graft(graft(bases["llama"]), tmp_path / "g")
    with pytest.raises(ValueError, match=r"model.window_size has no effect beside"):
        parse_settings({**tree, "model": {"pretrained": str(tmp_path / "g"), "window_size": 3}})
    other = hf.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    other.add_tokens(["two words"])
    other.save_pretrained(tmp_path / "tokenizer")
    data = {
        "files": [str(Path(__file__))],
        "held_out": 0,
        "sequence_length": 24,
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    with pytest.raises(ValueError, match=r"data.tokenizer has other tokens|below the tokenizer's"):
        train(parse_settings({**tree, "data": data, "training": {"output_dir": str(tmp_path / "run")}}))


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("graft*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_settings_are_read(path, tmp_path):
    """With a tiny base in place of the one that each names."""
    hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES | {"num_hidden_layers": 4})).save_pretrained(tmp_path / "base")
    save_graft(graft(str(tmp_path / "base"), window_size=256), tmp_path / "graft")
    tree = yaml.safe_load(path.read_text())
    model = tree["model"]
    key = "graft" if "graft" in model else "pretrained"
    assert model[key].startswith("runs/graft")
    model[key] = str(tmp_path / ("base" if key == "graft" else "graft"))
    assert parse_settings(tree).training.output_dir == f"runs/{path.stem}"


def test_the_example_grafts_trains_and_saves(bases, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example", Path(__file__).parents[1] / "examples/graft.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (tmp_path / "a.txt").write_text("all work and no play makes a dull boy. " * 30)
    words = [bases["llama"], str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["graft.py", *words, "--window", "24", "--steps", "40"])
    example.main()
    before, after = (float(number) for number in re.findall(r"\d+\.\d{3}", capsys.readouterr().out))
    assert after < before - 0.1
    assert load(tmp_path / "out")[0].config.grafted == [1]


# ------------------------------------------------------------------------------------------------ and everything else


def test_the_server_answers_from_the_memory_of_a_graft(llama):
    reader = Reader(llama, byte_tokenizer()).read("My number is 777. " * 9)
    with serving(Service(llama, byte_tokenizer(), reader.state, LIMITS)) as url:
        body = {"model": "titans", "prompt": "My number", "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert answer == reader.ask("My number", max_new_tokens=6)[0]


@torch.no_grad()
def test_beams_carry_the_memory_and_continue_a_state(llama):
    x, options = ids(1, 9), {"num_beams": 3, "max_new_tokens": 7, "eos_token_id": None}
    state = llama.initial_state(1)
    out = llama.generate(x, past_key_values=state, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(out, llama.generate(x, attention_mask=torch.ones_like(x), use_cache=False, **options))
    later = ids(1, 5)
    fork = state.continuation()
    expected = llama(torch.cat([out, later], 1)).logits[:, -5:]
    assert_close(llama(later, past_key_values=fork).logits, expected)


@torch.no_grad()
def test_documents_of_one_row_do_not_see_one_another(llama):
    one, two = ids(1, 11), ids(1, 7)
    position = torch.cat([torch.arange(11), torch.arange(7)])[None]
    packed = llama(torch.cat([one, two], 1), position_ids=position).logits
    assert_close(packed, torch.cat([llama(one).logits, llama(two).logits], 1))


@torch.no_grad()
def test_a_base_in_half_precision_has_a_memory_in_single(bases, tmp_path):
    folder = tmp_path / "half"
    plain(bases["llama"]).to(torch.bfloat16).save_pretrained(folder)
    model, x = graft(str(folder), opened=False, window_size=6), ids()
    assert torch.equal(model(x[:, :6]).logits, plain(str(folder))(x[:, :6]).logits)
    assert model.model.grafts()[0].memory.q_proj.weight.dtype == torch.float32
    torch.nn.init.normal_(model.model.grafts()[0].gate.scale)
    state = model.initial_state(1)
    model(x[:1], past_key_values=state)
    state.save(tmp_path / "a.memory")
    loaded = TitansState.load(tmp_path / "a.memory", model)
    assert torch.equal(model(x[1:], past_key_values=loaded).logits, model(x[1:], past_key_values=state).logits)


def test_a_trace_looks_into_the_layers_with_a_memory(llama):
    x = ids(1, 20)
    found = trace(llama, x)
    with torch.no_grad():
        logits = llama(x).logits[0, :-1].double()
    bits = torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none") / math.log(2)
    assert_close(torch.as_tensor(found.arrays["bits"])[1:].float(), bits.float())
    assert found.arrays["surprise"].shape == (20, 1, 2)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_graft_takes_its_state_by_either_name(llama, name):
    state = llama.initial_state(2)
    parts = [llama(part, **{name: state}).logits for part in ids().split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), llama(ids(), use_cache=False).logits)
    new = ids(tokens=3)
    out = [
        llama.generate(new, max_new_tokens=4, do_sample=False, **{key: state.continuation()})
        for key in (name, "past_key_values")
    ]
    assert torch.equal(*out)


def test_prompts_of_several_requests_are_read_together_as_alone(llama, bases):
    for model in (llama, graft(bases["llama"], window_size=None)):
        states = [model.initial_state(1) for _ in range(3)]
        pieces = [ids(1, tokens)[0] for tokens in (9, 6, 5)]
        for _ in range(2):
            expected = [state.clone() for state in states]
            logits = [last_logits(model, piece[None], state)[0] for piece, state in zip(pieces, expected, strict=True)]
            found = prefill_pieces(model, pieces, states, growing_layers(model))
            for mine, other in zip(found, logits, strict=True):
                assert_close(mine, other)
            assert [s.positions() for s in states] == [s.positions() for s in expected]
