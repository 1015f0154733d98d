"""A configuration is right or refused with the name of what is wrong; presets are what their names say."""

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import each_kind, tiny_config, tokens
from titans_lm import DEFAULT_CONFIG, VARIANT_CONFIGS, TitansConfig, TitansForCausalLM, preset
from titans_lm.models.configuration import VARIANTS, known_keys
from titans_lm.models.presets import SIZES, count_parameters
from titans_lm.training.config import parse_settings


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("hiden_size", "hidden_size"),
        ("memory_layer", "memory_layers"),
        ("num_layer", "num_layers"),
        ("windowsize", "window_size"),
        ("persistent_tokens", "num_persistent_tokens"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'.*did you mean '{nearest}'"):
        TitansConfig(**{key: 2})


def test_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"unknown key 'zzzzzz' in TitansConfig$"):
        TitansConfig(zzzzzz=1)


IMPOSSIBLE: list[dict[str, Any]] = [
    {"vocab_size": 0},
    {"hidden_size": 0},
    {"hidden_size": -64},
    {"num_hidden_layers": 0},
    {"num_attention_heads": 0},
    {"head_dim": 0},
    {"head_dim": 7},
    {"intermediate_size": 0},
    {"segment_size": 0},
    {"num_memory_heads": 0},
    {"memory_head_dim": 0},
    {"memory_layers": 0},
    {"memory_dim": 0},
    {"memory_chunk_size": 0},
    {"memory_conv_size": 0},
    {"num_persistent_tokens": -1},
    {"memory_loss_weight": -0.1},
    {"memory_theta_weight": -0.1},
    {"initializer_range": -1.0},
    {"memory_lr": 0.0},
    {"memory_lr": 1.01},
    {"memory_lr": float("nan")},
    {"memory_clip": 0.0},
    {"memory_clip": -1.0},
    {"window_size": 0},
    {"window_size": None},
    {"rope_theta": 0.0},
    {"rms_norm_eps": -1.0},
    {"max_position_embeddings": 0},
    {"pad_token_id": 99},
]
MISTYPED: list[dict[str, Any]] = [
    {"variant": "mom"},
    {"gate": "sum"},
    {"memory_init": "one"},
    {"memory_form": "deep"},
    {"memory_activation": "relu"},
    {"hidden_size": "64"},
    {"hidden_size": 64.5},
    {"memory_lr": "fast"},
    {"memory_momentum": "no"},
    {"window_size": 2.5},
    {"tie_word_embeddings": "no"},
    {"surprise_threshold": "high"},
]


@pytest.mark.parametrize("change", IMPOSSIBLE + MISTYPED, ids=str)
def test_a_value_that_cannot_be_is_named(change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        tiny_config("mag", **change)


def test_attention_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="hidden_size=64 is not a multiple of num_attention_heads=3"):
        TitansConfig(hidden_size=64, num_attention_heads=3)
    assert TitansConfig(hidden_size=64, num_attention_heads=3, head_dim=20).head_dim == 20


def test_a_window_of_everything_is_for_attention_alone():
    assert tiny_config("full").window_size is None
    with pytest.raises(ValueError, match="window_size"):
        tiny_config("mal", window_size=None)


def test_short_names_mean_the_same():
    config = TitansConfig(hidden_dim=128, num_layers=3, num_heads=4)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 4)
    assert (config.hidden_dim, config.num_layers, config.num_heads) == (128, 3, 4)
    assert (config.head_dim, config.num_memory_heads, config.memory_dim) == (32, 2, 256)


