"""`generate` with a memory gives what the model gives that reads everything again at each token."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import SEGMENT, each_kind, each_titan, tiny_model, tokens
from titans_lm import TitansForCausalLM, TitansState

NEW = 8
pytestmark = pytest.mark.usefixtures("unchecked")  # checked shapes cost half the time here, and are checked elsewhere


def generate(model: TitansForCausalLM, ids: Tensor | None, seed: int = 0, **options: Any) -> Tensor:
    """`model.generate`, which without a mask would take every token 0 for padding."""
    torch.manual_seed(seed)
    mask = torch.ones((options["inputs_embeds"] if ids is None else ids).shape[:2], dtype=torch.long)
    defaults = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**defaults, **options})


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens and mask."""
    size = max(len(row) for row in rows)
    mask = torch.stack([F.pad(torch.ones_like(row), (size - len(row), 0)) for row in rows])
    return torch.stack([F.pad(row, (size - len(row), 0)) for row in rows]), mask


def greedy(model: TitansForCausalLM, ids: Tensor, new: int = NEW) -> Tensor:
    """Without `generate` and without a state: the model reads everything again."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@each_kind
@pytest.mark.parametrize("length", [1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 1])
def test_greedy_is_the_most_likely_token_after_reading_everything(kind, length):
    model, ids = tiny_model(kind), tokens(2, length)
    assert torch.equal(generate(model, ids), greedy(model, ids))


@each_kind
@pytest.mark.parametrize("returned", [1, 3])
def test_sampling_with_a_state_is_sampling_without(kind, returned):
    model, ids = tiny_model(kind), tokens(2, 2 * SEGMENT + 1)
    options = {"do_sample": True, "num_return_sequences": returned}
    cached = generate(model, ids, **options)
    assert cached.shape == (2 * returned, ids.shape[1] + NEW)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(cached, generate(model, ids, seed=1, **options))


@each_kind
def test_beams_with_a_state_are_beams_without(kind):
    model, rows = tiny_model(kind), tokens(3, SEGMENT + 1)
    for ids, mask in ((rows, torch.ones_like(rows)), left_padded([rows[0, :1], rows[1, :5], rows[2]])):
        options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
        assert torch.equal(generate(model, ids, **options), generate(model, ids, **options, use_cache=False))


@each_kind
def test_beams_are_wrong_when_the_memory_does_not_follow_them(kind, monkeypatch):
    """The test above is of use only if beams change places."""
    model, ids = tiny_model(kind), tokens(3, SEGMENT + 1)
    right = generate(model, ids, num_beams=3, num_return_sequences=2)
    monkeypatch.setattr(TitansState, "reorder_cache", lambda self, beam_idx: None)  # noqa: ARG005
    assert not torch.equal(generate(model, ids, num_beams=3, num_return_sequences=2), right)


@each_kind
def test_rows_of_a_left_padded_batch_go_on_as_alone(kind):
    rows = [row[:length] for row, length in zip(tokens(3, 15), (1, 8, 15), strict=True)]
    model = tiny_model(kind)
    padded, mask = left_padded(rows)
    out = generate(model, padded, attention_mask=mask)
    for row, generated in zip(rows, out, strict=True):
        assert torch.equal(generated[-NEW:], greedy(model, row[None])[0, -NEW:])


@each_kind
def test_a_row_that_ended_does_not_disturb_the_others(kind):
    model, ids = tiny_model(kind), tokens(2, SEGMENT + 1)
    free = greedy(model, ids)
    end = int(free[0, SEGMENT + 4])
    out = generate(model, ids, eos_token_id=end)
    for row in range(2):
        ended = (free[row, SEGMENT + 1 :] == end).nonzero()
        count = int(ended[0]) + 1 if len(ended) else NEW
        kept = out[row, SEGMENT + 1 :]
        assert torch.equal(kept[:count], free[row, SEGMENT + 1 : SEGMENT + 1 + count])
        assert (kept[count:] == 0).all()


def state_after(model: TitansForCausalLM, **inputs: Tensor) -> TitansState:
    with torch.no_grad():
        return model(**inputs, use_cache=True).past_key_values


@each_kind
@pytest.mark.parametrize(("read", "fresh"), [(1, 1), (SEGMENT, 5), (2 * SEGMENT + 3, 1)])
def test_generation_goes_on_from_a_state(kind, read, fresh):
    model, ids = tiny_model(kind), tokens(2, read + fresh)
    expected = greedy(model, ids)
    state = state_after(model, input_ids=ids[:, :read])
    own = state.continuation()
    assert torch.equal(generate(model, ids[:, read:], past_key_values=own)[:, fresh:], expected[:, read + fresh :])
    assert torch.equal(generate(model, ids, past_key_values=state.clone()), expected)
    assert state.position.tolist() == [read, read]


@each_titan
def test_beams_go_on_from_a_state_with_a_row_for_each(kind):
    model, ids = tiny_model(kind), tokens(2, SEGMENT + 3)
    state = state_after(model, input_ids=ids[:, :SEGMENT])
    state.batch_repeat_interleave(3)
    beams = generate(model, ids, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, num_beams=3, past_key_values=state), beams)


@each_kind
def test_ragged_rows_go_on_from_a_state(kind):
    model, ids = tiny_model(kind), tokens(2, 30)
    (first, first_mask), (second, second_mask) = (
        left_padded(rows) for rows in ([ids[0, :3], ids[1, :9]], [ids[0, 3:11], ids[1, 9:11]])
    )
    state = state_after(model, input_ids=first, attention_mask=first_mask)
    both, mask = torch.cat([first, second], 1), torch.cat([first_mask, second_mask], 1)
    whole = generate(model, both, attention_mask=mask, past_key_values=state.clone())
    new = generate(model, second, attention_mask=second_mask, past_key_values=state.continuation())
    for row in range(2):
        expected = greedy(model, ids[row : row + 1, :11])[0, -NEW:]
        assert torch.equal(whole[row, -NEW:], expected)
        assert torch.equal(new[row, -NEW:], expected)


@each_kind
def test_generated_text_is_remembered(kind):
    """The state that `generate` returns has read all but the last token, and goes on from there."""
    model, ids = tiny_model(kind), tokens(2, SEGMENT + 2)
    out = generate(model, ids, return_dict_in_generate=True)
    state = out.past_key_values
    assert isinstance(state, TitansState)
    assert state.position.tolist() == [SEGMENT + 1 + NEW] * 2
    assert torch.equal(generate(model, out.sequences, past_key_values=state), greedy(model, ids, 2 * NEW))


@each_titan
def test_a_prompt_may_be_read_in_pieces(kind):
    model, ids = tiny_model(kind), tokens(2, 3 * SEGMENT + 1)
    with torch.no_grad():
        state = model.initial_state(2)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4, past_key_values=state), greedy(model, ids))


@each_kind
def test_generation_from_embeddings(kind):
    model, ids = tiny_model(kind), tokens(2, SEGMENT + 2)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    out = generate(model, None, inputs_embeds=embeddings)
    assert torch.equal(out, greedy(model, ids)[:, SEGMENT + 2 :])


def test_assisted_decoding_is_refused():
    """It would have to unread tokens."""
    model = tiny_model("mag")
    with pytest.raises(ValueError, match="stateful"):
        generate(model, tokens(1, 5), prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="unread"):
        model.initial_state(1).crop(1)
