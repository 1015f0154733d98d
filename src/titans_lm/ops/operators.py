"""The operation as operators of PyTorch, `torch.ops.titans_lm.*`, for whatever looks at a call without its values.

`torch.compile` and `torch.export` put `scan` and `step` into their graphs; the layout of chunks, which depends on the
state's position, is decided inside, when the operator runs. An eager call does not take this way, which costs a little.
Each has a fake implementation (shapes alone) and a backward pass, which is an operator too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.chunked.chunk import WeightsAndMomentum
from titans_lm.ops.chunked.group import ChunkRun
from titans_lm.ops.chunked.scan import RunInputs, chunked_scan, scan_run
from titans_lm.ops.cpu import saved_call
from titans_lm.ops.cpu.native import native_scan, unsupported_reason
from titans_lm.ops.cpu.native import update_token as native_update_token
from titans_lm.ops.decode import Layers, TokenUpdate, decode_token, needs_grad, update_token
from titans_lm.ops.delta_rule import linear_scan
from titans_lm.ops.delta_rule import unsupported_reason as linear_unsupported_reason
from titans_lm.ops.library import LIBRARY, define_operator, recorded_by_autograd
from titans_lm.ops.types import MemoryForm, MemoryState, ScanInputs, ScanOutput, Surprise, Tokens

SCANS = {"linear": linear_scan, "native": native_scan, "chunked": chunked_scan}
_ARGUMENTS = (
    "Tensor[] tokens, Tensor[] anchor, Tensor[] weights, Tensor[] momentum, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? mask, Tensor position, SymInt chunk_size, str activation, float? clip, float? threshold, bool surprise, "
    "str backend, int max_saved_bytes"
)
_TENSORS = 8
"""How many of the arguments are tensors, lists of them, or None."""


# ------------------------------------------------------------------------------------------------ arguments


class Arguments(NamedTuple):
    """The arguments of `scan` and `step`, as the dispatcher takes them."""

    tokens: Sequence[Tensor]
    anchor: Sequence[Tensor]
    weights: Sequence[Tensor]
    momentum: Sequence[Tensor]
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mask: Tensor | None
    position: Tensor
    chunk_size: int
    activation: str
    clip: float | None
    threshold: float | None
    surprise: bool
    backend: str
    max_saved_bytes: int
    """What `scan` may save for its backward pass; -1 where there will be none."""

    @classmethod
    def of(cls, inputs: ScanInputs, backend: str, max_saved_bytes: int) -> "Arguments":
        (anchor, weights, momentum, position), form = inputs.state, inputs.form
        norm_weight, norm_bias = form.norm or (None, None)
        return cls(
            list(inputs.tokens), list(anchor), list(weights), list(momentum), norm_weight, norm_bias, inputs.mask,
            position, inputs.chunk_size, form.activation, form.clip, form.threshold, inputs.surprise, backend,
            max_saved_bytes,
        )  # fmt: skip

    def inputs(self) -> ScanInputs:
        norm = None if self.norm_weight is None or self.norm_bias is None else (self.norm_weight, self.norm_bias)
        form = MemoryForm(self.activation, norm, self.clip, self.threshold)  # type: ignore[arg-type]  # a str
        state = MemoryState(tuple(self.anchor), tuple(self.weights), tuple(self.momentum), self.position)
        tokens, saved = Tokens(*self.tokens), max(self.max_saved_bytes, 0)
        return ScanInputs(tokens, state, self.chunk_size, form, self.mask, self.surprise, saved)

    def resolved(self) -> str:
        """The backend that "auto" chooses, as `resolve_backend` does."""
        if self.backend != "auto":
            return self.backend
        inputs = self.inputs()
        if inputs.tokens.q.shape[1] > 1 and linear_unsupported_reason(inputs) is None:
            return "linear"
        return "chunked" if unsupported_reason(inputs) is not None else "native"

    def saved_shapes(self) -> saved_call.SavedShapes | None:
        """What the scan saves for its backward pass; None if nothing, and the backward pass runs it again."""
        if self.max_saved_bytes < 0 or self.resolved() != "native":
            return None
        return saved_call.saved_shapes(self.inputs(), self.max_saved_bytes)


class Outputs(NamedTuple):
    """The tensors that a `scan` or `step` returns in one list, apart from what it saves."""

    y: Tensor
    surprise: Surprise | None
    anchor: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]

    def flatten(self) -> list[Tensor]:
        return [self.y, *(self.surprise or ()), *self.anchor, *self.weights, *self.momentum]

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor], surprise: bool, layers: int) -> "Outputs":
        first = 3 if surprise else 1
        parts = [tuple(flat[first + i * layers : first + (i + 1) * layers]) for i in range(3)]
        return cls(flat[0], Surprise(flat[1], flat[2]) if surprise else None, *parts)

    @classmethod
    def empty(cls, a: Arguments) -> "Outputs":
        """Their shapes and dtypes."""
        dtype, gate = a.weights[0].dtype, a.tokens[3]
        anchor, weights, momentum = (tuple(_contiguous_like(w) for w in a.weights) for _ in range(3))
        surprise = Surprise(*(_contiguous_like(gate, dtype) for _ in range(2))) if a.surprise else None
        return cls(_contiguous_like(a.tokens[2]), surprise, anchor, weights, momentum)


def _contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _as_new(tensors: Sequence[Tensor], old: Sequence[Any]) -> list[Tensor]:
    """The tensors, contiguous; copies of those that share memory with another or with `old`: operators return new
    ones."""
    seen = {
        x.untyped_storage().data_ptr() for part in old for x in ([part] if isinstance(part, Tensor) else part or ())
    }
    new = []
    for x in tensors:
        x = x.detach().contiguous()
        if x.untyped_storage().data_ptr() in seen:
            x = x.clone()
        seen.add(x.untyped_storage().data_ptr())
        new.append(x)
    return new


def _gradients(outputs: list[Tensor], leaves: list[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """The gradients by the leaves from those by the outputs; 0 where there is none."""
    given = [(x, g) for x, g in zip(outputs, grads, strict=True) if g is not None and x.requires_grad]
    if not given:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad([x for x, _ in given], leaves, [g for _, g in given], materialize_grads=True)


# ------------------------------------------------------------------------------------------------ scan


def _scan(*arguments: Any) -> list[Tensor]:
    a = Arguments(*arguments)
    shapes = a.saved_shapes()
    saved: list[Tensor] = []
    with torch.no_grad():
        if shapes is None:
            y, state, surprise = SCANS[a.resolved()](a.inputs())
        else:
            (y, state, surprise), saved = saved_call.scan_and_save(a.inputs(), shapes)
    out = Outputs(y.to(a.tokens[2].dtype), surprise, *state[:3])
    return [*_as_new(out.flatten(), a[:_TENSORS]), *saved]


def _scan_fake(*arguments: Any) -> list[Tensor]:
    a = Arguments(*arguments)
    shapes = a.saved_shapes()
    return [*Outputs.empty(a).flatten(), *([] if shapes is None else saved_call.empty(a.weights, shapes))]


def _leaves(a: Arguments) -> list[Tensor]:
    """The tensors that have a gradient."""
    norm = [x for x in (a.norm_weight, a.norm_bias) if x is not None]
    return [*a.tokens, *a.anchor, *a.weights, *a.momentum, *norm]


def _with_leaves(a: Arguments, leaves: Sequence[Tensor]) -> Arguments:
    """Undo `_leaves`."""
    rest, layers = iter(leaves), len(a.weights)
    tokens = [next(rest) for _ in a.tokens]
    anchor, weights, momentum = ([next(rest) for _ in range(layers)] for _ in range(3))
    norm = [None if x is None else next(rest) for x in (a.norm_weight, a.norm_bias)]
    return a._replace(
        tokens=tokens, anchor=anchor, weights=weights, momentum=momentum, norm_weight=norm[0], norm_bias=norm[1]
    )


def _scan_backward(saved: list[Tensor], grads: list[Tensor | None], *arguments: Any) -> list[Tensor]:
    """The gradients by `_leaves`."""
    a = Arguments(*arguments)
    with recorded_by_autograd():
        leaves = [x.detach().requires_grad_() for x in _leaves(a)]
        inputs, shapes = _with_leaves(a, leaves).inputs(), a.saved_shapes()
        if shapes is None:
            y, state, surprise = SCANS[a.resolved()](inputs)
        else:
            y, state, surprise = saved_call.scan_again(inputs, shapes, saved)
        outputs = Outputs(y.to(a.tokens[2].dtype), surprise, *state[:3]).flatten()
        found = _gradients(outputs, leaves, grads)
    return _as_new(found, [saved, [g for g in grads if g is not None], *a[:_TENSORS]])


def _scan_backward_fake(saved: list[Tensor], grads: list[Tensor | None], *arguments: Any) -> list[Tensor]:  # noqa: ARG001
    return [_contiguous_like(x) for x in _leaves(Arguments(*arguments))]


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    a = Arguments(*inputs)
    count = (3 if a.surprise else 1) + 3 * len(a.weights)
    ctx.set_materialize_grads(False)
    ctx.options = a[_TENSORS:]
    ctx.layers, ctx.has = len(a.weights), [x is not None for x in a[4:7]]
    ctx.count = count
    ctx.mark_non_differentiable(*output[count:], *(output[2:3] if a.surprise else ()))
    ctx.save_for_backward(*_leaves(a), a.position, *([] if a.mask is None else [a.mask]), *output[count:])


def _saved_arguments(ctx: Any) -> tuple[Arguments, list[Tensor]]:
    """The arguments of the forward pass, and what it saved."""
    tensors, layers = list(ctx.saved_tensors), ctx.layers
    tokens, tensors = tensors[:6], tensors[6:]
    (anchor, weights, momentum), tensors = (
        [tensors[i * layers : (i + 1) * layers] for i in range(3)],
        tensors[3 * layers :],
    )
    weight, bias = (tensors.pop(0) if has else None for has in ctx.has[:2])
    position = tensors.pop(0)
    mask = tensors.pop(0) if ctx.has[2] else None
    return Arguments(tokens, anchor, weights, momentum, weight, bias, mask, position, *ctx.options), tensors


def _differentiate_scan(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    a, saved = _saved_arguments(ctx)
    found = SCAN_BACKWARD(saved, list(grads[: ctx.count]), *a)
    by = _with_leaves(a, found)
    return *(list(x) for x in by[:4]), by.norm_weight, by.norm_bias, *[None] * (len(a) - 6)


SCAN = define_operator("scan", f"({_ARGUMENTS}) -> Tensor[]", _scan, _scan_fake)
SCAN_BACKWARD = define_operator(
    "scan_backward", f"(Tensor[] saved, Tensor?[] grads, {_ARGUMENTS}) -> Tensor[]", _scan_backward, _scan_backward_fake
)
torch.library.register_autograd("titans_lm::scan", _differentiate_scan, setup_context=_setup_scan, lib=LIBRARY)


# ------------------------------------------------------------------------------------------------ step


def _step(*arguments: Any) -> list[Tensor]:
    a = Arguments(*arguments)
    update = native_update_token if a.resolved() == "native" else update_token
    with torch.no_grad():
        y, weights, momentum, surprise = update(a.inputs(), tuple(a.anchor))
    out = Outputs(y.to(a.tokens[2].dtype), surprise, (), weights, momentum)
    return _as_new(out.flatten(), a[:_TENSORS])


def _step_fake(*arguments: Any) -> list[Tensor]:
    return Outputs.empty(Arguments(*arguments))._replace(anchor=()).flatten()


def _token_as_run(inputs: ScanInputs) -> list[Tensor]:
    """A step as a run of one chunk of one token, which has a backward pass."""
    (batch, _, heads, _), norm = inputs.tokens.q.shape, inputs.form.norm
    if norm is not None:
        weight, bias = (x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in norm)
        norm = (weight, bias)
    anchor, w, s = ([x.flatten(0, 1) for x in part] for part in inputs.state[:3])
    run = ChunkRun(inputs.form, inputs.surprise, 1, at_boundary=False, valid=None, fraction=1.0)
    (y, *surprise), state = scan_run(run, RunInputs(inputs.tokens, norm, anchor, WeightsAndMomentum(w, s)), 2**30)
    rows = (x.unflatten(0, (batch, heads)) for x in (*state.w, *state.s))
    return [y, *(surprise if inputs.surprise else ()), *rows]


def _step_backward(grads: list[Tensor | None], *arguments: Any) -> list[Tensor]:
    a = Arguments(*arguments)
    with recorded_by_autograd():
        leaves = [x.detach().requires_grad_() for x in _leaves(a)]
        outputs = _token_as_run(_with_leaves(a, leaves).inputs())
        found = _gradients(outputs, leaves, grads)
    return _as_new(found, [[g for g in grads if g is not None], *a[:_TENSORS]])


def _step_backward_fake(grads: list[Tensor | None], *arguments: Any) -> list[Tensor]:  # noqa: ARG001
    return [_contiguous_like(x) for x in _leaves(Arguments(*arguments))]


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    a = Arguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.layers, ctx.has = a[_TENSORS:], len(a.weights), [x is not None for x in a[4:7]]
    ctx.save_for_backward(*_leaves(a), a.position, *([] if a.mask is None else [a.mask]))


def _differentiate_step(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    a, _ = _saved_arguments(ctx)
    by = _with_leaves(a, STEP_BACKWARD(list(grads), *a))
    return *(list(x) for x in by[:4]), by.norm_weight, by.norm_bias, *[None] * (len(a) - 6)


STEP = define_operator("step", f"({_ARGUMENTS}) -> Tensor[]", _step, _step_fake)
STEP_BACKWARD = define_operator(
    "step_backward", f"(Tensor?[] grads, {_ARGUMENTS}) -> Tensor[]", _step_backward, _step_backward_fake
)
torch.library.register_autograd("titans_lm::step", _differentiate_step, setup_context=_setup_step, lib=LIBRARY)


# ------------------------------------------------------------------------------------------------ a call


def operator_scan(inputs: ScanInputs, backend: str) -> ScanOutput:
    """`naive_scan` by the operators, which choose the backend as `memory_scan` does."""
    recorded, layers = needs_grad(inputs), len(inputs.state.weights)
    if inputs.tokens.q.shape[1] == 1 and not recorded and backend in ("auto", "native"):
        return decode_token(inputs, lambda inputs, anchor: _step_operator(inputs, anchor, backend))
    a = Arguments.of(inputs, backend, inputs.max_saved_bytes if recorded else -1)
    out = Outputs.unflatten(SCAN(*a), inputs.surprise, layers)
    length = inputs.tokens.q.shape[1] if inputs.mask is None else inputs.mask.sum(1)
    position = (inputs.state.position + length) % inputs.chunk_size
    return ScanOutput(out.y, MemoryState(out.anchor, out.weights, out.momentum, position), out.surprise)


def _step_operator(inputs: ScanInputs, anchor: Layers, backend: str) -> TokenUpdate:
    a = Arguments.of(inputs._replace(state=inputs.state._replace(anchor=anchor)), backend, -1)
    y, *rest = STEP(*a._replace(mask=None))
    layers = len(anchor)
    surprise = Surprise(rest[0], rest[1]) if inputs.surprise else None
    rest = rest[2:] if inputs.surprise else rest
    return TokenUpdate(y, tuple(rest[:layers]), tuple(rest[layers:]), surprise)
