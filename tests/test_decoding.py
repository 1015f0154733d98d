"""Decoding in buffers that are written in place is decoding, and nobody who holds a state sees a tensor change."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import (
    KINDS,
    SEGMENT,
    TITANS,
    WINDOW,
    assert_bitwise,
    each_kind,
    state_tensors,
    tiny_model,
    tokens,
)
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.layers.bypass import bypass_memory
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")
LONG = 2 * SEGMENT + WINDOW
"""Tokens over several ends of segments, chunks and windows, which do not divide each other."""
BUFFERED = sorted(KINDS.keys() - {"full"})  # in one order, as processes that share the tests need


def read(model: TitansForCausalLM, rows: list[int]) -> TitansState:
    """The state of rows that have read so many tokens each."""
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    state = model.initial_state(len(rows))
    with torch.no_grad():
        model(tokens(len(rows), max(rows), seed=1), attention_mask=mask.long(), past_key_values=state)
    return state


@torch.no_grad()
def decode(model: TitansForCausalLM, state: TitansState, ids: Tensor, **options: Any) -> Tensor:
    """The logits of ids `[B, T]`, one token per call."""
    calls = [model(ids[:, i : i + 1], past_key_values=state, **options) for i in range(ids.shape[1])]
    return torch.cat([out.logits for out in calls], 1)


def decoding(model: TitansForCausalLM, state: TitansState) -> TitansState:
    """The state, in buffers."""
    model.begin_decoding(state)
    return state


def assert_alike(actual: TitansState, expected: TitansState) -> None:
    ours, theirs = actual.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name)


@each_kind
@pytest.mark.parametrize("rows", [[9], [4, 4], [1, 6, 15]])
def test_logits_and_states_are_those_without_buffers(kind, rows):
    model = tiny_model(kind)
    expected, state = read(model, rows), read(model, rows)
    ids = tokens(len(rows), LONG)
    model.begin_decoding(state)
    assert state.is_decoding == (kind in BUFFERED)
    for i in range(LONG):
        assert_close(decode(model, state, ids[:, i : i + 1]), decode(model, expected, ids[:, i : i + 1]), f"{i}")
        if i % 3 == 0 or i > LONG - 3:
            assert_alike(state, expected)
    assert state.is_decoding == (kind in BUFFERED)
    state.end_decoding()
    assert not state.is_decoding
    more = tokens(len(rows), 5, seed=2)
    assert_close(decode(model, state, more), decode(model, expected, more), "after")


@pytest.mark.parametrize("changes", [
    {"memory_chunk_size": 20}, {"memory_chunk_size": 1}, {"memory_layers": 1}, {"memory_momentum": False},
    {"memory_forgetting": False}, {"surprise_threshold": 0.5}, {"memory_gates_of": "chunk"}, {"memory_form": "plain"},
    {"num_persistent_tokens": 0}, {"window_size": 1}, {"gate": "convex"}, {"memory_conv_size": 1},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["mag", "mac"])
def test_all_forms_of_the_memory(kind, changes):
    model = tiny_model(kind, **{**changes, **({"memory_lr": 0.1} if "memory_form" in changes else {})})
    ids, expected, state = tokens(2, LONG), read(model, [3, 5]), decoding(model, read(model, [3, 5]))
    assert_close(decode(model, state, ids), decode(model, expected, ids), "logits")
    assert_alike(state, expected)


def test_wide_memories_in_float32():
    """Widths of whole vectors, which compiled code computes otherwise."""
    model = tiny_model("mag", torch.float32, hidden_size=64, memory_head_dim=64, memory_dim=256, num_hidden_layers=1)
    ids, expected, state = tokens(2, 21), read(model, [3, 5]), decoding(model, read(model, [3, 5]))
    torch.testing.assert_close(decode(model, state, ids), decode(model, expected, ids), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ who else holds it


@each_kind
def test_states_that_share_tensors_or_were_forked_stay_as_they_were(kind):
    model, ids = tiny_model(kind), tokens(2, LONG)
    given = read(model, [3, 5])
    before, shared = given.clone(), given.shallow_copy()
    state = decoding(model, given.shallow_copy())
    decode(model, state, ids[:, :4])
    forks = {name: getattr(state, name)() for name in ("clone", "shallow_copy", "continuation", "detach")}
    forks |= {"copy": copy.copy(state), "deepcopy": copy.deepcopy(state)}
    assert not any(fork.is_decoding for fork in forks.values())
    noted = {name: fork.clone() for name, fork in forks.items()}
    whole = decode(model, state, ids[:, 4:])
    for held in (given, shared):
        assert_bitwise(held, before)
    for name, fork in forks.items():
        assert_bitwise(fork, noted[name])
        assert_close(decode(model, fork, ids[:, 4:]), whole, name)


@pytest.mark.parametrize("kind", BUFFERED)
def test_rows_are_selected_reordered_repeated_and_joined_as_without_buffers(kind):
    model, ids = tiny_model(kind), tokens(3, 6)
    results = []
    for begin in (decoding, lambda _, state: state):
        state = begin(model, read(model, [2, 9]))
        decode(model, state, ids[:2, :3])
        chosen, other = state.select([1, 0, 1]), begin(model, read(model, [4]))
        joined = TitansState.concat([state, other])
        state.reorder_cache(torch.tensor([1, 1]))
        state.batch_repeat_interleave(2)
        assert chosen.is_decoding == state.is_decoding == joined.is_decoding == (begin is decoding)
        found = [decode(model, chosen, ids), decode(model, state, ids[[0, 1, 2, 0]]), decode(model, joined, ids)]
        state.reset([0, 2])
        results.append([*found, decode(model, state, ids[[0, 1, 2, 0]])])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, kind)


@pytest.mark.parametrize("kind", BUFFERED)
def test_files_are_those_without_buffers(kind, tmp_path):
    model, ids = tiny_model(kind), tokens(1, LONG)
    state = decoding(model, read(model, [3]))
    decode(model, state, ids[:, :6])
    state.save(tmp_path / "a.memory")
    loaded = TitansState.load(tmp_path / "a.memory", model)
    assert_bitwise(loaded, state.clone())
    assert_close(decode(model, loaded, ids[:, 6:]), decode(model, state, ids[:, 6:]), kind)


@pytest.mark.parametrize("kind", BUFFERED)
@pytest.mark.parametrize("rows", [[3], [3, 8]])
def test_a_call_that_failed_may_be_repeated(kind, rows, monkeypatch):
    """Each token fails once after all layers have computed it, and once in the middle."""
    model, ids = tiny_model(kind), tokens(len(rows), LONG)
    expected = decode(model, decoding(model, read(model, rows)), ids)
    state, found = decoding(model, read(model, rows)), []
    for i in range(LONG):
        for place in (model.model.layers[1], model.model.norm):
            monkeypatch.setattr(place, "forward", _failing)
            with pytest.raises(RuntimeError, match="fails"):
                decode(model, state, tokens(len(rows), 1, seed=i))
            monkeypatch.undo()
        found.append(decode(model, state, ids[:, i : i + 1]))
    assert torch.equal(torch.cat(found, 1), expected)


def _failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("it fails")


# ------------------------------------------------------------------------------------------------ other calls


@each_kind
def test_other_calls_leave_the_buffers(kind):
    """Several tokens, padding, gradients, a frozen or a bypassed memory: as without buffers."""
    model, ids = tiny_model(kind), tokens(2, 5)

    def frozen(state: TitansState) -> Tensor:
        state.frozen = True
        return decode(model, state, ids)

    def bypassed(state: TitansState) -> Tensor:
        with bypass_memory(model):
            return decode(model, state, ids)

    def padded(state: TitansState) -> Tensor:
        return decode(model, state, ids[:, :1], attention_mask=torch.tensor([[0], [1]]))[1:]

    def gradients(state: TitansState) -> Tensor:
        logits = model(ids[:, :1], past_key_values=state).logits
        return torch.autograd.grad(logits.sum(), model.model.layers[0].mlp.up_proj.weight)[0]

    calls = [lambda state: model(ids, past_key_values=state).logits, frozen, bypassed, padded, gradients]
    for call in calls:
        expected, state = read(model, [3, 5]), decoding(model, read(model, [3, 5]))
        decode(model, expected, ids[:, :2])
        decode(model, state, ids[:, :2])
        assert_close(call(state), call(expected), kind)
        assert_alike(state, expected)


@pytest.mark.parametrize("kind", BUFFERED)
def test_a_model_of_another_dtype_goes_on(kind):
    """Buffers are those of the dtype at hand: a token is in them also when they were made in another."""
    ids, found = tokens(2, LONG), []
    for begin in (decoding, lambda _, state: state):
        model = tiny_model(kind, torch.float32)
        state = begin(model, read(model, [3, 5]))
        decode(model, state, ids[:, :2])
        found.append(decode(model.double(), state, ids[:, 2:]).float())
    assert_close(*found, kind)


@pytest.mark.parametrize("kind", BUFFERED)
@pytest.mark.parametrize("rows", [[3, 5], [4] * 9])
def test_buffers_of_inference_mode_are_written_outside_of_it(kind, rows):
    """Few rows are decoded in compiled code, many are not."""
    model, ids = tiny_model(kind), tokens(len(rows), LONG)
    expected, state = read(model, rows), read(model, rows)
    with torch.inference_mode():
        model.begin_decoding(state)
        first = decode(model, state, ids[:, :3])
    found = [first, decode(model, state, ids[:, 3:6])]
    with torch.inference_mode():
        found.append(decode(model, state, ids[:, 6:]))
    assert_close(torch.cat(found, 1), decode(model, expected, ids), kind)


@pytest.mark.parametrize("kind", TITANS)
def test_a_memory_that_was_frozen_or_bypassed_is_written_again(kind):
    """Rows whose memory has written nothing may share its tensors."""
    model, ids = tiny_model(kind), tokens(2, LONG)
    for how in ("frozen", "bypassed"):
        found = []
        for begin in (decoding, lambda _, state: state):
            state = model.initial_state(2)
            state.frozen = how == "frozen"
            with torch.no_grad(), bypass_memory(model if how == "bypassed" else torch.nn.Identity()):
                model(tokens(2, 6, seed=1), past_key_values=state)
            state.frozen = False
            found.append(decode(model, begin(model, state), ids))
        assert_close(*found, how)


def test_nothing_begins_before_the_first_token_or_for_a_frozen_memory():
    model = tiny_model("lmm")
    for rows in ([0, 3], [3, 3]):
        state = read(model, rows)
        state.frozen = rows[0] > 0
        model.begin_decoding(state)
        assert not state.is_decoding


@pytest.mark.parametrize("kind", TITANS)
def test_the_surprise_is_that_without_buffers(kind):
    model, ids = tiny_model(kind), tokens(2, 3)
    expected, state = read(model, [3, 5]), decoding(model, read(model, [3, 5]))
    with torch.no_grad():
        pairs = [model(ids[:, :1], past_key_values=s, output_surprise=True).surprise for s in (state, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        assert_close(ours.loss, theirs.loss, "loss")
        assert_close(ours.gradient_norm, theirs.gradient_norm, "norm")
        assert_close(ours.theta, theirs.theta, "theta")


# ------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("kind", BUFFERED)
def test_generate_decodes_in_buffers_and_returns_a_value(kind, monkeypatch):
    model, seen = tiny_model(kind), []
    given, forward = read(model, [3]), model.model.norm.forward
    state, noted = given.continuation(), given.clone()
    shared = state.shallow_copy()
    monkeypatch.setattr(model.model.norm, "forward", lambda x: seen.append(state.is_decoding) or forward(x))
    model.generate(tokens(1, 2), past_key_values=state, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert seen == [False, *[True] * 5]
    assert not state.is_decoding
    assert int(state.position) == 3 + 2 + 5
    for held in (given, shared):
        held.columns = noted.columns
        assert_bitwise(held, noted)


def test_a_state_is_a_value_also_after_a_generation_that_failed():
    model = tiny_model("mag")
    state = read(model, [3])
    state.columns, states = 0, []

    class Stops:
        def put(self, _: Tensor) -> None:
            states.append(state.is_decoding)
            if len(states) == 4:
                raise RuntimeError("no paper left")

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="no paper"):
        model.generate(tokens(1, 2), past_key_values=state, streamer=Stops(), max_new_tokens=9, pad_token_id=0)
    assert states == [False, False, True, True]
    assert not state.is_decoding
    assert int(state.position) == 3 + 2 + 2
    assert set(state_tensors(state)) == set(state_tensors(read(model, [3])))
