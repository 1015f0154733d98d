"""Launch the Triton kernels: which calls they can run, and how a call becomes launches.

The kernels' design: README.md one folder up. PyTorch computes what does not touch the state: decays, and the last step
of the residual form.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.chunked.chunk import Layers, WeightsAndMomentum
from titans_lm.ops.chunked.group import ChunkRun, GroupOutput
from titans_lm.ops.chunked.scan import (
    RunInputs,
    RunOutput,
    StateLayers,
    grads_or_zeros,
    scan_runs,
    split_outputs,
    to_rows,
    to_tokens,
)
from titans_lm.ops.decays import Decays, SavedDecays, chunk_decays, decays_backward
from titans_lm.ops.grouping import group_size_sqrt
from titans_lm.ops.types import NORM_EPS, MemoryForm, MemoryState, ScanInputs, ScanOutput, Tokens

WIDTHS, MAX_HIDDEN, MAX_CHUNK_SIZE = (16, 32, 64, 128), 256, 64
MIN_SIZE = 16
"""The least size of a product's dimension. A shorter chunk is padded with empty slots."""

# ------------------------------------------------------------------------------------------------ what can run


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU, for tests. Triton reads the same variable when first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check_supported(q: Tensor, state: MemoryState, chunk_size: int) -> None:
    """Raise ValueError with the reason if the kernels cannot run on this call."""
    shapes = [tuple(w.shape[2:]) for w in state.weights]
    if importlib.util.find_spec("triton") is None:
        raise ValueError('backend="triton" needs the package triton, which is not installed; use "chunked"')
    if q.device.type != "cuda" and not is_interpreted():
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
    if shapes[0][1] % MIN_SIZE or shapes[0][1] > MAX_HIDDEN:
        raise ValueError(
            f'backend="triton" needs a hidden width that is a multiple of {MIN_SIZE} up to {MAX_HIDDEN}, '
            f"got {shapes[0][1]}"
        )
    if chunk_size > MAX_CHUNK_SIZE:
        raise ValueError(f'backend="triton" needs chunk_size <= {MAX_CHUNK_SIZE}, got {chunk_size}; use "chunked"')


# ------------------------------------------------------------------------------------------------ launches


