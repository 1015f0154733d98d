"""Tasks: every answer is what the tokens say by a slower definition, nothing else is asked, and no answer can be read
off the token at which it is asked."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_lm.tasks import IGNORED, Batch, Task, make_task, task_class

law = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
EACH = ["mqar", "forgetting_mqar", "blank_gap", "selective_copying", "parity", "modular", "s3", "s5"]


@st.composite
def recalls(draw) -> dict[str, Any]:
    """Options of a recall task, with as many keys as there can be among them."""
    name = draw(st.sampled_from(["mqar", "forgetting_mqar"]))
    pairs = draw(st.integers(1, 9))
    options = {"name": name, "pairs": pairs, "power": draw(st.sampled_from([0.01, 0.5, 1.0, 3.5]))}
    if name == "forgetting_mqar":
        options["again"] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    assigned = number_assigned(options)
    least = 2 * max(pairs + 1, assigned)
    sizes = {"length": 2 * (assigned + pairs) + draw(st.integers(0, 9)), "vocab_size": draw(st.integers(least, 40))}
    return {**options, **sizes}


@st.composite
def gaps(draw) -> dict[str, Any]:
    pairs = draw(st.integers(1, 9))
    sizes = {"gap": draw(st.integers(0, 30)), "vocab_size": draw(st.integers(2 * pairs + 2, 40))}
    return {"name": "blank_gap", "pairs": pairs, **sizes}


@st.composite
def copyings(draw) -> dict[str, Any]:
    symbols = draw(st.integers(1, 9))
    sizes = {"length": 2 * symbols + 1 + draw(st.integers(0, 30)), "vocab_size": draw(st.integers(4, 20))}
    return {"name": "selective_copying", "symbols": symbols, **sizes}


trackings = st.fixed_dictionaries({"name": st.sampled_from(["parity", "s3", "s5"]), "length": st.integers(2, 30)})
modulars = st.fixed_dictionaries(
    {"name": st.just("modular"), "length": st.integers(2, 30), "modulus": st.integers(2, 9), "operators": st.booleans()}
)


def number_assigned(options: dict[str, Any]) -> int:
    again = options.get("again", 0.5) if options["name"] == "forgetting_mqar" else 0
    return options["pairs"] + round(again * options["pairs"])


def drawn(options: dict[str, Any], rows: int = 4, seed: int = 0) -> tuple[Task, Batch]:
    """The task and some of its rows, of which the shape and the ranges are right."""
    task = make_task(options)
    batch = task.batch(np.random.default_rng(seed), rows)
    assert isinstance(task, Task)
    for x in batch:
        assert x.shape == (rows, task.length)
        assert x.dtype == np.int64
    assert ((batch.input_ids >= 0) & (batch.input_ids < task.vocab_size)).all()
    assert ((batch.labels == IGNORED) | ((batch.labels >= 0) & (batch.labels < task.vocab_size))).all()
    assert (batch.labels[:, 0] == IGNORED).all()  # nothing was read before it
    return task, batch


# ------------------------------------------------------------------------------------------------ slow definitions


def recalled(ids: list[int], vocab_size: int) -> list[int]:
    """A key before a value is an assignment, a key before anything else a question. Without filler."""
    known, labels = {}, [IGNORED] * len(ids)
    for t, (token, after) in enumerate(itertools.pairwise(ids)):
        if 0 < token < vocab_size // 2:
            if after >= vocab_size // 2:
                known[token] = after
            else:
                labels[t + 1] = known[token]
    return labels


def copied(ids: list[int], marker: int) -> list[int]:
    symbols = [token for token in ids if token not in (0, marker)]
    labels = [IGNORED] * (ids.index(marker) + 1) + symbols
    return labels


def counted(ids: list[int], modulus: int) -> list[int]:
    return [IGNORED, *(sum(ids[:t]) % modulus for t in range(1, len(ids)))]


def evaluated(ids: list[int], modulus: int) -> list[int]:
    """Python evaluates the expression so far, in brackets from the left."""
    labels = [IGNORED] * len(ids)
    for t in range(0, len(ids) - 1, 2):
        words = [str(token) if token < modulus else "+-*"[token - modulus] for token in ids[: t + 1]]
        text = "(" * (t // 2) + words[0] + "".join(f"{a}{b})" for a, b in zip(words[1::2], words[2::2], strict=True))
        labels[t + 1] = eval(text) % modulus
    return labels


def composed(ids: list[int], of: int) -> list[int]:
    """Things change places: `order[i]` is where thing i is."""
    elements = list(itertools.permutations(range(of)))
    order, labels = list(range(of)), [IGNORED]
    for token in ids[:-1]:
        for thing in range(of):
            order[thing] = elements[token][order[thing]]
        labels.append(elements.index(tuple(order)))
    return labels


@law
@given(options=recalls() | gaps(), seed=seeds)
def test_the_answer_is_the_value_that_the_key_was_last_assigned(options, seed):
    task, (ids, labels) = drawn(options, seed=seed)
    assigned, pairs = number_assigned(options), options["pairs"]
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        assert asked == recalled(row, task.vocab_size)
        keys, values = row[0 : 2 * assigned : 2], row[1 : 2 * assigned : 2]
        assert len(set(keys[:pairs])) == pairs
        assert len(set(keys[pairs:])) == assigned - pairs
        assert set(keys[pairs:]) <= set(keys[:pairs])
        assert len(set(values)) == assigned
        assert all(0 < key < task.vocab_size // 2 <= value for key, value in zip(keys, values, strict=True))
        questions = [row[t - 1] for t in range(len(row)) if asked[t] != IGNORED]
        assert sorted(questions) == sorted(keys[:pairs])
        assert len(row) - row.count(0) == 2 * assigned + pairs


@law
@given(options=recalls(), seed=seeds)
def test_filler_takes_the_place_of_blanks_and_changes_nothing_else(options, seed):
    _, blank = drawn(options, seed=seed)
    _, filled = drawn({**options, "filler": True}, seed=seed)
    assert np.array_equal(blank.labels, filled.labels)
    there = blank.input_ids != 0
    assert np.array_equal(blank.input_ids[there], filled.input_ids[there])


@law
@given(options=gaps(), seed=seeds)
def test_the_gap_is_blank_and_as_long_as_it_is_said_to_be(options, seed):
    task, (ids, labels) = drawn(options, seed=seed)
    pairs, gap = options["pairs"], options["gap"]
    assert task.length == 4 * pairs + gap
    assert (ids[:, 2 * pairs : 2 * pairs + gap] == 0).all()
    assert (ids[:, 2 * pairs + gap :: 2] > 0).all()
    assert (labels[:, 2 * pairs + gap + 1 :: 2] != IGNORED).all()


def test_after_a_gap_the_keys_are_asked_in_any_order():
    _, (ids, _) = drawn({"name": "blank_gap", "pairs": 3, "gap": 2}, rows=3000)
    keys, questions = ids[:, 0:6:2], ids[:, 8::2]
    place = np.argmax(questions[:, :, None] == keys[:, None], axis=2)
    assert unevenness(np.tile(np.arange(3), 3000), place.ravel(), cells=(3, 3)) < 5


@law
@given(options=copyings(), seed=seeds)
def test_symbols_are_copied_in_their_order(options, seed):
    task, (ids, labels) = drawn(options, seed=seed)
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        assert asked == copied(row, task.vocab_size - 1)
        assert row.count(task.vocab_size - 1) == options["symbols"] + 1
        assert sum(label != IGNORED for label in asked) == options["symbols"]


@law
@given(options=trackings | modulars, seed=seeds)
def test_the_state_is_what_the_tokens_make_of_it(options, seed):
    task, (ids, labels) = drawn(options, seed=seed)
    slow = {
        "parity": lambda row: counted(row, 2),
        "modular": lambda row: (evaluated if task.operators else counted)(row, task.modulus),
        "s3": lambda row: composed(row, 3),
        "s5": lambda row: composed(row, 5),
    }[options["name"]]
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        assert asked == slow(row)
    number = task.length // 2 if options.get("operators") else task.length - 1
    assert ((labels != IGNORED).sum(1) == number).all()


def test_permutations_by_hand():
    """Of three things the first two change places (token 2), then all move on by one (token 3): 0 -> 1 -> 2."""
    s3 = list(itertools.permutations(range(3)))
    assert (s3[2], s3[3]) == ((1, 0, 2), (1, 2, 0))
    _, (ids, labels) = drawn({"name": "s3", "length": 3}, rows=200)
    found = labels[(ids[:, 0] == 2) & (ids[:, 1] == 3), 2]
    assert len(found) > 0
    assert {s3[i] for i in found} == {(2, 1, 0)}


# ------------------------------------------------------------------------------------------------ chance


def unevenness(*columns: np.ndarray, cells: tuple[int, ...], expected: np.ndarray | None = None) -> float:
    """How many standard deviations the chi-square of a table of counts lies above that of chance (even cells)."""
    counts = np.histogramdd(np.stack(columns, 1), bins=[np.arange(n + 1) - 0.5 for n in cells])[0].ravel()
    assert counts.sum() == len(columns[0])  # nothing lies outside the table
    share = np.full(counts.size, 1 / counts.size) if expected is None else expected
    chi = ((counts - share * counts.sum()) ** 2 / (share * counts.sum())).sum()
    return float((chi - counts.size + 1) / np.sqrt(2 * (counts.size - 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "mqar", "length": 20, "pairs": 3},
        {"name": "forgetting_mqar", "length": 20, "pairs": 3, "again": 0.7},
        {"name": "blank_gap", "gap": 5, "pairs": 3},
    ],
    ids=lambda options: options["name"],
)
def test_the_key_alone_does_not_say_its_value(options):
    _, (ids, labels) = drawn({**options, "vocab_size": 14}, rows=4000)
    row, at = np.nonzero(labels != IGNORED)
    assert unevenness(ids[row, at - 1] - 1, labels[row, at] - 7, cells=(6, 7)) < 5
    first_key, next_row = ids[:-1, 0] - 1, ids[1:, 0] - 1
    assert unevenness(first_key, next_row, cells=(6, 6)) < 5  # rows do not know of each other


@pytest.mark.parametrize("name", ["parity", "modular", "s3", "s5"])
def test_the_token_alone_does_not_say_the_state(name):
    task, (ids, labels) = drawn({"name": name, "length": 26}, rows=3000)
    token, state = ids[:, 1:-1].ravel(), labels[:, 2:].ravel()  # the first token alone is its own state
    assert unevenness(token, state, cells=(task.vocab_size,) * 2) < 5
    assert unevenness(labels[:-1, -1], labels[1:, -1], cells=(task.vocab_size,) * 2) < 5


def test_operators_and_numbers_are_even():
    _, (ids, _) = drawn({"name": "modular", "length": 9, "modulus": 4, "operators": True}, rows=3000)
    assert unevenness(ids[:, 0], ids[:, 1] - 4, ids[:, 2], ids[:, 3] - 4, cells=(4, 3, 4, 3)) < 5


def test_symbols_and_their_places_are_even():
    _, (ids, labels) = drawn({"name": "selective_copying", "length": 11, "symbols": 2, "vocab_size": 8}, rows=4000)
    assert unevenness(labels[:, -2] - 1, labels[:, -1] - 1, cells=(6, 6)) < 5
    places = np.nonzero((ids != 0) & (ids != 7))[1].reshape(-1, 2)
    pairs = np.array([(a, b) for a in range(8) for b in range(8)])
    expected = np.where(pairs[:, 0] < pairs[:, 1], 1 / 28, 1e-12)
    assert unevenness(places[:, 0], places[:, 1], cells=(8, 8), expected=expected) < 5


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 2.0])
def test_gaps_follow_the_power_law(power):
    """Two keys, three slots: the first is drawn by the law, the second by the law among those that are left."""
    _, (ids, labels) = drawn({"name": "mqar", "length": 11, "pairs": 2, "power": power, "vocab_size": 8}, rows=8000)
    row, at = np.nonzero(labels != IGNORED)
    slots = np.zeros((8000, 2), int)
    slots[row, (ids[row, at - 1] == ids[row, 2]).astype(int)] = (at - 5) // 2
    law = np.arange(1.0, 4) ** (power - 1)
    law /= law.sum()
    expected = np.array([[law[a] * law[b] / (1 - law[a]) if a != b else 1e-12 for b in range(3)] for a in range(3)])
    assert unevenness(slots[:, 0], slots[:, 1], cells=(3, 3), expected=expected.ravel()) < 5


def test_published_settings_ask_soon_after_the_pairs():
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
        task, (ids, labels) = drawn({"name": "mqar", "length": length, "pairs": pairs}, rows=300)
        assert task.vocab_size == 8192
        gaps = np.nonzero(labels != IGNORED)[1] - 2 * pairs
        even = drawn({"name": "mqar", "length": length, "pairs": pairs, "power": 1.0}, rows=300)[1]
        assert gaps.mean() < np.nonzero(even.labels != IGNORED)[1].mean() - 2 * pairs
        assert len(np.unique(ids[:, 0])) > 250  # of 4,095 keys


@pytest.mark.parametrize("name", EACH)
def test_the_same_generator_makes_the_same_rows_and_no_two_are_alike(name):
    task, batch = drawn({"name": name}, rows=20, seed=7)
    np.random.seed(3)  # the global generator has no part in it
    _, same = drawn({"name": name}, rows=20, seed=7)
    _, other = drawn({"name": name}, rows=20, seed=8)
    assert batch.input_ids.tobytes() == same.input_ids.tobytes()
    assert batch.labels.tobytes() == same.labels.tobytes()
    assert len(np.unique(np.concatenate([batch.input_ids, other.input_ids]), axis=0)) == 40
    assert task == make_task({"name": name})
    assert drawn({"name": name}, rows=0)[1].input_ids.shape == (0, task.length)


@pytest.mark.parametrize("name", EACH)
def test_another_length_is_the_same_task(name):
    task = dataclasses.replace(make_task({"name": name}), length=57)
    assert isinstance(task, task_class(name))
    assert task.batch(np.random.default_rng(0), 2).input_ids.shape == (2, 57)
    assert task.vocab_size == make_task({"name": name}).vocab_size


def test_a_gap_is_changed_by_its_name_or_by_the_length():
    task = make_task({"name": "blank_gap"})
    assert task.length == 4 * 4 + 100
    assert dataclasses.replace(task, gap=7).length == 23
    assert dataclasses.replace(task, length=23) == dataclasses.replace(task, gap=7)


# ------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a task needs a name, one of: mqar, forgetting_mqar"),
        ({"name": "mqr"}, "task 'mqr' is not one of: mqar"),
        (
            {"name": "mqar", "pair": 4},
            "task mqar has no option 'pair'; it has length, pairs, vocab_size, power, filler",
        ),
        ({"name": "blank_gap", "gaps": 4}, "it has length, pairs, vocab_size, gap"),
        ({"name": "mqar", "pairs": 0}, "pairs must be a whole number of at least 1, got 0"),
        ({"name": "mqar", "pairs": True}, "pairs must be a whole number of at least 1, got True"),
        ({"name": "mqar", "length": 15}, "length must be a whole number of at least 16, got 15"),
        ({"name": "mqar", "length": 64.0}, r"length must be a whole number of at least 16, got 64.0"),
        ({"name": "mqar", "vocab_size": 9}, "vocab_size must be at least 10 for 4 pairs, got 9"),
        ({"name": "mqar", "vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"name": "mqar", "power": 0}, "power must be a number above 0, got 0"),
        ({"name": "mqar", "power": "1"}, "power must be a number above 0, got '1'"),
        ({"name": "mqar", "power": float("nan")}, "power must be a number above 0, got nan"),
        ({"name": "mqar", "power": float("inf")}, "power must be a number above 0, got inf"),
        ({"name": "mqar", "filler": 1}, "filler must be true or false, got 1"),
        ({"name": "forgetting_mqar", "again": 1.1}, "again must be a share from 0 to 1, got 1.1"),
        ({"name": "forgetting_mqar", "again": True}, "again must be a share from 0 to 1, got True"),
        ({"name": "forgetting_mqar", "pairs": 0}, "pairs must be a whole number of at least 1, got 0"),
        ({"name": "forgetting_mqar", "length": 19}, "length must be a whole number of at least 20, got 19"),
        ({"name": "forgetting_mqar", "vocab_size": 11}, "vocab_size must be at least 12 for 6 pairs, got 11"),
        ({"name": "blank_gap", "gap": -1}, "gap must be a whole number of at least 0, got -1"),
        ({"name": "blank_gap", "length": 15}, "length must be a whole number of at least 16, got 15"),
        ({"name": "blank_gap", "pairs": 40}, "vocab_size must be at least 82 for 40 pairs, got 64"),
        ({"name": "blank_gap", "pairs": None}, "pairs must be a whole number of at least 1, got None"),
        ({"name": "selective_copying", "symbols": 0}, "symbols must be a whole number of at least 1, got 0"),
        ({"name": "selective_copying", "length": 32}, "length must be a whole number of at least 33, got 32"),
        ({"name": "selective_copying", "vocab_size": 3}, "vocab_size must be a whole number of at least 4, got 3"),
        ({"name": "parity", "length": 1}, "length must be a whole number of at least 2, got 1"),
        ({"name": "parity", "vocab_size": 3}, "task parity has no option 'vocab_size'; it has length"),
        ({"name": "modular", "length": "40"}, "length must be a whole number of at least 2, got '40'"),
        ({"name": "modular", "modulus": 1}, "modulus must be a whole number of at least 2, got 1"),
        ({"name": "modular", "operators": "yes"}, "operators must be true or false, got 'yes'"),
        ({"name": "s3", "length": 0}, "length must be a whole number of at least 2, got 0"),
        ({"name": "s5", "of": 4}, "task s5 has no option 'of'; it has length"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        make_task(options)


def test_the_least_that_is_right_works():
    for options in (
        {"name": "mqar", "length": 16, "vocab_size": 10},
        {"name": "forgetting_mqar", "length": 20, "vocab_size": 12},
        {"name": "blank_gap", "gap": 0, "vocab_size": 10},
        {"name": "selective_copying", "length": 33, "vocab_size": 4},
    ):
        _, (_, labels) = drawn(options)
        assert (labels != IGNORED).any(1).all()


@pytest.mark.usefixtures("unchecked")
def test_a_whole_number_is_a_number():
    for whole, same in (({"power": 3}, {"power": 3.0}), ({"again": 1}, {"again": 1.0})):
        one, other = (drawn({"name": "forgetting_mqar", **options})[1] for options in (whole, same))
        assert np.array_equal(one.input_ids, other.input_ids)
