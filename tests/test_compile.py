"""Runs `compiled_models.py` and `onnx_programs.py`, each in a process of its own, without the checks of shapes:
`torch.compile` fails on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled_models.py", "onnx_programs.py"])
def test_compiled_and_exported_models_are_the_model(name: str, pytestconfig: pytest.Config):
    file = Path(__file__).with_name(name)
    marks = "not exhaustive" if "exhaustive" in pytestconfig.getoption("markexpr") else ""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "-m", marks, file],
        cwd=file.parent,
        env={**os.environ, "TITANS_UNCHECKED_TESTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:]
