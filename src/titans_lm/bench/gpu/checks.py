"""Whether a form of the operation is right on this device: against the definition, token by token, in float64.

Every result counts: outputs, surprise, the state after, the gradient by each input. Memory that PyTorch hands out is
filled with NaN, so that a number which no kernel wrote is seen. Each form runs twice: results that differ show a race.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titans_lm.bench import lm
from titans_lm.bench.measure import Contender, Setting
from titans_lm.ops import choice
from titans_lm.ops.agreement import TOLERANCE, Problem, cast_inputs, random_inputs, relative_errors, results
from titans_lm.ops.api import run_with

MODEL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of a model's logits, after layers that each add their rounding."""


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    deterministic: Any = torch.utils.deterministic  # a module that type checkers do not know
    before, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
        deterministic.fill_uninitialized_memory = filled


def check(options: dict[str, Any], setting: Setting) -> Contender:
    """`form` ("triton" or "chunked") on the problem of the other options, in the setting's dtype."""
    changes = {key: value for key, value in options.items() if key != "form"}
    problem = Problem(**changes, dtype=setting.torch_dtype())
    inputs = random_inputs(problem, setting.device)
    expected = results(run_with("naive"), cast_inputs(random_inputs(problem, "cpu"), torch.float64))
    expected = {name: x.to(setting.device) for name, x in expected.items()}
    with uninitialised_memory_is_nan():
        actual, again = (results(run_with(options["form"]), inputs) for _ in range(2))
    return Contender({}, judged(actual, expected, TOLERANCE[problem.dtype]) | {"repeats": _same(actual, again)})


def judged(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> dict[str, Any]:
    """Whether all results are within the tolerance, the worst of them, and all errors."""
    errors = relative_errors(actual, expected)
    worst = max(errors, key=lambda name: errors[name])
    shown = {name: error if error < float("inf") else "not finite" for name, error in errors.items()}
    right = errors[worst] <= tolerance
    return {"right": right, "worst": worst, "largest_error": shown[worst], "tolerance": tolerance, "errors": shown}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, other[name]) for name, x in one.items())


def model(options: dict[str, Any], setting: Setting) -> Contender:
    """A model's logits and gradients, with padding, against the same model on the CPU in float32."""
    on_cpu = lm.build(options["kind"], options["size"], Setting())
    here = lm.build(options["kind"], options["size"], setting)  # of the same seed
    ids = torch.randint(256, (2, options["tokens"]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : options["tokens"] // 3] = 0
    expected = _logits_and_gradients(on_cpu, ids, mask)
    with uninitialised_memory_is_nan(), setting.autocast():
        actual = _logits_and_gradients(here, ids.to(setting.device), mask.to(setting.device))
    actual = {name: x.cpu().float() for name, x in actual.items()}
    return Contender({}, judged(actual, expected, MODEL_TOLERANCE[setting.torch_dtype()]))


def _logits_and_gradients(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    logits = model(ids, attention_mask=mask).logits * mask[..., None]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()), allow_unused=True)
    flat = [g.flatten().float() for _, g in zip(names, grads, strict=True) if g is not None]
    return {"logits": logits.detach(), "gradients": torch.cat(flat)}


def auto(options: dict[str, Any], setting: Setting) -> Contender:
    """What "auto" decides for calls of this kind, and why."""
    size = {"tokens": choice.MAX_TOKENS, "memories": 64} | options
    name = choice.device_name(torch.device(setting.device))
    kind = choice.CallKind(
        device=name, dtype=setting.dtype, depth=2, width=size["width"], hidden=size["hidden"], chunk=size["chunk"],
        residual=True, clip=True, activation="silu", threshold=False, gradients=size["gradients"],
        tokens=size["tokens"], memories=size["memories"],
    )  # fmt: skip
    candidates = {name: run_with(name) for name in ("chunked", "triton")}
    decision = choice.decide(kind, candidates, "chunked", torch.device(setting.device))
    trials = {name: trial._asdict() for name, trial in decision.trials.items()}
    return Contender({}, {"right": decision.trials["triton"].right, "decision": str(decision), "trials": trials})


BUILD = {"check": check, "model": model, "auto": auto}
