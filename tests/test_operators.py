"""The operators that PyTorch knows: their registrations, and that compiled calls are eager ones."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from test_ops import (
    TOKENS,
    Case,
    assert_all_close,
    gradients,
    make_form,
    make_inputs,
    make_state,
    outputs_and_gradients,
    outputs_by_name,
    scan,
)
from titans_lm.layers.short_conv import qkv_features
from titans_lm.ops import ScanInputs, Tokens, memory_scan
from titans_lm.ops.operators import Arguments

pytestmark = pytest.mark.usefixtures("unchecked")
WHOLE = Case(chunk=8, tokens=16, residual=True, width=8, hidden=16, clip=0.7)
"""Rows of whole vectors: no saved activation has padding, whose numbers differ from call to call."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def arguments(case: Case, max_saved_bytes: int, backend: str = "auto", requires_grad: bool = True) -> tuple[Any, ...]:
    x = {k: v.requires_grad_(requires_grad) if v.is_floating_point() else v for k, v in make_inputs(case).items()}
    tokens, form = Tokens(*(x[name] for name in TOKENS)), make_form(x, case)
    call = ScanInputs(tokens, make_state(x, case), case.chunk, form, x.get("mask"), True, max_saved_bytes)
    return tuple(Arguments.of(call, backend, max_saved_bytes))


@pytest.mark.parametrize(
    ("case", "max_saved_bytes", "backend"),
    [
        (WHOLE, 2**28, "auto"),
        (WHOLE._replace(residual=True, start="ragged"), 0, "auto"),
        (Case(tokens=7, depth=3, mask="random", residual=True), -1, "chunked"),
        (Case(tokens=7, depth=1, chunk=1), 2**28, "auto"),  # "linear"
    ],
)
def test_scan_is_registered_as_pytorch_wants_it(case: Case, max_saved_bytes: int, backend: str):
    torch.library.opcheck(torch.ops.titans_lm.scan.default, arguments(case, max_saved_bytes, backend))


@pytest.mark.parametrize("residual", [False, True])
def test_step_is_registered_as_pytorch_wants_it(residual: bool):
    torch.library.opcheck(torch.ops.titans_lm.step.default, arguments(Case(tokens=1, residual=residual), -1))


def test_features_are_registered_as_pytorch_wants_it():
    past, filters = (torch.randn(*shape, requires_grad=True) for shape in ((2, 9, 48), (48, 3)))
    torch.library.opcheck(torch.ops.titans_lm.features.default, (past, filters, 2, 8))


def test_the_backward_operators_are_registered_as_pytorch_wants_it():
    given = arguments(WHOLE, 2**28, requires_grad=False)
    out = torch.ops.titans_lm.scan(*given)
    torch.library.opcheck(torch.ops.titans_lm.scan_backward.default, (out[9:], [*out[:2], None, *out[3:9]], *given))
    given = arguments(WHOLE._replace(tokens=1), -1, requires_grad=False)
    out = torch.ops.titans_lm.step(*given)
    torch.library.opcheck(torch.ops.titans_lm.step_backward.default, (out, *given))
    past, filters = torch.randn(2, 9, 48), torch.randn(48, 3)
    out = torch.ops.titans_lm.features(past, filters, 2, 8)
    torch.library.opcheck(torch.ops.titans_lm.features_backward.default, (past, filters, 2, 8, out))


def compile_scan(monkeypatch: pytest.MonkeyPatch, backend: Any = "aot_eager") -> None:
    """Compile `memory_scan` where test_ops.py calls it."""
    monkeypatch.setattr("test_ops.memory_scan", torch.compile(memory_scan, fullgraph=True, backend=backend))


@pytest.mark.parametrize("max_saved_bytes", [0, 2**28])
def test_ten_lengths_are_compiled_at_most_three_times(max_saved_bytes: int, monkeypatch: pytest.MonkeyPatch):
    counter = CompileCounterWithBackend("aot_eager")
    for tokens in (9, 10, 12, 13, 4, 33, 3, 64, 2, 27):
        case = Case(tokens=tokens, start="same", residual=True, clip=0.7)
        x = make_inputs(case)
        leaves = {name: v.clone().requires_grad_() if v.is_floating_point() else v for name, v in x.items()}
        with monkeypatch.context() as patch:
            compile_scan(patch, counter)
            out = outputs_by_name(*scan(leaves, case, max_saved_bytes=max_saved_bytes))
        assert_all_close(out | gradients(out, leaves), outputs_and_gradients(x, case, "naive"))
    assert 0 < counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["auto", "chunked"])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=21, mask="random", start="ragged", clip=0.7),
        Case(tokens=21, mask="empty row", residual=True, activation="gelu"),
        Case(tokens=140, chunk=100, start="ragged", threshold=2.0),  # chunks that are cut
        Case(tokens=20, depth=1, chunk=1),  # "linear"
        Case(tokens=1, start="ragged"),
    ],
)
def test_compiled_calls_are_naive_in_outputs_and_all_gradients(case: Case, backend: str, monkeypatch):
    x = make_inputs(case)
    expected = outputs_and_gradients(x, case, "naive")
    compile_scan(monkeypatch)
    assert_all_close(outputs_and_gradients(x, case, backend), expected)


def test_large_saved_activations_have_a_block_for_each_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("titans_lm.ops.cpu.native.SAVED_BLOCK_BYTES", 1)
    case = Case(tokens=21, start="ragged")
    x = make_inputs(case)
    expected = outputs_and_gradients(x, case, "naive")
    compile_scan(monkeypatch)
    assert_all_close(outputs_and_gradients(x, case, "auto"), expected)


def flops(case: Case, backend: str) -> int:
    x = make_inputs(case)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1]}  # PyTorch leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        outputs_and_gradients(x, case, backend)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", [Case(), Case(depth=3, tokens=64), Case(depth=1, chunk=16)])
def test_flops_are_those_of_chunks_as_matrix_products(case: Case):
    assert flops(case, "native") == flops(case, "chunked") > 0


def test_flops_of_a_token_are_those_of_a_step():
    x, case = make_inputs(Case(tokens=1)), Case(tokens=1)
    counts = []
    for backend in ("native", "step"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            memory_scan(
                *(x[name] for name in TOKENS),
                make_state(x, case),
                chunk_size=4,
                form=make_form(x, case),
                backend=backend,
            )
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_features_are_the_convolution_s():
    past, filters = (torch.randn(*shape, requires_grad=True) for shape in ((2, 9, 48), (48, 3)))
    with FlopCounterMode(display=False) as counter:
        sum(x.sum() for x in qkv_features(past, filters, 2, 8, compiled=True)).backward()
    assert counter.get_total_flops() == 4 * (2 * 2 * 7 * 48 * 3)


def test_profilers_show_the_compiled_code_by_name():
    def run(x: dict[str, Tensor], case: Case) -> None:
        outputs_and_gradients(x, case, "native")

    with profile() as profiler:
        run(make_inputs(Case()), Case())
        qkv_features(torch.randn(2, 9, 48), torch.randn(48, 3), 2, 8, compiled=True)
    names = {event.key for event in profiler.key_averages()}
    assert {"titans_forward", "titans_backward", "titans_features_forward"} <= names
