"""The arguments of a memory layer's calls in compiled code: what goes in, what is saved, and gradients."""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from titans_lm.layers.compiled_step import StepLayer
from titans_lm.layers.memory_state import NeuralMemoryState, StateShapes
from titans_lm.layers.module_call import eps_of
from titans_lm.layers.short_conv import FeatureArgs
from titans_lm.ops import MemoryForm, Tokens
from titans_lm.ops.cpu.compiled import NativeArgs, fields, thread_count
from titans_lm.ops.cpu.native import ScanArgs


@runtime_checkable  # the tests check annotations as they run
class ScanLayer(StepLayer, Protocol):
    """The parts of a `NeuralMemory` that a call of several tokens uses."""

    _state_shapes: StateShapes

    def form(self) -> MemoryForm: ...
    def parameters(self) -> Any: ...


def gates_of(layer: ScanLayer) -> list[Any]:
    """The maps of theta, eta and alpha, as far as the layer has them; adapters may have replaced them."""
    return [gate for gate in (layer.theta, layer.eta, layer.alpha) if gate is not None]


def projections_of(layer: ScanLayer) -> list[Any]:
    """The projections of a token, in the order of `LayerInputs.memory_proj`; adapters may have replaced them."""
    return [layer.q_proj, layer.k_proj, layer.v_proj, *gates_of(layer), layer.output_gate]


class Parts(NamedTuple):
    """The tokens of a call that complete a chunk, those of whole chunks, and those of an unfinished chunk."""

    lead: int
    whole: int
    tail: int


class Options(NamedTuple):
    """What of a call is no tensor."""

    form: MemoryForm
    chunk_size: int
    size: int
    """Tokens of a group, whole chunks."""
    parts: Parts
    has_eta: bool
    has_alpha: bool
    lr: float
    output_eps: float
    saves: bool
    """Whether there may be a backward pass."""

    @classmethod
    def of(cls, layer: ScanLayer, size: int, parts: Parts, inputs: Sequence[Tensor | None]) -> "Options":
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        eps = eps_of(layer.output_norm)
        has_eta, has_alpha = layer.eta is not None, layer.alpha is not None
        return cls(layer.form(), layer.chunk_size, size, parts, has_eta, has_alpha, layer.lr, eps, recorded)


class LayerInputs(NamedTuple):
    """The tensors of a call but x, in the order in which autograd takes them. Names are those of `LayerArgs` in C++."""

    memory_proj: Tensor
    gate_bias: Tensor
    output_norm: Tensor
    output_proj: Tensor
    filters: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv_state: Tensor
    anchor: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]

    @classmethod
    def of(cls, layer: ScanLayer, state: NeuralMemoryState) -> "LayerInputs":
        """The weights of a layer, and its state."""
        weights: list[Tensor] = [projection.weight for projection in projections_of(layer)]
        biases: list[Tensor] = [gate.bias for gate in gates_of(layer)]
        convs = [conv(weights[0]) for conv in layer.convs or ()]
        weight, bias = layer.form().norm or (None, None)
        return cls(
            torch.cat(weights), torch.cat(biases), layer.output_norm.weight, layer.o_proj.weight, torch.cat(convs),
            weight, bias, torch.cat(state.conv_state, -1), *state.memory[:3],
        )  # fmt: skip

    def flatten(self) -> tuple[Tensor | None, ...]:
        return *self[:8], *self.anchor, *self.weights, *self.momentum

    @classmethod
    def unflatten(cls, flat: Sequence[Any]) -> "LayerInputs":
        """Undo `flatten`; all contiguous."""
        flat = contiguous(flat)
        layers = (len(flat) - 8) // 3
        return cls._make([*flat[:8], *(tuple(flat[8 + i * layers : 8 + (i + 1) * layers]) for i in range(3))])


def contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The tensors without a history, contiguous."""
    return [None if x is None else x.detach().contiguous() for x in tensors]


class LayerSaved(NamedTuple):
    """What the forward pass computes for all tokens, and the backward pass needs."""

    read: Tensor
    """What the heads retrieve, `[B, T, H, V]`."""
    output_gate: Tensor
    gated: Tensor
    states: Tensor
    past: Tensor
    feature_q: Tensor
    feature_k: Tensor
    feature_v: Tensor
    theta: Tensor
    eta: Tensor
    alpha: Tensor

    def tokens(self) -> Tokens:
        return Tokens(*self[5:])

    @classmethod
    def empty(cls, options: Options, inputs: LayerInputs, tokens: int) -> "LayerSaved":
        batch, heads, width, _ = inputs.weights[0].shape
        sizes = ScanArgs(inputs.filters.dtype, layers=len(inputs.weights), chunk_size=options.chunk_size)
        sizes.set_widths(inputs.weights)
        like, past = inputs.filters, inputs.conv_state.shape[1]
        joined = like.new_empty(batch, past + tokens, 3 * heads * width)
        joined[:, :past] = inputs.conv_state
        parts = options.parts
        groups = (parts.lead > 0) - (-parts.whole // options.size) + (parts.tail > 0)
        gates = [like.new_empty(batch, tokens, heads), *(like.new_zeros(batch, tokens, heads) for _ in range(2))]
        return cls._make([
            like.new_empty(batch, tokens, heads, width),
            *(like.new_empty(batch, tokens, heads * width) for _ in range(2)),
            like.new_empty(groups + 1 if options.saves else 1, batch * heads, sizes.call("titans_state_size")),
            joined,
            *(like.new_empty(batch, tokens, heads, width) for _ in range(3)),
            *gates,
        ])  # fmt: skip

    def conv_state(self, like: Tensor) -> Tensor:
        """The convolutions' state after the tokens."""
        return self.past[:, self.past.shape[1] - like.shape[1] :].clone()


