"""What a call of the model is given is obeyed, or refused by name: packed rows, positions, and every other keyword."""

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from conftest import (
    SEGMENT,
    TITANS,
    VOCABULARY,
    assert_has_read,
    each_kind,
    each_titan,
    state_tensors,
    tiny_model,
    tokens,
)
from test_generate import generate, left_padded
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")

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
    weights = {"loss": 0.5, "theta": 0.3}
    model = tiny_model(kind, **{f"memory_{name}_weight": weight for name, weight in weights.items()}).train()
    batch = flattened(**BORDERS[borders])
    out = model(**batch, output_surprise=True, output_hidden_states=True, use_cache=True)
    alone = [model(d[None], labels=d[None], output_surprise=True, output_hidden_states=True) for d in DOCUMENTS]
    assert_close(out.logits[0], torch.cat([a.logits[0] for a in alone]))
    for i, hidden in enumerate(out.hidden_states):
        assert_close(hidden[0], torch.cat([a.hidden_states[i][0] for a in alone]))
    for i, layer in enumerate(out.surprise):
        for j, part in enumerate(layer):
            assert_close(part[0], torch.cat([a.surprise[i][j][0] for a in alone]))
    assert_has_read(model, out.past_key_values, [DOCUMENTS[-1]])
    assert (out.memory_loss is not None) == (out.memory_theta is not None) == (kind in TITANS)

    def of_next_token(out):
        return out.loss - sum(weight * (out.get(f"memory_{name}") or 0) for name, weight in weights.items())

    losses = [of_next_token(a) * (len(d) - 1) for a, d in zip(alone, DOCUMENTS, strict=True) if len(d) > 1]
    for name in [f"memory_{name}" for name in weights if f"memory_{name}" in out]:
        own = torch.stack([a[name] * (len(d) - 1) for a, d in zip(alone, DOCUMENTS, strict=True)])
        assert_close(out[name].float(), (own.sum() / (sum(LENGTHS) - len(LENGTHS))).float())
    plain = of_next_token(out)
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
    first = model.initial_state(2)
    first.frozen = True
    model(ids, past_key_values=first)  # begins with the first memory, and does not write to it
    for name, tensor in state_tensors(frozen).items():
        if ".memory.memory." in name or ".retrieval.weights" in name:
            assert_close(tensor, state_tensors(first)[name], name)


@each_titan
@torch.no_grad()
def test_packed_documents_begin_with_the_memory_that_streams_begin_with(kind):
    model = tiny_model(kind)
    model.begin_with(model(tokens(1, 17, seed=1), use_cache=True).past_key_values)
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
        ({"attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3]] * 2)}, "0 or 1, got 2; separate the documents"),
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
    for part in (model, model.model):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \[6\]"):
            part(ids[0])
        with pytest.raises(ValueError, match=r"inputs_embeds must be \[B, T, D\], got \[6, "):
            part(inputs_embeds=model.get_input_embeddings()(ids[0]))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)


@pytest.mark.parametrize("kind", ["mac", "mag", "window", "full"])
def test_eager_attention_is_written_out_and_gives_the_same(kind, monkeypatch):
    """attn_implementation="eager" means that no fused kernel runs."""
    model, ids = tiny_model(kind), tokens(2, 2 * SEGMENT + 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    fused = [model(ids).logits, model(ids, attention_mask=mask).logits]
    model.set_attn_implementation("eager")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    for options, expected in zip(({}, {"attention_mask": mask}), fused, strict=True):
        assert_close(model(ids, **options).logits, expected)


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
    first = model(ids, attention_mask=mask, output_hidden_states=0).hidden_states
    assert torch.equal(first[0], states[0])
    assert first[1:] == (None, None)
    for outside in (3, [0, -4]):
        with pytest.raises(ValueError, match=r"output_hidden_states=(3|-4): there are 3"):
            model(ids, output_hidden_states=outside)
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
