"""A memory that grows: the model computes what it did, its new parts learn, and what cannot grow is refused."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import each_titan, tiny_config, tiny_model, tokens
from titans_lm import (
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTimeSeriesPrediction,
    TitansTimeSeriesConfig,
    graft,
    grow_memory,
    load,
)
from titans_lm.models.growth import grown_config
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import parse_settings
from titans_lm.training.train import model_for, train

LARGER = {"num_memory_heads": 3, "memory_conv_size": 7, "memory_lags": 6}
CHANGES = [LARGER, {"num_memory_heads": 3}, {"memory_conv_size": 7}]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
@each_titan
@torch.no_grad()
def test_a_grown_model_computes_what_it_did(kind, changes):
    model, ids = tiny_model(kind), tokens(2, 41)
    grown = grow_memory(model, **changes)
    assert {name: getattr(grown.config, name) for name in changes} == changes
    assert not grown.training
    state, larger = model.initial_state(2), grown.initial_state(2)
    for part in (ids[:, :30], ids[:, 30:31], ids[:, 31:]):  # a prompt, a token, what goes on from them
        expected, actual = (m(part, past_key_values=s).logits for m, s in ((model, state), (grown, larger)))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"gate": "convex"}, {"memory_momentum": False, "memory_forgetting": False},
                                     {"memory_form": "plain", "memory_lr": 0.01}, {"memory_layers": 1},
                                     {"memory_init": "zero"}, {"tie_word_embeddings": False}], ids=str)  # fmt: skip
@torch.no_grad()
def test_whatever_the_memory_is(options):
    model, ids = tiny_model("mag", **options), tokens(1, 30)
    torch.testing.assert_close(grow_memory(model, **LARGER)(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)


def test_the_old_heads_hold_what_they_did_and_the_new_ones_something_of_their_own():
    model, ids = tiny_model("lmm"), tokens(1, 30)
    states = [m(ids, use_cache=True).past_key_values.layer_caches for m in (model, grow_memory(model, **LARGER))]
    assert len(states[0]) == 2
    for old, new in zip(*states, strict=True):
        for was, now in zip(old.memory.memory.weights, new.memory.memory.weights, strict=True):
            torch.testing.assert_close(now[:, :2], was, rtol=1e-9, atol=1e-9)
            assert not torch.allclose(now[:, 2], now[:, 0])


@each_titan
def test_new_parts_learn_from_the_second_step_on(kind):
    torch.manual_seed(0)
    grown, ids = grow_memory(tiny_model(kind), **LARGER).train(), tokens(2, 40)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(grown(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    for layer in grown.model.layers:
        memory = layer.memory
        for projection in (memory.q_proj, memory.k_proj, memory.v_proj, memory.output_gate, memory.theta):
            assert projection.weight.grad[-1].abs().max() > 0
        assert memory.o_proj.weight.grad[:, -16:].abs().max() > 0
        assert all(weight.grad[-1].abs().max() > 0 for weight in memory.initial_memory)
        assert all(conv.weight.grad[:32, :3].abs().max() > 0 for conv in memory.convs)  # old heads, new tokens


def test_new_heads_begin_with_their_own_lags():
    memory = (
        grow_memory(tiny_model("lmm"), num_memory_heads=3, memory_conv_size=9, memory_lags=8).model.layers[0].memory
    )
    back = 8 - memory.convs[1].weight.abs().argmax(1)
    assert back[32:].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert back[:32].max() < 4


def test_all_else_of_a_model_stays():
    model = tiny_model("mag", torch.bfloat16).train()
    model.model.layers[0].memory.output_norm.float()
    model.model.layers[0].memory.k_proj.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.generation_config.max_new_tokens = 77
    model.set_attn_implementation("eager")
    grown = grow_memory(model, **LARGER)
    assert grown.training
    assert grown.generation_config.max_new_tokens == 77
    assert grown.config._attn_implementation == "eager"
    assert grown.config is grown.model.config
    assert {name: (p.dtype, p.requires_grad) for name, p in grown.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()
    }
    assert model.config.num_memory_heads == 2
    assert model.model.layers[0].memory.num_heads == 2


@torch.no_grad()
def test_bfloat16_is_as_it_was():
    model, ids = tiny_model("mag", torch.bfloat16), tokens(1, 20)
    assert torch.equal(grow_memory(model, num_memory_heads=3)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_classifiers_and_forecasters_grow():
    torch.manual_seed(0)
    classifier = TitansForSequenceClassification(tiny_config("mag", num_labels=3)).double().eval()
    ids = tokens(2, 30)
    torch.testing.assert_close(grow_memory(classifier, **LARGER)(ids).logits, classifier(ids).logits)
    config = TitansTimeSeriesConfig(
        context_length=24, prediction_length=4, patch_length=4, num_input_channels=2, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, memory_head_dim=8, window_size=4,
    )  # fmt: skip
    forecaster, series = TitansForTimeSeriesPrediction(config).double().eval(), torch.randn(2, 24, 2).double()
    expected = forecaster(past_values=series).prediction_outputs
    torch.testing.assert_close(grow_memory(forecaster, **LARGER)(past_values=series).prediction_outputs, expected)


def test_what_would_be_lost_is_refused():
    model = tiny_model("mag", memory_lr=0.1)
    model.begin_with(model(tokens(1, 9), use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="call begin_with"):
        grow_memory(model, **LARGER)
    model.begin_with(None)
    memory = model.model.layers[1].memory
    memory.q_proj = torch.nn.Sequential(memory.q_proj)  # as an adapter has it
    with pytest.raises(ValueError, match="adapters or other weights of their own"):
        grow_memory(model, **LARGER)


RANDOM = {"memory_start": "random"}


@pytest.mark.parametrize(
    ("kind", "options", "changes", "words"),
    [
        ("mag", {}, {"hidden_size": 64}, "hidden_size cannot be changed in a trained model"),
        ("mag", {}, {"num_memory_heads": 1}, "num_memory_heads must be at least the model's 2, got 1"),
        ("mag", {}, {"num_memory_heads": None}, "num_memory_heads must be a whole number, got None"),
        ("mag", {}, {"num_memory_heads": 3.0}, "num_memory_heads must be a whole number, got 3.0"),
        ("mag", {}, {"num_memory_heads": True}, "num_memory_heads must be a whole number, got True"),
        ("mag", {}, {"num_memory_heads": 0}, "num_memory_heads must be"),
        ("mag", {}, {"memory_conv_size": 3}, "memory_conv_size must be at least the model's 4, got 3"),
        ("mag", {"memory_conv_size": 1}, {"memory_conv_size": 4}, "memory_conv_size must be 1, as this model has no"),
        ("mag", {}, {"memory_lags": 3}, "memory_lags has no effect without new heads"),
        ("mag", {}, {"num_memory_heads": 3, "memory_lags": 4}, "at most memory_conv_size - 1, which is 3, got 4"),
        ("mag", RANDOM, {"num_memory_heads": 3, "memory_lags": 3}, "no associative start"),
        ("mag", {"memory_conv_size": 1}, {"num_memory_heads": 3, "memory_lags": 1}, "no associative start"),
        ("window", {}, {"num_memory_heads": 3}, "attention alone has no memory"),
    ],
)
def test_what_cannot_grow_is_refused(kind, options, changes, words):
    config = tiny_model(kind, **options).config
    before = config.to_dict()
    with pytest.raises(ValueError, match=words):
        grown_config(config, **changes)
    assert config.to_dict() == before


@pytest.mark.usefixtures("unchecked")
def test_a_graft_is_refused(tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(tmp_path / "base")  # fmt: skip
    byte_tokenizer().save_pretrained(tmp_path / "base")
    grafted = graft(tmp_path / "base", memory_head_dim=8)
    with pytest.raises(ValueError, match="num_memory_heads cannot be changed: a graft does not grow"):
        grow_memory(grafted, num_memory_heads=4)
    grafted.save_pretrained(tmp_path / "graft")
    byte_tokenizer().save_pretrained(tmp_path / "graft")
    with pytest.raises(ValueError, match=r"model\.pretrained: num_memory_heads cannot be changed: a graft"):
        parse_settings(sections(tmp_path / "graft", tmp_path / "out", num_memory_heads=4))


def sections(folder, out, **growth):
    return {
        "model": {"pretrained": str(folder), **growth},
        "data": {"task": {"name": "streams", "length": 32}},
        "training": {"output_dir": str(out), "max_steps": 2, "batch_size": 1, "save_steps": 1},
    }


def test_training_begins_with_a_grown_model_and_saves_it(folder, tmp_path):
    made = sections(folder, tmp_path / "out", num_memory_heads=3, memory_conv_size=6)
    begun, ids = model_for(parse_settings(made)), tokens(1, 30)
    assert begun.training
    with torch.no_grad():
        expected, _ = load(folder)
        torch.testing.assert_close(begun.eval()(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    trained = train(parse_settings(made))
    assert trained.config.num_memory_heads == 3
    loaded = TitansForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.memory_conv_size == 6
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")  # as if it had been stopped after the first step
    (tmp_path / "out" / "model.safetensors").unlink()
    made["training"]["resume"] = True
    resumed = train(parse_settings(made))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize("key", ["num_memory_heads", "memory_conv_size", "memory_lags", "memory_dim"])
def test_a_key_that_is_null_counts_as_left_out(folder, tmp_path, key):
    config = parse_settings(sections(folder, tmp_path / "out", **{key: None})).config()
    assert config.own_fields() == load(folder)[0].config.own_fields()


@pytest.mark.parametrize(
    ("growth", "words"),
    [
        ({"num_memory_heads": 1}, "model.pretrained: num_memory_heads must be at least"),
        ({"num_memory_heads": "many"}, "model.num_memory_heads must be a whole number, got 'many'"),
        ({"memory_dim": 4096}, "model.memory_dim has no effect beside model.pretrained"),
    ],
)
def test_a_run_says_what_cannot_grow(folder, tmp_path, growth, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_settings(sections(folder, tmp_path / "out", **growth))
    assert "\n" not in str(raised.value)
