"""MAC's whole segments in compiled code: all that depends on the memory, segment after segment, in one call.

A segment has few tokens, so that the operations' overhead would count. `MACBlock` takes this path where `is_supported`
says so. It equals its own operations. `compiled_layer.py` has the memory's part.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_lm.layers.attention import SegmentAttention
from titans_lm.layers.compiled_call import (
    LayerArgs,
    LayerInputs,
    LayerSaved,
    LayerStructure,
    Options,
    Parts,
    by_weight,
    contiguous,
    grads_or_zeros,
)
from titans_lm.layers.compiled_layer import after, is_plain
from titans_lm.layers.memory_state import NeuralMemoryState, ProjectedQueries
from titans_lm.layers.module_call import eps_of, has_hooks, is_plain_matrix, is_plain_norm
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.ops.autograd import once_differentiable
from titans_lm.ops.cpu.compiled import fields

BLOCK = 32
"""`LayerArgs::BLOCK`: tokens whose gradients by the norms' weights are summed first."""


class SegmentLayers(NamedTuple):
    """The layers of a `MACBlock` that its segments run."""

    memory: NeuralMemory
    attention: SegmentAttention
    retrieved_norm: nn.RMSNorm
    written_norm: nn.RMSNorm


class SegmentsOutput(NamedTuple):
    """What segments return."""

    y: Tensor
    """Attention's output, `[B, T, D]`."""
    m: Tensor
    """The memory's output after each token, `[B, T, D]`."""
    state: NeuralMemoryState


def is_supported(layers: SegmentLayers, s: Tensor, state: NeuralMemoryState) -> bool:
    """Whether compiled code can run whole segments s `[B, T, D]` after `state`, which all rows begin: on a CPU, in the
    memory's dtype, where no hook, adapter or mode looks at the operations, and segments are whole chunks."""
    memory, attention, *norms = layers
    if (
        not is_plain(memory, s, state)
        or attention.segment_size % memory.chunk_size
        or bool(state.memory.position.any())
    ):
        return False
    inner, dim = attention.num_heads * attention.head_dim, s.shape[2]
    plain = all(is_plain_matrix(projection, (inner, dim)) for projection in (attention.k_proj, attention.v_proj))
    if has_hooks(memory) or has_hooks(attention) or not (plain and is_plain_matrix(attention.o_proj, (dim, inner))):
        return False
    tensors = [p for layer in layers[1:] for p in layer.parameters()]
    return all(is_plain_norm(norm, dim) for norm in norms) and all(
        t.dtype == s.dtype and t.device == s.device for t in tensors
    )


def read(
    layers: SegmentLayers, s: Tensor, queries: ProjectedQueries, qkv: tuple[Tensor, Tensor, Tensor],
    persistent: tuple[Tensor, Tensor], state: NeuralMemoryState,
) -> SegmentsOutput:  # fmt: skip
    """Read the whole segments s `[B, T, D]` (eqs. 21 to 25): retrieve, attend, write, and read after each token."""
    memory, attention, *norms = layers
    proj = (torch.cat([attention.k_proj.weight, attention.v_proj.weight]), attention.o_proj.weight)
    inputs = Inputs(s, *queries, *qkv, *persistent, norms[0].weight, norms[1].weight, *proj)
    flat = (*inputs, *LayerInputs.of(memory, state).flatten())
    options = Options.of(memory, attention.segment_size, Parts(0, s.shape[1], 0), flat)
    y, m, conv_state, *ends = _Segments.apply(options, tuple(map(eps_of, norms)), *flat)
    return SegmentsOutput(y, m, after(state, conv_state, ends, 0))


class Inputs(NamedTuple):
    """The tensors of a call, but for the memory's. Names are those of `SegmentArgs` in C++."""

    s: Tensor
    queries: Tensor
    gate: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    first_k: Tensor
    first_v: Tensor
    retrieved_norm: Tensor
    written_norm: Tensor
    kv_proj: Tensor
    attention_proj: Tensor


class Saved(NamedTuple):
    """What the forward pass computes for all tokens, and the backward pass needs, but for the memory's part."""

    x: Tensor
    retrieved: Tensor
    h_gated: Tensor
    h: Tensor
    h_normed: Tensor
    kv: Tensor
    attended: Tensor
    y: Tensor

    @classmethod
    def empty(cls, inputs: Inputs) -> "Saved":
        (batch, tokens, dim), attention, inner = inputs.s.shape, inputs.attention_proj.shape[1], inputs.gate.shape[2]
        widths = (dim, inner, inner, dim, dim, 2 * attention, attention, dim)
        return cls(*(inputs.s.new_empty(batch, tokens, n) for n in widths))


