"""The fused form: one kernel reads a group of chunks, one goes back over it. How: README.md one folder up.

Here is what surrounds the kernels: which calls they can run, how a call becomes launches, and what does not touch the
state (decays, the residual form's end), which stays PyTorch's.
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_lm.ops.chunked.chunk import Layers, Weights
from titans_lm.ops.chunked.group import Span
from titans_lm.ops.chunked.scan import Inputs, in_spans, thirds, to_rows, to_tokens
from titans_lm.ops.decays import Decays, Gates, back_decays, decays
from titans_lm.ops.types import NORM_EPS, Answer, Call, MemoryForm, MemoryState, Tokens

WIDTHS, LARGEST_HIDDEN, LARGEST_CHUNK = (16, 32, 64, 128), 256, 64
SMALLEST = 16
"""The least size of a product's dimension: a chunk that is shorter is padded with slots that do nothing."""

# ------------------------------------------------------------------------------------------------ what can run


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests; it reads the same variable when first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check(q: Tensor, state: MemoryState, chunk_size: int) -> None:
    """Raises ValueError with the reason if the kernels cannot run on this."""
    shapes = [tuple(w.shape[2:]) for w in state.weights]
    if importlib.util.find_spec("triton") is None:
        raise ValueError('backend="triton" needs the package triton, which is not installed; use "chunked"')
    if q.device.type != "cuda" and not interpreting():
        raise ValueError(
            f'backend="triton" needs tensors on a CUDA device, got {q.device.type}; use "chunked", or set '
            "TRITON_INTERPRET=1 before triton is imported to run its kernels very slowly on the CPU"
        )
    if state.weights[0].dtype != torch.float32:
        raise ValueError(f'backend="triton" keeps a float32 state, got {state.weights[0].dtype}; use "chunked"')
    if len(shapes) > 2:
        raise ValueError(f'backend="triton" has kernels for depth 1 and 2, got {len(shapes)}; use "chunked"')
    if shapes[0][0] not in WIDTHS or shapes[-1][1] != shapes[0][0]:
        raise ValueError(f'backend="triton" needs K == V in {WIDTHS}, got K={shapes[0][0]}, V={shapes[-1][1]}')
    if shapes[0][1] % SMALLEST or shapes[0][1] > LARGEST_HIDDEN:
        raise ValueError(
            f'backend="triton" needs a hidden width that is a multiple of {SMALLEST} up to {LARGEST_HIDDEN}, '
            f"got {shapes[0][1]}"
        )
    if chunk_size > LARGEST_CHUNK:
        raise ValueError(f'backend="triton" needs chunk_size <= {LARGEST_CHUNK}, got {chunk_size}; use "chunked"')


# ------------------------------------------------------------------------------------------------ launches


