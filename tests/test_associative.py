"""Where a memory begins: as a regression of what followed what, before anything was trained."""

import pytest
import torch
import torch.nn.functional as F

from titans_lm import NeuralMemory, TitansForCausalLM, preset

SYMBOLS = 12


def memory(start="auto", **options):
    torch.manual_seed(1)
    return NeuralMemory(32, 2, conv_size=6, lr=1.0, lr_start=0.1, alpha_bias=-12.0, start=start, **options)


def text(length):
    """Vectors of a walk through symbols in which each pair of symbols has one successor."""
    generator = torch.Generator().manual_seed(2)
    follows = torch.randint(SYMBOLS, (SYMBOLS, SYMBOLS), generator=generator).tolist()
    walk = [0, 1]
    while len(walk) < length:
        walk.append(follows[walk[-2]][walk[-1]])
    vectors = F.normalize(torch.randn(SYMBOLS, 32, generator=generator), dim=-1) * 32**0.5
    return vectors[torch.tensor(walk)][None]


def predicted(layer, x):
    """How well what each of the last tokens reads tells the value of the next: mean cosine similarity."""
    (_, _, v), _ = layer._features(x, layer.initial_state(1).conv_state, None)
    y, *_ = layer.scan(x, layer.initial_state(1), None)
    return F.cosine_similarity(y[:, -40:-1], v[:, -39:], dim=-1).mean().item()


@torch.no_grad()
def test_an_untrained_memory_tells_what_comes_next():
    x = text(400)
    assert predicted(memory(), x) > 0.8
    assert predicted(memory("random"), x) < 0.3


@torch.no_grad()
def test_a_key_is_the_query_of_the_token_before_it():
    (q, k, _), _ = memory()._features(text(60), memory().initial_state(1).conv_state, None)
    similarity = F.cosine_similarity(q[:, 5:-1], k[:, 6:], dim=-1).mean()
    assert similarity > 0.85
    assert similarity > F.cosine_similarity(q[:, 6:], k[:, 6:], dim=-1).mean() + 0.2


@pytest.mark.parametrize(("lags", "conv_size", "groups"), [(1, 6, 1), (4, 6, 4), (8, 6, 5), (4, 2, 1)])
def test_groups_of_channels_look_one_token_further_back_each(lags, conv_size, groups):
    layer = NeuralMemory(32, 2, conv_size=conv_size, lags=lags)
    q, k, v = (conv.weight.argmax(-1).view(2, 16) for conv in layer.convs)
    lag = torch.arange(16) * groups // 16
    assert torch.equal(q, (conv_size - 1 - lag).expand(2, -1))
    assert torch.equal(k, q - 1)
    assert torch.equal(v, torch.full_like(v, conv_size - 1))


def test_a_second_reset_begins_as_the_first():
    layer = memory()
    before = [conv.weight.abs().max().item() for conv in layer.convs]
    layer.reset_parameters()
    after = [conv.weight.abs().max().item() for conv in layer.convs]
    assert after == pytest.approx(before, abs=0.2)
    assert torch.equal(layer.k_proj.weight, layer.q_proj.weight)


def test_without_convolutions_there_is_no_such_start():
    with pytest.raises(ValueError, match="conv_size must be at least 2, got 1"):
        NeuralMemory(32, 2, conv_size=1, start="associative")
    layer = NeuralMemory(32, 2, conv_size=1)
    assert not torch.equal(layer.k_proj.weight, layer.q_proj.weight)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_models_begin_so_and_load_what_they_learned(variant, tmp_path):
    model = TitansForCausalLM(preset("tiny", variant))
    for block in model.model.layers:
        assert torch.equal(block.memory.k_proj.weight, block.memory.q_proj.weight)
        assert torch.equal(block.memory.convs[2].weight.argmax(-1), torch.full((128,), 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_the_old_start_is_an_option():
    model = TitansForCausalLM(preset("tiny", "mag", memory_start="random"))
    layer = model.model.layers[0].memory
    assert not torch.equal(layer.k_proj.weight, layer.q_proj.weight)
    assert layer.convs[0].weight.abs().max() <= 0.5