class KernelPlan(NamedTuple):
    """The constants that the kernels are compiled with for a run."""

    depth: int
    k: int
    units: int  # inputs of the last layer
    c: int
    form: MemoryForm
    at_boundary: bool
    precision: str
    block: int = MIN_SIZE
    """Units, or columns of K, that a kernel processes at a time. With 32 the compiler asked for more stack (backward,
    bfloat16 tokens, sm_90): 24, 40 and 72 bytes at C = 16, 32 and 64, for 0, 8 and 32."""

    @classmethod
    def of(cls, run: ChunkRun, inputs: RunInputs, c: int) -> "KernelPlan":
        k, units = inputs.anchor[0].shape[1], inputs.anchor[-1].shape[1]
        form, precision = run.form._replace(norm=None), product_precision(inputs.tokens.q.dtype)
        return cls(len(inputs.anchor), k, units, c, form, run.at_boundary, precision)

    def scratch(self, w: Tensor) -> Tensor:
        """Memory for what a kernel's loops over one chunk leave for one another. `w` has the rows."""
        return w.new_empty(len(w), self.c * (4 * self.units + 2 * self.k))

    def constants(self, norm: Any) -> dict[str, Any]:
        """The kernels' compile-time arguments; `norm` is None in the plain form."""
        return {
            "K": self.k, "U": self.units, "BLOCK": self.block, "C": self.c, "DEPTH": self.depth,
            "GELU": self.form.activation == "gelu", "NORM": norm is not None, "CLIP": self.form.clip,
            "THRESHOLD": self.form.threshold, "EPS": NORM_EPS, "AT_BOUNDARY": self.at_boundary,
            "PRECISION": self.precision, "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip


WARPS = 8


def product_precision(dtype: torch.dtype) -> str:
    """How the kernels multiply: bfloat16 tokens by bfloat16 operands, float32 tokens by three tf32 products for one.

    Three tf32 products are near float32's precision, and need less shared memory than one.
    """
    if dtype == torch.bfloat16 and not is_interpreted():  # the interpreter's products of bfloat16 are wrong
        return "bf16"
    return "tf32x3"


class KernelInputs(NamedTuple):
    """A group of chunks, as the kernels take it."""

    tokens: tuple[Tensor, Tensor, Tensor]  # q, k, shift [N, R, C, K]
    decay: Decays
    saved_decays: SavedDecays
    last_chunk: Tensor  # [R]


def kernel_inputs(tokens: Tokens, run: ChunkRun, bias: Tensor | None) -> KernelInputs:
    v = tokens.v.float()
    shift = -v if bias is None else tokens.k.float() - v + bias
    decay, saved_decays = chunk_decays(*tokens[3:], run.valid)
    decay = Decays(*(x.contiguous() for x in decay))
    return KernelInputs((tokens.q, tokens.k, shift), decay, saved_decays, last_valid_chunk(tokens, run.valid))


def last_valid_chunk(tokens: Tokens, valid: Tensor | None) -> Tensor:
    """The last chunk in which each row has a token, -1 if none: `[R]`."""
    n, rows = tokens.q.shape[:2]
    number = torch.arange(n, dtype=torch.int32, device=tokens.q.device)[:, None].expand(n, rows)
    return (number if valid is None else torch.where(valid.any(-1), number, -1)).amax(0)


def first_and_last(layers: Layers) -> tuple[Tensor | None, Tensor]:
    """The first and the last layer. At depth 1 the first is None."""
    return (None if len(layers) == 1 else layers[0]), layers[-1]


def state_arguments(state: StateLayers) -> tuple[Tensor | None, ...]:
    """anchor1, anchor2, w1, s1, w2, s2, as the kernels take them."""
    (w1, w2), (s1, s2) = first_and_last(state.w), first_and_last(state.s)
    return *first_and_last(state.anchor), w1, s1, w2, s2


def launch_forward(
    plan: KernelPlan,
    group: KernelInputs,
    norm_weight: Tensor | None,
    state: StateLayers,
    outputs: GroupOutput | None,
    scratch: Tensor,
) -> None:
    """Process a group. The state's W and S have slots, `[slots, R, in, out]` for each layer. `outputs` None: fill only
    the slots."""
    from titans_lm.ops.triton.kernels import forward_kernel

    n, rows = group.tokens[0].shape[:2]
    y, loss, gradient_norm = (None, None, None) if outputs is None else outputs
    with torch.cuda.device_of(group.last_chunk):
        forward_kernel[(rows,)](
            *group.tokens, *group.decay, norm_weight, *state_arguments(state),
            group.last_chunk, y, loss, gradient_norm, scratch, n, rows, plan.k, plan.units,
            **plan.constants(norm_weight), ALL_STATES=outputs is None, SURPRISE=loss is not None,
        )  # fmt: skip


class KernelGradients(NamedTuple):
    """The outer loss's gradients by a group's inputs."""

    q: Tensor
    k: Tensor
    shift: Tensor
    decay: Decays
    norm_weight: Tensor | None

    @classmethod
    def empty(cls, group: KernelInputs, norm_weight: Tensor | None) -> "KernelGradients":
        q, k, shift = (torch.empty_like(x, dtype=torch.float32) for x in group.tokens)
        decay = Decays(*(torch.empty_like(x) for x in group.decay))
        return cls(q, k, shift, decay, None if norm_weight is None else torch.zeros_like(norm_weight))


def launch_backward(
    plan: KernelPlan,
    group: KernelInputs,
    norm_weight: Tensor | None,
    state: StateLayers,
    grad_y: Tensor,
    grad_loss: Tensor | None,
    grad_state: StateLayers,
    scratch: Tensor,
) -> KernelGradients:
    """Go back over a group. `state` is as `launch_forward` filled it; `grad_state`, without slots, becomes that at the
    group's start, in place."""
    from titans_lm.ops.triton.kernel_backward import backward_kernel

    n, rows = group.tokens[0].shape[:2]
    grads = KernelGradients.empty(group, norm_weight)
    with torch.cuda.device_of(group.last_chunk):
        backward_kernel[(rows,)](
            *group.tokens, *group.decay, norm_weight, *state_arguments(state),
            group.last_chunk, grad_y, grad_loss, *state_arguments(grad_state),
            grads.q, grads.k, grads.shift, *grads.decay, grads.norm_weight, scratch, n, rows, plan.k, plan.units,
            **plan.constants(norm_weight),
        )  # fmt: skip
    return grads


# ------------------------------------------------------------------------------------------------ a run of chunks


class _ScanRun(torch.autograd.Function):
    """`chunks_forward` with a backward pass. It saves the inputs and the state at the start of each group."""

    @staticmethod
    def forward(ctx: Any, run: ChunkRun, *flat: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = RunInputs.unflatten(flat)
        output, end, starts = chunks_forward(run, inputs)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.count = run, len(flat)
        ctx.save_for_backward(*flat, *starts.w, *starts.s)
        if output.gradient_norm is not None:
            ctx.mark_non_differentiable(output.gradient_norm)
        return *output, *end.anchor, *end.w, *end.s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None, _: None, *grad_end: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs = RunInputs.unflatten(ctx.saved_tensors[: ctx.count])
        starts = ctx.saved_tensors[ctx.count :]
        layers = len(inputs.anchor)
        starts = WeightsAndMomentum(list(starts[:layers]), list(starts[layers:]))
        v = inputs.tokens.v
        grad_y = torch.zeros_like(v, dtype=torch.float32) if grad_y is None else grad_y.contiguous()
        grads = grads_or_zeros(grad_end, (*inputs.anchor, *inputs.state.w, *inputs.state.s))
        return None, *chunks_backward(ctx.run, inputs, starts, grad_y, grad_loss, grads).flatten()


class ForwardResult(NamedTuple):
    """What `chunks_forward` returns."""

    output: GroupOutput  # Y_L [N, R, C, K]; loss and gradient norm [N, R, C], with surprise
    end: StateLayers  # the last anchor, and the state after
    starts: WeightsAndMomentum  # the state at the start of each group, and at the end, [slots, R, in, out]


def chunks_forward(run: ChunkRun, inputs: RunInputs) -> ForwardResult:
    """Process a run, group after group."""
    n, rows, c, _ = inputs.tokens.q.shape
    plan, norm_weight = KernelPlan.of(run, inputs, c), norm_weight_of(inputs)
    size = group_size_sqrt(n)
    y = torch.empty_like(inputs.tokens.v, dtype=torch.float32)
    output = GroupOutput(y, *(y.new_empty(n, rows, c) if run.surprise else None for _ in range(2)))
    anchor = [w.clone(memory_format=torch.contiguous_format) for w in inputs.anchor]
    starts = state_slots(inputs.state, -(-n // size) + 1)
    scratch = plan.scratch(anchor[0])
    for i, (tokens, group_run) in enumerate(split_groups(inputs.tokens, run, size)):
        part = slice(i * size, (i + 1) * size)
        outputs = GroupOutput(y[part], *(None if x is None else x[part] for x in output[1:]))
        state = StateLayers(anchor, *([x[i:] for x in layers] for layers in starts))
        group = kernel_inputs(tokens, group_run, norm_bias_of(inputs))
        launch_forward(plan, group, norm_weight, state, outputs, scratch)
    end = StateLayers(anchor, *([x[-1].clone() for x in layers] for layers in starts))
    return ForwardResult(output, end, starts)


def chunks_backward(
    run: ChunkRun,
    inputs: RunInputs,
    starts: WeightsAndMomentum,
    grad_y: Tensor,
    grad_loss: Tensor | None,
    grads: StateLayers,
) -> RunInputs:
    """The gradients by `inputs`, from those by Y_L, the loss, the last anchor and the state after (`grads`)."""
    n, _, c, _ = inputs.tokens.q.shape
    plan, norm_weight = KernelPlan.of(run, inputs, c), norm_weight_of(inputs)
    size = group_size_sqrt(n)
    slots = ([x.new_empty(size + 1, *x.shape[1:]) for x in layers] for layers in starts)
    states = StateLayers([w.contiguous() for w in inputs.anchor], *slots)
    scratch = plan.scratch(states.anchor[0])
    parts: list[Tokens] = []
    grad_weight, grad_bias = None, None
    for i, (tokens, group_run) in reversed(list(enumerate(split_groups(inputs.tokens, run, size)))):
        group = kernel_inputs(tokens, group_run, norm_bias_of(inputs))
        for layer, start in zip((*states.w, *states.s), (*starts.w, *starts.s), strict=True):
            layer[0] = start[i]
        launch_forward(plan, group, norm_weight, states, None, scratch)
        part = slice(i * size, (i + 1) * size)
        loss = None if grad_loss is None else grad_loss[part].contiguous()
        by_group = launch_backward(plan, group, norm_weight, states, grad_y[part], loss, grads, scratch)
        grad_gates = decays_backward(by_group.decay, group.saved_decays)
        grad_k = by_group.k
        if run.at_boundary:  # in rows with a token it went into the gradient by the weights, which the anchor is
            for x in grads.anchor:
                x *= (group.last_chunk < 0)[:, None, None]
        if by_group.norm_weight is not None:
            grad_k, bias = by_group.k + by_group.shift, by_group.shift.sum((0, 2))[:, None]
            grad_weight = by_group.norm_weight if grad_weight is None else grad_weight + by_group.norm_weight
            grad_bias = bias if grad_bias is None else grad_bias + bias
        dtype, v_dtype = tokens.q.dtype, tokens.v.dtype
        parts.insert(0, Tokens(by_group.q.to(dtype), grad_k.to(dtype), -by_group.shift.to(v_dtype), *grad_gates))
    grad_tokens = Tokens(*(torch.cat(x) for x in zip(*parts, strict=True)))
    grad_norm = None if grad_weight is None or grad_bias is None else (grad_weight[:, None], grad_bias)
    return RunInputs(grad_tokens, grad_norm, grads.anchor, WeightsAndMomentum(grads.w, grads.s))


def state_slots(state: WeightsAndMomentum, count: int) -> WeightsAndMomentum:
    """Memory for `count` states, `[count, R, in, out]` for each layer; `state` is the first."""
    slots = WeightsAndMomentum(*([x.new_empty(count, *x.shape) for x in layers] for layers in state))
    for slot, first in zip((*slots.w, *slots.s), (*state.w, *state.s), strict=True):
        slot[0] = first
    return slots


def norm_weight_of(inputs: RunInputs) -> Tensor | None:
    return None if inputs.norm is None else inputs.norm[0][:, 0].contiguous()


def norm_bias_of(inputs: RunInputs) -> Tensor | None:
    return None if inputs.norm is None else inputs.norm[1]


def split_groups(tokens: Tokens, run: ChunkRun, size: int) -> list[tuple[Tokens, ChunkRun]]:
    """Groups of `size` chunks."""
    valid = run.valid
    return [
        (
            Tokens(*(x[n : n + size] for x in tokens)),
            run._replace(valid=None if valid is None else valid[n : n + size]),
        )
        for n in range(0, len(tokens.q), size)
    ]


def scan_run(run: ChunkRun, inputs: RunInputs) -> RunOutput:
    """`chunked.scan.scan_run` by kernels."""
    size, (batch, _, heads, _) = run.chunk_size, inputs.tokens.q.shape
    if run.valid is not None:
        run = run._replace(valid=to_rows(run.valid[..., None].expand(-1, -1, heads), size))
    run, tokens = pad_chunks(run, Tokens(*(to_rows(x, size) for x in inputs.tokens)))
    inputs = inputs._replace(tokens=tokens)
    if inputs.needs_grad():
        (y, loss, norm), end = split_outputs(_ScanRun.apply(run, *inputs.flatten()))
    else:
        (y, loss, norm), end, _ = chunks_forward(run, inputs)
    if inputs.norm is not None:
        weight, bias = inputs.norm
        y = tokens.q.float() + F.layer_norm(y, y.shape[-1:], eps=NORM_EPS) * weight + bias
    loss, norm = (None if x is None else to_tokens(x[:, :, :size], batch) for x in (loss, norm))
    return RunOutput(GroupOutput(to_tokens(y[:, :, :size], batch), loss, norm), end)


def pad_chunks(run: ChunkRun, tokens: Tokens) -> tuple[ChunkRun, Tokens]:
    """Pad chunks with empty slots to the size that the kernels need, a power of two."""
    size = tokens.q.shape[2]
    padding = max(MIN_SIZE, 1 << (size - 1).bit_length()) - size
    if not padding:
        return run, tokens
    valid = torch.ones_like(tokens.theta, dtype=torch.bool) if run.valid is None else run.valid
    vectors = tuple(F.pad(x, (0, 0, 0, padding)) for x in tokens[:3])
    gates = tuple(F.pad(x, (0, padding)) for x in tokens[3:])
    return run._replace(valid=F.pad(valid, (0, padding))), Tokens(*vectors, *gates)


# ------------------------------------------------------------------------------------------------ the whole call


def triton_scan(inputs: ScanInputs) -> ScanOutput:
    """`naive_scan` by kernels; q, k and v may be bfloat16. Raises ValueError with the reason if they cannot run."""
    q, k, v = inputs.tokens[:3]
    check_supported(q, inputs.state, inputs.chunk_size)
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        inputs = inputs._replace(tokens=inputs.tokens._replace(q=q.float(), k=k.float(), v=v.float()))
    return scan_runs(inputs, scan_run)
