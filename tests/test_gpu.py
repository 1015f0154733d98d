"""What a GPU computes is right: the checks of `titans bench gpu`, as tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titans_lm.bench.gpu.cell_worker import order_of, run_cell
from titans_lm.bench.gpu.cells import Cell, checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("unchecked"),
]


@pytest.mark.parametrize("cell", checks(), ids=lambda cell: cell.name)
def test_it_is_right(cell: Cell):
    found = run_cell(order_of(cell, "cuda"))
    assert found["right"], found
    assert found.get("repeats", True), "a second run gives other numbers"


def test_interpreted_kernels_are_right_too():
    tests = str(Path(__file__).with_name("test_triton.py"))
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # without a GPU, tests interpret the kernels
    subprocess.run([sys.executable, "-m", "pytest", "-q", tests], env=hidden, check=True)
