"""`NeuralMemory` is the paper's memory, and works as a layer of its own on any embeddings."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import memory_layer
from definition import Memory
from titans_lm.layers.neural_memory import NeuralMemory, NeuralMemoryState
from titans_lm.ops import MemoryForm, initial_state, memory_scan, retrieve
from tolerance import assert_close, relative_error

D, HEADS, CHUNK = 12, 2, 3

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth 1": {"layers": 1},
    "depth 3, plain": {"layers": 3, "form": "plain", "clip": None},
    "plain matrix": {"layers": 1, "form": "plain", "clip": None},
    "chunk 1": {"chunk_size": 1},
    "chunk longer than the text": {"chunk_size": 64},
    "no momentum": {"momentum": False},
    "no forgetting": {"forgetting": False},
    "gates of a chunk": {"gates_of": "chunk"},
    "no convolution": {"conv_size": 1},
    "zero, plain": {"init": "zero", "form": "plain"},
    "zero": {"init": "zero"},
    "gelu, wide heads": {"activation": "gelu", "head_dim": 10},
    "surprise_threshold": {"surprise_threshold": 12.0},
    "threshold on a prediction": {"surprise_threshold": 18.0, "surprise_threshold_on": "prediction"},
}
each_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def layer(**options: Any) -> NeuralMemory:
    return memory_layer(D, HEADS, **{"chunk_size": CHUNK, **options})


def inputs(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(state: NeuralMemoryState) -> list[Tensor]:
    more = [x for x in (state.prev_input, state.gates) if x is not None]
    return [*itertools.chain(*state.memory[:3]), state.memory.position, *more, *state.conv_state]


def by_definition(memory: NeuralMemory, x: Tensor) -> tuple[Tensor, list[Memory]]:
    streams = [Memory(memory) for _ in x]
    y = [torch.stack([stream.write_and_read(t) for t in row]) for stream, row in zip(streams, x, strict=True)]
    return torch.stack(y), streams


@each_form
def test_the_layer_is_the_paper_token_by_token(options):
    memory, x = layer(**options), inputs(2, 10)
    y, state = memory(x)
    expected, streams = by_definition(memory, x)
    assert_close(y, expected)
    for depth, weights in enumerate(state.memory.weights):
        assert_close(weights, torch.stack([torch.stack([w[depth] for w in s.weights]) for s in streams]))
    for depth, momentum in enumerate(state.memory.momentum):
        assert_close(momentum, torch.stack([torch.stack([w[depth] for w in s.momentum]) for s in streams]))


@each_form
def test_gradients_are_those_of_the_paper_token_by_token(options):
    memory, x = layer(**options), inputs(2, 8).requires_grad_()
    weight = inputs(2, 8, seed=2)
    wanted = [x, *memory.parameters()]
    actual = torch.autograd.grad((memory(x)[0] * weight).sum(), wanted, allow_unused=True)
    y, streams = by_definition(memory, x)
    errors = [error for stream in streams for error in stream.errors]
    total = (y * weight).sum() + (sum(errors) / len(errors) if errors else 0.0)
    expected = torch.autograd.grad(total, wanted, allow_unused=True)
    for name, a, e in zip(["x", *dict(memory.named_parameters())], actual, expected, strict=True):
        assert a is not None, name
        assert e is not None, name
        assert e.abs().sum() > 0, name
        assert_close(a, e, name)


@each_form
def test_every_form_computes_something_else(options):
    if options:
        assert relative_error(layer(**options)(inputs(1, 10))[0], layer()(inputs(1, 10))[0]) > 1e-3


states_of_all_kinds = pytest.mark.parametrize(
    "options", [{}, {"surprise_threshold": 18.0, "surprise_threshold_on": "prediction"}, {"gates_of": "chunk"}]
)


@states_of_all_kinds
@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.data(), st.integers(0, 14))
def test_any_cut_into_calls_is_one_call(options, data, length):
    memory, x = layer(**options), inputs(2, length)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    whole, whole_state = memory(x)
    parts, state = [], None
    for a, b in itertools.pairwise([0, *cuts, length]):
        y, state = memory(x[:, a:b], state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)
    for a, b in zip(leaves(state), leaves(whole_state), strict=True):
        assert_close(a, b)


@states_of_all_kinds
@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=14), st.integers(0, 5))
def test_padding_anywhere_leaves_no_trace(options, pattern, earlier):
    memory, mask = layer(**options), torch.tensor(pattern).T
    with torch.no_grad():
        _, state = memory(inputs(2, earlier, seed=3))
        y, after, surprise = memory(inputs(2, len(pattern)), state, mask, surprise=True)
        for row in range(2):
            own = NeuralMemoryState(
                type(state.memory)(*(tuple(t[row : row + 1] for t in part) for part in state.memory[:3]),
                                   state.memory.position[row : row + 1]),
                tuple(t[row : row + 1] for t in state.conv_state),
                *(None if x is None else x[row : row + 1] for x in (state.prev_input, state.gates)),
            )  # fmt: skip
            alone, alone_after, alone_surprise = memory(
                inputs(2, len(pattern))[row : row + 1, mask[row]], own, surprise=True
            )
            assert_close(y[row, mask[row]], alone[0])
            for part, expected in zip(surprise, alone_surprise, strict=True):
                assert_close(part[row, mask[row]], expected[0])
            for a, b in zip(leaves(after), leaves(alone_after), strict=True):
                assert_close(a[row], b[0])
    for padded in (y, *surprise):
        assert (padded[~mask] == 0).all()


@states_of_all_kinds
@pytest.mark.parametrize(("place", "frozen"), [("left", False), ("right", False), ("right", True)])
def test_padding_may_be_nan(options, place, frozen):
    memory, mask = layer(**options), torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    mask = mask if place == "right" else mask.flip(1)

    def read(junk: float) -> list[Tensor]:
        x = inputs(2, 7).masked_fill(~mask[..., None], junk).requires_grad_()
        state = memory.initial_state(2)
        y, after = memory(x, state, mask, update=not frozen)
        y = y[mask]
        return [y, *leaves(after), *torch.autograd.grad(y.sum(), [x, *memory.parameters()], materialize_grads=True)]

    for actual, expected in zip(read(math.nan), read(0.5), strict=True):
        assert_close(actual, expected)


def test_no_output_moves_with_a_later_input():
    memory, x = layer(), inputs(1, 12).requires_grad_()
    y, _ = memory(x)
    for t in range(12):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert gradient[0, t].abs().sum() > 0


def test_retrieve_reads_what_was_written_and_writes_nothing():
    memory, x = layer(), inputs(1, 9)
    stream = Memory(memory)
    for t in x[0, :7]:
        stream.write_and_read(t)
    _, state = memory(x[:, :7])
    before = [t.clone() for t in leaves(state)]
    expected = torch.stack([stream.read(t, stream.weights, stream.past[0]) for t in x[0, 7:]])
    assert_close(memory.retrieve(x[:, 7:], state)[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), before, strict=True))


def test_a_predictor_learns_what_comes_next_and_then_nothing_is_written():
    """A stream that repeats is no news to a linear map; where it changes, is."""
    torch.manual_seed(0)
    memory = NeuralMemory(
        D, HEADS, chunk_size=4, memory_dim=8, surprise_threshold=1.0, surprise_threshold_on="prediction"
    )
    pattern = torch.randn(5, D)
    x = pattern.repeat(12, 1)[None]
    optimizer = torch.optim.Adam(memory.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        memory(x)[0].square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        error = memory.predictor(x, torch.zeros(1, D))
        assert error[0, 0] > 1
        assert (error[0, 1:] < 1).all()
        _, state = memory(x)
        _, kept = memory(x, NeuralMemoryState(state.memory, state.conv_state, x[:, -1]))
        for s, before in zip(kept.memory.momentum, state.memory.momentum, strict=True):
            assert s.norm() < before.norm()  # it only decays
        changed = x.clone()
        changed[:, 30] = 3.0
        assert (memory.predictor(changed, torch.zeros(1, D))[0, 30:32] > 1).all()


def test_a_frozen_memory_is_read_while_the_stream_goes_on():
    memory, x = layer(gates_of="chunk"), inputs(2, 12)
    _, state = memory(x[:, :5])
    y, frozen = memory(x[:, 5:9], state, update=False)
    assert_close(y, memory.retrieve(x[:, 5:9], state))
    for a, b in zip(leaves(state)[:-3], leaves(frozen)[:-3], strict=True):
        assert torch.equal(a, b)
    _, read = memory(x[:, :9])
    for a, b in zip(frozen.conv_state, read.conv_state, strict=True):
        assert_close(a, b)
    assert_close(memory.retrieve(x[:, 9:], frozen), memory(x[:, 9:], frozen, update=False)[0])


def test_surprise_is_the_error_before_the_write_and_the_norm_of_its_gradient():
    memory = layer(chunk_size=1, clip=None)
    x = inputs(1, 6)
    _, _, surprise = memory(x, surprise=True)
    stream = Memory(memory)
    for t, token in enumerate(x[0]):
        probe = Memory(memory)
        probe.past = {which: list(past) for which, past in stream.past.items()}
        k, v = probe._unit(probe._project(token, 1, probe.past[1])), probe._project(token, 2, probe.past[2])
        probe.anchor = stream.weights
        for h in range(HEADS):
            loss = (probe._finish(h, k[h], probe._mlp(k[h], stream.weights[h])) - v[h]).square().sum()
            assert_close(surprise.loss[0, t, h], loss)
            norm = torch.cat([g.flatten() for g in probe._gradient(h, k[h], v[h])]).norm()
            assert_close(surprise.gradient_norm[0, t, h], norm)
        stream.write_and_read(token)


def test_the_theta_of_a_surprise_is_the_step_that_was_taken():
    """0 for a token that is not written, whatever decides that."""
    x, mask = inputs(2, 13), torch.ones(2, 13, dtype=torch.bool)
    mask[1, 5:8] = False
    plain = layer()
    step = plain.lr * torch.sigmoid(plain.theta(x))
    assert_close(plain(x, surprise=True)[2].theta, step)
    assert_close(plain(x, None, mask, surprise=True)[2].theta, step * mask[..., None])
    of_chunks = layer(gates_of="chunk", chunk_size=4)
    step = of_chunks.lr * torch.sigmoid(of_chunks.theta(x))
    assert_close(of_chunks(x, surprise=True)[2].theta, step[:, [t - t % 4 for t in range(13)]])
    above = plain(x, surprise=True)[2].loss.median()
    writes = layer(surprise_threshold=float(above))
    _, _, surprise = writes(x, surprise=True)
    written = surprise.loss > above
    assert 0 < written.sum() < written.numel()
    assert_close(surprise.theta, writes.lr * torch.sigmoid(writes.theta(x)) * written)
    predicts = layer(surprise_threshold=1.0, surprise_threshold_on="prediction")
    error = predicts.predictor(x, x.new_zeros(2, x.shape[-1]))
    predicts.surprise_threshold = float(error.median())
    step = predicts.lr * torch.sigmoid(predicts.theta(x)) * (error > error.median())[..., None]
    assert 0 < (step > 0).sum() < step.numel()
    assert_close(predicts(x, surprise=True)[2].theta, step)


def test_no_token_at_all_changes_nothing():
    memory = layer()
    _, state = memory(inputs(2, 5))
    y, after, surprise = memory(inputs(2, 0), state, surprise=True)
    assert y.shape == (2, 0, D)
    assert surprise.loss.shape == (2, 0, HEADS)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(after), strict=True))
    assert memory.retrieve(inputs(2, 0), state).shape == (2, 0, D)
    assert memory(inputs(2, 0), state, update=False)[0].shape == (2, 0, D)


def test_a_detached_state_is_the_same_memory_and_no_gradient_crosses_it():
    memory = layer(surprise_threshold=18.0, surprise_threshold_on="prediction", gates_of="chunk")
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 5, D, dtype=torch.float64)
    _, state = memory(x, memory.initial_state(2))
    (y, after), (z, beyond) = memory(more, state), memory(more, state.detach())
    assert_close(z, y)
    assert torch.equal(beyond.memory.position, after.memory.position)
    assert torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(z.square().sum(), x, allow_unused=True) == (None,)


def test_a_state_does_not_grow():
    memory = layer()
    with torch.no_grad():
        sizes = [sum(t.nbytes for t in leaves(memory(inputs(1, length))[1])) for length in (1, 40, 400)]
    assert len(set(sizes)) == 1


def test_a_half_precision_layer_keeps_its_memory_in_float32():
    memory = layer().bfloat16()
    y, state = memory(inputs(2, 9).bfloat16())
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in itertools.chain(*state.memory[:3])} == {torch.float32}
    expected, _ = memory.float()(inputs(2, 9).bfloat16().float())
    assert relative_error(y, expected) < 0.05


def test_autocast_does_not_round_the_memory():
    """Matrix products of the state stay in its own precision, to the last bit."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, HEADS, 8)
    gates, weights = torch.rand(3, 2, 9, HEADS), (torch.randn(HEADS, 8, 6), torch.randn(HEADS, 6, 8))

    def run(length: int) -> list[Tensor]:
        inputs = (x[:, :length] for x in (q, k, v, *gates))
        y, state = memory_scan(*inputs, initial_state(weights, 2), chunk_size=4)
        return [y, *itertools.chain(*state[:3]), retrieve(q, state.weights, MemoryForm())]

    for length in (9, 1):
        expected = run(length)
        with torch.autocast("cpu", torch.bfloat16):
            actual = run(length)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_learned_first_memory_is_each_row_s_own():
    memory, x = layer(), inputs(2, 6)
    state = memory.initial_state(2)
    changed = state._replace(memory=state.memory._replace(weights=tuple(w * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
                                                                        for w in state.memory.weights)))  # fmt: skip
    y, y_changed = memory(x, state)[0], memory(x, changed)[0]
    assert torch.equal(y[0], y_changed[0])
    assert relative_error(y_changed[1], y[1]) > 1e-3