class Plan(NamedTuple):
    """What is compiled into the kernels for a span, and how it is launched."""

    depth: int
    k: int
    units: int  # inputs of the last layer
    block: int
    c: int
    form: MemoryForm
    at_boundary: bool
    precision: str

    @classmethod
    def of(cls, span: Span, inputs: Inputs, c: int) -> "Plan":
        k, units = inputs.anchor[0].shape[1], inputs.anchor[-1].shape[1]
        form = span.form._replace(norm=None)
        return cls.made(len(inputs.anchor), k, units, c, form, span.at_boundary, precision_of(inputs.tokens.q.dtype))

    @classmethod
    def made(
        cls, depth: int, k: int, units: int, c: int, form: MemoryForm, at_boundary: bool, precision: str
    ) -> "Plan":
        return cls(depth, k, units, block_of(k, units, precision), c, form, at_boundary, precision)

    def constants(self, norm: Any) -> dict[str, Any]:
        return {
            "K": self.k, "U": self.units, "BLOCK": self.block, "C": self.c, "DEPTH": self.depth,
            "GELU": self.form.activation == "gelu", "NORM": norm is not None, "CLIP": self.form.clip,
            "THRESHOLD": self.form.threshold, "EPS": NORM_EPS, "AT_BOUNDARY": self.at_boundary,
            "PRECISION": self.precision, "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip


WARPS = 8


def block_of(k: int, units: int, precision: str) -> int:
    """Units that go through a kernel at one time: a power of two that divides them, no larger than what the compiler
    could hold without spilling much more (README.md one folder up)."""
    return math.gcd(units, 32 if k <= 64 and precision == "bf16" else 16)


def precision_of(dtype: torch.dtype) -> str:
    """How products are taken: bfloat16 tokens by bfloat16 operands; float32 by three tf32 products for one, which are
    near float32's own precision and need less shared memory than one tf32 product."""
    if dtype == torch.bfloat16 and not interpreting():  # the interpreter's products of bfloat16 are wrong
        return "bf16"
    return "tf32x3"


class Part(NamedTuple):
    """A group of chunks, as the kernels take it."""

    tokens: tuple[Tensor, Tensor, Tensor]  # q, k, shift [N, R, C, K]
    decay: Decays
    gates: Gates  # for the decays' backward pass
    last: Tensor  # [R]


def part_of(tokens: Tokens, span: Span, bias: Tensor | None) -> Part:
    v = tokens.v.float()
    shift = -v if bias is None else tokens.k.float() - v + bias
    decay, gates = decays(*tokens[3:], span.present)
    decay = Decays(*(x.contiguous() for x in decay))
    return Part((tokens.q, tokens.k, shift), decay, gates, last_chunk(tokens, span.present))


def last_chunk(tokens: Tokens, present: Tensor | None) -> Tensor:
    """The last chunk in which each row has a token, -1 if none: `[R]`."""
    n, rows = tokens.q.shape[:2]
    number = torch.arange(n, dtype=torch.int32, device=tokens.q.device)[:, None].expand(n, rows)
    return (number if present is None else torch.where(present.any(-1), number, -1)).amax(0)


def pair(layers: Layers) -> tuple[Tensor | None, Tensor]:
    """First and last layer; a memory of depth 1 has no first."""
    return (None if len(layers) == 1 else layers[0]), layers[-1]


def four(w: Layers, s: Layers) -> tuple[Tensor | None, ...]:
    return pair(w)[0], pair(s)[0], w[-1], s[-1]


def launch_read(
    plan: Plan,
    part: Part,
    gain: Tensor | None,
    anchor: Layers,
    state: Weights,
    outputs: tuple[Tensor | None, ...] | None,
) -> None:
    """Read a group. `state` has slots, `[slots, R, in, out]` per layer. `outputs` None: fill the slots alone."""
    from titans_lm.ops.triton.kernels import read

    n, rows = part.tokens[0].shape[:2]
    y, loss, norm = (None, None, None) if outputs is None else outputs
    with torch.cuda.device_of(part.last):
        read[(rows,)](
            *part.tokens, *part.decay, gain, *pair(anchor), *four(*state), part.last, y, loss, norm, n, rows,
            **plan.constants(gain), EACH=outputs is None, SURPRISE=loss is not None,
        )  # fmt: skip


class Gradients(NamedTuple):
    """Of the outer loss by what a group read; and room for the kernel."""

    q: Tensor
    k: Tensor
    shift: Tensor
    decay: Decays
    gain: Tensor | None
    room: tuple[Tensor, Tensor]  # [R, C, U] each

    @classmethod
    def like(cls, plan: Plan, part: Part, gain: Tensor | None) -> "Gradients":
        rows = part.tokens[0].shape[1]
        q, k, shift = (torch.empty_like(x, dtype=torch.float32) for x in part.tokens)
        decay = Decays(*(torch.empty_like(x) for x in part.decay))
        room = (shift.new_empty(rows, plan.c, plan.units), shift.new_empty(rows, plan.c, plan.units))
        return cls(q, k, shift, decay, None if gain is None else torch.zeros_like(gain), room)


def launch_back(
    plan: Plan,
    part: Part,
    gain: Tensor | None,
    anchor: Layers,
    state: Weights,
    by_y: Tensor,
    by_loss: Tensor | None,
    by_anchor: Layers,
    by_state: Weights,
) -> Gradients:
    """Go back over a group. `by_anchor` and `by_state`, of the end, become those of the start."""
    from titans_lm.ops.triton.kernels import back

    n, rows = part.tokens[0].shape[:2]
    by = Gradients.like(plan, part, gain)
    with torch.cuda.device_of(part.last):
        back[(rows,)](
            *part.tokens, *part.decay, gain, *pair(anchor), *four(*state), part.last, by_y, by_loss, *pair(by_anchor),
            *four(*by_state), by.q, by.k, by.shift, *by.decay, by.gain, *by.room, n, rows, **plan.constants(gain),
        )  # fmt: skip
    return by


# ------------------------------------------------------------------------------------------------ a span of chunks


class _ReadSpan(torch.autograd.Function):
    """`read_chunks` with a backward pass. Kept for it are the inputs and the state at the start of each group."""

    @staticmethod
    def forward(ctx: Any, span: Span, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.of(flat)
        y, loss, norm, anchor, after, starts = read_chunks(span, inputs)
        ctx.set_materialize_grads(False)
        ctx.span, ctx.count = span, len(flat)
        ctx.save_for_backward(*flat, *starts.w, *starts.s)
        if norm is not None:
            ctx.mark_non_differentiable(norm)
        return y, loss, norm, *anchor, *after.w, *after.s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y: Tensor | None, loss: Tensor | None, _: None, *states: Tensor | None) -> tuple[Any, ...]:
        inputs = Inputs.of(ctx.saved_tensors[: ctx.count])
        starts = ctx.saved_tensors[ctx.count :]
        layers = len(inputs.anchor)
        y = torch.zeros_like(inputs.tokens.v, dtype=torch.float32) if y is None else y.contiguous()
        shapes = (*inputs.anchor, *inputs.state.w, *inputs.state.s)
        by_anchor, *by_state = thirds([
            torch.zeros_like(x, memory_format=torch.contiguous_format) if by is None
            else by.clone(memory_format=torch.contiguous_format)
            for x, by in zip(shapes, states, strict=True)
        ])  # fmt: skip
        by = back_chunks(
            ctx.span, inputs, Weights(list(starts[:layers]), list(starts[layers:])), y, loss, by_anchor,
            Weights(*by_state),
        )  # fmt: skip
        return None, *by.flat()


def read_chunks(span: Span, inputs: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None, Layers, Weights, Weights]:
    """Y_L `[N, R, C, K]`, loss and gradient norm `[N, R, C]` if asked for, last anchor, state after, group starts."""
    n, rows, c, _ = inputs.tokens.q.shape
    plan, gain = Plan.of(span, inputs, c), gain_of(inputs)
    size = group_size(n)
    y = torch.empty_like(inputs.tokens.v, dtype=torch.float32)
    seen = tuple(y.new_empty(n, rows, c) if span.surprise else None for _ in range(2))
    anchor = [w.clone(memory_format=torch.contiguous_format) for w in inputs.anchor]
    starts = slots(inputs.state, -(-n // size) + 1)  # and the end
    for i, (tokens, here) in enumerate(groups(inputs.tokens, span, size)):
        part = slice(i * size, (i + 1) * size)
        outputs = (y[part], *(None if x is None else x[part] for x in seen))
        state = Weights(*([x[i:] for x in layers] for layers in starts))
        launch_read(plan, part_of(tokens, here, bias_of(inputs)), gain, anchor, state, outputs)
    after = Weights(*([x[-1].clone() for x in layers] for layers in starts))
    return y, *seen, anchor, after, starts  # type: ignore[return-value]


def back_chunks(
    span: Span,
    inputs: Inputs,
    starts: Weights,
    by_y: Tensor,
    by_loss: Tensor | None,
    by_anchor: Layers,
    by_state: Weights,
) -> Inputs:
    """The gradients by `inputs`, from those by Y_L, the loss, the last anchor and the state after."""
    n, _, c, _ = inputs.tokens.q.shape
    plan, gain = Plan.of(span, inputs, c), gain_of(inputs)
    size = group_size(n)
    inside = Weights(*([x.new_empty(size + 1, *x.shape[1:]) for x in layers] for layers in starts))
    anchor = [w.contiguous() for w in inputs.anchor]
    parts: list[Tokens] = []
    by_gain, by_bias = None, None
    for i, (tokens, here) in reversed(list(enumerate(groups(inputs.tokens, span, size)))):
        part = part_of(tokens, here, bias_of(inputs))
        for room, start in zip((*inside.w, *inside.s), (*starts.w, *starts.s), strict=True):
            room[0] = start[i]
        launch_read(plan, part, gain, anchor, inside, None)
        here_in_all = slice(i * size, (i + 1) * size)
        loss = None if by_loss is None else by_loss[here_in_all].contiguous()
        by = launch_back(plan, part, gain, anchor, inside, by_y[here_in_all], loss, by_anchor, by_state)
        by_gates = back_decays(by.decay, part.gates)
        k = by.k
        if span.at_boundary:  # went to the weights that the anchor was, in rows that have a token
            for x in by_anchor:
                x *= (part.last < 0)[:, None, None]
        if by.gain is not None:
            k, bias = by.k + by.shift, by.shift.sum((0, 2))[:, None]
            by_gain = by.gain if by_gain is None else by_gain + by.gain
            by_bias = bias if by_bias is None else by_bias + bias
        dtype = tokens.q.dtype
        parts.insert(0, Tokens(by.q.to(dtype), k.to(dtype), -by.shift.to(tokens.v.dtype), *by_gates))
    by_tokens = Tokens(*(torch.cat(x) for x in zip(*parts, strict=True)))
    norm = None if by_gain is None or by_bias is None else (by_gain[:, None], by_bias)
    return Inputs(by_tokens, norm, by_anchor, by_state)


def slots(state: Weights, count: int) -> Weights:
    """Room for `count` states, `[count, R, in, out]` per layer; `state` is the first."""
    made = Weights(*([x.new_empty(count, *x.shape) for x in layers] for layers in state))
    for room, first in zip((*made.w, *made.s), (*state.w, *state.s), strict=True):
        room[0] = first
    return made


def group_size(chunks: int) -> int:
    return max(1, round(math.sqrt(chunks)))


def gain_of(inputs: Inputs) -> Tensor | None:
    return None if inputs.norm is None else inputs.norm[0][:, 0].contiguous()


def bias_of(inputs: Inputs) -> Tensor | None:
    return None if inputs.norm is None else inputs.norm[1]


def groups(tokens: Tokens, span: Span, size: int) -> list[tuple[Tokens, Span]]:
    present = span.present
    return [
        (
            Tokens(*(x[n : n + size] for x in tokens)),
            span._replace(present=None if present is None else present[n : n + size]),
        )
        for n in range(0, len(tokens.q), size)
    ]


def read_span(span: Span, inputs: Inputs) -> tuple[Any, ...]:
    """As `chunked.read_span`."""
    width, (batch, _, heads, _) = span.width, inputs.tokens.q.shape
    if span.present is not None:
        span = span._replace(present=to_rows(span.present[..., None].expand(-1, -1, heads), width))
    span, tokens = padded(span, Tokens(*(to_rows(x, width) for x in inputs.tokens)))
    inputs = inputs._replace(tokens=tokens)
    flat = inputs.flat()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        y, loss, norm, *state = _ReadSpan.apply(span, *flat)
        anchor, w, s = thirds(state)
    else:
        y, loss, norm, anchor, (w, s), _ = read_chunks(span, inputs)
    if inputs.norm is not None:
        gain, bias = inputs.norm
        y = tokens.q.float() + F.layer_norm(y, y.shape[-1:], eps=NORM_EPS) * gain + bias
    return *(None if x is None else to_tokens(x[:, :, :width], batch) for x in (y, loss, norm)), anchor, w, s


def padded(span: Span, tokens: Tokens) -> tuple[Span, Tokens]:
    """Chunks made as long as the kernels need them, a power of two, with slots that hold no token."""
    width = tokens.q.shape[2]
    more = max(SMALLEST, 1 << (width - 1).bit_length()) - width
    if not more:
        return span, tokens
    present = torch.ones_like(tokens.theta, dtype=torch.bool) if span.present is None else span.present
    wide = tuple(F.pad(x, (0, 0, 0, more)) for x in tokens[:3])
    narrow = tuple(F.pad(x, (0, more)) for x in tokens[3:])
    return span._replace(present=F.pad(present, (0, more))), Tokens(*wide, *narrow)


# ------------------------------------------------------------------------------------------------ the whole call


def fused(call: Call) -> Answer:
    """As `naive`, by kernels; q, k and v also in bfloat16. Raises ValueError with the reason if they cannot run."""
    q, k, v = call.tokens[:3]
    check(q, call.state, call.chunk_size)
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        call = call._replace(tokens=call.tokens._replace(q=q.float(), k=k.float(), v=v.float()))
    return in_spans(call, read_span)
