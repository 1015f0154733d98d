"""The lines that a model did not expect: the same, however the text is cut into pieces."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_lm.inference.surprising import SHOWN, SurprisingLines


def most(data, bits, count, cuts=()):
    lines = SurprisingLines(count)
    edges = [0, *sorted(cuts), len(data)]
    for first, end in itertools.pairwise(edges):
        lines.add(data[first:end], np.asarray(bits[first:end], float))
    lines.end()
    return lines.most()


@given(st.data())
def test_however_a_text_is_cut_its_lines_are_those_of_sorting_them(data):
    text = data.draw(st.binary(max_size=60).map(lambda b: bytes(b"ab \n\r"[x % 5] for x in b)))
    bits = data.draw(st.lists(st.integers(0, 8), min_size=len(text), max_size=len(text)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=4))
    expected, first = [], 0
    for number, line in enumerate(text.split(b"\n"), 1):
        end = min(first + len(line) + 1, len(text))
        if line.strip():
            expected.append((sum(bits[first:end]) / (end - first), number, line.rstrip(b"\r").decode()))
        first = end
    expected.sort(key=lambda line: (-line[0], line[1]))
    found = [line[:3] for line in most(text, bits, 3, cuts)]
    assert [(number, words) for _, number, words in found] == [(n, words) for _, n, words in expected[:3]]
    assert [bits for bits, *_ in found] == pytest.approx([bits for bits, *_ in expected[:3]])


def test_bytes_that_nothing_predicted_do_not_count():
    """Neither in a line's mean, nor as a line of 0 bits."""
    bits = [np.nan, 4.0, 2.0, np.nan, np.nan, 1.0, 1.0]
    assert [line[:3] for line in most(b"ab\nc\nd\n", bits, 9, cuts=[1])] == [(3.0, 1, "ab"), (1.0, 3, "d")]


def test_a_line_of_any_length_takes_bounded_space():
    lines = SurprisingLines(1)
    for _ in range(100):
        lines.add(b"x" * 1000, np.ones(1000))
        assert len(lines._shown) <= SHOWN
    lines.end()
    assert lines.most()[0].bits_per_byte == pytest.approx(1)
    assert len(lines.most()[0].text) == SHOWN


def test_texts_have_names_and_numbers_of_their_own():
    lines = SurprisingLines(9)
    for name in ("a.log", "b.log"):
        lines.begin(name)
        lines.add(b"one\ntwo", np.arange(7.0))
    lines.end()
    assert sorted((line.source, line.number, line.text) for line in lines.most()) == [
        ("a.log", 1, "one"), ("a.log", 2, "two"), ("b.log", 1, "one"), ("b.log", 2, "two"),
    ]  # fmt: skip


def test_a_text_of_one_line_without_an_end_is_not_lost():
    lines = SurprisingLines(9)
    for name in ("a", "b"):
        lines.begin(name)
        lines.add(b"one", np.ones(3))
    lines.end()
    assert [(line.source, line.number) for line in lines.most()] == [("a", 1), ("b", 1)]


def test_bytes_that_are_no_text_are_replaced():
    assert most(b"\xff\xfe!\n", [1, 1, 1, 1], 1)[0].text == "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}!"


def test_a_count_below_one_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SurprisingLines(0)
