"""Which form of the operation "auto" runs on a GPU: the fastest of those that are right on this device.

At the first call of a kind (device, sizes, form, dtype, gradients) each form runs a small random problem. Those whose
outputs, state and gradients are `chunked`'s within the dtype's tolerance are timed, and the fastest is taken. The
decision is kept as JSON in `$XDG_CACHE_HOME/titans_lm` (~/.cache), for these versions of PyTorch, Triton and this
package.
"""

import hashlib
import json
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titans_lm.ops.agreement import (
    TOLERANCE,
    Problem,
    Run,
    forward_and_backward,
    random_inputs,
    relative_errors,
    results,
)
from titans_lm.ops.types import ScanInputs
from titans_lm.utils.record import write_text

LOG = logging.getLogger(__name__)
MAX_TOKENS, MAX_MEMORIES = 1024, 256
"""Limits of the problem that is timed. A longer call belongs to the same kind as one of this size."""
TIMED = 3
Clock = Callable[[], float]


class CallKind(NamedTuple):
    """Calls for which one decision holds."""

    device: str
    dtype: str
    depth: int
    width: int
    hidden: int
    chunk: int
    residual: bool
    clip: bool
    activation: str
    threshold: bool
    gradients: bool
    tokens: int
    """Rounded up to a power of two, at most MAX_TOKENS."""
    memories: int
    """Rows times heads, likewise, at most MAX_MEMORIES."""

    @classmethod
    def of(cls, inputs: ScanInputs, gradients: bool) -> "CallKind":
        q, weights, form = inputs.tokens.q, inputs.state.weights, inputs.form
        batch, tokens, heads, width = q.shape
        return cls(
            device_name(q.device), str(q.dtype).removeprefix("torch."), len(weights), width, weights[-1].shape[2],
            inputs.chunk_size, form.norm is not None, form.clip is not None, form.activation,
            form.threshold is not None, gradients, _rounded(tokens, MAX_TOKENS), _rounded(batch * heads, MAX_MEMORIES),
        )  # fmt: skip

    def problem(self, *, timed: bool) -> Problem:
        """A random problem of this kind: `timed` of its full size, else a few chunks with padding that begin inside a
        chunk."""
        dtype = getattr(torch, self.dtype)
        shape = Problem(
            width=self.width, hidden=self.hidden, depth=self.depth, chunk=self.chunk, residual=self.residual,
            clip=1.0 if self.clip else None, activation=self.activation, threshold=0.1 if self.threshold else None,
            dtype=dtype,
        )  # fmt: skip
        if timed:
            return shape._replace(rows=self.memories, heads=1, tokens=self.tokens)
        return shape._replace(tokens=2 * self.chunk + 3, masked=True, inside=True)


def _rounded(number: int, most: int) -> int:
    return min(most, 1 << max(0, number - 1).bit_length())


