"""Where retrievals and predictions come from, and what is still held: against sums that are known, and deletion."""

import numpy as np
import pytest
import torch

from conftest import each_titan, tiny_model, tokens
from titans_lm import load
from titans_lm.analyze.attribution import EXACT, FIRST_ORDER, log_probability, prediction_sources, retrieval_sources
from titans_lm.analyze.probe import probe
from titans_lm.cli.demo.needle import hide, task_for
from titans_lm.models.hub import find
from titans_lm.models.tokenizer import encode

LINEAR = {"memory_layers": 1, "memory_form": "plain", "memory_clip": None}


@each_titan
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_shares_in_a_linear_memory_are_all_of_a_retrieval(kind, clip):
    model = tiny_model(kind, **{**LINEAR, "memory_clip": clip})
    with torch.no_grad():
        state = model(tokens(1, 10, seed=2), use_cache=True).past_key_values  # in the middle of a chunk
    for begin in (None, state):
        found = retrieval_sources(model, tokens(1, 23), 22, begin)
        assert found.method == EXACT
        assert found.shares.shape == (23, 2, 2)
        assert found.shares.sum(0) + found.start == pytest.approx(np.ones((2, 2)), abs=1e-4)
    assert retrieval_sources(tiny_model(kind), tokens(1, 23), 22).method == FIRST_ORDER


@each_titan
def test_autocast_does_not_round_the_shares(kind):
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieval_sources(tiny_model(kind, torch.float32, **LINEAR), tokens(1, 23), 22)
    assert found.shares.sum(0) + found.start == pytest.approx(np.ones((2, 2)), abs=1e-4)


def test_a_share_is_what_a_write_adds_to_a_retrieval():
    """One chunk, no forgetting: M is the start and a sum of writes, so leaving one out leaves out its share."""
    model = tiny_model("lmm", num_hidden_layers=1, memory_chunk_size=64, memory_momentum=False, **LINEAR)
    ids, seen = tokens(1, 20), []
    memory = model.model.blocks()[0].memory
    with torch.no_grad():
        memory.alpha.bias.fill_(-60)
        memory.alpha.weight.zero_()
    hook = memory.output_norm.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0][0, -1]))
    found = retrieval_sources(model, ids, 19)
    whole = seen[-1]
    for t in (4, 11):
        log_probability(model, torch.cat([ids[0], ids[0, :1]]), 20, [t])
        part = ((whole - seen[-1]) * whole).sum(-1) / whole.square().sum(-1)
        assert found.shares[t, 0] == pytest.approx(part.numpy(), abs=1e-5)
    hook.remove()


@each_titan
def test_the_share_in_a_prediction_is_the_derivative_by_the_write(kind):
    model, ids = tiny_model(kind), tokens(1, 20)[0]
    (found, last) = prediction_sources(model, ids, [12, 19])
    assert found.shares.shape == (12, 2, 2)
    assert last.method == FIRST_ORDER
    for t in (3, 10):
        step = 1e-5
        changed = [_weakened(model, ids, 12, t, factor) for factor in (1 + step, 1 - step)]
        assert found.total()[t] == pytest.approx((changed[0] - changed[1]) / (2 * step), rel=1e-2, abs=1e-6)
    assert log_probability(model, ids, 12) == pytest.approx(_weakened(model, ids, 12, 3, 1.0), abs=1e-6)
    assert log_probability(model, ids, 12, [3]) == pytest.approx(_weakened(model, ids, 12, 3, 0.0), abs=1e-6)


