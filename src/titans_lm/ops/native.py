"""Chunks in C++: the algebra of `chunk.py`, a row and head at a time, so that its state stays in a core's caches.

The sources are in `cpp/`. They are compiled when first used, for the machine's own instructions, by the C++ compiler
that is there (`$CXX`, else c++, g++ or clang++), and kept in `$XDG_CACHE_HOME/titans_lm` (~/.cache). Layout, chunks and
what is kept for the backward pass are those of `chunked.py`.
"""

import ctypes
import hashlib
import itertools
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_lm.ops.chunked import Inputs, in_spans, thirds
from titans_lm.ops.group import Span
from titans_lm.ops.step import Advanced, Layers, one_token, wants_gradients
from titans_lm.ops.types import Answer, Call, MemoryForm, Surprise, Tokens

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
NUMBERS = {torch.float32: "float", torch.float64: "double"}
SMALL = 2**20
"""A call of fewer multiplications than this runs on one thread: starting others would take as long."""


# ------------------------------------------------------------------------------------------------ the library


class NotBuilt(Exception):
    """Why there is no library."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled sources for numbers of `dtype`. Raises NotBuilt, with the reason, where they cannot be."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NotBuilt("needs a C++ compiler: c++, g++ or clang++, or the one that CXX names")
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*texts, " ".join((compiler, *FLAGS)).encode(), _processor()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans_lm"
    built = folder / f"memory-{NUMBERS[dtype]}-{key[:16]}.so"
    try:
        if not built.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(compiler, NUMBERS[dtype], built)
        found = ctypes.CDLL(str(built))
    except OSError as error:
        raise NotBuilt(f"could not build or load {built}: {error}") from None
    for name in ("titans_state", "titans_trace"):
        getattr(found, name).restype = ctypes.c_long
    return found


def _processor() -> bytes:
    """What of this machine decides which instructions are its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine()).encode()


