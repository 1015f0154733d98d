"""`memory_scan`: checks what it is given, and runs one of the forms of the operation."""

import contextlib
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from titans_lm.ops.chunked.scan import KEPT_BYTES, chunked
from titans_lm.ops.cpu.native import native
from titans_lm.ops.cpu.native import obstacle as not_native
from titans_lm.ops.decode import step
from titans_lm.ops.delta_rule import linear
from titans_lm.ops.delta_rule import obstacle as not_linear
from titans_lm.ops.ragged import cleared
from titans_lm.ops.reference import naive
from titans_lm.ops.types import (
    Answer,
    Call,
    MemoryForm,
    MemoryState,
    Surprise,
    Tokens,
)

Backend = Literal["auto", "naive", "step", "linear", "chunked", "native", "triton"]
_FORMS: dict[str, Callable[[Call], Answer]] = {
    "naive": naive, "step": step, "linear": linear, "chunked": chunked, "native": native,
}  # fmt: skip


def resolve_backend(backend: Backend, call: Call) -> str:
    """The form that `memory_scan` runs for `backend` on `call`: "auto" chooses, the others are what they say.

    "auto" is never "triton", whose kernels were not measured on a GPU: who wants them names them.

    Raises ValueError for a name that is not a backend, or one that cannot run this call.
    """
    tokens, reason = call.tokens.q.shape[1], not_linear(call)
    if backend == "auto":
        if tokens > 1 and reason is None:
            return "linear"
        if not_native(call) is None:
            return "native"
        return "step" if tokens == 1 else "chunked"
    if backend not in (*_FORMS, "triton"):
        raise ValueError(f"backend={backend!r} is not one of: auto, {', '.join(_FORMS)}, triton")
    if backend == "step" and tokens != 1:
        raise ValueError(f'backend="step" decodes one token, got T={tokens}; use "chunked"')
    if backend == "linear" and reason is not None:
        raise ValueError(f'backend="linear" {reason}; use "chunked"')
    if backend == "native" and (reason := not_native(call)) is not None:
        raise ValueError(f'backend="native" {reason}; use "chunked"')
    return backend


def memory_scan(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    theta: Float[Tensor, "B T H"],
    eta: Float[Tensor, "B T H"],
    alpha: Float[Tensor, "B T H"],
    state: MemoryState,
    *,
    chunk_size: int,
    form: MemoryForm = MemoryForm(),  # noqa: B008 - immutable
    mask: Bool[Tensor, "B T"] | None = None,
    surprise: bool = False,
    backend: Backend = "auto",
    kept_bytes: int = KEPT_BYTES,
) -> tuple[Float[Tensor, "B T H V"], MemoryState] | tuple[Float[Tensor, "B T H V"], MemoryState, Surprise]:
    """Read T tokens with a memory that learns while it reads (arXiv:2501.00663, eqs. 10 to 15).

        S_t = eta_t S_{t-1} - theta_t grad || M(k_t) - v_t ||^2       M_t = (1 - alpha_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    The gradient is taken at the weights that held when the token's chunk of `chunk_size` tokens began (`chunk_size=1`
    is the paper to the letter). Every token reads its own M_t. Gates lie in [0, 1]; exactly 0 and 1 work. Any T >= 0
    may start at any position in a chunk: cutting a sequence into calls changes nothing but rounding.

    `mask` is False at padding, which is invisible: not written, no decay, no step in the chunk, output 0. With
    `surprise=True` a `Surprise` is returned as well. Work is done in the state's dtype; y has v's dtype.

    `kept_bytes`: a call by "chunked", "native" or "linear" that leaves no more for its backward pass than this keeps
    it; one that leaves more computes it again, group by group, in a third more time and bounded space.

    `backend="linear"` is for a memory of depth 1 in the plain form with `chunk_size=1`, where "auto" takes it.

    `backend="native"` is for CPUs, where "auto" takes it: C++, compiled when first used by the compiler that is there
    or that `$CXX` names, and kept in `$XDG_CACHE_HOME/titans_lm` (~/.cache).

    `backend="triton"` are fused kernels for a CUDA device, for some depths and widths (README.md beside this file).

    Raises ValueError for shapes, sizes or names that do not fit, and for a backend that cannot run on what it is given.
    """
    call = Call(Tokens(q, k, v, theta, eta, alpha), state, chunk_size, form, mask, surprise, kept_bytes)
    _check(call)
    if mask is not None:
        call = call._replace(tokens=Tokens(*(cleared(x, mask) for x in call.tokens)))
    name, dtype = resolve_backend(backend, call), state.weights[0].dtype
    as_they_are = 3 if name in ("triton", "chunked", "native") else 0  # q, k, v in bfloat16 are kept in it
    tokens = Tokens(*call.tokens[:as_they_are], *(x.to(dtype) for x in call.tokens[as_they_are:]))
    if form.norm is not None:
        form = form._replace(norm=(form.norm[0].to(dtype), form.norm[1].to(dtype)))
    half = torch.is_autocast_enabled(q.device.type)  # state and decays are never rounded to half precision
    with torch.autocast(q.device.type, enabled=False) if half else contextlib.nullcontext():
        y, state, seen = _form(name)(call._replace(tokens=tokens, form=form))
    y = y.to(v.dtype)
    return (y, state) if seen is None else (y, state, seen)


