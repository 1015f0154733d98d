"""Baselines: what they are, that they have as many parameters, and that all train by the same code."""

import pytest
import torch

from conftest import TITANS
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.baselines import BASELINES, MAMBA2, NAMES, build, mamba2_config
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.presets import PARAMETERS, SIZES, count_parameters, fitted, preset
from titans_lm.training.config import parse_settings
from titans_lm.training.train import train
from tolerance import assert_close


def count(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "170m"])
def test_all_have_a_size_s_parameters_within_three_percent(size):
    configs = [preset(size, variant) for variant in TITANS] + [preset(size, **fields) for fields in BASELINES.values()]
    configs.append(mamba2_config({"size": size, "vocab_size": SIZES[size].get("vocab_size", 32000)}))
    for config in configs:
        assert abs(count(config) / PARAMETERS[size] - 1) < 0.03, config


def test_another_vocabulary_changes_the_embedding_and_nothing_else():
    usual, larger = preset("tiny", "mag"), preset("tiny", "mag", vocab_size=8192)
    assert larger.intermediate_size == usual.intermediate_size
    assert count_parameters(larger) - count_parameters(usual) == (8192 - 320) * 128


def test_parameters_are_what_is_asked_for_or_an_error_says_so():
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 64}
    for baseline in NAMES:
        model = {**fields, "baseline": baseline, "parameters": 200_000}
        settings = parse_settings(_run("unused", model))
        assert abs(count(settings.config()) / 200_000 - 1) < 0.03, baseline
    with pytest.raises(ValueError, match=r"no MLP brings this model to 1,000 parameters within 3 %"):
        fitted(1e3, **fields)
    with pytest.raises(ValueError, match="mamba2"):
        mamba2_config({**fields, "parameters": 5000})
    with pytest.raises(ValueError, match="needs a size, or hidden_size and vocab_size"):
        mamba2_config({"parameters": 5000})


def test_a_baseline_stays_what_it_is():
    """Shared settings of a study, such as a window, do not change it."""
    settings = parse_settings(_run("unused", {"size": "tiny", "baseline": "full_attention", "window_size": 8}))
    assert settings.config().window_size is None
    settings = parse_settings(_run("unused", {"size": "tiny", "baseline": "delta_net", "memory_chunk_size": 64}))
    assert settings.config().memory_chunk_size == 1


def _memory(name: str, **changes) -> NeuralMemory:
    """A baseline's memory, every parameter changed by chance."""
    config = TitansConfig(
        **{**BASELINES[name], "hidden_size": 12, "num_attention_heads": 1, "memory_head_dim": 6, **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        memory = (
            build(TitansConfig(**{**config.to_diff_dict(), "num_hidden_layers": 1, "vocab_size": 8}))
            .model.layers[0]
            .memory
        )
        for p in memory.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.5)
    return memory.double()


def _inputs(memory: NeuralMemory, tokens: int = 33):
    """x, and what the layer makes of it: q, k, v, theta, eta, alpha."""
    x = torch.randn(2, tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features, _ = memory._features(x, memory.initial_state(2).conv_state, None)
    return x, *features, *memory._gates(x)


def test_linear_attention_is_a_sum_over_all_tokens():
    memory = _memory("linear_attention")
    x, q, k, v, theta, eta, alpha = _inputs(memory)
    assert not eta.any()
    assert not alpha.any()
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * (2 * theta).transpose(1, 2)[:, :, None]
    expected = memory.project_output(x, torch.einsum("bhts,bshv->bthv", scores, v))
    assert_close(memory(x)[0], expected)


@pytest.mark.parametrize("name", ["delta_net", "delta_net_negative", "gated_delta_net"])
def test_delta_nets_correct_what_they_remember_token_by_token(name):
    memory = _memory(name)
    x, q, k, v, theta, eta, alpha = _inputs(memory)
    assert not eta.any()
    assert bool(alpha.any()) == (name == "gated_delta_net")
    assert float(theta.detach().max()) <= (1.0 if name == "delta_net_negative" else 0.5)
    m, out = torch.zeros(2, 2, 6, 6, dtype=torch.float64), []
    for t in range(x.shape[1]):
        error = torch.einsum("bhk,bhkv->bhv", k[:, t], m) - v[:, t]
        write = torch.einsum("bhk,bhv->bhkv", k[:, t], error) * (2 * theta[:, t])[..., None, None]
        m = (1 - alpha[:, t])[..., None, None] * m - write
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], m))
    assert_close(memory(x)[0], memory.project_output(x, torch.stack(out, 1)))


def _run(folder, model) -> dict:
    return {
        "model": model,
        "data": {"task": {"name": "mqar", "length": 16, "pairs": 2, "vocab_size": 16}},
        "training": {"output_dir": str(folder), "max_steps": 8, "batch_size": 4, "logging_steps": 4},
    }


@pytest.mark.parametrize("name", [*NAMES, *TITANS])
def test_every_model_trains_by_the_same_code(name, tmp_path):
    chosen = {"variant": name} if name in TITANS else {"baseline": name}
    model = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "memory_head_dim": 16, "memory_dim": 16,
        "window_size": 8, "segment_size": 8, "parameters": 30_000, **chosen,
    }  # fmt: skip
    settings = parse_settings(_run(tmp_path / "run", model))
    trained = train(settings)
    with torch.device("meta"):
        first = dict(build(settings.config()).named_parameters())
    assert dict(trained.named_parameters()).keys() == first.keys()
    assert all(p.isfinite().all() for p in trained.parameters())
    assert trained.config.vocab_size == 16
    assert (name == MAMBA2) == (trained.config.model_type == "mamba2")
