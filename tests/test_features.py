"""Queries, keys and values from their projections: compiled and eager are the same, and look at no later token."""

import itertools
import re

import pytest
import torch
from torch import Tensor

import titans_lm.layers.short_conv as features_module
from titans_lm.layers.short_conv import _FeatureArgs, causal_convolution, eager_features, qkv_features
from titans_lm.ops.cpu import compiled
from titans_lm.ops.cpu.build import SOURCES
from tolerance import assert_close

HEADS, TOKENS = 3, 11


def inputs(
    parts: int, size: int, width: int, dtype: torch.dtype = torch.float64, tokens: int = TOKENS
) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    channels = parts * HEADS * width
    past = torch.randn(2, size - 1 + tokens, channels, dtype=dtype, requires_grad=True)
    return past, torch.randn(channels, size, dtype=dtype, requires_grad=True) if size > 1 else None


def with_gradients(made: tuple[Tensor, ...], past: Tensor, filters: Tensor | None) -> list[Tensor]:
    torch.manual_seed(1)
    total = sum((x * torch.randn_like(x)).sum() for x in made)
    leaves = [past] if filters is None else [past, filters]
    return [*made, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize(("parts", "size"), itertools.product((1, 2, 3), (1, 2, 4)))
def test_compiled_is_eager_in_outputs_and_gradients(parts: int, size: int, width: int):
    past, filters = inputs(parts, size, width)
    given = (past,) if filters is None else (past, filters)
    made = qkv_features(past, filters, HEADS, width, compiled=True)
    assert [tuple(x.shape) for x in made] == [(2, TOKENS, HEADS, width)] * parts
    expected = eager_features(*given, heads=HEADS, head_dim=width)
    for a, b in zip(*(with_gradients(x, past, filters) for x in (made, expected)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("tokens", [0, 1, 64, 130])
def test_any_number_of_tokens(tokens: int):
    """Sums over tokens are sums of blocks."""
    past, filters = inputs(3, 4, 5, tokens=tokens)
    both = (
        qkv_features(past, filters, HEADS, 5, compiled=True),
        eager_features(past, filters, heads=HEADS, head_dim=5),
    )
    for a, b in zip(*(with_gradients(x, past, filters) for x in both), strict=True):
        assert_close(a, b)


def test_gradcheck_of_compiled():
    past, filters = inputs(3, 3, 5)
    assert torch.autograd.gradcheck(
        lambda *x: qkv_features(*x, HEADS, 5, compiled=True), (past, filters), fast_mode=True
    )


def test_the_convolution_is_that_of_pytorch():
    past, filters = inputs(1, 4, 5)
    expected = torch.nn.functional.conv1d(past.mT, filters[:, None], groups=past.shape[2]).mT
    assert_close(causal_convolution(past, filters), expected)
    one = past[:, :4]
    assert_close(causal_convolution(one, filters), expected[:, :1])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_token_sees_itself_and_the_ones_before(is_compiled: bool):
    past, filters = inputs(3, 3, 5)
    for t in range(TOKENS):
        made = qkv_features(past, filters, HEADS, 5, compiled=is_compiled)
        (by,) = torch.autograd.grad(sum(x[:, t].sum() for x in made), past)
        seen = by.abs().sum((0, 2)) > 0
        assert seen.tolist() == [t <= s <= t + 2 for s in range(TOKENS + 2)]


def test_a_silent_head_has_a_finite_gradient():
    past = torch.zeros(1, 4, 2 * HEADS * 5, requires_grad=True)
    made = qkv_features(past, None, HEADS, 5, compiled=True)
    assert not any(x.any() for x in made)
    (by,) = torch.autograd.grad(sum(x.sum() for x in made), past)
    assert by.isfinite().all()


@pytest.mark.parametrize("why", ["asked", "half precision", "filters of another dtype", "no compiler"])
def test_eager_where_compiled_code_is_not_wanted_or_cannot_run(why: str, monkeypatch: pytest.MonkeyPatch):
    past, filters = inputs(3, 3, 5, torch.bfloat16 if why == "half precision" else torch.float32)
    if why == "filters of another dtype":
        filters = filters.double()
    if why == "no compiler":
        monkeypatch.setattr(features_module, "unsupported_tensor_reason", lambda *_: "no compiler")
    monkeypatch.setattr(features_module, "_CompiledFeatures", None)
    made = qkv_features(past, filters, HEADS, 5, compiled=why != "asked")
    assert all(x.dtype == past.dtype for x in made)


def test_outputs_are_where_the_projections_are():
    past, filters = inputs(3, 3, 5)
    with torch.device("meta"):
        made = qkv_features(past, filters, HEADS, 5, compiled=True)
    assert all(x.device.type == "cpu" for x in made)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "SINGLE_THREAD_WORK", 0)
    past, filters = inputs(3, 4, 16)
    one = with_gradients(qkv_features(past, filters, HEADS, 16, compiled=True), past, filters)
    torch.set_num_threads(3)
    try:
        three = with_gradients(qkv_features(past, filters, HEADS, 16, compiled=True), past, filters)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))


def test_the_structure_is_the_same_in_both_languages():
    text = (SOURCES / "token_features.h").read_text().split("struct FeatureArgs {")[1].split("};")[0]
    declared = " ".join(line.split("//")[0] for line in text.splitlines())
    names = re.findall(r"(\w+)\s*[,;]", declared)
    assert names == [name for name, _ in _FeatureArgs._fields_]
