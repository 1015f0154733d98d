"""Every path by which tokens reach a model gives what one plain call gives, in every variant."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache, StoppingCriteria, StoppingCriteriaList

from conftest import KINDS, SEGMENT, VOCABULARY, WINDOW, each_kind, each_titan, state_tensors, tiny_model, tokens
from test_generate import generate, left_padded
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.data import byte_tokenizer
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


# ------------------------------------------------------------------------------------------------ conversations


def assert_has_read(model: TitansForCausalLM, state: TitansState, rows: list[Tensor]) -> None:
    """Each row of the state is as if it had read that row's tokens alone, in one call."""
    assert state.position.tolist() == [len(row) for row in rows]
    for i, row in enumerate(rows):
        alone = state_tensors(model(row[None], use_cache=True).past_key_values)
        for name, tensor in state_tensors(state).items():
            mine, its = tensor[i], alone[name][0]
            if ".attention" in name:  # attention over everything keeps empty slots on the left
                mine = mine[:, mine.shape[1] - its.shape[1] :]
            assert_close(mine, its, name)


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


# ------------------------------------------------------------------------------------------------ packed rows

LENGTHS = (3, 2 * SEGMENT + 2, 1, SEGMENT, 4)
DOCUMENTS = [tokens(1, length, seed=length)[0] for length in LENGTHS]


def flattened(**asked: bool) -> dict[str, Any]:
    """The documents in one row, as transformers' collator has them."""
    features = [{"input_ids": document.tolist()} for document in DOCUMENTS]
    return dict(DataCollatorWithFlattening(return_tensors="pt", **asked)(features))


BORDERS: dict[str, dict[str, bool]] = {
    "position_ids": {},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@each_kind
@pytest.mark.parametrize("borders", BORDERS)
def test_a_packed_document_is_read_as_if_alone(kind, borders):
    """Logits, loss, gradients, surprise, hidden states; the state afterwards is that of the last document."""
    model, batch = tiny_model(kind, memory_loss_weight=0.5), flattened(**BORDERS[borders])
    out = model(**batch, output_surprise=True, output_hidden_states=True, use_cache=True)
    alone = [model(d[None], labels=d[None], output_surprise=True, output_hidden_states=True) for d in DOCUMENTS]
    assert_close(out.logits[0], torch.cat([a.logits[0] for a in alone]))
    for i, hidden in enumerate(out.hidden_states):
        assert_close(hidden[0], torch.cat([a.hidden_states[i][0] for a in alone]))
    for i, layer in enumerate(out.surprise):
        for j, part in enumerate(layer):
            assert_close(part[0], torch.cat([a.surprise[i][j][0] for a in alone]))
    assert_has_read(model, out.past_key_values, [DOCUMENTS[-1]])
    losses = [
        (a.loss - 0.5 * (a.memory_loss or 0)) * (len(d) - 1)
        for a, d in zip(alone, DOCUMENTS, strict=True)
        if len(d) > 1
    ]
    plain = out.loss - 0.5 * (out.memory_loss or 0)
    assert_close(plain.float(), (torch.stack(losses).sum() / (sum(LENGTHS) - len(LENGTHS))).float())
    parameters, weight = list(model.parameters()), torch.randn(sum(LENGTHS), VOCABULARY, dtype=torch.float64)
    ours = torch.autograd.grad((out.logits[0] * weight).sum(), parameters)
    theirs = torch.autograd.grad((torch.cat([a.logits[0] for a in alone]) * weight).sum(), parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert_close(a, b, name)


@each_kind
@torch.no_grad()
def test_packed_rows_of_any_borders_and_padding_go_on_from_a_state(kind):
    """The first document of a row is what the state has begun to read."""
    model, before, ids = tiny_model(kind), tokens(2, 5, seed=1), tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :2] = mask[0, 9] = mask[1, 14:] = 0
    index = torch.tensor([[0] * 6 + [1] * 10, [4] * 3 + [2] * 2 + [7] * 11])
    state = model(before, use_cache=True).past_key_values
    out = model(ids, attention_mask=mask, seq_idx=index, past_key_values=state)
    assert out.past_key_values is state
    assert state.columns == 21
    for row in range(2):
        for number in index[row].unique():
            here = (index[row] == number) & (mask[row] == 1)
            first = number == index[row, 0]
            whole = torch.cat([before[row, : 5 if first else 0], ids[row, here]])
            assert_close(out.logits[row, here], model(whole[None]).logits[0, -int(here.sum()) :])
    assert_has_read(model, state, [ids[0, 6:][mask[0, 6:] == 1], ids[1, 5:14]])
    frozen = model(before, use_cache=True).past_key_values
    frozen.frozen = True
    model(ids, attention_mask=mask, seq_idx=index, past_key_values=frozen)
    for name, tensor in state_tensors(frozen).items():
        if ".memory.memory." in name or ".retrieval.weights" in name:
            assert_close(tensor, state_tensors(model.initial_state(2))[name], name)


@each_titan
@torch.no_grad()
def test_packed_documents_begin_with_the_memory_that_streams_begin_with(kind):
    model, _ = begun(kind)
    batch = flattened()
    packed = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    assert_close(packed, torch.cat([model(document[None]).logits[0] for document in DOCUMENTS]))


@each_kind
@torch.no_grad()
def test_positions_of_a_plain_batch_change_nothing(kind):
    """Of the columns or of the tokens, in a first call and in later ones, also where `generate` passes them on."""
    model, rows = tiny_model(kind), [tokens(1, 9)[0], tokens(1, 5, seed=1)[0]]
    ids, mask = left_padded(rows)
    expected = model(ids, attention_mask=mask, use_cache=True)
    for position in (torch.arange(9)[None], (mask.cumsum(1) - 1).clamp(min=0), torch.arange(9).expand(2, -1) + 4):
        out = model(ids, attention_mask=mask, position_ids=position, use_cache=True)
        assert torch.equal(out.logits, expected.logits)
    new = tokens(2, 3, seed=2)
    later = model(new, past_key_values=expected.past_key_values.clone()).logits
    for position in (torch.arange(9, 12)[None], torch.tensor([[9, 10, 11], [5, 6, 7]])):
        assert torch.equal(
            model(new, past_key_values=expected.past_key_values.clone(), position_ids=position).logits, later
        )
    free = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)), free)


