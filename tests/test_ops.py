"""`memory_scan`: every backend equals the definition; cuts, padding, other rows and later tokens change nothing."""

import gc
import importlib
import itertools
import math
import random
import re
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from conftest import exhaustive
from titans_lm.ops import (
    MemoryForm,
    MemoryState,
    ScanInputs,
    Tokens,
    api,
    delta_rule,
    gather_tokens,
    grouping,
    initial_state,
    lay_out,
    left_align,
    memory_scan,
    resolve_backend,
    retrieve,
    undo_left_align,
)
from titans_lm.ops.chunked import scan as scan_module
from titans_lm.ops.decays import Decays, chunk_decays, decays_backward
from tolerance import assert_close

B, H, K, HIDDEN = 2, 2, 4, 6
law = settings(deadline=None, max_examples=25, derandomize=True)

# ------------------------------------------------------------------------------------------------ cases


class Case(NamedTuple):
    depth: int = 2
    chunk: int = 4
    tokens: int = 63
    residual: bool = False
    clip: float | None = None
    activation: str = "silu"
    threshold: float | None = None
    gates: str = "inside"
    mask: str = "none"
    start: str = "boundary"
    width: int = K
    hidden: int = HIDDEN

    @property
    def v_width(self) -> int:
        return self.width if self.residual else self.width + 1


OPTIONS = {
    "depth": (1, 2, 3, 4),
    "chunk": (1, 4, 16, 64),
    "tokens": (63, 257),
    "residual": (False, True),
    "clip": (None, 0.7),
    "activation": ("silu", "gelu"),
    "threshold": (None, 2.0),
    "gates": ("inside", "theta", "eta", "alpha", "all"),  # which gates are exactly 0 or exactly 1 at some tokens
    "mask": ("none", "random", "left", "empty row"),
    "start": ("boundary", "same", "ragged"),  # positions in the chunk, with weights that differ from the anchor
}


def pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(case._asdict().items(), 2))


def covering_cases(kind: type[Case], options: dict[str, tuple]) -> list[Case]:
    """A pairwise covering: every value of every option occurs with every value of every other option."""
    draw = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(options, 2)
        for x, y in itertools.product(options[a], options[b])
    }
    cases = []
    while missing:
        candidates = [kind(**{name: draw.choice(values) for name, values in options.items()}) for _ in range(100)]
        cases.append(max(candidates, key=lambda case: len(missing & pairs(case))))
        missing -= pairs(cases[-1])
    return cases


CASES = covering_cases(Case, OPTIONS)
LINEAR = {"depth": 1, "chunk": 1, "residual": False, "clip": None, "threshold": None}
"""The options of a case that `backend="linear"` can run."""


def supported(case: Case, backend: str) -> Case:
    """`case`, changed where `backend` could not run it."""
    if backend == "linear":
        return case._replace(**LINEAR)
    return case._replace(tokens=1) if backend == "step" else case


def case_id(case: Case) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case[: len(OPTIONS)])


def make_gate(name: str, case: Case, dtype: torch.dtype) -> Tensor:
    """A gate inside (0, 1), or, where the case asks, exactly 0 at some tokens and exactly 1 at others.

    A deep memory that forgets all is 0 from then on, and one without a clip amplifies rounding exponentially when its
    steps are large: neither tests anything. So alpha, and theta without a clip, reach 1 in the last tokens alone.
    """
    gentle = case.clip is None
    top = {"theta": 0.01 if gentle else 0.1, "eta": 0.8, "alpha": 0.02}
    gate = top[name] * torch.rand(B, case.tokens, H, dtype=dtype)
    if case.gates not in (name, "all"):
        return gate
    place = torch.randint(0, 6, gate.shape)
    late = name == "alpha" or (name == "theta" and gentle)
    allowed = torch.arange(case.tokens)[:, None] >= (case.tokens - 8 if late else 0)
    return gate.masked_fill(place == 0, 0.0).masked_fill((place == 1) & allowed, 1.0)


