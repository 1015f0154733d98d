"""The Triton kernels, interpreted on the CPU, equal the definition; and they compile for GPUs.

Races, speed and bfloat16 products are not tested: the interpreter cannot show them, and no GPU was used.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor

import test_ops
from conftest import exhaustive
from test_ops import (
    TOKENS,
    B,
    assert_all_close,
    case_id,
    covering_cases,
    gradients,
    make_form,
    make_inputs,
    make_state,
    outputs_and_gradients,
    outputs_by_name,
    scan,
)
from titans_lm.ops import memory_scan, resolve_backend
from titans_lm.ops.grouping import group_size_sqrt
from titans_lm.ops.triton import fused
from tolerance import assert_close


class Case(test_ops.Case):
    """A case with V == K, at a size that fits the kernels."""

    v_width = property(lambda self: self.width)


SMALL = Case(depth=2, chunk=4, tokens=9, width=16, hidden=16)
OPTIONS = {
    "depth": (1, 2),
    "chunk": (4, 16),
    "tokens": (5, 9),
    "residual": (False, True),
    "clip": (None, 0.7),
    "activation": ("silu", "gelu"),
    "threshold": (None, 18.0),
    "gates": ("inside", "eta"),
    "mask": ("none", "random", "empty row"),
    "start": test_ops.OPTIONS["start"],
    "width": (16,),
    "hidden": (16, 48),  # one block of units, several blocks
}
CASES = covering_cases(Case, OPTIONS)


def assert_equals_naive(case: Case) -> None:
    """Outputs and all gradients in float32 equal the definition's in float64."""
    x = make_inputs(case, torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    assert_all_close(outputs_and_gradients(x, case, "triton"), outputs_and_gradients(wide, case, "naive"))


def scan_in_calls(x: dict[str, Tensor], case: Case, cuts: list[int]) -> dict[str, Tensor]:
    state, parts = make_state(x, case), []
    for start, end in itertools.pairwise([0, *cuts, case.tokens]):
        y, state, surprise = scan(x, case, state, slice(start, end), backend="triton")
        parts.append((y, *surprise))
    y, loss, norm = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return outputs_by_name(y, state, (loss, norm))


def leaves_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() if value.is_floating_point() else value for name, value in x.items()}


# ------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_kernels_are_naive_in_outputs_and_all_gradients(case: Case):
    assert_equals_naive(case)


@pytest.mark.parametrize(
    ("depth", "chunk", "width", "hidden"), [(1, 16, 64, 0), (2, 16, 128, 32), exhaustive(2, 64, 64, 64)]
)
def test_kernels_are_naive_at_the_sizes_of_models(depth: int, chunk: int, width: int, hidden: int):
    assert_equals_naive(
        SMALL._replace(
            depth=depth, chunk=chunk, tokens=chunk + 3, width=width, hidden=hidden, residual=True, clip=0.7, gates="all"
        )
    )


@pytest.mark.parametrize("residual", [False, True])
def test_kernels_write_what_is_above_the_threshold_alone(residual: bool):
    case = SMALL._replace(tokens=5, residual=residual, clip=0.7)
    x = make_inputs(case, torch.float32)
    loss = scan(x, case)[2].loss
    case = case._replace(threshold=float(loss.median()) + 0.01)
    written = scan(x, case)[2].loss > case.threshold
    assert 0 < written.float().mean() < 1
    assert_equals_naive(case)


def test_groups_of_chunks_follow_one_another():
    case = SMALL._replace(chunk=1, tokens=6, hidden=16, residual=True, mask="random", start="ragged")
    assert group_size_sqrt(case.tokens) < case.tokens / 2
    assert_equals_naive(case)


def test_kernels_may_be_cut_anywhere():
    case = SMALL._replace(tokens=9, hidden=16, mask="random", start="ragged", residual=True)
    x = leaves_of(make_inputs(case, torch.float32))
    whole, pieces = outputs_by_name(*scan(x, case, backend="triton")), scan_in_calls(x, case, [1, 6, 6])
    assert_all_close(pieces, whole)
    assert_all_close(gradients(pieces, x), gradients(whole, x))


