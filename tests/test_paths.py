"""Every path by which tokens reach a model gives what one plain call gives, in every variant."""

import pytest
import torch

from conftest import KINDS, SEGMENT, WINDOW, each_kind, state_tensors, tiny_model, tokens
from titans_lm import TitansForCausalLM, TitansState
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")
PRESET = 2 * SEGMENT + 3


@torch.no_grad()
def begun(kind: str) -> tuple[TitansForCausalLM, torch.Tensor]:
    """A model whose streams begin with a memory of PRESET tokens, and these."""
    model, ids = tiny_model(kind), tokens(1, PRESET, seed=1)
    model.begin_with(model(ids, use_cache=True).past_key_values)
    return model, ids


@each_kind
@pytest.mark.parametrize("length", [1, SEGMENT - 4, SEGMENT, 2 * SEGMENT + 1])
@torch.no_grad()
def test_a_stream_that_begins_with_a_memory_goes_on_from_it(kind, length):
    model, before = begun(kind)
    ids = tokens(2, length)
    out = model(ids, use_cache=True)
    model.begin_with(None)
    whole = model(torch.cat([before.expand(2, -1), ids], 1), use_cache=True)
    assert_close(out.logits, whole.logits[:, PRESET:])
    assert out.past_key_values.columns == length
    expected = state_tensors(whole.past_key_values)
    for name, tensor in state_tensors(out.past_key_values).items():
        assert_close(tensor, expected[name], name)


@each_kind
@torch.no_grad()
def test_a_stream_that_begins_with_a_memory_does_not_see_its_future(kind):
    model, _ = begun(kind)
    ids = tokens(1, SEGMENT + 2)
    changed = ids.repeat(ids.shape[1], 1)
    changed.diagonal().copy_((ids[0] + 1) % 23)  # row t differs at token t
    moved = (model(changed).logits - model(ids).logits).abs().amax(-1)
    assert moved.tril(-1).max() <= 1e-12
    assert moved.diagonal().min() > 1e-6


@each_kind
@torch.no_grad()
def test_a_row_that_was_reset_begins_with_the_memory_too(kind):
    model, before = begun(kind)
    ids = tokens(3, 2 * WINDOW)
    read = model(ids, use_cache=True)
    state = read.past_key_values
    state.reset([1])
    logits = model(ids, past_key_values=state).logits
    assert state.position.tolist() == [PRESET + 4 * WINDOW, PRESET + 2 * WINDOW, PRESET + 4 * WINDOW]
    assert_close(logits[1], read.logits[1])
    model.begin_with(None)
    whole = model(torch.cat([before.expand(3, -1), ids, ids], 1)).logits[:, -2 * WINDOW :]
    assert_close(logits[0], whole[0])
    assert_close(logits[2], whole[2])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_memory_file_is_not_frozen_by_the_memory_that_streams_begin_with(kind, tmp_path):
    model, _ = begun(kind)
    model.initial_state(1).save(tmp_path / "memory")
    frozen = model.initial_state(1)
    frozen.frozen = True
    model.begin_with(frozen)
    assert model.initial_state(1).frozen
    assert not TitansState.load(tmp_path / "memory", model).frozen
