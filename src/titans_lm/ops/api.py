"""`memory_scan`: checks its arguments, chooses a backend, and runs it."""

import contextlib
from collections.abc import Callable
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from titans_lm.ops import choice
from titans_lm.ops.cpu.native import unsupported_reason as native_unsupported_reason
from titans_lm.ops.decode import step_scan
from titans_lm.ops.delta_rule import unsupported_reason as linear_unsupported_reason
from titans_lm.ops.grouping import MAX_SAVED_BYTES
from titans_lm.ops.operators import SCANS, operator_scan
from titans_lm.ops.ragged import masked_zero
from titans_lm.ops.reference import naive_scan
from titans_lm.ops.types import (
    MemoryForm,
    MemoryState,
    ScanInputs,
    ScanOutput,
    Surprise,
    Tokens,
    has_values,
    is_autocast,
    is_traced,
    is_watched,
)
from titans_lm.utils.deprecation import renamed_arguments

Backend = Literal["auto", "naive", "step", "linear", "chunked", "native", "triton"]
_SCANS: dict[str, Callable[[ScanInputs], ScanOutput]] = {"naive": naive_scan, "step": step_scan, **SCANS}


def resolve_backend(backend: Backend, inputs: ScanInputs) -> str:
    """The backend that `memory_scan` runs for `backend` on `inputs`: "auto" chooses, any other name is that backend.

    On a GPU "auto" chooses between "chunked" and "triton": at the first call of a kind it compares and times both, and
    takes the faster one if it is right (`choice.py`). It never takes a kernel that failed.

    Raises ValueError for an unknown name, and for a backend that cannot run these inputs.
    """
    tokens, reason = inputs.tokens.q.shape[1], linear_unsupported_reason(inputs)
    if backend == "auto":
        if tokens > 1 and reason is None:
            return "linear"
        if native_unsupported_reason(inputs) is None:
            return "native"
        if tokens > 1 and _may_run_kernels(inputs):
            return choice.choose(inputs, {name: run_with(name) for name in ("chunked", "triton")})
        return "step" if tokens == 1 else "chunked"
    if backend not in (*_SCANS, "triton"):
        raise ValueError(f"backend={backend!r} is not one of: auto, {', '.join(_SCANS)}, triton")
    if backend == "step" and tokens != 1:
        raise ValueError(f'backend="step" decodes one token, got T={tokens}; use "chunked"')
    if backend == "linear" and reason is not None:
        raise ValueError(f'backend="linear" {reason}; use "chunked"')
    if backend == "native" and (reason := native_unsupported_reason(inputs)) is not None:
        raise ValueError(f'backend="native" {reason}; use "chunked"')
    return backend


def _may_run_kernels(inputs: ScanInputs) -> bool:
    """Whether there is a GPU, whose kernels could run these inputs."""
    q = inputs.tokens.q
    if not (q.is_cuda and torch.cuda.is_available()) or is_traced(q):
        return False
    from titans_lm.ops.triton.fused import check_supported

    try:
        check_supported(q, inputs.state, inputs.chunk_size)
    except ValueError:
        return False
    return True


def run_with(name: Backend) -> Callable[[ScanInputs], ScanOutput]:
    """`memory_scan` with this backend, as a function of its arguments."""

    def run(inputs: ScanInputs) -> ScanOutput:
        _, state, chunk_size, form, mask, surprise, max_saved_bytes = inputs
        y, after, *per_token = memory_scan(
            *inputs.tokens, state, chunk_size=chunk_size, form=form, mask=mask, surprise=surprise, backend=name,
            max_saved_bytes=max_saved_bytes,
        )  # fmt: skip
        return ScanOutput(y, after, per_token[0] if per_token else None)

    return run


@overload
def memory_scan(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, state: MemoryState, *,
    chunk_size: int, form: MemoryForm = ..., mask: Tensor | None = ..., surprise: Literal[False] = ...,
    backend: Backend = ..., max_saved_bytes: int = ...,
) -> tuple[Tensor, MemoryState]: ...  # fmt: skip
@overload
def memory_scan(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, state: MemoryState, *,
    chunk_size: int, form: MemoryForm = ..., mask: Tensor | None = ..., surprise: Literal[True],
    backend: Backend = ..., max_saved_bytes: int = ...,
) -> tuple[Tensor, MemoryState, Surprise]: ...  # fmt: skip
@overload
def memory_scan(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, state: MemoryState, *,
    chunk_size: int, form: MemoryForm = ..., mask: Tensor | None = ..., surprise: bool,
    backend: Backend = ..., max_saved_bytes: int = ...,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Surprise]: ...  # fmt: skip