@torch.no_grad()
def test_positions_that_a_memory_cannot_have_are_refused():
    model, ids = tiny_model("mag"), tokens(2, 6)
    state = model(ids, use_cache=True).past_key_values
    for options, words in (
        ({"position_ids": torch.full((2, 6), 3)}, "from 3 to 3 in row 0, column 1"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 3]])}, "from 1 to 3 in row 1, column 5"),
        ({"position_ids": torch.arange(6)}, r"position_ids must be \[B, T\] = \[2, 6\], got \[6\]"),
        ({"position_ids": torch.arange(6)[None], "past_key_values": state}, "begins at 0 in row 0, which has read 6"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx must be"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "one row"),
        ({"max_length_q": 6}, "need cu_seq_lens_q"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3]] * 2)}, "0 or 1, got 2; documents"),
    ):
        with pytest.raises(ValueError, match=words):
            model(ids, **options)
    one, ends = ids[:1], torch.tensor([0, 2, 6])
    for options, words in (
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "from 0 to the row's 6 tokens"),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": torch.tensor([0, 3, 6])}, "cu_seq_lens_k must be"),
        ({"cu_seq_lens_q": ends, "max_length_q": 3}, "max_length_q=3, and a document has 4"),
        ({"cu_seq_lens_q": ends, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])}, "seq_idx and cu_seq_lens_q"),
    ):
        with pytest.raises(ValueError, match=words):
            model(one, **options)
    assert state.position.tolist() == [6, 6]


# ------------------------------------------------------------------------------------------------ arguments


@torch.no_grad()
def test_an_argument_is_obeyed_or_refused():
    model, ids = tiny_model("mag"), tokens(2, 6)
    plain = model(ids).logits
    for nothing in (
        {"output_attentions": False},
        {"token_type_ids": torch.zeros_like(ids)},
        {"cache_position": torch.arange(6)},
        {"is_causal": True},
        {"head_mask": None},
        {"num_items_in_batch": 12},
    ):
        assert torch.equal(model(ids, **nothing).logits, plain), nothing
    for refused, words in (
        ({"output_attentions": True}, "output_attentions=True: .* attention weights"),
        ({"token_type_ids": torch.ones_like(ids)}, "token_type_ids"),
        ({"cache_position": torch.arange(6) + 1}, "cache_position"),
        ({"is_causal": False}, "is_causal=False"),
        ({"head_mask": torch.ones(2, 2)}, "unknown key 'head_mask'"),
        ({"output_suprise": True}, "did you mean 'output_surprise'"),
        ({"shift_labels": ids}, "shift_labels without labels"),
    ):
        with pytest.raises(ValueError, match=words):
            model(ids, **refused)
        if "shift_labels" not in refused:
            with pytest.raises(ValueError, match=words):
                model.model(ids, **refused)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)


@each_kind
@torch.no_grad()
def test_hidden_states_stand_where_their_tokens_stand(kind):
    model, rows = tiny_model(kind), [tokens(1, 9)[0], tokens(1, 5, seed=1)[0]]
    ids, mask = left_padded(rows)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == 3
    for hidden, alone in zip(states, model(rows[1][None], output_hidden_states=True).hidden_states, strict=True):
        assert_close(hidden[1, 4:], alone[0])
    chosen = model(ids, attention_mask=mask, output_hidden_states=[0, -1]).hidden_states
    assert chosen[1] is None
    assert torch.equal(chosen[0], states[0])
    assert torch.equal(chosen[2], states[2])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3


@each_kind
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_token_that_is_not_finite_is_refused_with_its_place(kind, junk):
    model, ids = tiny_model(kind), tokens(2, 6)
    x = model.get_input_embeddings()(ids)
    x[1, 3, 2] = junk
    with pytest.raises(ValueError, match="row 1, column 3 is not finite"):
        model(inputs_embeds=x)
    hidden = torch.ones_like(ids)
    hidden[1, 3] = 0
    assert model(inputs_embeds=x, attention_mask=hidden).logits[hidden == 1].isfinite().all()
    model.get_input_embeddings().weight[ids[0, 4], 0] = junk
    with pytest.raises(ValueError, match=r"row 0, column \d is not finite"):
        model(ids)
    state = model.initial_state(2)
    with pytest.raises(ValueError, match="not finite"):
        model(ids, past_key_values=state)
    assert state.position.tolist() == [0, 0]
