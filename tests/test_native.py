"""The C++ backend: wide matrices, threads, saved activations. test_ops.py tests that it equals the definition."""

import importlib
import re

import pytest
import torch
from torch import Tensor

from test_ops import (
    TOKENS,
    Case,
    assert_all_close,
    chunk_backends,
    make_call,
    make_form,
    make_inputs,
    make_state,
    outputs_and_gradients,
    outputs_by_name,
    scan,
)
from titans_lm.ops import MemoryState, grouping, memory_scan, resolve_backend
from titans_lm.ops.cpu import compiled, native
from titans_lm.ops.cpu.build import SOURCES

WIDE = [
    Case(depth=2, chunk=64, tokens=130, width=20, hidden=37, clip=0.7, mask="random", start="ragged"),
    Case(depth=3, chunk=16, tokens=50, width=35, hidden=24, residual=True, activation="gelu", threshold=30.0),
    Case(depth=2, chunk=7, tokens=50, width=64, hidden=72, residual=True, clip=1.0, start="same"),
    Case(depth=1, chunk=13, tokens=50, width=16, mask="left"),
]
"""Matrices wider than a vector and higher than a tile: whole tiles and remainders."""


@pytest.mark.parametrize("max_saved_bytes", [0, 2**28])
@pytest.mark.parametrize("case", WIDE)
def test_wide_matrices_are_naive_in_outputs_and_all_gradients(case: Case, max_saved_bytes: int, monkeypatch):
    def kept(x: dict[str, Tensor], case: Case, **options):
        return scan(x, case, max_saved_bytes=max_saved_bytes, **options)

    monkeypatch.setattr(importlib.import_module("test_ops"), "scan", kept)
    x = make_inputs(case)
    assert_all_close(outputs_and_gradients(x, case, "native"), outputs_and_gradients(x, case, "naive"))


@pytest.mark.parametrize("case", WIDE)
def test_wide_matrices_in_float32_are_near_naive_in_float64(case: Case):
    x = make_inputs(case, torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    assert_all_close(outputs_and_gradients(x, case, "native"), outputs_and_gradients(wide, case, "naive"))


@chunk_backends
@pytest.mark.parametrize("residual", [False, True])
def test_a_tight_clip_where_there_is_no_gradient(backend: str, residual: bool):
    """Padding has a gradient of length 0, and clip / (4 * smallest number) overflows."""
    case = Case(tokens=21, residual=residual, clip=0.1, mask="random", start="ragged")
    x = make_inputs(case, torch.float32)
    if residual:
        x["norm_bias"] = torch.zeros_like(x["norm_bias"])
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    assert_all_close(outputs_and_gradients(x, case, backend), outputs_and_gradients(wide, case, "naive"))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_large_numbers_stay_finite(activation: str):
    case = Case(tokens=9, activation=activation, clip=1.0)
    x = make_inputs(case, torch.float32)
    for name in "qkv":
        x[name] = x[name] * 1e4
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    assert_all_close(
        outputs_by_name(*scan(x, case, backend="native")), outputs_by_name(*scan(wide, case, backend="naive"))
    )


@pytest.mark.parametrize("why", ["no step is taken", "no loss is above the threshold"])
def test_keys_that_nothing_is_written_by_are_not_looked_at(why: str):
    """Without gradients and surprise: nan keys would show."""
    case = Case(tokens=11, start="same", threshold=None if why == "no step is taken" else float("inf"))
    x = make_inputs(case)
    if case.threshold is None:
        x["theta"] = torch.zeros_like(x["theta"])
    x["k"] = torch.full_like(x["k"], float("nan"))
    tokens = (x[name] for name in TOKENS)
    y, state = memory_scan(*tokens, make_state(x, case), chunk_size=4, form=make_form(x, case), backend="native")
    assert y.isfinite().all()
    assert all(w.isfinite().all() for w in (*state.weights, *state.momentum))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_subnormal_numbers_are_zero_in_compiled_code_alone(tokens: int, threads: int, monkeypatch):
    """An x86 core takes a hundred times as long for them: a memory of depth 4 trained ten times more slowly."""
    monkeypatch.setattr(compiled, "SINGLE_THREAD_WORK", 0)
    small = torch.tensor(1e-39)
    q = torch.nn.functional.normalize(torch.ones(2, tokens, 3, 8), dim=-1)
    v, gate = small.expand_as(q).contiguous(), torch.full((2, tokens, 3), 0.5)
    zeros = (torch.zeros(2, 3, 8, 8),)
    state = MemoryState(zeros, zeros, zeros, torch.zeros(2, dtype=torch.long))
    torch.set_num_threads(threads)
    try:
        y, after = memory_scan(q, q, v, gate, gate, gate, state, chunk_size=4, backend="native")
    finally:
        torch.set_num_threads(1)
    assert y.eq(0).all()
    assert all(w.eq(0).all() for w in (*after.weights, *after.momentum))
    assert (small * 1).item() > 0, "the caller's own arithmetic has changed"


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "SINGLE_THREAD_WORK", 0)
    case = Case(tokens=tokens, mask="random", start="ragged", residual=True)
    x = make_inputs(case)
    one = outputs_and_gradients(x, case, "native"), outputs_by_name(*scan(x, case, backend="native"))
    torch.set_num_threads(3)
    try:
        three = outputs_and_gradients(x, case, "native"), outputs_by_name(*scan(x, case, backend="native"))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, three, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("block_bytes", [1, 20_000])
