"""MAC's whole segments in compiled code equal the block's own operations: outputs, states and all gradients."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conftest import state_tensors, tiny_model, tokens
from titans_lm import TitansForCausalLM
from titans_lm.layers import compiled_segments
from titans_lm.layers.neural_memory import memories
from titans_lm.ops.cpu import compiled
from titans_lm.ops.cpu.build import SOURCES
from tolerance import assert_close

SIZES: dict[str, Any] = {"segment_size": 8, "memory_chunk_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one chunk": {"memory_chunk_size": 8},
    "blocks of tokens": {"segment_size": 72, "memory_chunk_size": 36},
    "plain matrix": {"memory_layers": 1, "memory_form": "plain", "memory_clip": None},
    "depth 3, gelu": {"memory_layers": 3, "memory_activation": "gelu"},
    "no momentum, no forgetting": {"memory_momentum": False, "memory_forgetting": False},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "wide heads": {"head_dim": 6, "num_memory_heads": 3},
    "a threshold": {"surprise_threshold": 0.2},
}


class Paths:
    """Which calls took the compiled path."""

    def __init__(self) -> None:
        self.taken: list[bool] = []
        self.allowed = True
        self.is_supported = compiled_segments.is_supported

    def __call__(self, *arguments: Any) -> bool:
        self.taken.append(self.allowed and self.is_supported(*arguments))
        return self.taken[-1]


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    seen = Paths()
    monkeypatch.setattr(compiled_segments, "is_supported", seen)
    return seen


def run(model: TitansForCausalLM, calls: list[int], rows: int = 2) -> dict[str, Tensor]:
    """Logits and state of texts read in calls of these lengths, and gradients by all parameters."""
    state, outputs = None, []
    for i, length in enumerate(calls):
        out = model(tokens(rows, length, seed=i), past_key_values=state, use_cache=True)
        outputs.append(out.logits)
        state = out.past_key_values
    found = {f"logits {i}": x for i, x in enumerate(outputs)}
    assert state is not None
    found |= state_tensors(state)
    torch.manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, dtype=torch.float64).to(x.dtype)).sum() for x in found.values() if x.requires_grad
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    found |= dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    return found


def both(paths: Paths, model: TitansForCausalLM, calls: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    results = []
    for paths.allowed in (True, False):
        paths.taken.clear()
        results.append(run(model, calls))
        assert any(paths.taken) == paths.allowed
    return results[0], results[1]


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_compiled_is_the_block_in_outputs_states_and_all_gradients(changes: dict[str, Any], paths: Paths):
    """The second call begins at a segment's start with another state than the first, and ends inside a segment."""
    model = tiny_model("mac", **(SIZES | changes))
    size = model.config.segment_size
    ours, expected = both(paths, model, [2 * size, size + 3])
    for name, x in expected.items():
        assert_close(ours[name], x, name)


def test_float32_is_near_float64(paths: Paths):
    model = tiny_model("mac", **SIZES)
    expected = run(model, [24])
    ours = run(model.float(), [24])
    assert all(paths.taken)
    for name, x in expected.items():
        assert_close(ours[name], x.to(ours[name].dtype), name)


def test_threads_change_nothing(paths: Paths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "SINGLE_THREAD_WORK", 0)
    model = tiny_model("mac", **(SIZES | {"segment_size": 72, "memory_chunk_size": 36}))
    one = run(model, [144])
    torch.set_num_threads(3)
    try:
        three = run(model, [144])
    finally:
        torch.set_num_threads(1)
    assert all(paths.taken)
    for name, x in one.items():
        assert_close(three[name], x, name)


def test_without_gradients_it_saves_one_state(paths: Paths):
    model = tiny_model("mac", **SIZES)
    expected = run(model, [24])
    with torch.no_grad():
        out = model(tokens(2, 24), use_cache=True)
    assert all(paths.taken)
    assert torch.equal(out.logits, expected["logits 0"])
    for name, x in state_tensors(out.past_key_values).items():
        assert_close(x, expected[name], name)


def test_activation_checkpointing_gives_the_same_gradients(paths: Paths):
    model = tiny_model("mac", **SIZES)
    expected = run(model, [24])
    ids, parameters = tokens(2, 24), list(model.parameters())
    logits = checkpoint(lambda: model(ids).logits, use_reentrant=False)
    weight = torch.randn_like(logits)
    ours = torch.autograd.grad((logits * weight).sum(), parameters)
    theirs = torch.autograd.grad((model(ids).logits * weight).sum(), parameters)
    assert all(paths.taken)
    assert torch.equal(logits, expected["logits 0"])
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("why", ["a hook", "surprise", "rows", "inside a segment", "autocast", "chunks", "eager"])
def test_else_the_block_s_own_operations(why: str, paths: Paths):
    changes = {"memory_chunk_size": 3} if why == "chunks" else {}
    model, options = tiny_model("mac", torch.float32, **(SIZES | changes)), dict[str, Any]()
    if why == "a hook":
        for memory in memories(model):
            memory.register_forward_hook(lambda *_: None)
    if why == "eager":
        model.config._attn_implementation = "eager"
    if why == "surprise":
        options["output_surprise"] = True
    if why == "rows":
        options["attention_mask"] = torch.tensor([[0, 0] + [1] * 22, [1] * 24])
    state = model(tokens(2, 3), use_cache=True).past_key_values if why == "inside a segment" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        model(tokens(2, 24), past_key_values=state, **options)
    assert not any(paths.taken)


def test_the_structure_is_the_same_in_both_languages():
    text = (
        (SOURCES / "segments.h")
        .read_text()
        .split("struct SegmentArgs : LayerArgs<T> {")[1]
        .split("    long attention_ch")[0]
    )
    declared = " ".join(line.split("//")[0] for line in text.splitlines())
    names = re.findall(r"(\w+)\s*[,;]", declared)
    assert names == [name for name, _ in compiled_segments.SegmentStructure._fields_]
    assert f"BLOCK = {compiled_segments.BLOCK};" in (SOURCES / "layer_scan.h").read_text()
