"""Names, arguments and files of earlier versions of the layers and models: they still work, and names warn."""

import importlib
import inspect
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import assert_bitwise, tiny_model, tokens
from titans_lm import NeuralMemory, NeuralMemoryState, TitansConfig, TitansState
from titans_lm.models import block_cache, cache_file
from titans_lm.models.model_identity import identity

FILES = Path(__file__).parent / "memory_files"
"""Written before fields of the state were renamed: one layer, two rows, 17 tokens, float32."""

MODULES = {
    "layers.attention": {"Rotation": "RotaryEmbedding", "rotation": "rotary_embedding", "Product": "AttentionFunction"},
    "layers.bypass": {"memory_off": "bypass_memory"},
    "layers.checkpointing": {"recomputed": "checkpointed", "made_again": "checkpointed_pure"},
    "layers.memory_state": {"last_input": "next_prev_input", "gates_of_chunks": "chunk_gates"},
    "layers.module_call": {"at_home": "empty_like_weights", "is_plain": "is_plain_linear"},
    "layers.neural_memory": {"Queries": "ProjectedQueries", "KEPT_BYTES": "MAX_SAVED_BYTES"},
    "layers.predictor": {"TrainAlong": "AuxiliaryLoss"},
    "layers.short_conv": {"features": "qkv_features", "in_eager": "eager_features", "convolved": "causal_convolution"},
    "models.arguments": {"hidden_states": "select_hidden_states"},
    "models.block_cache": {"Retrieval": "SegmentSnapshot", "expand": "expand_rows", "start_rows": "restart_rows"},
    "models.blocks": {"PIECE": "PREFILL_TOKENS", "Ahead": "SegmentInputs"},
    "models.cache_file": {"read": "load_file", "write": "save_file", "check": "check_tensors"},
    "models.forward_context": {"Reading": "ForwardContext"},
    "models.generation": {"Ended": "RowEnds", "Prompt": "PromptState"},
    "models.model_files": {"shipped": "shipped_folder", "complete": "add_companions"},
    "models.packing": {"Asked": "OutputOptions", "Read": "StackOutput"},
}


@pytest.mark.parametrize("name", MODULES)
def test_an_old_name_of_a_module_is_the_new_one_with_a_warning(name: str):
    module = importlib.import_module(f"titans_lm.{name}")
    for old, new in MODULES[name].items():
        with pytest.warns(DeprecationWarning, match=rf"{old} was renamed: use titans_lm\.{name}\.{new}"):
            value = getattr(module, old)
        assert value is getattr(module, new)


OPTIONS = {
    "depth": ("layers", 1),
    "hidden": ("memory_dim", 8),
    "theta_max": ("lr", 0.5),
    "theta_start": ("lr_start", 0.05),
    "threshold": ("surprise_threshold", 2.0),
    "threshold_on": ("surprise_threshold_on", "prediction"),
}


@pytest.mark.parametrize("old", OPTIONS)
def test_an_old_argument_of_the_layer_is_the_new_one_with_a_warning(old: str):
    new, value = OPTIONS[old]
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match=f"{old} of NeuralMemory.__init__ was renamed: use {new}"):
        layer = NeuralMemory(12, 2, **{old: value})
    torch.manual_seed(0)
    same = NeuralMemory(12, 2, **{new: value})
    assert all(map(torch.equal, layer.parameters(), same.parameters()))
    assert (layer.lr, layer.surprise_threshold, layer.shapes) == (same.lr, same.surprise_threshold, same.shapes)
    with pytest.raises(TypeError, match=f"{old} is the old name of {new}"):
        NeuralMemory(12, 2, **{old: value, new: value})


def test_the_layer_s_arguments_are_the_configuration_s_keys():
    arguments = set(inspect.signature(NeuralMemory).parameters) - {"dim", "backend"}
    keys = {key for key in TitansConfig().own_fields() if "memory_" in key or "surprise_" in key}
    of_the_loss = {"memory_loss_weight", "memory_theta_weight"}
    assert arguments == {key if key == "memory_dim" else key.replace("memory_", "") for key in keys - of_the_loss}