class SegmentStructure(LayerStructure):
    """`SegmentArgs` of ops/cpu/csrc/segments.h, field by field."""

    _fields_ = (
        *fields(ctypes.c_long, "persistent attention_heads attention_width"),
        *fields(ctypes.c_double, "retrieved_eps written_eps"),
        *fields(ctypes.c_void_p, "s queries gate q k v first_k first_v"),
        *fields(ctypes.c_void_p, "retrieved_norm written_norm kv_proj attention_proj"),
        *fields(ctypes.c_void_p, "retrieved h_gated h h_normed kv attended y grad_y"),
        *fields(ctypes.c_void_p, "grad_s grad_queries grad_gate grad_q grad_k grad_v grad_first_k grad_first_v"),
        *fields(ctypes.c_void_p, "grad_attention grad_kv grad_h grad_retrieved_norm grad_written_norm"),
    )


class SegmentArgs(LayerArgs):
    """The arguments of the compiled functions."""

    structure = SegmentStructure

    def set_inputs(self, inputs: Inputs, eps: tuple[float, ...], saved: Saved) -> None:
        (_, heads, _, width), persistent = inputs.q.shape, inputs.first_k.shape[2]
        self.fields |= {"persistent": persistent, "attention_heads": heads, "attention_width": width}
        self.fields |= {"retrieved_eps": eps[0], "written_eps": eps[1]}
        self.set_tensors(**inputs._asdict(), **saved._asdict())


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, eps: tuple[float, ...], *flat: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        count = len(Inputs._fields)
        inputs, of_layer = Inputs(*contiguous(flat[:count])), LayerInputs.unflatten(flat[count:])
        saved, memory = Saved.empty(inputs), LayerSaved.empty(options, of_layer, inputs.s.shape[1])
        args, m = SegmentArgs.of_call(options, of_layer, memory, saved.x), torch.empty_like(inputs.s)
        assert isinstance(args, SegmentArgs)
        args.set_inputs(inputs, eps, saved)
        args.set_tensors(m=m)
        ends = args.forward("titans_segments_forward", memory, of_layer)
        if options.saves:
            ctx.options, ctx.eps, ctx.count = options, eps, len(flat)
            ctx.save_for_backward(*flat, *saved, *memory)
        return saved.y, m, memory.conv_state(of_layer.conv_state), *ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, count, parts = ctx.saved_tensors, len(Inputs._fields), len(Saved._fields)
        flat, saved = tensors[: ctx.count], Saved(*tensors[ctx.count : ctx.count + parts])
        inputs, of_layer = Inputs(*contiguous(flat[:count])), LayerInputs.unflatten(flat[count:])
        memory = LayerSaved(*tensors[ctx.count + parts :])
        args = SegmentArgs.of_call(ctx.options, of_layer, memory, saved.x)
        assert isinstance(args, SegmentArgs)
        args.set_inputs(inputs, ctx.eps, saved)
        return None, None, *_backward(args, inputs, of_layer, saved, memory, grads)


def _backward(
    args: SegmentArgs, inputs: Inputs, of_layer: LayerInputs, saved: Saved, memory: LayerSaved,
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients by the inputs."""
    like = (saved.y, saved.y, of_layer.conv_state, *of_layer.anchor, *of_layer.weights, *of_layer.momentum)
    grad_y, grad_m, *ends = grads_or_zeros(grads, like)
    by = {name: torch.empty_like(getattr(inputs, name)) for name in ("s", "queries", "gate", "q", "k", "v")}
    by |= {name: torch.zeros_like(getattr(inputs, name)) for name in ("first_k", "first_v")}
    blocks = (saved.y.shape[0] * saved.y.shape[1] // args.fields["size"]) * -(-args.fields["size"] // BLOCK)
    norms = {name: saved.y.new_zeros(int(blocks), saved.y.shape[2]) for name in ("retrieved_norm", "written_norm")}
    outputs = {
        "attention": torch.empty_like(saved.y), "kv": torch.empty_like(saved.kv), "h": torch.empty_like(saved.h),
    }  # fmt: skip
    args.set_tensors(grad_y=grad_y, **{f"grad_{name}": x for name, x in (by | norms | outputs).items()})
    found = args.backward("titans_segments_backward", of_layer, memory, grad_m, ends)
    ours = Inputs(
        **by, **{name: x.sum(0) for name, x in norms.items()},
        kv_proj=by_weight(outputs["kv"], saved.h_normed),
        attention_proj=by_weight(outputs["attention"], saved.attended),
    )  # fmt: skip
    by_output_proj = by_weight(grad_m, memory.gated).add_(by_weight(outputs["h"], saved.h_gated))
    return *ours, *found.by_inputs(of_layer, saved.x, by_output_proj).flatten()
