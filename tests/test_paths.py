"""Every path by which tokens reach a model gives what one plain call gives, in every variant.

`PATHS` is the table of paths, `VARIANTS` of what models are. A path is a function that reads rows of tokens and says
what it read, the logits of the last of them, and the state. The law: logits, state and, where the path has them,
gradients are those of each row alone in one plain call. That a plain call does not see the future, and that rows are
independent, is tested in `test_model`; so with the law it holds on every path.

Whole by construction: a new path is one function with `@path`, a new kind of model one line in `conftest.KINDS`; every
pair of a path and a kind is a test, and `test_every_pair_is_covered` fails unless each value of every setting meets
each path, each kind and each value of the other settings. Hypothesis draws lengths, cuts, padding and tokens.
"""

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import titans_lm.models.blocks
from conftest import (
    KINDS,
    SEGMENT,
    VOCABULARY,
    WINDOW,
    assert_has_read,
    assert_is_joined,
    each_kind,
    state_tensors,
    tiny_model,
    tokens,
)
from titans_lm import TitansForCausalLM, TitansState
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


# ------------------------------------------------------------------------------------------------ the table


class Read(NamedTuple):
    """What a path made of its tokens."""

    rows: list[Tensor]
    """All tokens that each row has read, `[T_row]`."""
    logits: list[Tensor]
    """Of the last of them, as many as the path shows, `[n_row, V]`."""
    state: TitansState | None = None


Draw = Callable[[st.SearchStrategy], Any]
Path = Callable[[TitansForCausalLM, Draw], Read]
PATHS: dict[str, Path] = {}
LEARNING: set[str] = set()
"""Paths that gradients go through."""


def path(function: Path) -> Path:
    PATHS[function.__name__] = function
    return function


def learning(function: Path) -> Path:
    LEARNING.add(function.__name__)
    return path(function)


def drawn(draw: Draw, rows: int = 2, least: int = 2, most: int = 2 * SEGMENT + 3) -> Tensor:
    """Tokens `[rows, T]`."""
    return tokens(rows, draw(st.integers(least, most)), seed=draw(st.integers(0, 99)))