class LayerStructure(ctypes.Structure):
    """`LayerArgs` of ops/cpu/csrc/layer_scan.h, field by field."""

    _fields_ = (
        *fields(
            ctypes.c_long, "batch tokens size lead tail dim heads width has_eta has_alpha saves threads state_size"
        ),
        *fields(ctypes.c_double, "lr output_eps"),
        *fields(ctypes.c_void_p, "scan lead_scan tail_scan features x memory_proj gate_bias output_norm output_proj"),
        *fields(ctypes.c_void_p, "states theta eta alpha read output_gate gated m carried"),
        *fields(ctypes.c_void_p, "grad_theta grad_eta grad_alpha grad_read grad_m"),
        *fields(ctypes.c_void_p, "grad_x grad_gates grad_output_gate grad_output_norm"),
    )


class LayerArgs(NativeArgs):
    """The arguments of the compiled functions."""

    structure: ClassVar[type[ctypes.Structure]] = LayerStructure
    scans: dict[str, tuple[slice, ScanArgs]]
    """Of the lead, of whole chunks and of the tail, where there are such: which tokens, and their arguments."""
    features: FeatureArgs

    @classmethod
    def of_call(cls, options: Options, inputs: LayerInputs, saved: LayerSaved, x: Tensor) -> "LayerArgs":
        (batch, tokens, dim), (_, heads, width, _) = x.shape, inputs.weights[0].shape
        threads, parts = thread_count(options.size * sum(w.numel() for w in inputs.weights)), options.parts
        args = cls(
            x.dtype, batch=batch, tokens=tokens, size=options.size, lead=parts.lead, tail=parts.tail, dim=dim,
            heads=heads, width=width, has_eta=options.has_eta, has_alpha=options.has_alpha, saves=options.saves,
            threads=threads, state_size=saved.states.shape[2], lr=options.lr, output_eps=options.output_eps,
        )  # fmt: skip
        weights = {name: getattr(inputs, name) for name in ("memory_proj", "gate_bias", "output_norm", "output_proj")}
        outputs = ("states", "theta", "eta", "alpha", "read", "output_gate", "gated")
        args.set_tensors(x=x, **weights, **{name: getattr(saved, name) for name in outputs})
        chunks = {"lead_scan": parts.lead, "scan": options.chunk_size, "tail_scan": parts.tail}
        args.scans, end = {}, 0
        for (name, chunk), count in zip(chunks.items(), parts, strict=True):
            start, end = end, end + count
            if count:
                args.scans[name] = (slice(start, end), cls._scan(options, inputs, saved.tokens(), chunk))
        if parts.lead:
            args.scans["lead_scan"][1].fields["at_boundary"] = 0
        args.set_token_pointers(y=saved.read, **saved.tokens()._asdict())
        args.features = FeatureArgs.of(saved.past, inputs.filters, heads, width)
        return args

    @staticmethod
    def _scan(options: Options, inputs: LayerInputs, tokens: Tokens, chunk_size: int) -> ScanArgs:
        batch = len(inputs.weights[0])
        scan = ScanArgs.of(options.form, False, tokens, inputs.weights, chunk_size)
        scan.fields |= {"at_boundary": 1, "group": options.size // options.chunk_size}
        norm = [None if x is None else x.expand(batch, *x.shape).contiguous() for x in (inputs.weight, inputs.bias)]
        scan.set_tensors(weight=norm[0], bias=norm[1], w=inputs.weights, s=inputs.momentum, anchor=inputs.anchor)
        return scan

    def set_token_pointers(self, **tensors: Tensor) -> None:
        """Set, for each scan, pointers to its first token in tensors `[B, T, H, *]`."""
        for part, scan in self.scans.values():
            scan.set_tensors(**{name: x[0, part.start] for name, x in tensors.items()})

    def set_scans(self, **tensors: Any) -> None:
        """Set pointers of all scans to whole tensors."""
        for _, scan in self.scans.values():
            scan.set_tensors(**tensors)

    def forward(self, function: str, saved: LayerSaved, inputs: LayerInputs) -> list[Tensor]:
        """Run a forward pass. Returns anchor, weights and momentum after it, the anchor only where there is a tail."""
        anchor, weights, momentum = ([torch.empty_like(x) for x in part] for part in inputs[8:])
        self.set_scans(last_anchor=anchor, new_w=weights, new_s=momentum)
        self.features.set_tensors(outputs=saved.tokens()[:3])
        self._run(function)
        return [*anchor, *weights, *momentum]

    def backward(
        self, function: str, inputs: LayerInputs, saved: LayerSaved, grad_m: Tensor, grad_ends: Sequence[Tensor]
    ) -> "LayerGradients":
        """Run a backward pass. `grad_ends` are the gradients by what a forward pass leaves: the convolutions' state,
        anchor, weights and momentum."""
        grad_conv, *ends = grad_ends
        layers, (batch, heads) = len(inputs.weights), inputs.weights[0].shape[:2]
        end_anchor, ends = ends[:layers], [end.clone() for end in ends[layers:]]  # written in place
        anchor = [torch.zeros_like(x) for x in inputs.anchor]
        tokens, norms = Tokens(*map(torch.empty_like, saved.tokens())), (inputs.weight, inputs.bias)
        by_norm = [None if x is None else x.new_zeros(batch, *x.shape) for x in norms]
        past, filters = torch.zeros_like(saved.past), torch.zeros_like(inputs.filters)
        past[:, past.shape[1] - grad_conv.shape[1] :] = grad_conv
        gates = grad_m.new_empty(*grad_m.shape[:2], len(inputs.gate_bias))
        output_norm, grad_read = grad_m.new_zeros(batch * heads, saved.read.shape[3]), torch.empty_like(saved.read)
        found = LayerGradients(past, filters, gates, torch.empty_like(saved.gated), output_norm, by_norm, anchor, ends)
        self.set_scans(grad_w=ends[:layers], grad_s=ends[layers:], grad_weight=by_norm[0], grad_bias=by_norm[1])
        for name, grads in (("lead_scan", anchor), ("tail_scan", end_anchor)):
            if name in self.scans:
                self.scans[name][1].set_tensors(grad_anchor=grads)
        self.set_token_pointers(grad_y=grad_read, **{f"grad_{name}": x for name, x in tokens._asdict().items()})
        self.features.set_tensors(grad_outputs=tokens[:3], grad_past=past, grad_filters=filters)
        self.set_tensors(
            carried=torch.empty_like(saved.states[0]), grad_m=grad_m, grad_gates=gates, grad_read=grad_read,
            grad_output_gate=found.output_gate, grad_output_norm=output_norm,
            grad_theta=tokens.theta, grad_eta=tokens.eta, grad_alpha=tokens.alpha,
        )  # fmt: skip
        self._run(function)
        return found

    def _run(self, function: str) -> None:
        structures: dict[str, NativeArgs] = {name: scan for name, (_, scan) in self.scans.items()}
        for name, args in (structures | {"features": self.features}).items():
            structure = args.structure(**args.fields)
            self.references.append(structure)
            self.fields[name] = ctypes.addressof(structure)
        self.run(function)


class LayerGradients(NamedTuple):
    """The gradients that a backward pass computes; those by projections' weights follow from them."""

    past: Tensor
    filters: Tensor
    gates: Tensor
    output_gate: Tensor
    output_norm: Tensor
    norm: list[Tensor | None]
    anchor: list[Tensor]
    ends: list[Tensor]

    def by_inputs(self, inputs: LayerInputs, x: Tensor, by_output_proj: Tensor) -> LayerInputs:
        """The gradients by the inputs of a call with this x."""
        size, layers = inputs.conv_state.shape[1], len(inputs.weights)
        projected = (self.past[:, size:], self.gates, self.output_gate)
        return LayerInputs(
            memory_proj=torch.cat([by_weight(grad, x) for grad in projected]),
            gate_bias=self.gates.sum((0, 1)),
            output_norm=self.output_norm.sum(0),
            output_proj=by_output_proj,
            filters=self.filters,
            weight=None if self.norm[0] is None else self.norm[0].sum(0),
            bias=None if self.norm[1] is None else self.norm[1].sum(0),
            conv_state=self.past[:, :size],
            anchor=tuple(self.anchor),
            weights=tuple(self.ends[:layers]),
            momentum=tuple(self.ends[layers:]),
        )


def by_weight(grad_output: Tensor, x: Tensor) -> Tensor:
    """The gradient by a projection's weight."""
    return grad_output.flatten(0, 1).t() @ x.flatten(0, 1)


def grads_or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous gradients, 0 for None."""
    return [torch.zeros_like(x) if grad is None else grad.contiguous() for grad, x in zip(grads, like, strict=True)]
