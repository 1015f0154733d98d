"""Attention in windows and segments is softmax attention with the mask that its definition says."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Made, tiny_model, tokens
from definition import attend, window_mask, windowed
from titans_lm.layers.attention import SegmentAttention, WindowAttention, rotary_embedding
from tolerance import assert_close

D, HEADS, WIDTH, BASE = 12, 2, 4, 10000.0


def random_layer(kind: type[nn.Module], window: int | None) -> nn.Module:
    torch.manual_seed(0)
    return kind(D, HEADS, WIDTH, window).double()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turns(position: Tensor, length: int):
    return rotary_embedding(position[:, None] + torch.arange(length), WIDTH, BASE)


def in_calls(layer: nn.Module, prefix: Tensor, rows: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
    """Read `rows` of inputs `[T, D]` in calls; in call n row r has its next `counts[n][r]` tokens, then padding."""
    state, read = layer.initial_state(len(rows), rows[0]), [0] * len(rows)
    outputs: list[list[Tensor]] = [[] for _ in rows]
    for call in counts:
        x = torch.stack(
            [
                torch.cat([row[at : at + n], torch.full((max(call) - n, D), 7.0, dtype=row.dtype)])
                for row, at, n in zip(rows, read, call, strict=True)
            ]
        )
        present = None if min(call) == max(call) else torch.arange(max(call)) < torch.tensor(call)[:, None]
        position = torch.tensor(read)
        at = read[0] if present is None and len(set(read)) == 1 else None
        y, state = layer(x, prefix, state, position, turns(position, max(call)), present, at)
        for row, n in enumerate(call):
            outputs[row].append(y[row, :n])
            read[row] += n
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("window", [1, 2, 5, None])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("at", [0, None])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 11, 17])
def test_a_window_is_a_band_and_persistent_tokens_are_always_visible(window, persistent, length, at):
    layer, prefix, x = random_layer(WindowAttention, window), random(persistent, D), random(2, length, D, seed=2)
    start = torch.zeros(2, dtype=torch.long)
    y, _ = layer(x, prefix[None], layer.initial_state(2, x), start, turns(start, length), None, at)
    assert_close(y, torch.stack([windowed(layer, prefix, row) for row in x]))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from([1, 2, 5, None]), st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=1, max_size=6))
def test_a_window_is_the_same_in_calls_of_any_lengths(window, counts):
    layer, prefix = random_layer(WindowAttention, window), random(2, D)
    rows = [random(sum(n), D, seed=3 + r) for r, n in enumerate(zip(*counts, strict=True))]
    for y, row in zip(in_calls(layer, prefix[None], rows, [list(n) for n in counts]), rows, strict=True):
        if len(row):
            assert_close(y, windowed(layer, prefix, row))


def segment(layer: nn.Module, prefix: Tensor, x: Tensor, h: Tensor, start: int) -> Tensor:
    """Token i of a segment sees P, h_j and S_j for j <= i; only S has positions."""
    position, causal = start + torch.arange(len(x)), window_mask(len(x), None)
    everything = torch.ones(len(x), len(prefix), dtype=torch.bool)
    return attend(layer, x, position, [(prefix, None, everything), (h, None, causal), (x, position, causal)])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("persistent", [0, 3])
@pytest.mark.parametrize("cuts", [(7,), (3, 4), (1,) * 7, (6, 1), (5,)])
def test_a_segment_sees_persistent_tokens_and_what_is_retrieved_for_no_later_token(persistent, cuts, alike):
    layer, prefix, length, start = random_layer(SegmentAttention, 7), random(persistent, D), sum(cuts), 14
    x, h = random(length, D, seed=2), random(length, D, seed=3)
    state, outputs = layer.initial_state(1, x), []
    for a, b in itertools.pairwise(itertools.accumulate(cuts, initial=0)):
        position = torch.tensor([a])
        y, state = layer(
            x[None, a:b], h[None, a:b], prefix[None], state, position, turns(position + start, b - a), None,
            a if alike else None,
        )  # fmt: skip
        outputs.append(y[0])
    assert_close(torch.cat(outputs), segment(layer, prefix, x, h, start))
    kept = torch.stack([*state.keys, *state.values])
    assert (kept[..., sum(cuts) % 7 :, :] == 0).all()  # no token, or a segment that has ended
    assert (kept[..., : sum(cuts) % 7, :] != 0).all()


def test_a_new_segment_does_not_see_the_last():
    layer, prefix, x, h = random_layer(SegmentAttention, 7), random(2, D), random(2, 14, D), random(2, 14, D, seed=2)
    state, zero = layer.initial_state(2, x), torch.zeros(2, dtype=torch.long)
    _, state = layer(x[:, :7], h[:, :7], prefix[None], state, zero, turns(zero, 7), None)
    y, _ = layer(x[:, 7:], h[:, 7:], prefix[None], state, zero, turns(zero + 7, 7), None)
    assert_close(y, torch.stack([segment(layer, prefix, x[r, 7:], h[r, 7:], 7) for r in range(2)]))


def test_rows_of_a_segment_stand_at_their_own_positions():
    layer, prefix, x, h = random_layer(SegmentAttention, 7), random(2, D), random(2, 6, D), random(2, 6, D, seed=2)
    first, rest = torch.tensor([2, 5]), torch.tensor([4, 1])

    def call(tokens_: list[Tensor], retrieved: list[Tensor], state, position: Tensor, count: Tensor):
        padded = [nn.utils.rnn.pad_sequence(parts, True, 7.0) for parts in (tokens_, retrieved)]
        present = torch.arange(int(count.max())) < count[:, None]
        return layer(*padded, prefix[None], state, position, turns(position, int(count.max())), present)

    zero = torch.zeros(2, dtype=torch.long)
    y1, state = call([x[0, :2], x[1, :5]], [h[0, :2], h[1, :5]], layer.initial_state(2, x), zero, first)
    y2, _ = call([x[0, 2:], x[1, 5:]], [h[0, 2:], h[1, 5:]], state, first, rest)
    for row in range(2):
        y = torch.cat([y1[row, : first[row]], y2[row, : rest[row]]])
        assert_close(y, segment(layer, prefix, x[row], h[row], 0))


def test_rotary_positions_are_exact_at_the_ten_millionth_token():
    """cos of an angle taken in float32 would be off by a tenth."""
    turn = rotary_embedding(torch.tensor([[10_000_019]]), WIDTH, BASE)
    angle = torch.tensor(10_000_019, dtype=torch.float64) * BASE ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert_close(turn.cos[0, 0].double(), angle.cos())
    assert_close(turn.sin[0, 0].double(), angle.sin())


@pytest.mark.parametrize("kind", ["mac", "mag", "mal", "window"])
def test_no_tensor_grows_with_the_square_of_the_length(kind):
    length = 4096
    model = tiny_model(kind, torch.float32, window_size=16, segment_size=16, memory_chunk_size=16, num_hidden_layers=1)
    sizes: list[int] = []
    with torch.no_grad(), Made(lambda t: sizes.append(t.untyped_storage().nbytes() // t.element_size())):
        model(tokens(1, length), logits_to_keep=1)
    assert length < max(sizes) < length * length // 16