def device_name(device: torch.device) -> str:
    """The device's model, such as "NVIDIA H200": a decision holds for all of one model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Trial(NamedTuple):
    """What was found about one form."""

    right: bool
    worst: str
    """The result with the largest error, or the error that the form raised."""
    error: float | None
    """That largest relative error. None: it raised one."""
    seconds: float | None
    """Median of a call of the timed problem. None where it is not right."""


class Decision(NamedTuple):
    backend: str
    """The fastest form that is right; the reference if no other is."""
    trials: dict[str, Trial]

    def __str__(self) -> str:
        parts = [f"{name}: {_said(trial)}" for name, trial in self.trials.items()]
        return f"{self.backend} ({'; '.join(parts)})"


def _said(trial: Trial) -> str:
    if trial.error is None:
        return f"failed, {trial.worst}"
    if not trial.right:
        return f"wrong, relative error {trial.error:.1e} of {trial.worst}"
    assert trial.seconds is not None
    return f"{1e3 * trial.seconds:.2f} ms, error {trial.error:.1e}"


def decide(
    kind: CallKind,
    candidates: Mapping[str, Run],
    reference: str,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> Decision:
    """Compare each candidate with the candidate named `reference`, and time those that agree, in seconds of `clock`.

    Warns once for each candidate that does not."""
    tolerance = TOLERANCE[getattr(torch, kind.dtype)]
    inputs = random_inputs(kind.problem(timed=False), device)
    expected = results(candidates[reference], inputs, gradients=kind.gradients)
    timed = random_inputs(kind.problem(timed=True), device)._replace(surprise=False)
    trials = {}
    for name, run in candidates.items():
        try:
            errors = relative_errors(results(run, inputs, gradients=kind.gradients), expected)
            worst = max(errors, key=lambda key: errors[key])
            right = errors[worst] <= tolerance
            seconds = _time(run, timed, kind.gradients, clock) if right else None
            trials[name] = Trial(right, worst, errors[worst], seconds)
        except Exception as error:  # a compiler's, a launch's: whatever it is, this form does not run here
            if name == reference:
                raise
            trials[name] = Trial(False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", None, None)
        if not trials[name].right:
            warnings.warn(f'backend="auto" does not use "{name}" on {kind.device}: {_said(trials[name])}', stacklevel=2)
    right_ones = {name: trial.seconds for name, trial in trials.items() if trial.seconds is not None}
    return Decision(min(right_ones, key=lambda name: right_ones[name]), trials)


def _time(run: Run, inputs: ScanInputs, gradients: bool, clock: Clock) -> float:
    """Median seconds of a call, with its backward pass if `gradients`, after one that is not counted."""
    spent = []
    for _ in range(TIMED + 1):
        _wait(inputs)
        begun = clock()
        forward_and_backward(run, inputs, gradients)
        _wait(inputs)
        spent.append(clock() - begun)
    return statistics.median(spent[1:])


def _wait(inputs: ScanInputs) -> None:
    if inputs.tokens.q.device.type == "cuda":
        torch.cuda.synchronize(inputs.tokens.q.device)


# ------------------------------------------------------------------------------------------------ kept decisions

_decisions: dict[CallKind, Decision] = {}
"""Decisions that this process has made or read."""


def choose(
    inputs: ScanInputs, candidates: Mapping[str, Run], reference: str = "chunked", clock: Clock = time.perf_counter
) -> str:
    """The name of the candidate to run for a call. The first call of a kind takes some seconds, and waits for the
    device; where that is not possible (a CUDA graph is being captured) it is the reference, until a later call
    decides."""
    device = inputs.tokens.q.device
    kind = CallKind.of(inputs, torch.is_grad_enabled())
    if kind not in _decisions:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return reference
        decision = _read(kind, candidates)
        if decision is None:
            with torch.inference_mode(False):
                decision = decide(kind, candidates, reference, device, clock)
            _write(kind, decision)
        LOG.debug("%s: %s", kind, decision)
        _decisions[kind] = decision
    return _decisions[kind].backend


def decided(inputs: ScanInputs, gradients: bool) -> Decision | None:
    """The decision for calls like this one, if this process has one."""
    return _decisions.get(CallKind.of(inputs, gradients))


def _versions() -> dict[str, str]:
    found = {}
    for package in ("titans-lm", "torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"kernels": _digest_of_kernels()}


def _digest_of_kernels() -> str:
    """Of the kernels' source, so that a changed kernel is checked anew."""
    files = sorted((Path(__file__).parent / "triton").glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def decision_file(kind: CallKind) -> Path:
    """Where a decision is kept."""
    key = json.dumps([kind._asdict(), _versions()]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans_lm"
    return folder / f"backend-{hashlib.sha256(key).hexdigest()[:16]}.json"


def _read(kind: CallKind, candidates: Mapping[str, Run]) -> Decision | None:
    """The kept decision; None if there is none for this kind, these versions and these candidates."""
    try:
        kept: dict[str, Any] = json.loads(decision_file(kind).read_text())
        trials = {name: Trial(**trial) for name, trial in kept["trials"].items()}
        fits = kept["kind"] == kind._asdict() and kept["versions"] == _versions()
        if fits and trials.keys() == candidates.keys() and trials[kept["backend"]].right:
            return Decision(kept["backend"], trials)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none, or a damaged one: it is decided again
    return None


def _write(kind: CallKind, decision: Decision) -> None:
    path = decision_file(kind)
    trials = {name: trial._asdict() for name, trial in decision.trials.items()}
    for trial in trials.values():
        if trial["error"] is not None and not math.isfinite(trial["error"]):
            trial["error"] = 1e308  # JSON has no infinity
    kept = {"kind": kind._asdict(), "versions": _versions(), "backend": decision.backend, "trials": trials}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        LOG.debug("%s cannot be written, so each process decides anew: %s", path, error)
