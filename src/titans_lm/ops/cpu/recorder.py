"""Record the compiled steps of a call, to run them again on other inputs: what a CUDA graph is on a GPU.

A decoded token takes some thirty compiled steps. Finding their weights and addresses, and making room for what they
return, takes about as long as computing them.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titans_lm.ops.cpu.compiled import library, recording, run

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
}  # fmt: skip


class Step(NamedTuple):
    """A call of a step's function, and its arguments as ctypes arrays."""

    function: Any
    numbers: Any
    of_layer: Any
    scalars: Any


class Recorder(TorchDispatchMode):
    """Within this context, notes each compiled step, and keeps what is allocated for it.

    Only steps can run again. So the record `is_complete` if no other operator computed numbers in between. Operators
    on integers may: they are of positions, which decide where attention writes alone, and that is set anew."""

    knows_compiled_steps = True  # so compiled code runs within this mode

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.weights: list[Any] = []
        """The `WeightAddresses` that the steps have their weights' addresses of."""
        self.places: list[tuple[Any, Any]] = []
        """Of each step of attention its numbers, which end with where it writes, and its buffers."""
        self.kept: list[Any] = []
        self.is_complete = True
        self._token: Any = None

    def __enter__(self) -> "Recorder":
        self._token = recording.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        recording.reset(self._token)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.kept.append(out)
        elif not _is_view(function) and not _is_integer(out):
            self.is_complete = False
        return out

    def note_step(self, function: Any, numbers: Any, of_layer: Any, scalars: Any) -> None:
        self.steps.append(Step(function, numbers, of_layer, scalars))

    def note_weights(self, weights: Any) -> None:
        self.weights.append(weights)

    def note_places(self, cache: Any) -> None:
        """The last step writes a token into the buffers of `cache`."""
        self.places.append((self.steps[-1].numbers, cache))


def _is_view(function: Any) -> bool:
    """Whether what the operator returns is a view of an argument, which it does not write."""
    aliases = [argument.alias_info for argument in function._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _is_integer(out: Any) -> bool:
    return isinstance(out, Tensor) and not out.is_floating_point() and not out.is_complex()


class Replay:
    """Recorded steps, in one call."""

    def __init__(self, steps: list[Step], dtype: torch.dtype):
        self.steps, self.dtype = steps, dtype
        addresses = [
            0 if part is None else ctypes.cast(part, ctypes.c_void_p).value or 0 for step in steps for part in step
        ]
        self._program = (ctypes.c_long * len(addresses))(*addresses)
        library(dtype)

    def run(self) -> None:
        """Run the steps. Raises MemoryError if their buffers could not be allocated."""
        run("titans_replay", self.dtype, self._program, len(self.steps))

    def exchange(self, addresses: dict[int, int]) -> None:
        """Let the steps use other addresses in place of these."""
        for step in self.steps:
            for i, number in enumerate(step.numbers):
                if number in addresses:
                    step.numbers[i] = addresses[number]