@renamed_arguments({"kept_bytes": "max_saved_bytes"})
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
    max_saved_bytes: int = MAX_SAVED_BYTES,
) -> tuple[Float[Tensor, "B T H V"], MemoryState] | tuple[Float[Tensor, "B T H V"], MemoryState, Surprise]:
    """Write T tokens to the memory and read it at each of them (arXiv:2501.00663, eqs. 10 to 15).

        S_t = eta_t S_{t-1} - theta_t grad || M(k_t) - v_t ||^2       M_t = (1 - alpha_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    The gradient is taken at the anchor: the weights at the start of the token's chunk of `chunk_size` tokens.
    `chunk_size=1` is the paper to the letter. Each token reads its own M_t.

    Args:
        q, k: queries and keys `[B, T, H, K]`, T >= 0.
        v: values `[B, T, H, V]`.
        theta, eta, alpha: step size, momentum and forgetting `[B, T, H]`, in [0, 1]; exactly 0 and 1 work.
        state: the memory before the first token, at any position of a chunk. Cutting a sequence into several calls
            changes nothing but rounding.
        chunk_size: tokens that take their gradient at the same weights, C >= 1.
        form: the function M, its clip and its threshold.
        mask: False at padding, which is not written, does not decay and does not count in the chunk. Its output is 0.
        surprise: whether to return each token's loss and gradient norm too.
        backend: "auto" chooses; on a GPU it compares and times "chunked" and "triton" at first use. "linear" is for
            depth 1 in the plain form with `chunk_size=1`. "native" is C++ for CPUs, compiled at first use by `$CXX` or
            the compiler that is installed, and cached in `$XDG_CACHE_HOME/titans_lm` (~/.cache). "triton" runs fused
            kernels on a CUDA device, for some depths and widths (README.md beside this file). "naive", "step" and
            "chunked" are plain PyTorch.
        max_saved_bytes: what "chunked", "native" and "linear" may save for the backward pass. A call that needs more
            recomputes groups of chunks there: a third more time, bounded memory.

    Returns:
        y `[B, T, H, V]` in v's dtype, and the state after the last token; with `surprise=True` a `Surprise` too. The
        state keeps its dtype, and computation runs in it.

    Raises:
        ValueError: for shapes, sizes or names that do not fit, and for a backend that cannot run these inputs.
    """
    inputs = ScanInputs(Tokens(q, k, v, theta, eta, alpha), state, chunk_size, form, mask, surprise, max_saved_bytes)
    _check(inputs)
    if mask is not None:
        inputs = inputs._replace(tokens=Tokens(*(masked_zero(x, mask) for x in inputs.tokens)))
    by_shape = not has_values(q) and backend in ("auto", *SCANS)
    name = backend if by_shape else resolve_backend(backend, inputs)
    autocast = is_autocast(q)  # state and decays are never rounded to half precision
    with torch.autocast(q.device.type, enabled=False) if autocast else contextlib.nullcontext():
        inputs = _in_state_dtype(inputs, name)
        if by_shape or (name == "native" and is_watched()):
            y, state, per_token = operator_scan(inputs, name)
        else:
            y, state, per_token = _scan_of(name)(inputs)
    y = y.to(v.dtype)
    return (y, state) if per_token is None else (y, state, per_token)


def _in_state_dtype(inputs: ScanInputs, backend: str) -> ScanInputs:
    """Gates and norm in the state's dtype; q, k and v too, where the backend would not save them as they are."""
    dtype, norm = inputs.state.weights[0].dtype, inputs.form.norm
    unchanged = 3 if backend in ("auto", "triton", "chunked", "native") else 0
    tokens = Tokens(*inputs.tokens[:unchanged], *(x.to(dtype) for x in inputs.tokens[unchanged:]))
    if norm is not None:
        norm = norm[0].to(dtype), norm[1].to(dtype)
    return inputs._replace(tokens=tokens, form=inputs.form._replace(norm=norm))


def _scan_of(name: str) -> Callable[[ScanInputs], ScanOutput]:
    if name == "triton":
        from titans_lm.ops.triton.fused import triton_scan  # imports triton: only here

        return triton_scan
    return _SCANS[name]


def _check(inputs: ScanInputs) -> None:
    tokens, form, chunk_size = inputs.tokens, inputs.form, inputs.chunk_size
    q, k, v = tokens[:3]
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k must be [B, T, H, K] and v [B, T, H, V], got {_shapes(q, k, v)}")
    for name, gate in zip(("theta", "eta", "alpha"), tokens[3:], strict=True):
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {list(q.shape[:3])}, got {list(gate.shape)}")
    if inputs.mask is not None and inputs.mask.shape != q.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {list(q.shape[:2])}, got {list(inputs.mask.shape)}")
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, True where a token is read, got {inputs.mask.dtype}")
    _check_weights(q, v, inputs.state)
    _check_consistency(inputs)
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


def _check_consistency(inputs: ScanInputs) -> None:
    """Check that all tensors share a device, and the parts of the state shapes and a dtype: C++ reads addresses."""
    tokens, state, form = inputs.tokens, inputs.state, inputs.form
    if state.position.shape != tokens.q.shape[:1] or state.position.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the state's position must be [B] = {list(tokens.q.shape[:1])} integers, tokens of the chunk so far, got "
            f"{_shapes(state.position)} in {state.position.dtype}"
        )
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
                f"tokens, state and norm must be on one device: q is on {tokens.q.device}, another is on {x.device}"
            )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)
