"""A memory that grows: the model computes what it did, its new parts learn, and what cannot grow is refused."""

import pytest
import torch
import torch.nn.functional as F

from conftest import KINDS, each_titan, tiny_model, tokens
from titans_lm import TitansForCausalLM, grow_memory, load
from titans_lm.models.growth import grown_config
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
    states = [m(ids, use_cache=True).past_key_values.layers for m in (model, grow_memory(model, **LARGER))]
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


def test_dtype_and_mode_stay():
    grown = grow_memory(tiny_model("mag", torch.bfloat16).train(), **LARGER)
    assert grown.dtype == torch.bfloat16
    assert grown.training


@pytest.mark.parametrize(
    ("kind", "options", "changes", "words"),
    [
        ("mag", {}, {"hidden_size": 64}, "hidden_size cannot be changed in a trained model"),
        ("mag", {}, {"num_memory_heads": 1}, "num_memory_heads must be at least the model's 2, got 1"),
        ("mag", {}, {"memory_conv_size": 3}, "memory_conv_size must be at least the model's 4, got 3"),
        ("mag", {}, {"memory_lags": 6}, "memory_lags has no effect without new heads"),
        ("mag", {"memory_conv_size": 1}, {"memory_conv_size": 4}, "memory_conv_size must be 1, as this model has no"),
        ("mag", {}, {"num_memory_heads": 0}, "num_memory_heads must be"),
        *(
            (kind, {}, {"num_memory_heads": 3}, "num_memory_heads has no effect")
            for kind in KINDS.keys() & {"window", "full"}
        ),
    ],
)
def test_what_cannot_grow_is_refused(kind, options, changes, words):
    config = tiny_model(kind, **options).config
    before = config.to_dict()
    with pytest.raises(ValueError, match=words):
        grown_config(config, **changes)
    assert config.to_dict() == before


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
    made["training"] |= {"max_steps": 3, "resume": True}
    assert train(parse_settings(made)).config.num_memory_heads == 3


@pytest.mark.parametrize(
    ("growth", "words"),
    [
        ({"num_memory_heads": 1}, "model.pretrained: num_memory_heads must be at least"),
        ({"num_memory_heads": "many"}, "num_memory_heads"),
        ({"memory_dim": 4096}, "model.memory_dim has no effect beside model.pretrained"),
    ],
)
def test_a_run_says_what_cannot_grow(folder, tmp_path, growth, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse_settings(sections(folder, tmp_path / "out", **growth))
    assert "\n" not in str(raised.value)
