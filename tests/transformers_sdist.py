"""transformers' own model tests: taken from its source distribution on PyPI, for a wheel has none.

The distribution has the files `tests/test_*.py`. Three modules that they import are in folders it leaves out; what is
needed of them is below. Its generation tests are in such a folder too: `test_generate.py` states their laws.
"""

import importlib
import subprocess
import sys
import tarfile
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from filelock import FileLock

CACHE = Path(__file__).parent.parent / ".cache"
PACKAGE = "transformers_tests"

COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "architectures": ["SomeModel"],
    "problem_type": "regression",
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
}
"""Arguments that every configuration takes and keeps."""


class ExportTesterMixin:
    """Export to ONNX and ExecuTorch is not a feature of this package."""


class GenerationTesterMixin:
    """Its tests are not in the distribution."""


_LEFT_OUT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": COMMON_ARGUMENTS},
}


def load(name: str) -> types.ModuleType:
    """The module `name` of the tests of the installed transformers. Skips the caller's module where pip cannot get
    them: without a network, or for a version that was never published."""
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    if PACKAGE not in sys.modules:
        _register(PACKAGE, {"__path__": [str(_folder())]})
        for left_out, contents in _LEFT_OUT.items():
            _register(f"{PACKAGE}.{left_out.split('.')[0]}", {"__path__": []})
            _register(f"{PACKAGE}.{left_out}", contents)
    with warnings.catch_warnings(action="ignore", category=pytest.PytestUnknownMarkWarning):  # marks of its own runners
        return importlib.import_module(f"{PACKAGE}.{name}")


def _register(name: str, contents: dict[str, Any]) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


def _folder() -> Path:
    """Where the tests lie, after the first call of any process has fetched them."""
    release = f"transformers-{transformers.__version__}"
    folder = CACHE / release / "tests"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"{release}.lock"):
        if not (folder / "__init__.py").exists():
            _fetch(release)
            (folder / "__init__.py").touch()  # last: the files before it are whole
    return folder


def _fetch(release: str) -> None:
    pip = [sys.executable, "-m", "pip", "--timeout", "15", "--retries", "1", "download", "-q", "--no-deps"]
    pip += ["--no-binary", "transformers", "-d", str(CACHE), release.replace("-", "==")]
    archive = CACHE / f"{release}.tar.gz"
    done = subprocess.run(pip, capture_output=True, text=True)
    if not archive.exists():
        last = (done.stderr.strip() or "pip gave no file").splitlines()[-1]
        pytest.skip(f"pip cannot get the source distribution {release}: {last}", allow_module_level=True)
    with tarfile.open(archive) as tar:
        tests = [member for member in tar.getmembers() if member.name.startswith(f"{release}/tests/")]
        tar.extractall(CACHE, tests, filter="data")
    archive.unlink()