def make_mask(case: Case) -> Tensor | None:
    token = torch.arange(case.tokens).expand(B, -1)
    if case.mask == "random":
        return torch.rand(B, case.tokens) < 0.7
    if case.mask == "left":
        return token >= torch.tensor([[case.tokens // 3], [2]])
    if case.mask == "empty row":
        return (token % 3 != 1) & torch.tensor([[True], [False]])
    return None


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """All inputs of the operation by name: tokens, gates, state, norm. No part of the state is 0."""
    torch.manual_seed(seed)
    tokens = (B, case.tokens, H)
    x = {
        name: torch.nn.functional.normalize(torch.randn(*tokens, case.width, dtype=dtype), dim=-1)
        for name in ("q", "k")
    }
    x["v"] = torch.randn(*tokens, case.v_width, dtype=dtype)
    x |= {name: make_gate(name, case, dtype) for name in ("theta", "eta", "alpha")}
    widths = [case.width, *[case.hidden] * (case.depth - 1), case.v_width]
    for part, scale in (("anchor", 1.0), ("weights", 1.0), ("momentum", 0.3)):
        for layer, (i, o) in enumerate(itertools.pairwise(widths)):
            x[f"{part}{layer}"] = scale * torch.randn(B, H, i, o, dtype=dtype) / i**0.5
    if case.residual:
        x["norm_weight"] = 1 + 0.3 * torch.randn(H, case.width, dtype=dtype)
        x["norm_bias"] = 0.3 * torch.randn(H, case.width, dtype=dtype)
    start = {"boundary": (0, 0), "same": (2, 2), "ragged": (1, -1)}[case.start]
    x["position"] = torch.tensor(start) % case.chunk
    mask = make_mask(case)
    return x if mask is None else {**x, "mask": mask}


def make_form(x: dict[str, Tensor], case: Case) -> MemoryForm:
    norm = (x["norm_weight"], x["norm_bias"]) if case.residual else None
    return MemoryForm(activation=case.activation, norm=norm, clip=case.clip, threshold=case.threshold)


def make_state(x: dict[str, Tensor], case: Case) -> MemoryState:
    parts = (tuple(x[f"{part}{layer}"] for layer in range(case.depth)) for part in ("anchor", "weights", "momentum"))
    return MemoryState(*parts, x["position"])


TOKENS = ("q", "k", "v", "theta", "eta", "alpha")


def scan(x: dict[str, Tensor], case: Case, state: MemoryState | None = None, part: slice = slice(None), **options):
    """Run `memory_scan` on the tokens `part` -> y, state, surprise."""
    mask = x["mask"][:, part] if "mask" in x else None
    return memory_scan(
        *(x[name][:, part] for name in TOKENS),
        make_state(x, case) if state is None else state,
        chunk_size=case.chunk,
        form=make_form(x, case),
        mask=mask,
        surprise=True,
        **options,
    )


def outputs_by_name(y: Tensor, state: MemoryState, surprise: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """All outputs by name."""
    out = {"y": y, "loss": surprise[0], "gradient_norm": surprise[1], "position": state.position}
    for part in ("anchor", "weights", "momentum"):
        out |= {f"{part}{layer}": w for layer, w in enumerate(getattr(state, part))}
    return out


def gradients(out: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a random linear function of all outputs by every floating-point input."""
    torch.manual_seed(1)
    weigh = (torch.randn(value.shape, dtype=torch.float64).to(value) for value in out.values())
    total = sum((value * w).sum() for value, w in zip(out.values(), weigh, strict=True) if value.requires_grad)
    leaves = {name: value for name, value in x.items() if value.requires_grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {f"d {name}": g for name, g in zip(leaves, found, strict=True)}


def outputs_and_gradients(x: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    leaves = {name: v.clone().requires_grad_() if v.is_floating_point() else v for name, v in x.items()}
    out = outputs_by_name(*scan(leaves, case, backend=backend))
    return out | gradients(out, leaves)


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name)


# ------------------------------------------------------------------------------------------------ backends agree


chunk_backends = pytest.mark.parametrize("backend", ["chunked", "native"])
length_backends = pytest.mark.parametrize("backend", ["chunked", "native", "linear"])
norm_backends = pytest.mark.parametrize(
    ("residual", "backend"),
    [(False, "chunked"), (True, "chunked"), (False, "native"), (True, "native"), (False, "linear")],
)
any_case_backends = pytest.mark.parametrize("backend", ["auto", "chunked"])
"""For any case. "auto" chooses "native", and "linear" where it can run."""


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_chunked_is_naive_in_outputs_and_all_gradients(case: Case, subtests: pytest.Subtests):
    x = make_inputs(case)
    expected = outputs_and_gradients(x, case, "naive")
    for backend in ("chunked", "native"):
        with subtests.test(backend):
            assert_all_close(outputs_and_gradients(x, case, backend), expected)


BACKENDS = ["naive", "chunked", "native", "step", "linear"]


@length_backends
def test_keys_and_queries_may_have_any_length(backend: str):
    case = supported(Case(tokens=40), backend)
    x = make_inputs(case)
    x |= {name: x[name] * (0.2 + 2 * torch.rand(B, case.tokens, H, 1)) for name in ("q", "k")}
    assert_all_close(outputs_and_gradients(x, case, backend), outputs_and_gradients(x, case, "naive"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_asking_for_surprise_changes_no_number(backend: str):
    case = supported(Case(mask="random", residual=True, clip=0.7, threshold=2.0, tokens=20), backend)
    x = make_inputs(case)
    asked = outputs_by_name(*scan(x, case, backend=backend))
    y, state = memory_scan(
        *(x[name] for name in TOKENS), make_state(x, case), chunk_size=case.chunk, form=make_form(x, case),
        mask=x["mask"], backend=backend,
    )  # fmt: skip
    assert torch.equal(y, asked["y"])
    assert all(torch.equal(w, asked[f"weights{layer}"]) for layer, w in enumerate(state.weights))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_token_is_the_same_in_every_form(case: Case):
    case = case._replace(tokens=1)
    x = make_inputs(case)
    expected = outputs_and_gradients(x, case, "naive")
    for backend in ("step", "chunked", "native"):
        assert_all_close(outputs_and_gradients(x, case, backend), expected)
    outputs = outputs_by_name(*scan(x, case, backend="naive"))
    for backend in ("step", "native"):  # decoding runs these, without gradients
        assert_all_close(outputs_by_name(*scan(x, case, backend=backend)), outputs)


def assert_untouched(state: MemoryState, before: MemoryState) -> None:
    assert torch.equal(state.position, before.position)
    for got, had in zip(state.weights + state.momentum, before.weights + before.momentum, strict=True):
        assert torch.equal(got, had)
    for row in range(B):  # at a chunk start the anchor is the weights
        anchor = before.weights if before.position[row] == 0 else before.anchor
        assert all(torch.equal(got[row], had[row]) for got, had in zip(state.anchor, anchor, strict=True))


@pytest.mark.parametrize("backend", ["auto", "naive", "chunked", "native", "linear"])
@pytest.mark.parametrize("case", CASES[:8], ids=case_id)
def test_no_tokens_leave_the_memory_as_it_was(case: Case, backend: str):
    case = supported(case._replace(tokens=0), backend)
    x = make_inputs(case)
    y, state, surprise = scan(x, case, backend=backend)
    assert y.shape == (B, 0, H, case.v_width)
    assert surprise.loss.shape == surprise.gradient_norm.shape == (B, 0, H)
    assert_untouched(state, make_state(x, case))


@pytest.mark.parametrize("case", CASES[:8], ids=case_id)
def test_numbers_do_not_depend_on_whether_gradients_are_on(case: Case):
    for backend in ("naive", "chunked", "native", "linear"):
        case = supported(case._replace(tokens=21), backend)
        x = make_inputs(case)
        expected = outputs_and_gradients(x, case, backend)
        with torch.no_grad():
            actual = outputs_by_name(*scan(x, case, backend=backend))
        assert_all_close(actual, {name: expected[name] for name in actual})


@norm_backends
@pytest.mark.parametrize("mask", ["none", "random"])
def test_gradcheck(residual: bool, mask: str, backend: str):
    case = Case(2, 3, 7, residual, clip=0.7 if residual else None, mask=mask, start="ragged", gates="alpha")
    case = supported(case, backend)
    x = make_inputs(case)
    leaves = {name: v.requires_grad_() for name, v in x.items() if v.is_floating_point()}

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        out = outputs_by_name(*scan(x | dict(zip(leaves, values, strict=True)), case, backend=backend))
        return tuple(value for value in out.values() if value.requires_grad)

    # finite differences step outside [0, 1] at a gate of exactly 1, where the operation is not defined
    x["alpha"].data.clamp_(1e-3, 1 - 1e-3)
    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("depth", [1, 4])
def test_chunked_in_float32_is_near_naive_in_float64(depth: int, chunk: int, residual: bool, subtests: pytest.Subtests):
    case = Case(depth, chunk, 40, residual, clip=1.0, gates="all", mask="random", start="ragged")
    x = make_inputs(case, torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in x.items()}
    expected = outputs_and_gradients(wide, case, "naive")
    for backend in ("chunked", "native"):
        with subtests.test(backend):
            assert_all_close(outputs_and_gradients(x, case, backend), expected)


# ------------------------------------------------------------------------------------------------ cut, mask, rows

small_cases = st.builds(
    Case,
    depth=st.integers(1, 3),
    chunk=st.sampled_from([1, 3, 4, 16]),
    tokens=st.integers(1, 40),
    residual=st.booleans(),
    clip=st.sampled_from(OPTIONS["clip"]),
    activation=st.sampled_from(OPTIONS["activation"]),
    threshold=st.sampled_from(OPTIONS["threshold"]),
    gates=st.sampled_from(OPTIONS["gates"]),
    mask=st.sampled_from(OPTIONS["mask"]),
    start=st.sampled_from(OPTIONS["start"]),
    width=st.just(K),
    hidden=st.just(HIDDEN),
)
small_cases |= small_cases.map(lambda case: supported(case, "linear"))


def scan_in_calls(x: dict[str, Tensor], case: Case, cuts: list[int], backend: str = "auto") -> dict[str, Tensor]:
    state, parts = make_state(x, case), []
    for start, end in itertools.pairwise([0, *sorted(min(cut, case.tokens) for cut in cuts), case.tokens]):
        y, state, surprise = scan(x, case, state, slice(start, end), backend=backend)
        parts.append((y, *surprise))
    y, loss, norm = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return outputs_by_name(y, state, (loss, norm))


@any_case_backends
@law
@given(case=small_cases, cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 99))
def test_cut_anywhere(backend: str, case: Case, cuts: list[int], seed: int):
    x = make_inputs(case, seed=seed)
    assert_all_close(scan_in_calls(x, case, cuts, backend), outputs_by_name(*scan(x, case, backend=backend)))


@length_backends
def test_gradients_cross_a_cut(backend: str):
    case = supported(Case(2, 4, 23, residual=True, mask="random", start="ragged"), backend)
    x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}
    whole, pieces = outputs_by_name(*scan(x, case, backend=backend)), scan_in_calls(x, case, [1, 2, 9, 16], backend)
    assert_all_close(gradients(pieces, x), gradients(whole, x))


@any_case_backends
@law
@given(case=small_cases, junk=st.integers(1, 20), scale=st.sampled_from([1.0, 1e4]), seed=st.integers(0, 99))
def test_masked_tokens_are_invisible(backend: str, case: Case, junk: int, scale: float, seed: int):
    case = case._replace(mask="none")
    x = make_inputs(case, seed=seed)
    place = torch.stack([torch.randperm(case.tokens + junk)[: case.tokens].sort().values for _ in range(B)])
    row = torch.arange(B)[:, None]
    mixed = dict(x)
    for name in TOKENS:
        garbage = scale * torch.randn(B, case.tokens + junk, *x[name].shape[2:], dtype=torch.float64)
        mixed[name] = garbage.index_put((row, place), x[name]).requires_grad_()
    mixed["mask"] = torch.zeros(B, case.tokens + junk, dtype=torch.bool).index_put((row, place), torch.tensor(True))

    actual, expected = (
        outputs_by_name(*scan(mixed, case, backend=backend)),
        outputs_by_name(*scan(x, case, backend=backend)),
    )
    grads = gradients(actual, mixed)
    for name in ("y", "loss", "gradient_norm"):
        assert not actual[name][~mixed["mask"]].any(), f"{name} of a masked token is not 0"
        actual[name] = actual[name][row, place]
    assert_all_close(actual, expected)
    for name in TOKENS:
        assert not grads[f"d {name}"][~mixed["mask"]].any(), f"a masked token's {name} has a gradient"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_may_be_nan(backend: str, residual: bool):
    """0 * nan is nan, so masked tokens must be replaced, not multiplied by 0."""
    case = supported(Case(tokens=21, residual=residual, clip=0.7, start="ragged"), backend)
    x = make_inputs(case)
    x["mask"] = torch.arange(case.tokens) % torch.tensor([[3], [2]]) != torch.tensor(
        [[1], [0]]
    )  # with one token, row 1 has no valid one

    def filled(junk: float) -> dict[str, Tensor]:
        tokens = {name: x[name].clone() for name in TOKENS}
        for token in tokens.values():
            token[~x["mask"]] = junk
        return outputs_and_gradients({**x, **tokens}, case, backend)

    assert_all_close(filled(math.nan), filled(0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_of_padding_alone_changes_nothing(backend: str):
    case = supported(Case(tokens=5, start="ragged"), backend)
    x = make_inputs(case)
    x["mask"] = torch.zeros(B, case.tokens, dtype=torch.bool)
    y, state, surprise = scan(x, case, backend=backend)
    assert not y.any()
    assert not surprise.loss.any()
    assert_untouched(state, make_state(x, case))


@any_case_backends
@law
@given(case=small_cases, row=st.integers(0, B - 1), seed=st.integers(0, 99))
def test_rows_and_heads_are_independent(backend: str, case: Case, row: int, seed: int):
    x = make_inputs(case, seed=seed)
    one = slice(row, row + 1)  # row 0 and head 0, or row 1 and head 1
    alone = {name: value[one] for name, value in x.items()}
    for name in alone.keys() - {"position", "mask", "norm_weight", "norm_bias"}:
        alone[name] = alone[name][:, :, one] if name in TOKENS else alone[name][:, one]
    whole, actual = (
        outputs_by_name(*scan(x, case, backend=backend)),
        outputs_by_name(*scan(alone, case, backend=backend)),
    )
    for name, value in whole.items():
        expected = value[one]
        if name in ("y", "loss", "gradient_norm"):
            expected = expected[:, :, one]
        elif name != "position":
            expected = expected[:, one]
        assert_close(actual[name], expected, name)


# ------------------------------------------------------------------------------------------------ layout of ragged rows


@law
@given(
    tokens=st.integers(1, 12),
    chunk=st.integers(1, 5) | st.just(2**30),
    position=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layout_puts_every_token_at_its_place_in_a_chunk(
    tokens: int, chunk: int, position: list[int], masked: bool, seed: int
):
    torch.manual_seed(seed)
    mask = torch.rand(3, tokens) < 0.6 if masked else None
    position = torch.tensor(position)
    layout = lay_out(mask, position, tokens, chunk)
    there = torch.ones(3, tokens, dtype=torch.bool) if mask is None else mask
    number = torch.arange(1, tokens + 1).expand(3, -1) * there
    assert torch.equal(layout.from_slots(layout.to_slots(number)), number)
    assert torch.equal(layout.length, there.sum(1))
    edges = [0, *itertools.chain.from_iterable((start, end) for start, end, _ in layout.runs()), layout.slots]
    assert edges[::2] == edges[1::2], "spans follow one another"
    assert all((end - start) % width == 0 for start, end, width in layout.runs())

    present = torch.ones(3, layout.slots, dtype=torch.bool) if layout.valid is None else layout.valid
    for row in range(3):
        used = present[row].nonzero()[:, 0]
        assert torch.equal(layout.to_slots(number)[row, used], number[row, there[row]]), "in order"
        assert layout.slots <= 2 * tokens, "a chunk that no row fills is not laid out"
        place = (position[row] + torch.arange(len(used))) % chunk
        after = used >= layout.lead
        assert torch.equal(place[after], (used[after] - layout.lead) % chunk), "on the grid from `head` on"
        assert (place[~after].diff() > 0).all(), "no chunk ends inside the head"


@pytest.mark.parametrize("start", [0, 3, 7])
def test_rows_that_agree_need_no_layout(start: int):
    layout = lay_out(None, torch.full((3,), start), 10, 4)
    assert layout.token_of_slot is None
    assert layout.lead == -start % 4


def test_left_aligned_tokens_are_restored():
    torch.manual_seed(0)
    mask, x = torch.rand(3, 9) < 0.5, torch.randn(3, 9, 2)
    order, length = left_align(mask)
    aligned = gather_tokens(x, order)
    for row in range(3):
        assert torch.equal(aligned[row, : length[row]], x[row, mask[row]])
    assert torch.equal(undo_left_align(aligned, mask), x * mask[..., None])


# ------------------------------------------------------------------------------------------------ causality


@any_case_backends
@law
@given(case=small_cases, token=st.integers(0, 39), seed=st.integers(0, 99))
def test_a_token_does_not_change_what_came_before(backend: str, case: Case, token: int, seed: int):
    token = token % case.tokens
    x = make_inputs(case, seed=seed)
    other = make_inputs(case, seed=seed + 100)
    changed = dict(x)
    for name in TOKENS:
        changed[name] = torch.cat([x[name][:, :token], other[name][:, token:]], 1)
    before, after = (
        outputs_by_name(*scan(x, case, backend=backend)),
        outputs_by_name(*scan(changed, case, backend=backend)),
    )
    for name in ("y", "loss", "gradient_norm"):
        assert torch.equal(before[name][:, :token], after[name][:, :token]), name


@norm_backends
@pytest.mark.parametrize("mask", ["none", "random"])
def test_no_gradient_comes_from_the_future(residual: bool, mask: str, backend: str):
    case = supported(Case(2, 4, 11, residual, mask=mask, start="same"), backend)
    x = make_inputs(case)
    leaves = [x[name].requires_grad_() for name in TOKENS]
    y, _, _ = scan(x, case, backend=backend)
    for s in range(case.tokens):
        found = torch.autograd.grad(y[:, s].sum(), leaves, retain_graph=True)
        for name, gradient in zip(TOKENS, found, strict=True):
            assert not gradient[:, s + 1 :].any(), f"y[{s}] sees a later {name}"
            if name not in ("q", "eta") and (mask == "none" or x["mask"][:, s].any()):
                assert gradient[:, s].any(), f"y[{s}] does not see its own {name}: it is read after its write"


# ------------------------------------------------------------------------------------------------ arguments


@chunk_backends
@pytest.mark.parametrize("case", CASES[:6], ids=case_id)
def test_a_token_reads_the_memory_after_its_own_write(case: Case, backend: str):
    case = case._replace(tokens=1, mask="none")
    x = make_inputs(case)
    y, state, _ = scan(x, case, backend=backend)
    assert_close(y, retrieve(x["q"], state.weights, make_form(x, case)))


@pytest.mark.parametrize("backend", ["naive", "chunked", "native"])
def test_below_the_threshold_nothing_is_written(backend: str):
    case = Case(tokens=13, threshold=float("inf"), start="ragged")
    x = make_inputs(case)
    unwritten = x | {"theta": torch.zeros_like(x["theta"])}
    expected = outputs_by_name(*scan(unwritten, case._replace(threshold=None), backend=backend))
    assert_all_close(outputs_by_name(*scan(x, case, backend=backend)), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_of_decays_are_those_of_small_changes(masked: bool):
    """Also with empty slots in the middle, which no layout makes today, and with gates of 0 and 1."""
    torch.manual_seed(0)
    gates = torch.rand(3, 2, 7, dtype=torch.float64) * 0.8 + 0.1
    gates[:, :, 2], gates[:, :, 5] = 0, 1
    present = torch.tensor(
        [[True, False, True, True, False, True, False], [False, True, True, False, True, True, True]]
    )
    left, saved = chunk_decays(*gates, present if masked else None)
    by = Decays(*(torch.randn_like(x) for x in left))
    expected, step = torch.zeros_like(gates), 1e-6
    for place in range(gates.numel()):
        above, below = gates.clone(), gates.clone()
        above.view(-1)[place] += step
        below.view(-1)[place] -= step
        up, down = (chunk_decays(*g, present if masked else None)[0] for g in (above, below))
        change = sum(((u - d) * b).sum() for u, d, b in zip(up, down, by, strict=True))
        expected.view(-1)[place] = change / (2 * step)
    assert torch.allclose(torch.stack(decays_backward(by, saved)), expected, atol=1e-8)


def scan_without_grad(x: dict[str, Tensor], case: Case, backend: str) -> tuple[dict[str, Tensor], int]:
    """Run without gradients and surprise. Returns all outputs, and the operations of the matrix products."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y, state = memory_scan(
            *(x[name] for name in TOKENS), make_state(x, case), chunk_size=case.chunk, form=make_form(x, case),
            mask=x.get("mask"), backend=backend,
        )  # fmt: skip
    nothing = torch.zeros(0)
    out = outputs_by_name(y, state, (nothing, nothing))
    return out, counter.get_total_flops()


@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize(
    ("depth", "residual"),
    [(1, True), (2, False), *(exhaustive(*case) for case in ((1, False), (2, True), (3, False), (3, True)))],
)
def test_chunks_that_write_nothing_cost_less_and_change_no_number(depth: int, residual: bool, mask: str):
    case = Case(depth=depth, residual=residual, mask=mask, start="ragged", tokens=8 * 4 + 3)
    x = make_inputs(case)
    _, every = scan_without_grad(x, case, "chunked")
    token = torch.arange(case.tokens)[None, :, None]
    x["theta"] = x["theta"] * ((token // 4) % 3 == 1)
    actual, some = scan_without_grad(x, case, "chunked")
    expected, _ = scan_without_grad(x, case, "naive")
    assert_all_close(actual, expected)
    assert_all_close(scan_without_grad(x, case, "native")[0], expected)
    _, _, surprise = scan(x, case, backend="chunked")
    case = case._replace(threshold=float((surprise.loss * (x["theta"] > 0)).amax()) * 0.5)
    actual, few = scan_without_grad(x, case, "chunked")
    expected, _ = scan_without_grad(x, case, "naive")
    assert_all_close(actual, expected)
    assert_all_close(scan_without_grad(x, case, "native")[0], expected)
    case = case._replace(threshold=float("inf"))
    x["theta"][:] = 0.0
    actual, none = scan_without_grad(x, case, "chunked")
    expected, _ = scan_without_grad(x, case, "naive")
    assert_all_close(actual, expected)
    assert_all_close(scan_without_grad(x, case, "native")[0], expected)
    assert none < min(some, few) <= max(some, few) <= every
    assert mask == "random" or max(some, few) < every  # a mask moves tokens between chunks


def test_the_threshold_separates_written_tokens_by_their_loss():
    case = Case(depth=1, chunk=64, tokens=40)
    x = make_inputs(case)
    _, _, surprise = scan(x, case)
    tau = float(surprise.loss.median())
    chosen = x | {"theta": x["theta"] * (surprise.loss > tau)}
    assert 0 < (surprise.loss > tau).double().mean() < 1
    assert_all_close(outputs_by_name(*scan(x, case._replace(threshold=tau))), outputs_by_name(*scan(chosen, case)))


def test_the_clip_bounds_the_gradient_and_keeps_its_direction():
    case = Case(depth=1, chunk=1, tokens=1)
    x = make_inputs(case) | {"eta": torch.zeros(B, 1, H).double(), "alpha": torch.zeros(B, 1, H).double()}
    had = make_state(x, case).weights[0]
    plain, clipped = (scan(x, case._replace(clip=clip)) for clip in (None, 0.1))
    assert (clipped[2].gradient_norm < 0.1).all()  # keys have norm 1
    length = plain[2].gradient_norm[:, 0, :, None, None]
    assert_close(clipped[1].weights[0] - had, (plain[1].weights[0] - had) * 0.1 / (length + 0.1))


def make_call(case: Case) -> ScanInputs:
    x = make_inputs(case)
    tokens = Tokens(*(x[name] for name in TOKENS))
    return ScanInputs(tokens, make_state(x, case), case.chunk, make_form(x, case), x.get("mask"), False, 0)


def test_auto_reads_by_compiled_code_and_without_it_one_token_by_step_and_more_by_chunks(monkeypatch):
    calls = [make_call(Case(tokens=tokens)) for tokens in (0, 1, 2)]
    assert [resolve_backend("auto", call) for call in calls] == ["native"] * 3
    assert resolve_backend("naive", calls[1]) == "naive"
    monkeypatch.setattr(api, "native_unsupported_reason", lambda inputs: "is not there")  # noqa: ARG005
    assert [resolve_backend("auto", call) for call in calls] == ["chunked", "step", "chunked"]


def test_a_memory_that_has_read_nothing():
    weights = tuple(torch.randn(H, i, o, dtype=torch.bfloat16, requires_grad=True) for i, o in ((K, 6), (6, K)))
    state = initial_state(weights, batch=3)
    for w, row in zip(weights, state.weights, strict=True):
        assert row.dtype == torch.float32
        assert torch.equal(row, w.float().expand(3, *w.shape))
    assert all(map(torch.equal, state.anchor, state.weights))
    assert not any(s.any() for s in state.momentum)
    assert state.position.tolist() == [0, 0, 0]
    q, gate = torch.randn(3, 5, H, K), torch.full((3, 5, H), 0.1)
    y, _ = memory_scan(q, q, q, gate, gate, gate, state, chunk_size=2)
    y.sum().backward()
    assert all(w.grad.abs().sum() > 0 for w in weights)


# ------------------------------------------------------------------------------------------------ dtypes, sizes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
def test_bfloat16_tokens_keep_a_float32_state(backend: str, residual: bool):
    case = supported(Case(tokens=20, residual=residual, start="ragged"), backend)
    x = make_inputs(case, torch.float32)
    half = {name: x[name].bfloat16() for name in (*TOKENS, "norm_weight", "norm_bias") if name in x}
    actual = outputs_by_name(*scan(x | half, case, backend=backend))
    expected = outputs_by_name(*scan(x | {name: value.float() for name, value in half.items()}, case, backend=backend))
    assert actual["y"].dtype == torch.bfloat16
    for name in expected.keys() - {"y", "position"}:
        assert actual[name].dtype == torch.float32, name
    assert_all_close(actual, expected)


@chunk_backends
@pytest.mark.parametrize("start", ["boundary", "ragged"])
def test_bfloat16_tokens_are_kept_in_it_for_training_and_their_gradients_are_those_of_their_values(
    start: str, backend: str
):
    case = Case(tokens=40, start=start)
    x = make_inputs(case, torch.float32)
    half = x | {name: x[name].bfloat16() for name in "qkv"}
    wide = x | {name: half[name].float() for name in "qkv"}
    found = []
    for x in (half, wide):
        shapes = [x[name].shape[2:] for name in "qkv"]
        leaves = x | {name: x[name].requires_grad_() for name in "qkv"}
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: [kept.append(t), t][1], lambda t: t):
            y, *_ = scan(leaves, case, backend=backend)
        tokens = [t.dtype for t in kept if t.is_floating_point() and t.dim() == 4 and t.shape[2:] in shapes]
        assert set(tokens) == {x["q"].dtype}
        found.append(torch.autograd.grad(y.float().sin().sum(), [leaves[name] for name in "qkv"]))
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.bfloat16
        assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_memory(backend: str):
    case = supported(Case(tokens=20), backend)
    x = make_inputs(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_by_name(*scan(x, case, backend=backend))
    assert_all_close(actual, outputs_by_name(*scan(x, case, backend=backend)))


@pytest.mark.parametrize("mask", ["none", "random"])
def test_the_state_has_the_same_size_after_any_number_of_tokens(mask: str):
    def stored(tokens: int) -> int:
        case = Case(tokens=tokens, mask=mask)
        _, state, _ = scan(make_inputs(case), case)
        return sum(w.untyped_storage().nbytes() for w in itertools.chain(*state[:3], [state.position]))

    assert stored(1) == stored(10) == stored(200)


def test_a_call_leaves_its_inputs_and_the_given_state_alone():
    for backend in BACKENDS:
        case = supported(Case(tokens=6, mask="random", start="ragged"), backend)
        x = make_inputs(case)
        copy = {name: value.clone() for name, value in x.items()}
        scan(x, case, backend=backend)
        assert all(torch.equal(x[name], copy[name]) for name in x)


def test_training_keeps_no_weights_per_chunk(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 0)

    def saved_weights(tokens: int) -> int:
        case = Case(tokens=tokens)
        x = make_inputs(case)
        leaves = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in x.items()}
        count = 0

        def pack(saved: Tensor) -> Tensor:
            nonlocal count
            count += saved.shape[-2:] == (K, HIDDEN)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            scan(leaves, case, backend="chunked", max_saved_bytes=0)
        return count

    few, many = saved_weights(4 * 16), saved_weights(4 * 64)  # chunks x4, groups x2
    assert many <= 2 * few + 2


@length_backends
@pytest.mark.parametrize("mask", ["none", "random"])
def test_kept_and_computed_again_are_the_same(mask: str, backend: str, monkeypatch):
    case = supported(Case(tokens=4 * 9 + 1, mask=mask, start="ragged", residual=True, clip=0.7), backend)
    x = make_inputs(case)
    monkeypatch.setattr(delta_rule, "BLOCK_SIZE", 4)
    kept = outputs_and_gradients(x, case, backend)
    leaves = {name: v.clone().requires_grad_() if v.is_floating_point() else v for name, v in x.items()}
    for size in (0, 10**9):  # groups of sqrt(N), and one recomputed group
        monkeypatch.setattr(grouping, "GROUP_BYTES", size)
        out = outputs_by_name(*scan(leaves, case, backend=backend, max_saved_bytes=0))
        assert_all_close(out | gradients(out, leaves), kept)


def watch_groups(patch: pytest.MonkeyPatch) -> weakref.WeakSet:
    """The groups of chunks that are alive, from now on."""
    groups = weakref.WeakSet()

    class Watched(scan_module.ChunkGroup):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            groups.add(self)

    patch.setattr(scan_module, "ChunkGroup", Watched)
    return groups


def test_activation_checkpointing_drops_what_a_call_keeps(monkeypatch):
    case = Case(tokens=4 * 9)
    x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}
    groups = watch_groups(monkeypatch)
    y = scan(x, case, backend="chunked")[0]
    gc.collect()
    assert len(groups) == 1
    y = checkpoint(lambda: scan(x, case, backend="chunked")[0], use_reentrant=False)
    gc.collect()
    assert len(groups) == 0
    y.sum().backward()


# ------------------------------------------------------------------------------------------------ errors


@pytest.fixture
def without_shape_checker(monkeypatch):
    """Switch the tests' annotation checker off, so that the operation's own messages appear, as for a user."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


WRONG = {
    "q, k": {"k": (B, 5, H, K + 1)},
    "and v": {"v": (B, 4, H, K)},
    r"q.*\[2, 5, 4\]": {"q": (B, 5, K)},
    "theta": {"theta": (B, 5, 1)},
    "eta must": {"eta": (B, 4, H)},
    "alpha": {"alpha": (B, 5, H, 1)},
    "mask": {"mask": (B, 4)},
    "weights must chain": {"weights": (1, H, K, K)},
    "last layer gives width 4, but v has 3": {"v": (B, 5, H, 3)},
    r"momentum must be as its weights, \[2, 2, 4, 4\] in torch.float32, got \[2, 2, 4, 5\]": {"momentum": (B, H, K, 5)},
    r"anchor must be as its weights, .* got \[1, 2, 4, 4\]": {"anchor": (1, H, K, K)},
}


@pytest.mark.usefixtures("without_shape_checker")
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_shape_is_named(message: str):
    shapes = dict.fromkeys(("q", "k", "v"), (B, 5, H, K)) | dict.fromkeys(("theta", "eta", "alpha"), (B, 5, H))
    shapes |= {"mask": (B, 5), "weights": (B, H, K, K)} | WRONG[message]
    shapes = {"anchor": shapes["weights"], "momentum": shapes["weights"]} | shapes
    x = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state = MemoryState((x["anchor"],), (x["weights"],), (x["momentum"],), torch.zeros(B, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        memory_scan(*(x[name] for name in TOKENS), state, chunk_size=4, mask=x["mask"].bool())


@pytest.mark.usefixtures("without_shape_checker")
def test_what_is_elsewhere_or_of_another_kind_is_named():
    case = Case(tokens=5)
    x = make_inputs(case)
    for wrong, message in (
        (x | {"momentum1": x["momentum1"].float()}, "momentum must be as its weights, .* in torch.float64, got .*"),
        (x | {"position": x["position"][:1]}, r"position must be \[B\] = \[2\] integers, .* got \[1\] in torch.int64"),
        (x | {"mask": torch.ones(B, 5)}, "mask must be torch.bool, True where a token is read, got torch.float32"),
        (x | {"position": x["position"].float()}, r"position must be .* got \[2\] in torch.float32"),
        (x | {"eta": x["eta"].to("meta")}, "one device: q is on cpu, another is on meta"),
        (x | {"weights1": x["weights1"].to("meta")}, "one device: q is on cpu, another is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            scan(wrong, case)


@pytest.mark.usefixtures("without_shape_checker")
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("chunk_size must be at least 1, got 0", {"chunk_size": 0}),
        ("clip must be above 0 or None, got 0.0", {"form": MemoryForm(clip=0.0)}),
        ("activation='relu'", {"form": MemoryForm(activation="relu")}),
        ("residual form needs V == K, got K=4, V=5", {"form": MemoryForm(norm=(torch.ones(H, 5), torch.ones(H, 5)))}),
        ("backend='fast' is not one of: auto, naive, step, linear, native, chunked, triton", {"backend": "fast"}),
        (
            r"norm's weight and bias must be \[H, V\] = \[2, 5\], got \[4\]",
            {"form": MemoryForm(norm=(torch.ones(K),) * 2)},
        ),
        ('backend="step" decodes one token, got T=5', {"backend": "step"}),
    ],
)
def test_a_wrong_option_is_named(message: str, options: dict):
    case = Case(tokens=5)
    x = make_inputs(case)
    with pytest.raises(ValueError, match=message):
        memory_scan(*(x[name] for name in TOKENS), make_state(x, case), **{"chunk_size": 4} | options)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("", "Call", "ScanInputs"),
        ("", "cleared", "masked_zero"),
        ("", "restore", "undo_left_align"),
        ("", "take", "gather_tokens"),
        (".ragged", "take", "gather_tokens"),
        (".reference", "naive", "naive_scan"),
        (".decode", "step", "step_scan"),
        (".delta_rule", "linear", "linear_scan"),
        (".delta_rule", "BLOCK", "BLOCK_SIZE"),
        (".chunked.scan", "chunked", "chunked_scan"),
        (".cpu.native", "native", "native_scan"),
        (".cpu.build", "NotBuilt", "NativeBuildError"),
    ],
)
def test_an_old_name_gives_the_new_one_and_warns(module: str, old: str, new: str):
    place = importlib.import_module(f"titans_lm.ops{module}")
    with pytest.warns(DeprecationWarning, match=rf"\.{old} was renamed: use titans_lm\.ops{module}\.{new}$"):
        assert getattr(place, old) is getattr(place, new)
    assert not hasattr(place, "never_there")


def test_kept_bytes_is_max_saved_bytes_and_warns():
    case = Case(tokens=4 * 9)
    x = {name: v.requires_grad_() if v.is_floating_point() else v for name, v in make_inputs(case).items()}

    def saved_bytes(**options: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [sizes.append(t.nbytes), t][1], lambda t: t):
            scan(x, case, backend="native", **options)
        return sum(sizes)

    with pytest.warns(DeprecationWarning, match="use max_saved_bytes"):
        few = saved_bytes(kept_bytes=0)
    assert few == saved_bytes(max_saved_bytes=0) < saved_bytes()


# ------------------------------------------------------------------------------------------------ the map


def test_the_map_names_functions_and_tests_that_exist():
    here = Path(__file__).parent
    page = (here.parent / "src/titans_lm/ops/README.md").read_text()
    _, _, table = page.partition("## Equation, function, test")
    tests = set(re.findall(r"`(test_\w+)`", table))
    functions = set(re.findall(r"`((?:\w+\.)*\w+)\.(\w+)`", table))
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in here.glob("test_*.py")), re.MULTILINE))
    assert tests
    assert tests <= defined, tests - defined
    assert functions
    for module, name in functions:
        assert hasattr(importlib.import_module(f"titans_lm.ops.{module}"), name), f"{module}.{name}"
