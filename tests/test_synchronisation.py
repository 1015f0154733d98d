"""Where a forward pass reads a tensor's values in Python: on a GPU each of these waits for the device.

The calls are found on the CPU, with "chunked", as on a GPU; what launches the kernels lays tokens out by the same code.
`REMAINING` is what is left, and this test fails for a new place as well as for one that is gone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import titans_lm
from conftest import TITANS, each_titan, tiny_model, tokens
from titans_lm.layers.neural_memory import memories

pytestmark = pytest.mark.usefixtures("unchecked")

SOURCE = Path(titans_lm.__file__).parent
ON_CPU_ONLY = {
    "ops/types.py: select_rows",
    "layers/attention.py: _has_none",
    "ops/chunked/group.py: __init__",
    "models/arguments.py: check_finite",
    "models/forward_context.py: may_be_at",
    "models/arguments.py: <lambda>",  # arguments given as Python's own values
}
"""Places that ask for the device first, and read values on a CPU alone."""
LAYOUT, MASK = "ops/ragged.py: lay_out", "models/arguments.py: token_mask"
REMAINING: dict[str, set[str]] = {
    "training": {LAYOUT},  # the position in the chunk
    "reading": {LAYOUT},
    "decoding": set(),
    "padding": {LAYOUT, MASK},  # whether the mask is one, and whether anything is masked
}
_METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero")
_OPERATORS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")


def place() -> str | None:
    """The file and function of the package that the innermost call comes from."""
    frame = sys._getframe(1)  # not this one
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(SOURCE) and not name.startswith("__torch_"):
            return f"{path.relative_to(SOURCE).as_posix()}: {frame.f_code.co_qualname.split('.')[-1]}"
        frame = frame.f_back
    return None


class _Methods(TorchFunctionMode):
    """Notes calls of methods that read values, some of which (`tolist`) reach no operator on a CPU."""

    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _METHODS and (where := place()):
            self.found.add(where)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Notes operators whose result is a number, or has a shape that depends on values."""

    def __init__(self, found: set[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            getattr(x, "dtype", None) == torch.bool for x in tree_leaves(args[1:])
        )
        if (name in _OPERATORS or by_mask) and (where := place()):
            self.found.add(where)
        return function(*args, **(kwargs or {}))


@contextmanager
def noted() -> Iterator[set[str]]:
    found: set[str] = set()
    with _Methods(found), _Operators(found):
        yield found
    found -= ON_CPU_ONLY


def found_in(kind: str, what: str) -> set[str]:
    model, ids = tiny_model(kind, torch.float32), tokens(2, 12)
    for memory in memories(model):
        memory.backend = "chunked"
    model.train(what == "training")
    state, mask = model.initial_state(2), None
    if what == "decoding":
        with torch.no_grad():
            model(ids, past_key_values=state)
        ids = ids[:, :1]
        for memory in memories(model):
            memory.backend = "step"
    if what == "padding":
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
    with torch.set_grad_enabled(what == "training"), noted() as found:
        if what == "training":
            model(ids, labels=ids, use_cache=False).loss.backward()
        else:
            model(ids, attention_mask=mask, past_key_values=state)
    return found


@each_titan
@pytest.mark.parametrize("what", REMAINING)
def test_no_other_place_reads_values(kind: str, what: str):
    assert found_in(kind, what) <= REMAINING[what]


@pytest.mark.parametrize("what", REMAINING)
def test_the_list_names_nothing_that_is_gone(what: str):
    assert set().union(*(found_in(kind, what) for kind in TITANS)) == REMAINING[what]


def test_decoding_mag_reads_no_values():
    """So that a CUDA graph can be captured of it."""
    assert not found_in("mag", "decoding")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: int(x[0]),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x[0]), lambda x: torch.masked_select(x, x > 0),
    ],
)  # fmt: skip
def test_every_way_of_reading_values_is_noted(read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", Path(__file__).parent)
    with noted() as found:
        read(torch.arange(3))
    assert found == {"test_synchronisation.py: <lambda>"}
    with noted() as found:
        torch.arange(3).cumsum(0)
    assert not found