def _compile(compiler: str, number: str, built: Path) -> None:
    """Beside `built`, then renamed: several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder, built.name)
        command = (*shlex.split(compiler), *FLAGS, f"-DNumber={number}", str(SOURCES / "memory.cpp"), "-o", str(made))
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise NotBuilt(f"could not be compiled by {compiler}: {reason}")
        os.replace(made, built)


@cache
def _missing(dtype: torch.dtype) -> str | None:
    try:
        library(dtype)
    except NotBuilt as reason:
        return str(reason)
    return None


def obstacle(call: Call) -> str | None:
    """Why "native" cannot run this call, or None."""
    device = call.tokens.q.device.type
    if device != "cpu":
        return f"runs on CPUs, got tensors on {device}"
    return _missing(call.state.weights[0].dtype)


# ------------------------------------------------------------------------------------------------ what it is handed

_LONGS = ("batch", "slots", "heads", "layers", "width", "at_boundary", "threads", "group")
_FORM = ("activation", "has_threshold", "surprise")
_POINTERS = (
    "widths", "q", "k", "v", "theta", "eta", "alpha", "present", "weight", "bias", "anchor", "w", "s",
    "last_anchor", "new_w", "new_s", "y", "loss", "gradient_norm", "traces", "starts", "by_y", "by_loss",
    "by_q", "by_k", "by_v", "by_theta", "by_eta", "by_alpha", "by_weight", "by_bias", "by_anchor", "by_w", "by_s",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of cpp/call.h."""

    _fields_ = (
        *((name, ctypes.c_long) for name in (*_LONGS, *_FORM)),
        *((name, ctypes.c_double) for name in ("clip", "threshold")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


class _Handed:
    """A `_Call`, and what its pointers point to."""

    def __init__(self, form: MemoryForm, surprise: bool, tokens: Tokens, weights: Sequence[Tensor], width: int):
        batch, slots, heads, _ = tokens.q.shape
        shapes = [w.shape[-2:] for w in weights]
        work = batch * heads * slots * sum(i * o for i, o in shapes)
        self.call = _Call(
            batch=batch, slots=slots, heads=heads, layers=len(weights), width=width,
            threads=1 if work < SMALL else torch.get_num_threads(), activation=form.activation == "gelu",
            has_threshold=form.threshold is not None, threshold=form.threshold or 0, clip=form.clip or 0,
            surprise=surprise,
        )  # fmt: skip
        self.alive: list[Any] = []
        sizes = (ctypes.c_long * (len(weights) + 1))(shapes[0][0], *(o for _, o in shapes))
        self._point("widths", sizes, ctypes.addressof(sizes))
        self.library = library(weights[0].dtype)
        self.give(**tokens._asdict())

    def _point(self, name: str, holder: Any, address: int) -> None:
        self.alive.append(holder)
        setattr(self.call, name, address)

    def give(self, **tensors: Tensor | Sequence[Tensor] | None) -> None:
        """Contiguous tensors of the state's dtype, one or several; None is a null pointer."""
        for name, given in tensors.items():
            if isinstance(given, Tensor):
                self._point(name, given, given.data_ptr())
            elif given is not None:
                addresses = (ctypes.c_void_p * len(given))(*(x.data_ptr() for x in given))
                self._point(name, (given, addresses), ctypes.addressof(addresses))

    def run(self, function: str) -> int:
        return int(getattr(self.library, function)(ctypes.byref(self.call)) or 0)


def _solid(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Its numbers one behind the other, in `dtype`."""
    return x if x.dtype == dtype and x.is_contiguous() else x.detach().to(dtype).contiguous()


def _solid_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To be filled."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _handed(inputs: Inputs, span: Span) -> _Handed:
    dtype = inputs.anchor[0].dtype
    handed = _Handed(
        span.form, span.surprise, Tokens(*(_solid(x, dtype) for x in inputs.tokens)), inputs.anchor, span.width
    )
    handed.call.at_boundary = span.at_boundary
    anchor, w, s = ([_solid(x, dtype) for x in part] for part in (inputs.anchor, *inputs.state))
    weight, bias = (None, None) if inputs.norm is None else (_solid(x, dtype) for x in inputs.norm)
    present = None if span.present is None else span.present.contiguous()
    handed.give(anchor=anchor, w=w, s=s, weight=weight, bias=bias, present=present)
    return handed


# ------------------------------------------------------------------------------------------------ a span of chunks


def _read(handed: _Handed, inputs: Inputs, span: Span) -> tuple[tuple[Tensor | None, ...], list[list[Tensor]]]:
    """y, loss and gradient norm; last anchor, weights and momentum."""
    dtype = inputs.anchor[0].dtype
    y, gate = _solid_like(inputs.tokens.v, dtype), inputs.tokens.theta
    seen = [_solid_like(gate, dtype) if span.surprise else None for _ in range(2)]
    states = [[_solid_like(x, dtype) for x in inputs.anchor] for _ in range(3)]
    handed.give(y=y, loss=seen[0], gradient_norm=seen[1], last_anchor=states[0], new_w=states[1], new_s=states[2])
    handed.run("titans_read")
    return (y.to(inputs.tokens.v.dtype), *seen), states


class _ReadSpan(torch.autograd.Function):
    """`read_span` with a backward pass. Kept for it are the inputs, and what all chunks leave or the state at the start
    of each group of chunks, which are then read once more."""

    @staticmethod
    def forward(ctx: Any, span: Span, kept_bytes: int, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(flat)
        ctx.set_materialize_grads(False)
        handed = _handed(inputs, span)
        rows, chunks, some = len(inputs.anchor[0]), inputs.slots() // span.width, inputs.anchor[0]
        trace = handed.run("titans_trace")
        kept: list[Tensor] = []
        if rows * chunks * trace * some.element_size() <= kept_bytes * span.share:
            kept = [some.new_empty(chunks * trace) for _ in range(rows)]  # one a row: large ones are the system's anew
            handed.give(traces=kept)
        else:
            handed.call.group = max(8, round(math.sqrt(chunks)))
            groups = -(-chunks // handed.call.group)
            kept = [some.new_empty(max(groups - 1, 1), rows, handed.run("titans_state"))]
            handed.give(starts=kept[0])
        ctx.span, ctx.count, ctx.group = span, len(flat), handed.call.group
        out, states = _read(handed, inputs, span)
        ctx.save_for_backward(*flat, *kept)
        if span.surprise:
            ctx.mark_non_differentiable(out[2])
        return *out, *itertools.chain(*states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        saved, span = ctx.saved_tensors, ctx.span
        inputs, kept = Inputs.of(tuple(saved[: ctx.count])), saved[ctx.count :]
        dtype = inputs.anchor[0].dtype
        handed = _handed(inputs, span)
        handed.call.group = ctx.group
        handed.give(**({"starts": kept[0]} if ctx.group else {"traces": kept}))
        by_y = torch.zeros_like(inputs.tokens.v) if y is None else y
        handed.give(by_y=_solid(by_y, dtype), by_loss=None if loss is None else _solid(loss, dtype))
        shapes = (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        by_anchor, by_w, by_s = thirds([
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            if by is None else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip(shapes, states, strict=True)
        ])  # fmt: skip
        handed.give(by_anchor=by_anchor, by_w=by_w, by_s=by_s)
        by_tokens = Tokens(*(_solid_like(x, dtype) for x in inputs.tokens))
        handed.give(**{f"by_{name}": x for name, x in by_tokens._asdict().items()})
        by_norm = (None, None) if inputs.norm is None else [_solid_like(x, dtype) for x in inputs.norm]
        handed.give(by_weight=by_norm[0], by_bias=by_norm[1])
        handed.run("titans_back")
        found = (by.to(x.dtype) for by, x in zip(by_tokens, inputs.tokens, strict=True))
        return None, None, *found, *by_norm, *by_anchor, *by_w, *by_s


def read_span(span: Span, inputs: Inputs, kept_bytes: int) -> tuple[Any, ...]:
    """As `chunked.read_span`."""
    flat = inputs.flat()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        y, loss, norm, *state = _ReadSpan.apply(span, kept_bytes, *flat)
        return y, loss, norm, *thirds(state)
    out, states = _read(_handed(inputs, span), inputs, span)
    return *out, *states


# ------------------------------------------------------------------------------------------------ the whole call


def native(call: Call) -> Answer:
    """As `naive`, by compiled code."""
    if call.tokens.q.shape[1] == 1 and not wants_gradients(call):
        return one_token(call, _advance)
    return in_spans(call, partial(read_span, kept_bytes=call.kept_bytes))


def _advance(call: Call, anchor: Layers) -> Advanced:
    dtype, batch = call.state.weights[0].dtype, len(call.tokens.q)
    tokens = Tokens(*(_solid(x, dtype) for x in call.tokens))
    handed = _Handed(call.form, call.surprise, tokens, anchor, width=1)
    norm = call.form.norm or ()
    handed.give(**dict(zip(("weight", "bias"), (_solid(x.expand(batch, *x.shape), dtype) for x in norm), strict=False)))
    old = (anchor, call.state.weights, call.state.momentum)
    handed.give(
        **{name: [_solid(x, dtype) for x in part] for name, part in zip(("anchor", "w", "s"), old, strict=True)}
    )
    y, seen = torch.empty_like(tokens.v), [torch.empty_like(tokens.theta) for _ in range(2 * call.surprise)]
    weights, momentum = (tuple(_solid_like(x, dtype) for x in anchor) for _ in range(2))
    handed.give(new_w=weights, new_s=momentum, y=y, **dict(zip(("loss", "gradient_norm"), seen, strict=False)))
    handed.run("titans_step")
    return y, weights, momentum, Surprise(*seen) if seen else None
