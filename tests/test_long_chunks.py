"""Chunks longer than `MAX_CHUNK`: equal to the definition, with time and memory linear in the number of tokens."""

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from test_ops import (
    OPTIONS,
    Case,
    assert_all_close,
    case_id,
    chunk_backends,
    covering_cases,
    law,
    make_inputs,
    outputs_and_gradients,
    outputs_by_name,
    scan,
    scan_in_calls,
    small_cases,
    watch_groups,
)
from titans_lm.ops.chunked import scan as scan_module

LONG_CASES = covering_cases(
    Case, OPTIONS | {"depth": (1, 2, 3), "chunk": (11, 16, 2**30), "tokens": (37,), "activation": ("silu",)}
)
"""Cases with chunks longer than `SHORT` tokens, for tests that set `MAX_CHUNK` to it."""
SHORT = 5


@pytest.mark.parametrize("case", LONG_CASES, ids=case_id)
def test_a_chunk_read_in_parts_is_naive_in_outputs_and_all_gradients(
    case: Case, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
):
    monkeypatch.setattr(scan_module, "MAX_CHUNK", SHORT)
    x = make_inputs(case)
    expected = outputs_and_gradients(x, case, "naive")
    for backend in ("chunked", "native"):
        with subtests.test(backend):
            assert_all_close(outputs_and_gradients(x, case, backend), expected)


@chunk_backends
@law
@given(
    case=small_cases,
    chunk=st.sampled_from([7, 13, 2**30]),
    longest=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    seed=st.integers(0, 99),
)
def test_cut_a_long_chunk_anywhere(backend: str, case: Case, chunk: int, longest: int, cuts: list[int], seed: int):
    case = case._replace(chunk=chunk)
    x = make_inputs(case, seed=seed)
    whole = outputs_by_name(*scan(x, case, backend=backend))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "MAX_CHUNK", longest)
        assert_all_close(scan_in_calls(x, case, cuts, backend), whole)


def saved_groups(tokens: int, chunk: int, max_saved_bytes: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of groups that are saved for the backward pass."""
    with monkeypatch.context() as patch:
        groups = watch_groups(patch)
        case = Case(tokens=tokens, chunk=chunk)
        x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}
        out = scan(x, case, backend="chunked", max_saved_bytes=max_saved_bytes)
        gc.collect()
        assert out[0].requires_grad
        return len(groups)


def test_the_parts_of_long_chunks_keep_no_more_together_than_a_call_may(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan_module, "MAX_CHUNK", SHORT)
    enough = next(4**n for n in itertools.count(5) if saved_groups(10, 10, 4**n, monkeypatch))
    assert enough > 4**5
    assert saved_groups(80, 10, enough, monkeypatch) == 0
    assert saved_groups(80, 10, 8 * enough, monkeypatch) == 8


@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("start", ["boundary", "same", "ragged"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_chunk_longer_than_the_text_costs_as_much_for_each_token_of_any_number(depth: int, start: str, mask: str):
    def operations(tokens: int) -> int:
        case = Case(depth=depth, chunk=2**30, tokens=tokens, start=start, mask=mask)
        x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}
        with FlopCounterMode(display=False) as counter:
            y, _, _ = scan(x, case, backend="chunked")
            y.sum().backward()
        return counter.get_total_flops()

    few = operations(8 * scan_module.MAX_CHUNK)
    assert few > 0
    assert operations(16 * scan_module.MAX_CHUNK) / few == pytest.approx(2, abs=0.3)