def test_what_is_kept_may_lie_in_pieces(block_bytes: int, monkeypatch: pytest.MonkeyPatch):
    case = Case(tokens=4 * 9 + 1, mask="random", start="ragged", residual=True)
    x = make_inputs(case)
    whole = outputs_and_gradients(x, case, "native")
    monkeypatch.setattr(native, "SAVED_BLOCK_BYTES", block_bytes)
    pieces = outputs_and_gradients(x, case, "native")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def saved_bytes(case: Case, max_saved_bytes: int) -> int:
    x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(x, case, backend="native", max_saved_bytes=max_saved_bytes)
    return sum(saved.values())


def test_groups_are_as_large_as_a_cache_but_their_starts_are_few():
    near, far = grouping.CACHE_BYTES, grouping.GROUP_BYTES
    assert grouping.group_size_in_cache(10**6, near // 20, far // 10**5) == 20  # all starts fit
    assert grouping.group_size_in_cache(10**6, near // 20, far) == 1000  # only one start fits: sqrt
    assert grouping.group_size_in_cache(5, near // 20, far) == 20


def test_training_keeps_no_more_than_it_may_and_then_grows_with_the_root_of_the_chunks(monkeypatch):
    for name in ("GROUP_BYTES", "CACHE_BYTES"):
        monkeypatch.setattr(grouping, name, 0)
    case = Case(depth=2, chunk=1, width=16, hidden=32)
    tokens = [saved_bytes(case._replace(tokens=n), 0) for n in (16**2, 64**2)]
    inputs = 8 * (3 * 16 + 1 + 3) * 2 * 2  # for each token: q, k, v and gates of two rows and two heads
    state = [n - inputs * t for n, t in zip(tokens, (16**2, 64**2), strict=True)]
    assert state[1] < 6 * state[0]
    every = saved_bytes(case._replace(tokens=64), 2**28)
    assert every > saved_bytes(case._replace(tokens=64), 0)


def test_the_structure_is_the_same_in_both_languages():
    text = (SOURCES / "scan_args.h").read_text().split("struct ScanArgs {")[1].split("};")[0]
    declared = " ".join(line.split("//")[0] for line in text.splitlines())
    names = re.findall(r"(\w+)\s*[,;]", declared)
    assert names == [name for name, _ in native._ScanArgs._fields_]


def test_other_devices_are_not_for_it():
    call = make_call(Case(tokens=5))
    call = call._replace(tokens=type(call.tokens)(*(x.to("meta") for x in call.tokens)))
    assert resolve_backend("auto", call) == "chunked"
    with pytest.raises(ValueError, match=r'^backend="native" runs on CPUs, got tensors on meta; use "chunked"$'):
        resolve_backend("native", call)
