"""Continuous batching: whatever joins, waits or leaves meanwhile, each answer is the one that a request has alone."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conftest import KINDS, assert_bitwise, each_kind, tiny_model
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.inference.serve.answer import Answer, Sampling
from titans_lm.inference.serve.batch import RowBatch, growing_layers, last_logits
from titans_lm.inference.serve.engine import Engine
from titans_lm.inference.serve.limits import Limits
from titans_lm.inference.serve.prefill import prefill_pieces
from titans_lm.inference.serve.worker import Worker
from titans_lm.models.block_cache import cache_slots
from titans_lm.models.cache_card import Source
from titans_lm.models.tokenizer import byte_tokenizer
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")

BYTES = 260
TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def no_call_fails(request, caplog) -> Iterator[None]:
    """A call for several rows that fails is computed row by row: the answers would be right all the same."""
    yield
    failing = (
        test_an_error_ends_one_answer_alone,
        test_a_server_refuses_a_memory_that_cannot_join_and_answers_the_others,
        test_an_error_between_calls_ends_the_answers_and_not_the_server,
        test_a_call_for_several_prompts_that_fails_at_its_end_leaves_the_states,
    )
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert bool(said) == (request.function in failing)
    assert all("failed" in message for message in said)


def read(model: TitansForCausalLM, tokens: int) -> TitansState:
    """A memory that has read this many tokens."""
    state = model.initial_state(1)
    if tokens:
        with torch.no_grad():
            model(torch.arange(tokens)[None] * 7 % 256, past_key_values=state)
    return state


class Noted(Answer):
    """An answer that keeps the logits that its tokens were drawn from."""

    def take(self, logits: Tensor, read: int) -> str:
        if self.read + read >= len(self.ids):
            self.__dict__.setdefault("logits", []).append(logits)
        return super().take(logits, read)


class Request(NamedTuple):
    """A request of a schedule: the step before which it comes, and the one before which it leaves (None: it stays)."""

    prompt: Tensor
    memory: TitansState
    sampling: Sampling
    comes: int
    leaves: int | None

    def answer(self) -> Noted:
        return Noted(self.prompt, self.memory.shallow_copy(), self.sampling, TOKENIZER, frozenset([3]))


def schedule(model: TitansForCausalLM, seed: int, requests: int = 7) -> list[Request]:
    """Requests that come and leave at any time, with memories at different positions and other sampling parameters."""
    draw = random.Random(seed)
    memories = [read(model, tokens) for tokens in (0, 4, 9)]
    found = []
    for i in range(requests):
        sampling = Sampling(
            draw.randint(1, 14), draw.choice([0.0, 0.0, 0.9, 1.4]), draw.choice([1.0, 0.8]), seed=i,
            stop=draw.choice([(), ("a",)]),
        )  # fmt: skip
        comes = draw.randint(0, 12)
        leaves = comes + draw.randint(1, 6) if draw.random() < 0.3 else None
        prompt = torch.tensor([draw.randrange(256) for _ in range(draw.choice([1, 2, 5, 30]))])
        found.append(Request(prompt, draw.choice(memories), sampling, comes, leaves))
    return found


class Outcome(NamedTuple):
    text: str
    tokens: list[int]
    reason: str | None
    logits: list[Tensor]

    def check(self, expected: "Outcome", complete: bool = True) -> None:
        """The same tokens from the same logits; if not `complete`, the first of them."""
        if complete:
            assert self[:3] == expected[:3]
        assert expected.tokens[: len(self.tokens)] == self.tokens
        assert expected.text.startswith(self.text)
        for mine, other in zip(self.logits, expected.logits, strict=complete):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def alone(model: TitansForCausalLM, request: Request) -> Outcome:
    """The answer by the model itself, without an engine."""
    answer, text = request.answer(), ""
    with torch.no_grad():
        while answer.finish_reason is None:
            ids = answer.next_ids(512)
            text += answer.take(model(ids[None], past_key_values=answer.state).logits[0, -1], len(ids))
    return Outcome(text, answer.tokens, answer.finish_reason, answer.logits)


def together(engine: Engine, requests: list[Request], steps: int = 400) -> list[Outcome]:
    """The outcomes of a schedule. A request that leaves has what it had until then."""
    answers, texts = [request.answer() for request in requests], [""] * len(requests)
    places = {id(answer): i for i, answer in enumerate(answers)}
    for step in range(steps):
        for answer, request in zip(answers, requests, strict=True):
            if request.comes == step:
                engine.add(answer)
        engine.discard([a for a, r in zip(answers, requests, strict=True) if r.leaves == step])
        for answer, result in engine.step():
            assert isinstance(result, str), result
            texts[places[id(answer)]] += result
    assert not engine.answers()
    logits = [vars(a).get("logits", []) for a in answers]
    return [Outcome(t, a.tokens, a.finish_reason, x) for t, a, x in zip(texts, answers, logits, strict=True)]


# ------------------------------------------------------------------------------------------------ the law


@each_kind
@pytest.mark.parametrize(("seed", "rows", "piece"), [(0, 3, 11), (1, 8, 64), (2, 2, 3)])
def test_answers_are_those_of_single_requests(kind: str, seed: int, rows: int, piece: int):
    model = tiny_model(kind, vocab_size=BYTES)
    requests = schedule(model, seed)
    found = together(Engine(model, rows, piece), requests, steps=150)
    for request, outcome in zip(requests, found, strict=True):
        outcome.check(alone(model, request), complete=request.leaves is None)
    assert sum(len(outcome.tokens) for outcome in found) > 20
    assert len({tuple(outcome.tokens) for outcome in found}) > 3


def test_schedules_are_of_every_kind():
    """Or the law would hold of nothing: requests that wait, that leave, that stop, that are sampled."""
    requests = [r for seed in range(3) for r in schedule(tiny_model("mag", vocab_size=BYTES), seed)]
    assert {r.leaves is None for r in requests} == {True, False}
    assert {r.sampling.temperature > 0 for r in requests} == {True, False}
    assert {int(r.memory.position) for r in requests} == {0, 4, 9}
    assert max(len(r.prompt) for r in requests) == 30


@pytest.mark.parametrize("kind", ["mac", "mag"])
def test_other_forms_of_the_memory_too(kind: str):
    """What a state holds beside weights: the gates of a chunk, the last input of a predictor."""
    changes: dict[str, Any] = {
        "memory_gates_of": "chunk", "surprise_threshold": 0.5, "surprise_threshold_on": "prediction",
    }  # fmt: skip
    model = tiny_model(kind, vocab_size=BYTES, **changes)
    requests = [r._replace(leaves=None) for r in schedule(model, 3, requests=5)]
    for request, outcome in zip(requests, together(Engine(model, 3, 11), requests, steps=100), strict=True):
        outcome.check(alone(model, request))


def test_frozen_memories_are_read_together_and_not_with_others():
    model = tiny_model("mag", vocab_size=BYTES)
    requests = [r._replace(leaves=None) for r in schedule(model, 4, requests=4)]
    learning = [alone(model, r) for r in requests]
    for state in {id(r.memory): r.memory for r in requests}.values():
        state.frozen = True
    frozen = [alone(model, r) for r in requests]
    engine = Engine(model, 3, 11)
    for outcome, expected in zip(together(engine, requests, steps=100), frozen, strict=True):
        outcome.check(expected)
    assert [outcome.tokens for outcome in frozen] != [outcome.tokens for outcome in learning]
    engine.add(requests[0].answer())
    with pytest.raises(ValueError, match="frozen=False"):
        engine.add(requests[0]._replace(memory=read(model, 4)).answer())


# ------------------------------------------------------------------------------------------------ rows


def test_a_server_refuses_a_memory_that_cannot_join_and_answers_the_others():
    model = tiny_model("mag", vocab_size=BYTES)
    learning, frozen = (request(model, 5, most=4).answer() for _ in range(2))
    frozen.state.frozen = True
    worker, said = Worker(model, Limits()), {"learning": [], "frozen": []}
    for name, answer in (("learning", learning), ("frozen", frozen)):
        worker.submit(answer, said[name].append, stream=False)
    while worker.jobs:
        worker.turn()
    (refused,) = said["frozen"]
    assert refused.refused.status == 500
    assert "frozen=True" in str(refused.refused)
    assert said["learning"][-1].refused is None
    assert len(learning.tokens) == 4


def test_an_error_between_calls_ends_the_answers_and_not_the_server(monkeypatch):
    model = tiny_model("mag", vocab_size=BYTES)
    worker, said = Worker(model, Limits()), list[Any]()
    monkeypatch.setattr(model, "begin_decoding", lambda _: (_ for _ in ()).throw(RuntimeError("no memory for a row")))
    worker.submit(request(model, 5).answer(), said.append, stream=False)
    while worker.jobs:
        worker.turn()
    monkeypatch.undo()
    assert "no memory for a row" in str(said[-1].refused)
    later, expected = request(model, 5, most=4), alone(model, request(model, 5, most=4))
    answer = later.answer()
    worker.submit(answer, said.append, stream=False)
    while worker.jobs:
        worker.turn()
    assert said[-1].refused is None
    assert answer.tokens == expected.tokens


def request(model: TitansForCausalLM, tokens: int, most: int = 50) -> Request:
    return Request(torch.full((tokens,), 97), read(model, 4), Sampling(most, 0.0), 0, None)


def test_waiting_is_first_come_first_served_and_rows_are_bounded():
    engine = Engine(model := tiny_model("lmm", vocab_size=BYTES), max_batch_size=2)
    answers = [Answer(torch.tensor([97]), read(model, 2), Sampling(4, 0.0), TOKENIZER) for _ in range(5)]
    for answer in answers:
        engine.add(answer)
    begun: list[int] = []
    while engine.answers():
        assert len(engine.step()) <= 2
        begun += [i for i, answer in enumerate(answers) if answer.count and i not in begun]
        assert len(engine.decoding.answers) + len(engine.reading) <= 2
    assert begun == list(range(5))
    assert engine.decoding.state is None


def test_a_long_prompt_holds_up_neither_tokens_nor_short_prompts():
    engine = Engine(model := tiny_model("lmm", vocab_size=BYTES), prefill_chunk_size=8)
    writing, long, short = (request(model, tokens).answer() for tokens in (1, 400, 6))
    seen = []
    for new in (writing, long, short, None, None):
        if new is not None:
            engine.add(new)
        engine.step()
        seen.append((writing.count, long.read, short.count))
    assert seen == [(1, 0, 0), (2, 8, 0), (3, 16, 0), (4, 18, 1), (5, 26, 2)]


def test_prompts_take_turns():
    """Whatever comes after a long prompt, that one is read on, and whatever is read, others are too."""
    engine = Engine(model := tiny_model("lmm", vocab_size=BYTES), prefill_chunk_size=128)
    answers = [request(model, 400).answer() for _ in range(3)]
    for answer in answers:
        engine.add(answer)
    seen = []
    for _ in range(3):
        engine.step()
        seen.append(tuple(answer.read for answer in answers))
    assert seen == [(64, 64, 0), (128, 64, 64), (128, 128, 128)]


def test_calls_are_shared(monkeypatch):
    """One call for all tokens of a step, one for pieces of prompts whose lengths are similar."""
    engine = Engine(model := tiny_model("lmm", vocab_size=BYTES))
    *first, last = (request(model, tokens).answer() for tokens in (3, 5, 5, 2))
    widths: list[tuple[int, int]] = []
    monkeypatch.setattr(model, "forward", _noting(model.forward, widths))
    for answer in first:
        engine.add(answer)
    engine.step()
    engine.add(last)
    engine.step()
    assert widths == [(3, 5), (3, 1), (1, 2)]
    for tokens in (40, 4, 19, 41, 3, 10):
        engine.add(request(model, tokens).answer())
    widths.clear()  # of the memories of the requests
    engine.step()
    assert widths == [(4, 1), (2, 4), (2, 19), (2, 41)], "at most half of a row is padding"


@each_kind
def test_prompts_read_in_one_call_are_read_as_alone(kind: str):
    """Into states that are new, at different positions, and of unlike columns and texts; each its own afterwards."""
    model = tiny_model(kind, vocab_size=BYTES)
    grows = growing_layers(model)
    states = [read(model, tokens) for tokens in (0, 9, 4, 0, 6)]
    states[1].sources = [Source("a book", 9, "a" * 64, "learning")]
    for length in (8, 1):
        pieces = [torch.arange(10 + i, 10 + i + n) for i, n in enumerate((length, length, 1 + length // 2, 3, 21))]
        expected = [state.clone() for state in states]
        logits = [last_logits(model, ids[None], state)[0] for ids, state in zip(pieces, expected, strict=True)]
        for mine, other in zip(prefill_pieces(model, pieces, states, grows), logits, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
        for mine, other in zip(states, expected, strict=True):
            assert (mine.columns, mine.sources, mine.positions()) == (other.columns, other.sources, other.positions())
            assert mine.tensors().keys() == other.tensors().keys()
            for name, tensor in other.tensors().items():
                assert_close(mine.tensors()[name], tensor, name)


def test_a_long_context_that_grows_is_not_the_padding_of_short_ones(monkeypatch):
    for kind, expected in (("full", [(2, 4), (1, 4)]), ("window", [(3, 4)])):
        model = tiny_model(kind, vocab_size=BYTES)
        states, widths = [read(model, tokens) for tokens in (60, 0, 1)], []
        monkeypatch.setattr(model, "forward", _noting(model.forward, widths))
        prefill_pieces(model, [torch.arange(4)] * 3, states, growing_layers(model))
        assert widths == expected


def test_a_call_for_several_prompts_that_fails_at_its_end_leaves_the_states(monkeypatch):
    model = tiny_model("mag", vocab_size=BYTES)
    states, pieces = [read(model, tokens) for tokens in (4, 9)], [torch.arange(5), torch.arange(6)]
    expected = [state.clone() for state in states]
    logits = [last_logits(model, ids[None], state)[0] for ids, state in zip(pieces, expected, strict=True)]
    select, selected = TitansState.select, []

    def failing(self: TitansState, rows: list[int]) -> TitansState:
        selected.append(rows)
        if len(selected) == 2:
            raise RuntimeError("no memory for a second row")
        return select(self, rows)

    monkeypatch.setattr(TitansState, "select", failing)
    for mine, other in zip(prefill_pieces(model, pieces, states, growing_layers(model)), logits, strict=True):
        assert torch.equal(mine, other)
    assert selected == [[0], [1]]
    for mine, other in zip(states, expected, strict=True):
        assert_bitwise(mine, other)


def test_a_state_that_has_pending_tokens_reads_them_before_its_piece():
    model = tiny_model("mag", vocab_size=BYTES)
    states = [read(model, 4) for _ in range(3)]
    states = [state.continuation() for state in states]
    model.generate(torch.tensor([[5]]), past_key_values=states[1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    states[1].columns = 0
    pieces = [torch.tensor([7, 8, 9])] * 3
    expected = [last_logits(model, ids[None], s.clone())[0] for ids, s in zip(pieces, states, strict=True)]
    for mine, other in zip(prefill_pieces(model, pieces, states, growing_layers(model)), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    assert [state.positions() for state in states] == [[7], [11], [7]]


def _noting(forward: Any, widths: list[tuple[int, int]]) -> Any:
    def noting(ids: Tensor, **options: Any) -> Any:
        widths.append((len(ids), ids.shape[1]))
        return forward(ids, **options)

    return noting


def test_an_error_ends_one_answer_alone(monkeypatch):
    """Of its prompt's call, of the call for a token of all rows, or of the logits of a row."""
    model = tiny_model("mag", vocab_size=BYTES)
    requests = [request(model, tokens, most=6) for tokens in (1, 2, 3)]
    expected = [alone(model, r) for r in requests]
    forward = model.forward

    def failing(ids: Tensor, **options: Any) -> Any:
        if bool((ids == 200).any()):
            raise RuntimeError("200 cannot be read")
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", failing)
    engine = Engine(model)
    bad = Answer(torch.tensor([97, 200]), read(model, 4), Sampling(5), TOKENIZER)
    nan = Answer(torch.tensor([97, 98]), read(model, 4), Sampling(5), TOKENIZER)
    monkeypatch.setattr(nan, "_draw", lambda _: (_ for _ in ()).throw(ValueError("not finite")))
    late = Answer(torch.tensor([97, 99]), read(model, 4), Sampling(5), TOKENIZER)
    monkeypatch.setattr(late, "_draw", lambda _: 200)
    answers = [r.answer() for r in requests]
    for answer in (answers[0], bad, answers[1], late, nan, answers[2]):
        engine.add(answer)
    errors = []
    while engine.answers():
        errors += [(answer, str(result)) for answer, result in engine.step() if isinstance(result, Exception)]
    assert errors == [(bad, "200 cannot be read"), (nan, "not finite"), (late, "200 cannot be read")]
    assert [a.tokens for a in answers] == [outcome.tokens for outcome in expected]


