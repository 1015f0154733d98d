"""After `generate` a memory has read what was said, no more and no less, however it was generated and goes on."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from conftest import VOCABULARY, assert_has_read, each_kind, tiny_model, tokens
from test_generate import generate, left_padded
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.models.tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")


class EndsAt(StoppingCriteria):
    """Each row ends after so many tokens."""

    def __init__(self, *lengths: int):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        return input_ids.shape[1] >= self.lengths


def ending(*lengths: int) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList([EndsAt(*lengths)])}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams sampled": {"num_beams": 2, "do_sample": True},
    "rows that end": ending(14, 12),
    "a row that ends at once": ending(10, 30),
    "rows that say an end": {"eos_token_id": [2, 5, 7, 11, 13, 17]},
    "beams that say an end": {"eos_token_id": [2, 5, 7, 11, 13, 17], "num_beams": 3, "num_return_sequences": 2},
    "one token": {"max_new_tokens": 1},
}


def told(sequences: Tensor, prompts: list[Tensor], width: int, options: dict[str, Any]) -> list[Tensor]:
    """The prompt and the answer of each sequence, up to its end."""
    found = []
    for i, sequence in enumerate(sequences):
        row = i * len(prompts) // len(sequences)
        answer = sequence[width:].tolist()
        ends = [n + 1 for n, token in enumerate(answer) if token in options.get("eos_token_id", [])]
        if "stopping_criteria" in options:
            ends.append(max(int(options["stopping_criteria"][0].lengths[row]) - width, 1))
        found.append(torch.cat([prompts[row], sequence[width : width + min([*ends, len(answer)])]]))
    return found


def assert_has_pending(model: TitansForCausalLM, state: TitansState, rows: list[Tensor], full: list[int]) -> None:
    """The state has read these rows, but for the last token of those that did not end before the others."""
    last = [len(row) == length for row, length in zip(rows, full, strict=True)]
    assert state.pending.tolist() == [int(row[-1]) if p else -1 for row, p in zip(rows, last, strict=True)]
    assert_has_read(model, state, [row[:-1] if p else row for row, p in zip(rows, last, strict=True)])


@each_kind
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_after_generate_the_memory_has_read_what_was_generated(kind, way):
    """All but the pending tokens, and no padding; then these too, however it goes on."""
    model, rows = tiny_model(kind), [tokens(1, 9)[0], tokens(1, 5, seed=1)[0]]
    padded, mask = left_padded(rows)
    options = {"attention_mask": mask, "max_new_tokens": 6, "return_dict_in_generate": True, **WAYS[way]}
    out = generate(model, padded, **options)
    state, count = out.past_key_values, len(out.sequences)
    whole = told(out.sequences, rows, 9, options)
    assert_has_pending(
        model, state, whole, [len(rows[i * 2 // count]) + out.sequences.shape[1] - 9 for i in range(count)]
    )
    new = tokens(count, 3, seed=2)
    chained = state.continuation()
    model(new, past_key_values=chained)
    assert chained.columns == 3
    assert_has_read(model, chained, [torch.cat([r, n]) for r, n in zip(whole, new, strict=True)])
    saved = state.clone()
    model.read_pending(saved)
    assert saved.pending is None
    assert_has_read(model, saved, whole)


@each_kind
@pytest.mark.parametrize("way", ["greedy", "sampled", "beams returned", "rows that end"])
def test_a_state_of_one_row_a_prompt_is_enough(kind, way):
    """Whatever `generate` needs a row for, and it is the given state that has read the answers."""
    model, ids = tiny_model(kind), tokens(2, 14)
    options = {"return_dict_in_generate": True, **WAYS[way]}
    expected = generate(model, ids, **options)
    with torch.no_grad():
        state = model(ids[:, :5], use_cache=True).past_key_values
    fork = state.continuation()
    out = generate(model, ids[:, 5:], past_key_values=fork, **options)
    if way != "rows that end":  # which counts columns
        assert torch.equal(out.sequences[:, 9:], expected.sequences[:, 14:])
    assert out.past_key_values is fork
    whole = told(out.sequences, list(ids), 9, options)
    assert_has_pending(model, fork, whole, [out.sequences.shape[1] + 5] * len(whole))
    assert state.position.tolist() == [5, 5]


@each_kind
@torch.no_grad()
def test_a_conversation_of_many_turns_is_one_reading(kind):
    model, talk, state = tiny_model(kind), torch.zeros(1, 0, dtype=torch.long), tiny_model(kind).initial_state(1)
    for turn in range(3):
        said = tokens(1, 4, seed=turn)
        state = state.continuation()
        out = generate(model, said, past_key_values=state, max_new_tokens=5)
        assert torch.equal(out[:, 4:], generate(model, torch.cat([talk, said], 1), max_new_tokens=5)[:, -5:])
        talk = torch.cat([talk, out], 1)
    model.read_pending(state)
    assert_has_read(model, state, list(talk))


@torch.no_grad()
def test_a_pending_token_cannot_be_lost(tmp_path):
    model, ids = tiny_model("mag"), tokens(2, 9)
    out = generate(model, ids, return_dict_in_generate=True)
    state, last = out.past_key_values, out.sequences[:, -1:]
    other = (last + 1) % VOCABULARY
    with pytest.raises(ValueError, match=r"has not read the last tokens generated.*read_pending"):
        model(other, past_key_values=state)
    with pytest.raises(ValueError, match="has not read the last tokens"):
        model(torch.stack([last[0], other[1]]), past_key_values=state)
    with pytest.raises(ValueError, match="has not read the last tokens"):
        model(inputs_embeds=model.get_input_embeddings()(other), past_key_values=state)
    state.save(tmp_path / "memory")
    for fork in (TitansState.load(tmp_path / "memory", model), state.clone(), state.select([0, 1]), state.detach()):
        assert torch.equal(fork.pending, last[:, 0])
        model(torch.cat([last, other], 1), past_key_values=fork)  # as transformers has it
        assert fork.pending is None or (fork.pending < 0).all()
        assert_has_read(model, fork, list(torch.cat([out.sequences, other], 1)))
    half = state.clone()
    half.reset([1])
    assert half.pending.tolist() == [int(last[0]), -1]
    waiting = state.clone()
    model(last, attention_mask=torch.tensor([[0], [1]]), past_key_values=waiting)
    assert waiting.pending.tolist() == [int(last[0]), -1]
    model.begin_with(state.select([0]))
    begun = model(other[:1], use_cache=True).past_key_values
    model.begin_with(None)
    assert_has_read(model, begun, [torch.cat([out.sequences[0], other[0]])])


@torch.no_grad()
def test_generate_may_stop_at_a_text():
    """transformers passes the tokenizer, which only `generate` needs, on to the model."""
    model, tokenizer = tiny_model("mag", vocab_size=260), byte_tokenizer()
    ids = torch.tensor([tokenizer("It was")["input_ids"]])
    out = generate(model, ids, stop_strings=["It"], tokenizer=tokenizer, return_dict_in_generate=True)
    assert out.past_key_values.position.item() == out.sequences.shape[1] - 1


@torch.no_grad()
def test_what_generate_cannot_do_with_a_memory_is_refused():
    model, ids = tiny_model("mag"), tokens(2, 9)
    state = model(ids[:, :4], use_cache=True).past_key_values
    for options, words in (
        ({"use_cache": False, "past_key_values": state}, "use_cache=False"),
        ({"past_key_values": DynamicCache()}, "TitansState.*DynamicCache"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"past_key_values": state, "num_beams": 2, "output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(model, ids, **options)
    for short in (ids[:, :3], ids[:, :4]):
        with pytest.raises(ValueError, match=r"has read 4: pass .*continuation"):
            generate(model, short, past_key_values=state)
    assert state.position.tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"TitansState.*DynamicCache"):
        model(ids, past_key_values=DynamicCache())