def _form(name: str) -> Callable[[Call], Answer]:
    if name == "triton":
        from titans_lm.ops.triton.fused import fused  # imports triton: only here

        return fused
    return _FORMS[name]


def _check(call: Call) -> None:
    tokens, form, chunk_size = call.tokens, call.form, call.chunk_size
    q, k, v = tokens[:3]
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k must be [B, T, H, K] and v [B, T, H, V], got {_shapes(q, k, v)}")
    for name, gate in zip(("theta", "eta", "alpha"), tokens[3:], strict=True):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {list(q.shape[:3])}, got {list(gate.shape)}")
    if call.mask is not None and call.mask.shape != q.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {list(q.shape[:2])}, got {list(call.mask.shape)}")
    _check_weights(q, v, call.state)
    _check_alike(call)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if form.norm is not None and v.shape[3] != q.shape[3]:
        raise ValueError(f"the residual form needs V == K, got K={q.shape[3]}, V={v.shape[3]}")
    if form.activation not in ("silu", "gelu"):
        raise ValueError(f'activation={form.activation!r} is not "silu" or "gelu"')
    if form.clip is not None and form.clip <= 0:
        raise ValueError(f"clip must be above 0 or None, got {form.clip}")


def _check_weights(q: Tensor, v: Tensor, state: MemoryState) -> None:
    batch, heads, width = q.shape[0], q.shape[2], q.shape[3]
    for w in state.weights:
        if w.dim() != 4 or w.shape[:3] != (batch, heads, width):
            raise ValueError(
                f"the state's weights must chain [B, H, in, out] from [{batch}, {heads}, {width}, ...], "
                f"got {_shapes(*state.weights)}"
            )
        width = w.shape[3]
    if width != v.shape[3]:
        raise ValueError(f"the state's last layer gives width {width}, but v has {v.shape[3]}")


def _check_alike(call: Call) -> None:
    """What belongs together has one shape, or one device, and a state one dtype: compiled code reads addresses."""
    tokens, state, form = call.tokens, call.state, call.form
    for name, part in (("anchor", state.anchor), ("momentum", state.momentum)):
        if [(w.shape, w.dtype) for w in part] != [(w.shape, w.dtype) for w in state.weights]:
            kinds = [f"{_shapes(*x)} in {', '.join(sorted({str(w.dtype) for w in x}))}" for x in (state.weights, part)]
            raise ValueError(f"the state's {name} must be as its weights, {kinds[0]}, got {kinds[1]}")
    for x in form.norm or ():
        if x.shape != (tokens.v.shape[2], tokens.v.shape[3]):
            raise ValueError(
                f"the norm's weight and bias must be [H, V] = {list(tokens.v.shape[2:])}, got {list(x.shape)}"
            )
    for x in (*tokens, *state.weights, *state.anchor, *state.momentum, *(form.norm or ())):
        if x.device != tokens.q.device:
            raise ValueError(
                f"q is on {tokens.q.device}, but not all of the tokens, state and norm: one is on {x.device}"
            )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)
