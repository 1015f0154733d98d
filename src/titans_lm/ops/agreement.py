"""Whether two forms of the operation agree: a small random problem, every result of it, and how far results differ."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.types import MemoryForm, MemoryState, ScanInputs, ScanOutput, Tokens

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""The largest relative error of a right result, by the dtype of the tokens. Kernels also multiply in that dtype."""
Run = Callable[[ScanInputs], ScanOutput]
"""A form of the operation, called as `memory_scan` is: it casts, and leaves masked tokens alone."""
NAMES = Tokens._fields


class Problem(NamedTuple):
    """The size of a random problem and the form of its memory."""

    rows: int = 2
    tokens: int = 35
    heads: int = 2
    width: int = 16
    hidden: int = 32
    depth: int = 2
    chunk: int = 16
    residual: bool = True
    clip: float | None = 1.0
    activation: str = "silu"
    threshold: float | None = None
    masked: bool = False
    """Padding at random places; the second row begins with padding."""
    inside: bool = False
    """Rows begin inside a chunk, at positions of their own, with weights that differ from the anchor."""
    dtype: torch.dtype = torch.float32
    """Of q, k and v. State and gates are float32, or float64 with float64 tokens."""
    seed: int = 0

    def layers(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([self.width, *[self.hidden] * (self.depth - 1), self.width]))


def random_inputs(problem: Problem, device: torch.device | str, max_saved_bytes: int = 2**28) -> ScanInputs:
    """Tokens, gates and a state as a layer makes them. The numbers are the same on every device and in every dtype, but
    for rounding. PyTorch's own generators are not used."""
    p, generator = problem, torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    size = (p.rows, p.tokens, p.heads)
    q, k, v = (normal(*size, p.width) for _ in "qkv")
    gates = [torch.sigmoid(normal(*size) + bias) for bias in (-2.0, 2.5, -5.0)]
    tokens = [x.to(p.dtype) for x in (q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v / 4)]
    gates = [x.to(wide) for x in (0.1 * gates[0], *gates[1:])]
    weights = [normal(p.rows, p.heads, i, o).to(wide) / i**0.5 for i, o in p.layers()]
    momentum = [0.01 * normal(*w.shape).to(wide) for w in weights]
    position = torch.zeros(p.rows, dtype=torch.long, device="cpu")
    anchor = weights
    if p.inside:
        position = (torch.arange(p.rows, device="cpu") + 1) % p.chunk
        away = (position > 0).view(-1, 1, 1, 1)
        anchor = [w + 0.1 * away * normal(*w.shape).to(wide) for w in weights]
    norm = None
    if p.residual:
        norm = (1 + 0.1 * normal(p.heads, p.width).to(wide), 0.1 * normal(p.heads, p.width).to(wide))
    mask = None
    if p.masked:
        mask = torch.rand(p.rows, p.tokens, generator=generator, device="cpu") < 0.7
        mask[1:2, : p.tokens // 3] = False

    def there(part: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in part)

    state = MemoryState(there(anchor), there(weights), there(momentum), position.to(device))
    form = MemoryForm(
        activation=p.activation,  # type: ignore[arg-type]
        norm=None if norm is None else (norm[0].to(device), norm[1].to(device)),
        clip=p.clip,
        threshold=p.threshold,
    )
    where = None if mask is None else mask.to(device)
    return ScanInputs(Tokens(*there(tokens), *there(gates)), state, p.chunk, form, where, True, max_saved_bytes)


def cast_inputs(inputs: ScanInputs, dtype: torch.dtype) -> ScanInputs:
    """The same problem with every number in `dtype`."""
    anchor, weights, momentum = (tuple(x.to(dtype) for x in part) for part in inputs.state[:3])
    norm = inputs.form.norm
    return inputs._replace(
        tokens=Tokens(*(x.to(dtype) for x in inputs.tokens)),
        state=MemoryState(anchor, weights, momentum, inputs.state.position),
        form=inputs.form._replace(norm=None if norm is None else (norm[0].to(dtype), norm[1].to(dtype))),
    )


def results(run: Run, inputs: ScanInputs, *, gradients: bool = True) -> dict[str, Tensor]:
    """Outputs, surprise and the state after, by name; with `gradients` also those of a sum in which every element of
    y, of the loss and of the state takes part, by every input."""
    leaves = _leaves(inputs, gradients)
    with torch.set_grad_enabled(gradients):
        y, state, surprise = run(_with_leaves(inputs, leaves))
        out = {"y": y, **_named_state(state)}
        if surprise is not None:
            out |= {"loss": surprise.loss, "gradient norm": surprise.gradient_norm}
        if not gradients:
            return out
        summed = {name: x for name, x in out.items() if x.is_floating_point() and name != "gradient norm"}
        total = torch.stack(
            [(x * _steady(x, i)).sum().to(state.weights[0].dtype) for i, x in enumerate(summed.values())]
        )
        grads = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True)
    by = {f"d {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: x.detach() for name, x in out.items()} | by


def forward_and_backward(run: Run, inputs: ScanInputs, gradients: bool) -> None:
    """One call, with `gradients` also its backward pass from y to every input. For measuring."""
    leaves = _leaves(inputs, gradients)
    with torch.set_grad_enabled(gradients):
        y = run(_with_leaves(inputs, leaves)).y
        if gradients:
            torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)


def _leaves(inputs: ScanInputs, gradients: bool) -> dict[str, Tensor]:
    named = dict(zip(NAMES, inputs.tokens, strict=True)) | {
        name: x for name, x in _named_state(inputs.state).items() if x.is_floating_point()
    }
    if inputs.form.norm is not None:
        named |= {"norm weight": inputs.form.norm[0], "norm bias": inputs.form.norm[1]}
    return {name: x.detach().clone().requires_grad_(gradients) for name, x in named.items()}


def _named_state(state: MemoryState) -> dict[str, Tensor]:
    parts = ("anchor", "weights", "momentum")
    named = {f"{part} {i}": x for part in parts for i, x in enumerate(getattr(state, part))}
    return {**named, "position": state.position}


def _with_leaves(inputs: ScanInputs, leaves: dict[str, Tensor]) -> ScanInputs:
    layers = range(len(inputs.state.weights))
    anchor, weights, momentum = (
        tuple(leaves[f"{part} {i}"] for i in layers) for part in ("anchor", "weights", "momentum")
    )
    norm = (leaves["norm weight"], leaves["norm bias"]) if inputs.form.norm is not None else None
    return inputs._replace(
        tokens=Tokens(*(leaves[name] for name in NAMES)),
        state=MemoryState(anchor, weights, momentum, inputs.state.position),
        form=inputs.form._replace(norm=norm),
    )


def _steady(x: Tensor, seed: int) -> Tensor:
    """Fixed weights of a sum, without a pattern that would cancel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device, x.dtype)


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """For each of the expected results RMS(actual - expected) / RMS(expected), in float64. It is inf for one that is
    missing, has another shape, holds a nan or an infinity, or is not exactly equal though it is of whole numbers."""
    return {name: _error(actual.get(name), value) for name, value in expected.items()}


def _error(actual: Tensor | None, expected: Tensor) -> float:
    if actual is None or actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if bool((actual == expected).all()) else float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    difference, size = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(b))
    if difference == 0:
        return 0.0
    error = difference / size if size else float("inf")
    return error if error == error else float("inf")  # a nan is not an error that a limit would catch