def test_old_attributes_are_the_new_ones_with_a_warning():
    layer = NeuralMemory(12, num_heads=2, lr=0.5)
    with pytest.warns(DeprecationWarning, match=r"NeuralMemory\.theta_max was renamed: use NeuralMemory\.lr"):
        assert layer.theta_max == 0.5
    with pytest.warns(DeprecationWarning, match="surprise_threshold"):
        layer.threshold = 3.0
    assert layer.surprise_threshold == 3.0
    with pytest.warns(DeprecationWarning, match=r"heads was renamed"):
        assert layer.heads == 2
    with pytest.warns(DeprecationWarning, match=r"heads of NeuralMemory.__init__ was renamed: use num_heads"):
        assert NeuralMemory(12, heads=2).num_heads == 2
    state = layer.initial_state(1)
    with pytest.warns(DeprecationWarning, match=r"NeuralMemoryState\.tails was renamed"):
        assert state.tails is state.conv_state
    with pytest.warns(DeprecationWarning, match=r"NeuralMemoryState\.last was renamed"):
        assert state.last is None
    with pytest.warns(DeprecationWarning, match="the argument tails of .* was renamed: use conv_state"):
        assert NeuralMemoryState(state.memory, tails=state.conv_state).conv_state is state.conv_state
    for name in ("off", "kept_bytes"):
        with pytest.raises(AttributeError, match=rf"NeuralMemory\.{name} was removed: use "):
            setattr(layer, name, 1)
    x = torch.randn(1, 5, 12)
    with pytest.warns(DeprecationWarning, match="use update=False"):
        y, _ = layer.frozen(x, state, None)
    assert torch.equal(y, layer(x, state, update=False)[0])


def test_old_methods_of_a_state_are_the_new_ones_with_a_warning():
    state = tiny_model("mag").initial_state(2)
    with pytest.warns(DeprecationWarning, match=r"TitansState\.memories was renamed: use TitansState\.layer_caches"):
        assert state.memories is state.layer_caches
    for old in ("shared", "leave", "begun_by", "moved", "become"):
        with pytest.warns(DeprecationWarning, match=rf"TitansState\.{old} was renamed"):
            assert callable(getattr(state, old))
    with pytest.warns(DeprecationWarning, match=r"TitansState\.concat"):
        assert TitansState.joined([state, state]).batch_size == 4


@pytest.mark.parametrize("kind", ["mac", "mag", "mal", "lmm", "window"])
def test_the_old_type_of_caches_makes_the_new_ones(kind: str):
    cache = tiny_model(kind).initial_state(1).layer_caches[0]
    with pytest.warns(DeprecationWarning, match=f"use {type(cache).__name__}"):
        again = block_cache.LayerState(**cache._asdict())
    assert type(again) is type(cache)
    assert again == cache
    with pytest.raises(ValueError, match="no block has a cache with the fields none"):
        block_cache.LayerState()


def test_a_state_that_an_old_version_pickled_is_loaded():
    state = tiny_model("lmm").initial_state(1)
    old = {**state.__dict__, "memories": state.layer_caches}
    del old["layer_caches"]
    again = object.__new__(TitansState)
    again.__setstate__(old)
    assert_bitwise(again, state)
    assert pickle.loads(b"ctitans_lm.reading\nLayerState\n.") is block_cache.LayerState


@pytest.mark.parametrize("kind", ["mac", "mal"])
def test_a_memory_file_of_an_old_version_is_loaded_and_written_the_same(kind: str, tmp_path: Path):
    more = {"surprise_threshold": 0.1, "surprise_threshold_on": "prediction", "memory_gates_of": "chunk"}
    model = tiny_model(kind, torch.float32, num_hidden_layers=1, **(more if kind == "mac" else {}))
    tensors, card = cache_file.load_file(FILES / f"{kind}.memory")
    cache_file.save_file(tmp_path / "old", tensors, replace(card, **identity(model)))  # whatever this machine draws
    state = TitansState.load(tmp_path / "old", model)
    assert state.position.tolist() == [17, 17]
    state.save(tmp_path / "new")
    again, _ = cache_file.load_file(tmp_path / "new")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    model(tokens(2, 5), past_key_values=state)
    assert state.position.tolist() == [22, 22]
