"""How likely what follows is: the numbers of one forward pass, in any pieces and rows, each context read once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import VOCABULARY, each_kind, tiny_model, tokens
from titans_lm import TitansForCausalLM
from titans_lm.evaluate import likelihood
from titans_lm.evaluate.likelihood import Request, scores

pytestmark = pytest.mark.usefixtures("unchecked")  # shapes are checked where these parts are tested


def plainly(model: TitansForCausalLM, request: Request) -> tuple[float, bool]:
    """From one forward pass over all tokens."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        found = model(ids).logits[0, len(request.context) - 1 : -1].log_softmax(-1)
    wanted = ids[0, len(request.context) :]
    return found.gather(-1, wanted[:, None]).sum().item(), bool((found.argmax(-1) == wanted).all())


def greedily(model: TitansForCausalLM, context: list[int], count: int) -> list[int]:
    ids = torch.tensor([context])
    there = torch.ones_like(ids)  # also a token that is elsewhere padding
    out = model.generate(ids, attention_mask=there, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(context) :].tolist()


def requests_of(lengths: list[tuple[int, int, int]]) -> list[Request]:
    """(which context, its length, length of the continuation)."""
    found = []
    for number, (which, before, after) in enumerate(lengths):
        context = tokens(1, before, seed=which)[0].tolist()
        found.append(Request(context, tokens(1, after, seed=100 + number)[0].tolist()))
    return found


RAGGED = [(0, 30, 1), (1, 2, 9), (0, 30, 3), (2, 1, 3), (0, 30, 6), (1, 2, 1), (3, 17, 20)]


@each_kind
def test_scores_are_those_of_a_forward_pass_over_everything(kind, monkeypatch):
    model = tiny_model(kind)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 3 * VOCABULARY)
    wanted = requests_of(RAGGED)
    wanted[2] = Request(wanted[0].context, greedily(model, list(wanted[0].context), 3))
    wanted[3] = Request(wanted[2].context, [*wanted[2].continuation[:2], (wanted[2].continuation[2] + 1) % VOCABULARY])
    found = dict(scores(model, wanted, rows=3, piece=4))
    assert sorted(found) == list(range(len(RAGGED)))
    for number, request in enumerate(wanted):
        total, greedy = plainly(model, request)
        assert found[number].log_probability == pytest.approx(total, rel=1e-9, abs=1e-9), number
        assert found[number].greedy == greedy, number
    assert [found[number].greedy for number in (2, 3)] == [True, False]


lengths = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=5)


@settings(max_examples=6, deadline=None)
@given(lengths, st.integers(1, 4), st.integers(1, 13))
def test_rows_and_pieces_of_any_number_give_the_same(lengths, rows, piece):
    model = tiny_model("mac", num_hidden_layers=1)
    wanted = requests_of(lengths)
    for number, score in scores(model, wanted, rows, piece):
        assert score == pytest.approx(plainly(model, wanted[number]), rel=1e-9, abs=1e-9)


def test_a_context_is_read_once_in_pieces_and_few_logits_exist_at_a_time(monkeypatch):
    model, read, widths, logits = tiny_model("mag", num_hidden_layers=1), [], [], []
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 3 * VOCABULARY + 5)

    def count(_, given, options):
        read.append(int(options["attention_mask"].sum()))
        widths.append(given[0].shape[1])

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda _, __, out: logits.append(len(out)))
    context = tokens(1, 100)[0].tolist()
    list(scores(model, [Request(context, [1] * 20)] * 4 + [Request(context, [4])], rows=2, piece=16))
    assert sum(read) == 99 + 4 * 20 + 1
    assert max(widths) == 16
    assert sum(logits) == 4 * 20 + 1
    assert max(logits) == 3


def test_padding_is_not_read_so_a_declared_limit_is_that_of_the_longest_request():
    model = tiny_model("lmm", num_hidden_layers=1, max_position_embeddings=12)
    wanted = requests_of([(0, 12, 1), (1, 3, 10), (0, 12, 0)])
    assert len(list(scores(model, wanted, rows=3))) == 3
    with pytest.raises(ValueError, match="max_position_embeddings=12"):
        list(scores(model, requests_of([(0, 12, 2)])))


def test_a_context_needs_a_token():
    with pytest.raises(ValueError, match="request 1 has no context"):
        list(scores(tiny_model("lmm"), [Request([1], [2]), Request([], [2])]))