def _weakened(model, ids, token, t, factor):
    """The log-probability of a token where token t's step is `factor` times what it is."""
    handles = []
    for block in model.model.blocks():
        memory, place = block.memory, [0]

        def gates(x, memory=memory, place=place, original=block.memory._gates):
            theta, eta, alpha = original(x)
            if place[0] is not None and memory.called:
                at = t - place[0]
                if 0 <= at < x.shape[1]:
                    theta = (
                        theta.index_fill(1, torch.tensor([at]), 0)
                        + torch.nn.functional.one_hot(torch.tensor(at), x.shape[1])[None, :, None] * theta * factor
                    )
                place[0] += x.shape[1]
            return theta, eta, alpha

        def begin(memory, _inputs, options):
            memory.called = "surprise" in options if options.get("method") else getattr(memory, "called", False)

        memory._gates = gates
        handles.append(memory.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        with torch.no_grad():
            logits = model(ids[None, :token]).logits[0, -1]
        return float(torch.log_softmax(logits, -1)[ids[token]])
    finally:
        for handle in handles:
            handle.remove()
        for block in model.model.blocks():
            del block.memory._gates


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deleting_the_top_source_of_an_answer_matters_and_another_does_not(seed):
    folder = find("needle")
    model, tokenizer = load(folder)
    hidden = hide(task_for(folder, 600, "words", 40.0), seed)
    ids = torch.cat([hidden.ids[0], torch.from_numpy(encode(tokenizer, hidden.value))])
    token = len(ids) - 1
    (found,) = prediction_sources(model, ids, [token])
    whole, random = log_probability(model, ids, token), np.random.default_rng(seed)
    (top, _), *_ = found.top(1)
    assert hidden.start - 2 <= top <= hidden.start + hidden.length + 2
    written = np.flatnonzero(found.total())
    others = random.choice(written[np.abs(written - top) > hidden.length], 3, replace=False).tolist()
    changes = [abs(log_probability(model, ids, token, [t]) - whole) for t in others]
    assert abs(log_probability(model, ids, token, [top]) - whole) > 3 * max(changes)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_shares_is_refused(model):
    for arguments, words in (
        ((prediction_sources, model, [1, 2, 3], [0]), "not its first"),
        ((prediction_sources, tiny_model("mag", memory_gates_of="chunk"), [1, 2], [1]), "chunk"),
        ((prediction_sources, model, [1] * 20_000, [19_000]), "up to token 16,384"),
        ((retrieval_sources, model, [1, 2], 2), "0 to 1"),
        ((probe, model, [1, 2, 3], (2, 9)), "within the 3 tokens"),
    ):
        function, *rest = arguments
        with pytest.raises(ValueError, match=words):
            function(*rest)


@each_titan
def test_a_passage_is_held_after_it_is_read(kind):
    model = tiny_model(kind, memory_lr=0.9)
    ids = tokens(1, 60)
    found = probe(model, ids, (20, 26), piece=10)
    assert found.read.tolist() == [20, 26, 36, 46, 56, 60]
    assert found.error.shape == (6, 6, 2, 2)
    assert found.rank.shape == (6, 2, 2)
    assert found.rank.min() >= 1
    assert found.rank.max() <= found.candidates == 60
    assert (probe(model, ids[:, :1], (0, 1)).rank == 1).all()  # there is no other value
    start = probe(model, ids, (0, 60), piece=10)
    assert start.read.tolist() == [0, 60]
    late = probe(model, ids[:, :26], (20, 26))
    assert found.error[:2] == pytest.approx(late.error, rel=1e-4)


def test_half_lives_and_ranks_are_those_of_numbers_that_are_known():
    from titans_lm.analyze.probe import Probe

    error = np.array([1.0, 0.2, 0.4, 0.8, 0.9], np.float32)[:, None, None, None]
    found = Probe((5, 6), np.array([5, 6, 16, 26, 36]), error, np.ones((1, 1, 1), np.int64), 9)
    assert found.half_life()[0, 0] == pytest.approx(10 + 10 * 0.5)  # 0.8 was gained; 0.6 after 10, 0.2 after 20
    assert Probe((5, 6), found.read[:3], error[:3], found.rank, 9).half_life()[0, 0] == np.inf
    assert np.isnan(Probe((5, 6), found.read, 1 - error, found.rank, 9).half_life()[0, 0])