def cut(draw: Draw, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts, neither empty."""
    first = draw(st.integers(1, ids.shape[1] - 1))
    return ids[:, :first], ids[:, first:]


def after(model: TitansForCausalLM, ids: Tensor) -> TitansState:
    return model(ids, use_cache=True).past_key_values


def gone_on(model: TitansForCausalLM, state: TitansState, before: Tensor, ids: Tensor) -> Read:
    """`state`, which has read `before`, reads `ids`."""
    return Read(list(torch.cat([before, ids], 1)), list(model(ids, past_key_values=state).logits), state)


def generated(model: TitansForCausalLM, ids: Tensor, **options: Any) -> Any:
    """Without a mask `generate` would take every token 0 for padding."""
    defaults = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **defaults, **options)


@learning
def one_call(model: TitansForCausalLM, draw: Draw) -> Read:
    ids = drawn(draw)
    out = model(ids, use_cache=True)
    return Read(list(ids), list(out.logits), out.past_key_values)


@learning
def without_a_cache(model: TitansForCausalLM, draw: Draw) -> Read:
    ids = drawn(draw)
    return Read(list(ids), list(model(ids, use_cache=False).logits))


@learning
def embeddings(model: TitansForCausalLM, draw: Draw) -> Read:
    ids = drawn(draw)
    out = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)
    return Read(list(ids), list(out.logits), out.past_key_values)


@learning
def calls_cut_anywhere(model: TitansForCausalLM, draw: Draw) -> Read:
    ids, state = drawn(draw), model.initial_state(2)
    cuts = sorted(draw(st.lists(st.integers(0, ids.shape[1]), max_size=4)))
    parts = [ids[:, a:b] for a, b in itertools.pairwise([0, *cuts, ids.shape[1]])]
    return Read(list(ids), list(torch.cat([model(part, past_key_values=state).logits for part in parts], 1)), state)


@path
def token_by_token(model: TitansForCausalLM, draw: Draw) -> Read:
    ids, state = drawn(draw, most=SEGMENT + 2), model.initial_state(2)
    return Read(list(ids), list(torch.cat([model(t, past_key_values=state).logits for t in ids.split(1, 1)], 1)), state)


@path
def begun_with(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = drawn(draw, 1), drawn(draw)
    model.begin_with(after(model, before))
    out = model(ids, use_cache=True)
    model.begin_with(None)
    return Read(list(torch.cat([before.expand(2, -1), ids], 1)), list(out.logits), out.past_key_values)


@path
def begun_with_and_reset(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = drawn(draw, 1), drawn(draw)
    model.begin_with(after(model, before))
    state = after(model, drawn(draw))
    state.reset([1])
    read = model(ids, past_key_values=state)
    model.begin_with(None)
    return Read([torch.cat([before[0], ids[1]])], [read.logits[1]], state.select([1]))


@path
def continuation(model: TitansForCausalLM, draw: Draw) -> Read:
    """After an answer, of which the last token is pending."""
    said, ids = drawn(draw), drawn(draw)
    out = generated(model, said, max_new_tokens=draw(st.integers(1, 4)))
    return gone_on(model, out.past_key_values.continuation(), out.sequences, ids)


@path
def generated_from_a_state(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    state = after(model, before).continuation()
    out = generated(model, ids, past_key_values=state, max_new_tokens=3, output_logits=True)
    return Read(list(torch.cat([before, out.sequences], 1)[:, :-1]), list(torch.stack(out.logits, 1)), state)


@path
def beams(model: TitansForCausalLM, draw: Draw) -> Read:
    ids = drawn(draw)
    out = generated(model, ids, num_beams=2, num_return_sequences=2, max_new_tokens=4)
    return Read(list(out.sequences[:, :-1]), [], out.past_key_values)


@path
def ended_rows(model: TitansForCausalLM, draw: Draw) -> Read:
    ids, ends = drawn(draw), list(range(0, VOCABULARY, 2))
    out = generated(model, ids, max_new_tokens=6, eos_token_id=ends)
    rows, width = [], out.sequences.shape[1]
    for row in out.sequences:
        end = next((n + 1 for n in range(ids.shape[1], width) if int(row[n]) in ends), width)
        rows.append(row[: min(end, width - 1)])
    return Read(rows, [], out.past_key_values)


@path
def prompt_in_pieces(model: TitansForCausalLM, draw: Draw) -> Read:
    ids, state = drawn(draw), model.initial_state(2)
    generated(model, ids, past_key_values=state, prefill_chunk_size=draw(st.integers(1, 6)), max_new_tokens=1)
    return Read(list(ids), [], state)


@path
def loaded_from_a_file(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    with tempfile.NamedTemporaryFile() as file:
        after(model, before).save(file.name)
        return gone_on(model, TitansState.load(file.name, model), before, ids)


@path
def cloned(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    state = after(model, before)
    fork = draw(st.sampled_from([TitansState.clone, TitansState.shared, TitansState.detach, copy.deepcopy]))(state)
    model(drawn(draw), past_key_values=state)
    return gone_on(model, fork, before, ids)


@path
def selected(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    rows = draw(st.lists(st.integers(0, 1), min_size=1, max_size=3))
    return gone_on(model, after(model, before).select(rows), before[rows], ids[rows])


@path
def reordered(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    state = after(model, before)
    state.reorder_cache(torch.tensor([1, 0]))
    return gone_on(model, state, before[[1, 0]], ids)


@path
def repeated(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    state = after(model, before)
    state.batch_repeat_interleave(2)
    return gone_on(model, state, before[[0, 0, 1, 1]], ids[[0, 1, 1, 0]])


@path
def joined(model: TitansForCausalLM, draw: Draw) -> Read:
    before, ids = cut(draw, drawn(draw))
    state = TitansState.concat([after(model, before[:1]), after(model, before[1:])])
    return gone_on(model, state, before, ids)


@path
def reset(model: TitansForCausalLM, draw: Draw) -> Read:
    state, ids = after(model, drawn(draw)), drawn(draw)
    state.reset()
    return gone_on(model, state, ids[:, :0], ids)


def padded(model: TitansForCausalLM, draw: Draw, place: str) -> Read:
    """Two calls with padding, of two rows."""
    ids, state, read, logits = drawn(draw, most=30), model.initial_state(2), [0, 0], [[], []]
    rows = [[], []]
    for _ in range(2):
        width = draw(st.integers(1, ids.shape[1] // 2))
        mask = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=2, max_size=2))
        )
        if place != "inside":
            mask = mask.int().sort(1, descending=place == "right")[0].bool()
        here = torch.full(mask.shape, VOCABULARY - 1)
        for row in range(2):
            count = int(mask[row].sum())
            here[row, mask[row]] = ids[row, read[row] : read[row] + count]
            rows[row].append(ids[row, read[row] : read[row] + count])
            read[row] += count
        out = model(here, attention_mask=mask.long(), past_key_values=state).logits
        for row in range(2):
            logits[row].append(out[row, mask[row]])
    return Read([torch.cat(r) for r in rows], [torch.cat(x) for x in logits], state)


@learning
def left_padding(model: TitansForCausalLM, draw: Draw) -> Read:
    return padded(model, draw, "left")


@learning
def right_padding(model: TitansForCausalLM, draw: Draw) -> Read:
    return padded(model, draw, "right")


@learning
def inner_padding(model: TitansForCausalLM, draw: Draw) -> Read:
    return padded(model, draw, "inside")


def packed(model: TitansForCausalLM, draw: Draw, borders: Callable[[list[int]], dict[str, Tensor]]) -> Read:
    """Documents in one row."""
    rows = [tokens(1, n, seed=n)[0] for n in draw(st.lists(st.integers(1, 2 * SEGMENT), min_size=1, max_size=4))]
    lengths = [len(row) for row in rows]
    out = model(torch.cat(rows)[None], use_cache=True, **borders(lengths))
    assert_has_read(model, out.past_key_values, rows[-1:])
    return Read(rows, list(out.logits[0].split(lengths)))


@learning
def packed_by_position_ids(model: TitansForCausalLM, draw: Draw) -> Read:
    return packed(model, draw, lambda sizes: {"position_ids": torch.cat([torch.arange(n) for n in sizes])[None]})


@learning
def packed_by_cu_seq_lens(model: TitansForCausalLM, draw: Draw) -> Read:
    return packed(model, draw, lambda sizes: {"cu_seq_lens_q": torch.tensor([0, *sizes]).cumsum(0)})


@learning
def packed_by_seq_idx(model: TitansForCausalLM, draw: Draw) -> Read:
    return packed(model, draw, lambda n: {"seq_idx": torch.arange(len(n)).repeat_interleave(torch.tensor(n))[None]})


@path
def in_inference_mode(model: TitansForCausalLM, draw: Draw) -> Read:
    with torch.inference_mode():
        return calls_cut_anywhere(model, draw)


@path
def in_pieces(model: TitansForCausalLM, draw: Draw) -> Read:
    """As long texts are, inside a block."""
    piece, titans_lm.models.blocks.PREFILL_TOKENS = titans_lm.models.blocks.PREFILL_TOKENS, draw(st.integers(1, 6))
    try:
        return one_call(model, draw)
    finally:
        titans_lm.models.blocks.PREFILL_TOKENS = piece


@learning
def with_checkpointed_activations(model: TitansForCausalLM, draw: Draw) -> Read:
    ids = drawn(draw)
    model.train().gradient_checkpointing_enable()
    try:
        return Read(list(ids), list(model(ids).logits))
    finally:
        model.eval().gradient_checkpointing_disable()


@path
def of_a_model_that_was_cast(model: TitansForCausalLM, draw: Draw) -> Read:
    """To float32, which has all its numbers, and back."""
    other = copy.deepcopy(model)
    other.begin_with(after(other, before := drawn(draw, 1)))
    other.float().double()
    out = other(ids := drawn(draw), use_cache=True)
    return Read(list(torch.cat([before.expand(2, -1), ids], 1)), list(out.logits), out.past_key_values)


# ------------------------------------------------------------------------------------------------ the law

SETTINGS: dict[str, tuple[Any, ...]] = {
    "gate": ("product", "convex"),
    "memory_layers": (1, 2),
    "memory_chunk_size": (1, 4),
    "num_persistent_tokens": (0, 3),
    "memory_gates_of": ("token", "chunk"),
}


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """Each path with each kind; the settings take turns, each at a pace of its own."""
    found = []
    for (i, name), (j, kind) in itertools.product(enumerate(PATHS), enumerate(KINDS)):
        turns = (i + j, i // 2 + j, i + j // 2, i // 4 + j // 2 + i, i // 2 + j // 3)
        changes = {key: values[turn % 2] for (key, values), turn in zip(SETTINGS.items(), turns, strict=True)}
        found.append((name, kind, changes))
    return found


def test_every_pair_is_covered():
    for a, b in itertools.combinations(["path", "kind", *SETTINGS], 2):
        rows = [{"path": name, "kind": kind, **changes} for name, kind, changes in cases()]
        values = {"path": PATHS, "kind": KINDS, **SETTINGS}
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(values[a], values[b])), (a, b)


@functools.cache
def model_of(kind: str, changes: tuple[tuple[str, Any], ...]) -> TitansForCausalLM:
    return tiny_model(kind, num_hidden_layers=1, **dict(changes))


def gradients(model: TitansForCausalLM, logits: list[Tensor]) -> dict[str, Tensor]:
    weights = [torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for x in logits]
    loss = sum((x * w).sum() for x, w in zip(logits, weights, strict=True))
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "changes"), cases(), ids=lambda value: value if isinstance(value, str) else ""
)
@settings(deadline=None, derandomize=True, max_examples=1, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_path_is_one_plain_call(name, kind, changes, data):
    model = model_of(kind, tuple(changes.items()))
    with torch.set_grad_enabled(name in LEARNING):
        read = PATHS[name](model, data.draw)
        alone = [model(row[None], use_cache=True) for row in read.rows]
        whole = [out.logits[0] for out in alone[: len(read.logits)]]
        expected = [logits[len(logits) - len(part) :] for logits, part in zip(whole, read.logits, strict=True)]
        for part, its in zip(read.logits, expected, strict=True):
            assert_close(part, its)
    if read.state is not None:
        assert_is_joined(read.state, [out.past_key_values for out in alone])
    if name in LEARNING and sum(map(len, read.logits)):
        ours, theirs = gradients(model, read.logits), gradients(model, expected)
        for parameter, gradient in ours.items():
            assert_close(gradient, theirs[parameter], parameter)