@pytest.mark.parametrize("scale", [math.nan, exhaustive(1e4)])
def test_kernels_do_not_see_masked_tokens(scale: float):
    case = SMALL._replace(tokens=9, start="ragged", residual=True, clip=0.7)
    x = make_inputs(case, torch.float32)
    there = torch.tensor(
        [[0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]
    ).bool()
    row, place = torch.arange(B)[:, None], torch.stack([t.nonzero()[:, 0] for t in there])
    mixed = dict(x)
    for name in TOKENS:
        garbage = scale * torch.randn(*there.shape, *x[name].shape[2:])
        mixed[name] = garbage.index_put((row, place), x[name]).requires_grad_()
    mixed["mask"] = there
    actual = outputs_by_name(*scan(mixed, case, backend="triton"))
    by = gradients(actual, mixed)
    for name in TOKENS:
        assert by[f"d {name}"].isfinite().all(), name
        assert not by[f"d {name}"][~there].any(), f"a masked token's {name} has a gradient"
    for name in ("y", "loss", "gradient_norm"):
        assert not actual[name][~there].any(), f"{name} of a masked token is not 0"
        actual[name] = actual[name][row, place]
    assert_all_close(actual, outputs_by_name(*scan(x, case, backend="triton")))


def test_kernels_keep_rows_and_heads_apart():
    case = SMALL._replace(mask="random", start="ragged", residual=True)
    x = make_inputs(case, torch.float32)
    one = slice(1, 2)
    alone = {name: value[one] for name, value in x.items()}
    for name in alone.keys() - {"position", "mask", "norm_weight", "norm_bias"}:
        alone[name] = alone[name][:, :, one] if name in TOKENS else alone[name][:, one]
    whole, actual = (outputs_by_name(*scan(part, case, backend="triton")) for part in (x, alone))
    for name, value in whole.items():
        expected = value[one] if name == "position" else value[one][:, :, one]
        if name not in ("y", "loss", "gradient_norm", "position"):
            expected = value[one][:, one]
        assert_close(actual[name], expected, name)


def test_no_gradient_comes_from_the_future_through_kernels():
    case = SMALL._replace(depth=2, tokens=6, start="same")
    x = make_inputs(case, torch.float32)
    leaves = [x[name].requires_grad_() for name in TOKENS]
    y, _, _ = scan(x, case, backend="triton")
    for s in (0, 4):
        found = torch.autograd.grad(y[:, s].sum(), leaves, retain_graph=True)
        for name, gradient in zip(TOKENS, found, strict=True):
            assert not gradient[:, s + 1 :].any(), f"y[{s}] sees a later {name}"
            if name not in ("q", "eta"):
                assert gradient[:, s].any(), f"y[{s}] does not see its own {name}"


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("tokens", [0, 1])
def test_kernels_read_nothing_and_one_token(tokens: int):
    assert_equals_naive(SMALL._replace(tokens=tokens, start="ragged"))


def test_kernels_leave_the_memory_alone_where_all_is_padding():
    case = SMALL._replace(start="ragged")
    x = make_inputs(case, torch.float32)
    x["mask"] = torch.zeros(B, case.tokens, dtype=torch.bool)
    y, state, _ = scan(x, case, backend="triton")
    assert not y.any()
    before = make_state(x, case)
    for part in ("anchor", "weights", "momentum"):
        assert all(map(torch.equal, getattr(state, part), getattr(before, part)))


def test_kernels_give_the_same_without_gradients_and_without_surprise():
    case = SMALL._replace(mask="random", residual=True)
    x = make_inputs(case, torch.float32)
    copy = {name: value.clone() for name, value in x.items()}
    y, state = memory_scan(
        *(x[name] for name in TOKENS), make_state(x, case), chunk_size=case.chunk, form=make_form(x, case),
        mask=x["mask"], backend="triton",
    )  # fmt: skip
    expected = outputs_by_name(*scan(leaves_of(x), case, backend="triton"))
    assert_close(y, expected["y"])
    for layer, w in enumerate(state.weights):
        assert_close(w, expected[f"weights{layer}"])
    assert all(torch.equal(x[name], copy[name]) for name in x), "a call leaves what it is given alone"


def test_kernels_take_bfloat16_tokens_and_keep_a_float32_state():
    case = SMALL._replace(tokens=5, residual=True, start="ragged")
    x = make_inputs(case, torch.float32)
    half = {name: x[name].bfloat16() for name in TOKENS}
    actual = outputs_and_gradients(x | half, case, "triton")
    expected = outputs_and_gradients(x | {name: value.float() for name, value in half.items()}, case, "triton")
    assert actual["y"].dtype == actual["d k"].dtype == torch.bfloat16
    assert actual["weights1"].dtype == torch.float32
    for name in expected:
        # the gradient by y has y's dtype, so gradients are only as close as bfloat16
        value = actual[name].bfloat16() if name.startswith("d ") else actual[name]
        assert_close(value, expected[name], name)


def test_training_keeps_no_weights_per_chunk_for_kernels():
    def saved_weights(chunks: int) -> int:
        case = SMALL._replace(chunk=1, tokens=chunks, hidden=32)
        size = 0

        def pack(saved: Tensor) -> Tensor:
            nonlocal size
            size += saved.numel() if saved.shape[-2:] == (case.width, case.hidden) else 0
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            scan(leaves_of(make_inputs(case, torch.float32)), case, backend="triton")
        return size

    assert saved_weights(9) <= 1.6 * saved_weights(4), "chunks x 2.25, groups x 1.5"


# ------------------------------------------------------------------------------------------------ what cannot run


def without_interpreter(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("TRITON_INTERPRET")


def without_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize(
    ("message", "changes", "dtype"),
    [
        ("needs the package triton", without_triton, torch.float32),
        ("needs tensors on a CUDA device, got cpu", without_interpreter, torch.float32),
        ("keeps a float32 state, got torch.float64", {}, torch.float64),
        ("depth 1 and 2, got 3", {"depth": 3}, torch.float32),
        (r"needs K == V in \(16, 32, 64, 128\), got K=24, V=24", {"width": 24}, torch.float32),
        ("multiple of 16 up to 256, got 272", {"hidden": 272}, torch.float32),
        ("multiple of 16 up to 256, got 24", {"hidden": 24}, torch.float32),
        ("chunk_size <= 64, got 65", {"chunk": 65}, torch.float32),
    ],
)
def test_what_kernels_cannot_run_is_named(message: str, changes, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    case = SMALL._replace(**changes) if isinstance(changes, dict) else SMALL
    x = make_inputs(case, dtype)
    if callable(changes):
        changes(monkeypatch)
    with pytest.raises(ValueError, match=message):
        scan(x, case, backend="triton")


def test_a_value_narrower_than_its_key_has_no_kernel():
    case = test_ops.Case(tokens=5, width=16, hidden=32)
    with pytest.raises(ValueError, match=r"got K=16, V=17"):
        scan(make_inputs(case, torch.float32), case, backend="triton")


def test_auto_is_never_triton():
    calls = [test_ops.make_call(SMALL._replace(tokens=tokens, depth=depth)) for tokens in range(9) for depth in (1, 2)]
    assert "triton" not in {resolve_backend("auto", call) for call in calls}
    assert {resolve_backend("triton", call) for call in calls} == {"triton"}


# ------------------------------------------------------------------------------------------------ products, compiler


def test_products_are_bfloat16_where_tokens_are_and_kernels_are_not_interpreted(monkeypatch: pytest.MonkeyPatch):
    assert fused.product_precision(torch.bfloat16) == "tf32x3", "the interpreter's products of bfloat16 are wrong"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert fused.product_precision(torch.bfloat16) == "bf16"
    assert fused.product_precision(torch.float32) == "tf32x3"


@pytest.mark.parametrize("plan", ["--arch 90", "--arch 80 --depth 1 --precision tf32x3 --mid-chunk --plain"])
def test_kernels_compile_for_gpus(plan: str, tmp_path: Path):
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(script), "--head", "32", "--hidden", "32", "--chunk", "16", "--precision", "bf16"]
    command += ["--kernel", "forward", "states", "backward"]
    done = subprocess.run([*command, *plan.split()], capture_output=True, text=True, check=True, env=environment)
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [fact["kernel"] for fact in facts] == ["forward", "states", "backward"]
    for fact in facts:
        assert fact["shared_bytes"] <= 99 * 1024, "what a block may have on every GPU from sm_80 on"
