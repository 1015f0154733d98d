"""Shapes are checked while tests run, wherever the package states them (conftest.py)."""

import importlib
import inspect

import jaxtyping
import pytest
import torch

from conftest import SOURCE
from titans_lm.layers.short_conv import causal_convolution
from titans_lm.ops import initial_state, memory_scan


def test_a_shape_that_is_not_the_stated_one_ends_a_test():
    with pytest.raises(jaxtyping.TypeCheckError, match="causal_convolution"):
        causal_convolution(torch.zeros(2, 5), torch.zeros(3, 4))
    x, gate = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1)
    with pytest.raises(jaxtyping.TypeCheckError, match="memory_scan"):
        memory_scan(x, x, x[0], gate, gate, gate, initial_state((torch.zeros(1, 4, 4),), 1), chunk_size=2)


def test_every_module_that_states_a_shape_is_checked():
    stating = [path for path in SOURCE.rglob("*.py") if "jaxtyping" in path.read_text(encoding="utf-8")]
    names = {".".join(("titans_lm", *path.relative_to(SOURCE).with_suffix("").parts)) for path in stating}
    assert len(names) > 10
    for name in names:
        functions = inspect.getmembers(importlib.import_module(name), inspect.isfunction)
        own = [f for _, f in functions if f.__module__ == name]
        assert all(hasattr(f, "__wrapped__") for f in own), name