@each_kind
def test_a_configuration_is_saved_and_loaded_whole(kind, tmp_path):
    config = tiny_config(kind, memory_lr=0.25, gate="convex", surprise_threshold=0.5, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    loaded = TitansConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.own_fields() == config.own_fields()


def warned(act) -> tuple[TitansConfig, list[str]]:
    """What `act` gave, and of which keys it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = act()
    return config, [str(w.message) for w in caught if "unknown key" in str(w.message)]


def test_an_unknown_key_of_a_file_is_kept_with_one_warning_that_names_the_nearest(tmp_path):
    model = TitansForCausalLM(tiny_config("mag"))
    model.config.note, model.config.hiden_size = "x", 3
    model.save_pretrained(tmp_path)
    for act in (
        lambda: TitansForCausalLM.from_pretrained(tmp_path).config,
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path).config,
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: TitansConfig.from_dict(model.config.to_dict()),
        lambda: TitansConfig(**model.config.to_dict()),
    ):
        config, (said,) = warned(act)
        assert (config.note, config.hiden_size) == ("x", 3)
        assert config.hidden_size == model.config.hidden_size
        assert "unknown key 'hiden_size' in config.json; did you mean 'hidden_size'?" in said
        assert "unknown key 'note'" in said
    assert warned(lambda: copy.deepcopy(model.config))[1] == []


def test_a_value_of_a_file_that_cannot_be_is_refused(tmp_path):
    tiny_config("mag").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"memory_layers": 0}))
    with pytest.raises(ValueError, match="memory_layers must be at least 1"):
        TitansConfig.from_pretrained(tmp_path)


OF_TRANSFORMERS: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": torch.float16,
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
    "quantization_config": {"quant_method": "torchao"},
}
"""What transformers' own test of configurations sets, and what quantization leaves there."""


def test_keys_that_every_transformers_model_takes_are_taken(tmp_path):
    config, said = warned(lambda: tiny_config("mag", **OF_TRANSFORMERS))
    assert {key: getattr(config, key) for key in OF_TRANSFORMERS} == OF_TRANSFORMERS
    del config.quantization_config  # transformers wants its own kind of object to save one
    config.save_pretrained(tmp_path)
    loaded, more = warned(lambda: TitansConfig.from_pretrained(tmp_path))
    assert loaded.to_dict() == config.to_dict()
    assert said == more == []


def test_labels_are_counted_as_in_transformers(tmp_path):
    config = tiny_config("mag", num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    config.save_pretrained(tmp_path)
    assert TitansConfig.from_pretrained(tmp_path).num_labels == 3
    assert TitansConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7


def test_a_key_typed_into_a_run_is_refused_though_transformers_might_take_it():
    tree = {"model": {"size": "tiny", "note": "x"}, "data": {"files": ["a"]}, "training": {"output_dir": "o"}}
    with pytest.raises(ValueError, match="unknown key 'note' in model"):
        parse_settings(tree)
    tree["model"] = {"size": "tiny", "model_type": "titans", "memory_layer": 1}
    with pytest.raises(ValueError, match="unknown key 'model_type' in model"):
        parse_settings(tree)


def test_defaults_are_every_own_field_and_variants_build():
    assert set(DEFAULT_CONFIG) <= set(known_keys())
    assert TitansConfig().own_fields().keys() == DEFAULT_CONFIG.keys()
    assert TitansConfig(**DEFAULT_CONFIG).to_dict() == TitansConfig().to_dict()
    assert set(VARIANT_CONFIGS) == set(VARIANTS)
    small = {
        "vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "memory_head_dim": 16,
        "intermediate_size": 32,
    }  # fmt: skip
    for variant, fields in VARIANT_CONFIGS.items():
        config = TitansConfig(**{**DEFAULT_CONFIG, **fields, **small})
        assert config.variant == variant
        assert TitansForCausalLM(config)(tokens(1, 5)).logits.isfinite().all()


NAMED = {"170m": 170e6, "340m": 340e6, "400m": 400e6, "760m": 760e6}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", NAMED)
def test_a_size_has_the_parameters_of_its_name(size, variant):
    """Tied embeddings are counted once; so are the parameters of a model that is built."""
    assert abs(count_parameters(preset(size, variant)) / NAMED[size] - 1) < 0.05


@pytest.mark.parametrize("tied", [True, False])
@each_kind
def test_parameters_are_counted_as_built(kind, tied):
    config = tiny_config(kind, num_hidden_layers=3, tie_word_embeddings=tied)
    assert count_parameters(config) == sum(p.numel() for p in TitansForCausalLM(config).parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_sizes_of_all_variants_are_near_each_other(variant):
    for size in SIZES.keys() - NAMED.keys():
        assert abs(count_parameters(preset(size, variant)) / count_parameters(preset(size, "mag")) - 1) < 0.05


def test_a_preset_takes_changes_and_refuses_what_does_not_exist():
    config = preset("tiny", "mal", memory_layers=1, intermediate_size=100)
    assert (config.memory_layers, config.intermediate_size, config.variant) == (1, 100, "mal")
    with pytest.raises(ValueError, match=r"unknown size 'huge'.*tiny"):
        preset("huge")
    with pytest.raises(ValueError, match=r"did you mean 'memory_layers'"):
        preset("tiny", memory_layer=1)


def test_what_is_set_changes_the_model():
    """Every field of the memory, the window and the segment reaches what it is for."""
    ids = tokens(1, 20)

    def logits(variant: str, **changes: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return TitansForCausalLM(tiny_config(variant, **changes)).eval()(ids).logits

    for variant, changes in [
        ("mag", {"memory_lr": 0.1}),
        ("mag", {"memory_chunk_size": 2}),
        ("mag", {"memory_form": "plain"}),
        ("mag", {"memory_activation": "gelu"}),
        ("mag", {"memory_clip": None}),
        ("mag", {"memory_momentum": False}),
        ("mag", {"memory_forgetting": False}),
        ("mag", {"memory_init": "zero"}),
        ("mag", {"memory_layers": 1}),
        ("mag", {"memory_conv_size": 3}),
        ("mag", {"surprise_threshold": 1e6}),
        ("mag", {"num_memory_heads": 1}),
        ("mag", {"gate": "convex"}),
        ("mag", {"window_size": 6}),
        ("mac", {"segment_size": 8}),
        ("mag", {"rope_theta": 100.0}),
        ("mag", {"rms_norm_eps": 0.1}),
    ]:
        assert not torch.equal(logits(variant, **changes), logits(variant)), changes