def test_a_memory_learns_what_it_reads():
    """A pattern read again surprises less, in every head."""
    memory, x = layer(forgetting=False, lr_start=0.05), inputs(1, 6)
    _, _, surprise = memory(x.repeat(1, 120, 1), surprise=True)
    first, last = surprise.loss[0, 6:12].mean(0), surprise.loss[0, -6:].mean(0)
    assert (last < 0.5 * first).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head_dim": 0}, "head_dim"),
        ({"num_heads": 5}, r"dim=\d+ is not a multiple of num_heads=5"),
        ({"memory_dim": 0}, "memory_dim"),
        ({"layers": 0}, "layers"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": 1.5}, "lr"),
        ({"form": "deep"}, "form"),
        ({"init": "one"}, "init"),
        ({"conv_size": 0}, "conv_size"),
    ],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        NeuralMemory(**{"dim": D, "num_heads": HEADS, **options})


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_do_not_fit_are_refused():
    memory, x = layer(), inputs(2, 5)
    y, state = memory(x)
    for wrong, words in (
        ((x, None, torch.ones(2, 4, dtype=torch.bool)), r"mask must be \[B, T\] = \[2, 5\], .*got \[2, 4\]"),
        ((x, None, torch.ones(2, 5, dtype=torch.long)), r"mask must be .*True at tokens.* of torch.int64"),
        ((x[0],), rf"x must be \[B, T, D\] with D = {D}, got \[5, {D}\]"),
        ((x[..., 1:],), rf"with D = {D}, got \[2, 5, {D - 1}\]"),
        ((x, (y, state)), "the state must be the one that an earlier call returned, got tuple"),
    ):
        with pytest.raises(ValueError, match=words):
            memory(*wrong)
    for wrong, words in (((x[0], state), "x must be"), ((x, (y, state)), "the state must be")):
        with pytest.raises(ValueError, match=words):
            memory.retrieve(*wrong)
