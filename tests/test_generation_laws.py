"""What transformers' generation tests (`GenerationTesterMixin`) ask of every model, stated for a memory.

They are not in the source distribution, and copy nothing here. By their names:

greedy_generate, sample_generate, beam_search_generate, left_padding_compatibility,
generate_continue_from_past_key_values: `test_generate.py`
*_dict_output(s), *_use_cache, beam_sample_generate, generate_without_input_ids, generate_from_(random_)inputs_embeds,
generate_continue_from_inputs_embeds, generate_methods_with_logits_to_keep, inherits_generation_mixin: here
assisted_decoding_*, prompt_lookup_decoding_*: refused, a memory cannot unread what it read of a draft
past_key_values_format, generate_with_static_cache, *_quant_cache: a memory is no list of keys and values by layer
generate_compile_*, generate_compilation_*: only a static cache is compiled
*_padding_matches_padding_free_*: packed rows have tests of their own
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

from conftest import SEGMENT, VOCABULARY, each_titan, tiny_model, tokens
from test_generate import NEW, generate, greedy
from titans_lm import TitansForCausalLM, TitansModel, TitansState
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")

LENGTH = SEGMENT + 2
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
}
ASKED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}

each_mode = pytest.mark.parametrize("mode", MODES)


def test_only_the_language_model_generates():
    assert issubclass(TitansForCausalLM, GenerationMixin)
    assert TitansForCausalLM.can_generate()
    assert not TitansModel.can_generate()


@each_titan
@each_mode
def test_all_that_can_be_asked_for_is_given(kind, mode):
    """One entry for each new token: scores and logits of each row or beam, hidden states of each layer and before."""
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    out = generate(model, ids, **ASKED, **MODES[mode])
    beams = MODES[mode].get("num_beams", 1)
    assert torch.equal(out.sequences, generate(model, ids, **MODES[mode]))
    assert out.sequences.shape == (2 * MODES[mode].get("num_return_sequences", 1), LENGTH + NEW)
    for scores in (out.scores, out.logits):
        assert [tuple(s.shape) for s in scores] == [(2 * beams, VOCABULARY)] * NEW
    assert len(out.hidden_states) == NEW
    for number, layers in enumerate(out.hidden_states):
        width = LENGTH if number == 0 else 1
        assert [tuple(h.shape) for h in layers] == [(2 * beams, width, model.config.hidden_size)] * 3
    assert isinstance(out.past_key_values, TitansState)
    assert out.past_key_values.batch_size == len(out.sequences)


@each_titan
def test_logits_given_are_those_of_a_call(kind):
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    out = generate(model, ids, **ASKED)
    with torch.no_grad():
        whole = model(out.sequences, output_hidden_states=True)
    assert_close(torch.stack(out.logits, 1), whole.logits[:, LENGTH - 1 : -1])
    for layer, hidden in enumerate(whole.hidden_states):
        given = torch.cat([layers[layer] for layers in out.hidden_states], 1)
        assert_close(given, hidden[:, :-1], f"layer {layer}")


@each_titan
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@torch.no_grad()
def test_a_prompt_read_in_pieces_needs_no_state(kind, mode):
    """From the memory that streams begin with, too."""
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    model.begin_with(model(ids[:1], use_cache=True).past_key_values)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4, **MODES[mode]), generate(model, ids, **MODES[mode]))


@each_titan
@each_mode
def test_a_cache_and_the_logits_kept_change_no_token(kind, mode):
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    expected = generate(model, ids, **MODES[mode])
    assert torch.equal(generate(model, ids, use_cache=False, **MODES[mode]), expected)
    assert torch.equal(generate(model, ids, logits_to_keep=0, **MODES[mode]), expected)


@each_titan
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_embeddings_generate_what_their_tokens_do(kind, mode):
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    embeddings = model.get_input_embeddings()(ids).detach()
    options = {**MODES[mode], "inputs_embeds": embeddings}
    expected = generate(model, ids, **MODES[mode])
    assert torch.equal(generate(model, None, **options), expected[:, LENGTH:])
    assert torch.equal(generate(model, ids, **options), expected)
    assert not torch.equal(generate(model, None, **{**options, "inputs_embeds": -embeddings}), expected[:, LENGTH:])


@each_titan
def test_generation_from_embeddings_goes_on(kind):
    """What it returned reads on: embeddings of the prompt, and the tokens that were made."""
    model, ids = tiny_model(kind), tokens(2, LENGTH)
    embed = model.get_input_embeddings()
    first = generate(model, None, inputs_embeds=embed(ids).detach(), return_dict_in_generate=True)
    both = torch.cat([ids, first.sequences], 1)
    again = generate(model, None, inputs_embeds=embed(both).detach(), past_key_values=first.past_key_values)
    assert torch.equal(again, greedy(model, ids, 2 * NEW)[:, LENGTH + NEW :])


@each_titan
def test_generation_begins_with_nothing(kind):
    model = tiny_model(kind)
    begin: Tensor = torch.full((1, 1), 3)
    assert torch.equal(model.generate(bos_token_id=3, max_new_tokens=NEW, do_sample=False), greedy(model, begin))


def test_drafts_are_refused():
    model = tiny_model("mac")
    for options in ({"assistant_model": tiny_model("mac", seed=1)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="stateful"):
            generate(model, tokens(1, LENGTH), **options)


@each_titan
@torch.no_grad()
def test_a_model_in_another_dtype_begins_with_its_memory(kind):
    model, ids = tiny_model(kind), tokens(1, LENGTH)
    state = model(ids, use_cache=True).past_key_values
    model.begin_with(state)
    expected = model(ids).logits
    assert_close(model.to(torch.float32)(ids).logits, expected.float())