def test_memories_of_requests_stay_as_they_were():
    model = tiny_model("mag", vocab_size=BYTES)
    memory = read(model, 9)
    before = memory.clone()
    engine = Engine(model)
    for tokens in (1, 5):
        engine.add(request(model, tokens, most=5)._replace(memory=memory).answer())
    while engine.answers():
        engine.step()
    assert_bitwise(memory, before)


def test_a_row_that_has_left_takes_its_space_with_it():
    """Keys and values of unlimited attention are as long as those of the longest row."""
    model = tiny_model("full", vocab_size=BYTES)
    rows = RowBatch(model)
    answers = [request(model, 1).answer() for _ in range(3)]
    rows.join(answers, [read(model, tokens) for tokens in (5, 40, 9)])

    def slots() -> int:
        assert rows.state is not None
        return cache_slots(rows.state.layer_caches[0])

    assert slots() == 40
    rows.leave([answers[1]])
    assert slots() == 9
    rows.leave([answers[2]])
    assert slots() == 5
    for kind in KINDS.keys() - {"full"}:  # a window keeps its slots, whatever its rows have read
        model = tiny_model(kind, vocab_size=BYTES)
        rows = RowBatch(model)
        rows.join(answers, [read(model, tokens) for tokens in (1, 40, 2)])
        assert rows.state is not None
        before = cache_slots(rows.state.layer_caches[0])
        rows.leave([answers[1]])
        assert slots() == before


def test_sizes_are_checked():
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least 1, got"):
            Engine(tiny_model("lmm", vocab_size=BYTES), *sizes)
