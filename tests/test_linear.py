"""Linear memories with chunk_size=1: the triangular systems equal the definition, in bounded memory.

test_ops.py tests every backend, test_special_cases.py the published recurrences.
"""

import itertools

import pytest
import torch
from torch import Tensor

from test_ops import (
    LINEAR,
    OPTIONS,
    Case,
    assert_all_close,
    case_id,
    covering_cases,
    make_call,
    make_inputs,
    outputs_and_gradients,
    scan,
)
from titans_lm.ops import resolve_backend
from titans_lm.ops.delta_rule import BLOCK_SIZE

LINEAR_CASES = covering_cases(
    Case,
    OPTIONS
    | {name: (value,) for name, value in LINEAR.items()}
    | {"tokens": (5, BLOCK_SIZE, 2 * BLOCK_SIZE + 13), "activation": ("silu",)},
)


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("case", LINEAR_CASES, ids=case_id)
def test_linear_is_naive_in_outputs_and_all_gradients(case: Case):
    x = make_inputs(case)
    assert_all_close(outputs_and_gradients(x, case, "linear"), outputs_and_gradients(x, case, "naive"))


@pytest.mark.parametrize("width", [4, 64])
def test_linear_in_float32_is_near_naive_in_float64(width: int):
    case = Case(**LINEAR, tokens=2 * BLOCK_SIZE + 5, gates="all", mask="random", width=width)
    x = make_inputs(case, torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    assert_all_close(outputs_and_gradients(x, case, "linear"), outputs_and_gradients(wide, case, "naive"))


@pytest.mark.parametrize("name", ["theta", "eta", "alpha"])
def test_a_gate_is_0_or_1_at_every_token(name: str):
    case = Case(**LINEAR, tokens=BLOCK_SIZE + 9)
    x = make_inputs(case)
    x[name] = torch.randint(0, 2, x[name].shape).double()
    if name == "theta":
        x["eta"] *= 0.1  # with more momentum, steps of 1 amplify rounding
    assert_all_close(outputs_and_gradients(x, case, "linear"), outputs_and_gradients(x, case, "naive"))


# ------------------------------------------------------------------------------------------------ chosen


WRONG = {
    "runs memories of depth 1, got 2": {"depth": 2},
    "runs with chunk_size=1, got 4": {"chunk": 4},
    "runs the plain form, got the residual form": {"residual": True},
    "runs without clip and threshold, got clip=0.7, threshold=None": {"clip": 0.7},
    "runs without clip and threshold, got clip=None, threshold=2.0": {"threshold": 2.0},
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_linear_does_not_read_is_named(reason: str):
    case = Case(**LINEAR | WRONG[reason], tokens=5)
    with pytest.raises(ValueError, match=f'^backend="linear" {reason}; use "chunked"$'):
        scan(make_inputs(case), case, backend="linear")


def test_auto_reads_a_linear_memory_with_chunk_one_by_linear():
    calls = [make_call(Case(**LINEAR, tokens=tokens)) for tokens in (0, 1, 2)]
    assert [resolve_backend("auto", call) for call in calls] == ["native", "native", "linear"]
    for name, other in (("depth", 2), ("chunk", 2), ("residual", True), ("clip", 0.7), ("threshold", 0.0)):
        assert resolve_backend("auto", make_call(Case(**LINEAR | {name: other}, tokens=2))) == "native", name


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(case: Case, max_saved_bytes: int) -> int:
    """The bytes that "linear" saves for its backward pass."""
    x = {
        name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case, torch.float32).items()
    }
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scan(x, case, backend="linear", max_saved_bytes=max_saved_bytes)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("width", [16, 64])
def test_what_linear_leaves_for_its_backward_pass_is_what_it_counts(width: int):
    case = Case(**LINEAR, tokens=8 * BLOCK_SIZE, width=width)
    kept = saved_bytes(case, 2**40)
    count = next(
        2**n for n in itertools.count() if saved_bytes(case, 2**n) == kept
    )  # the smallest limit that saves all
    assert count / 2.2 < kept < 1.1 * count
    assert saved_bytes(case, 0) < kept / 4
