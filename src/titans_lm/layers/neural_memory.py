"""The neural long-term memory as a layer: projections, convolutions, gates and norm around `ops.memory_scan`."""

import itertools
import math
import warnings
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from titans_lm.layers import compiled_layer, compiled_step
from titans_lm.layers.associative import start_associative
from titans_lm.layers.bypass import is_bypassed
from titans_lm.layers.checkpointing import checkpointed
from titans_lm.layers.gating import sigmoid_gates
from titans_lm.layers.memory_options import RENAMED, check_options, head_width
from titans_lm.layers.memory_state import (
    InitialMemory,
    LayerSurprise,
    NeuralMemoryOutput,
    NeuralMemoryState,
    ProjectedQueries,
    StateShapes,
    check_inputs,
    chunk_gates,
    next_prev_input,
    with_theta,
)
from titans_lm.layers.module_call import as_call, empty_like_weights, routes_methods
from titans_lm.layers.predictor import AuxiliaryLoss, Predictor
from titans_lm.layers.short_conv import ShortConvolution, continue_features
from titans_lm.ops import (
    Activation,
    Backend,
    MemoryForm,
    gather_tokens,
    initial_state,
    is_left_aligned,
    left_align,
    masked_zero,
    memory_scan,
    retrieve,
    undo_left_align,
)
from titans_lm.utils.deprecation import RemovedAttribute, RenamedAttribute, renamed, renamed_arguments

MAX_SAVED_BYTES = 128 * 2**20
"""What a scan may save for its backward pass (see `ops.memory_scan`): little, because a model has many layers."""
LONGEST_MOMENTUM = 256
"""The momentum spans at most this many tokens before training."""

WithSurprise = tuple[Float[Tensor, "B T D"], NeuralMemoryState, LayerSurprise]
__getattr__ = renamed(__name__, {"Queries": "ProjectedQueries", "KEPT_BYTES": "MAX_SAVED_BYTES"})


class NeuralMemory(nn.Module):
    """A layer whose memory is a small network per head that learns at test time (arXiv:2501.00663, section 3).

        y, state = memory(x, state)        # x, y [B, T, D]; state None: a new one; each token is written, then read
        y = memory.retrieve(x, state)      # reads only, and returns no state

    Args:
        dim: model width D.
        num_heads: memory heads. Each has a memory of its own, of width `head_dim` (default D / num_heads).
        layers: depth L of the memory, at least 1. One layer is a matrix; two or more store what no matrix can.
        memory_dim: width between those layers (default 4 x head_dim).
        chunk_size: tokens C whose gradients are taken at the same weights, the inner-loop mini-batch. 1 is the paper to
            the letter; a larger chunk is faster.
        lr: upper bound of the step theta, in (0, 1].
        lr_start: the step before training, in (0, 1], at most half of its bound. A small one is best whatever the
            bound is: a layer that writes little at first learns what to write.
        form: "residual", M(k) = k + norm(MLP(k)), which stays finite; or the paper's "plain" MLP.
        clip: bound of each token's gradient at the memory's output (see `ops.MemoryForm`); None: no bound.
        momentum, forgetting: False fixes eta or alpha at 0.
        gates_of: each "token" has its own theta, eta and alpha; or each "chunk" has those of its first token (section
            3.2 makes them constant in a chunk; their mean over it would depend on later tokens).
        alpha_bias: forgetting before training, before the sigmoid: -5 forgets over some 150 tokens, -8 over 3,000.
            Training covers the memory's settled behaviour only if that length is below a training sequence's.
        conv_size: width of the causal convolutions on q, k and v; 1: no convolutions.
        init: "learned": M_0 is a parameter. "zero": M_0(k) = 0, because its last layer starts at 0.
        start: how projections and convolutions start. "associative": as a memory of what follows what, which learns in
            context from its first step (`associative`). "random": each on its own, as linear layers and convolutions
            usually do. "auto": associative if there are convolutions, which it needs.
        lags: how many tokens back the keys of an associative start look, one group of channels for each; at most
            conv_size - 1.
        surprise_threshold: only tokens with a larger surprise are written (None: all are). Without gradients, a chunk
            with no such token is skipped, which saves time.
        surprise_threshold_on: the surprise that is compared: the "reconstruction" loss || M(k) - v ||^2 of each head,
            or the error of a learned "prediction" of the input from the one before it.
        backend: see `ops.memory_scan`.

    Raises ValueError for values outside these ranges.
    """

    @renamed_arguments(RENAMED)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        layers: int = 2,
        memory_dim: int | None = None,
        chunk_size: int = 16,
        lr: float = 0.1,
        lr_start: float = 0.01,
        form: Literal["residual", "plain"] = "residual",
        activation: Activation = "silu",
        clip: float | None = 1.0,
        momentum: bool = True,
        forgetting: bool = True,
        gates_of: Literal["token", "chunk"] = "token",
        alpha_bias: float = -6.0,
        conv_size: int = 4,
        init: Literal["learned", "zero"] = "learned",
        start: Literal["auto", "associative", "random"] = "auto",
        lags: int = 4,
        surprise_threshold: float | None = None,
        surprise_threshold_on: Literal["reconstruction", "prediction"] = "reconstruction",
        backend: Backend = "auto",
    ):
        super().__init__()
        head_dim = head_width(dim, num_heads) if head_dim is None else head_dim
        memory_dim = 4 * head_dim if memory_dim is None else memory_dim
        check_options(
            counts={"dim": dim, "num_heads": num_heads, "head_dim": head_dim, "layers": layers, "lags": lags,
                    "memory_dim": memory_dim, "chunk_size": chunk_size, "conv_size": conv_size},
            rates={"lr": lr, "lr_start": lr_start},
            words={"form": form, "init": init, "start": start, "gates_of": gates_of,
                   "surprise_threshold_on": surprise_threshold_on},
        )  # fmt: skip
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.chunk_size, self.lr, self.lr_start, self.clip, self.backend = chunk_size, lr, lr_start, clip, backend
        self.activation, self.surprise_threshold = activation, surprise_threshold
        self.alpha_bias, self.gates_of, self.start, self.lags = alpha_bias, gates_of, start, lags
        self._add_projections(conv_size, momentum, forgetting)
        self._add_memory([head_dim] + [memory_dim] * (layers - 1) + [head_dim], form, init, surprise_threshold_on)
        self.reset_parameters()

    def _add_projections(self, conv_size: int, momentum: bool, forgetting: bool) -> None:
        """Projections, convolutions, gates and output."""
        dim, inner = self.dim, self.num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in "qkv")
        self.convs = nn.ModuleList(ShortConvolution(inner, conv_size) for _ in "qkv") if conv_size > 1 else None
        self.theta = nn.Linear(dim, self.num_heads)
        self.eta = nn.Linear(dim, self.num_heads) if momentum else None
        self.alpha = nn.Linear(dim, self.num_heads) if forgetting else None
        self.output_gate = nn.Linear(dim, inner, bias=False)
        self.output_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self._conv_shape = (conv_size - 1, inner)

    def _add_memory(self, widths: list[int], form: str, init: str, surprise_threshold_on: str) -> None:
        """M_0, the norm of a residual memory, the predictor, and the shapes of the state."""
        self.shapes = [(self.num_heads, i, o) for i, o in itertools.pairwise(widths)]
        self.predictor = Predictor(self.dim) if surprise_threshold_on == "prediction" else None
        learned = self.shapes if init == "learned" else self.shapes[:-1]
        self.initial_memory = InitialMemory(nn.Parameter(torch.empty(s)) for s in learned)
        norm = torch.empty(self.num_heads, self.head_dim) if form == "residual" else None
        self.norm_weight = None if norm is None else nn.Parameter(norm)
        self.norm_bias = None if norm is None else nn.Parameter(norm.clone())
        prev_input = None if self.predictor is None else (self.dim,)
        gates = (self.num_heads, 3) if self.gates_of == "chunk" else None
        self._state_shapes = StateShapes(self.shapes, self._conv_shape, prev_input, gates)

    def reset_parameters(self) -> None:
        """Initialise M_0, convolutions, the gates' biases and the norm; for an associative start also projections.

        Each layer of M_0 preserves the scale of its input. Keys have length 1, not 1 in each channel, so the first of
        several layers enlarges them: the activation then bends them, and they differ.
        """
        for layer, w in enumerate(self.initial_memory):
            nn.init.normal_(w, std=1.0 if layer == 0 and len(self.shapes) > 1 else w.shape[1] ** -0.5)
        share = min(self.lr_start / self.lr, 0.5)
        nn.init.constant_(self.theta.bias, math.log(share / (1 - share)))
        if self.eta is not None:  # the momentum spans about a chunk: 1 / (1 - eta) = C
            nn.init.constant_(self.eta.bias, math.log(min(max(self.chunk_size, 2), LONGEST_MOMENTUM) - 1))
        if self.alpha is not None:
            nn.init.constant_(self.alpha.bias, self.alpha_bias)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        convs = [conv for conv in self.convs or () if isinstance(conv, ShortConvolution)]
        for conv in convs:
            conv.reset_parameters()
        if self.start != "random" and convs:
            projections, filters = (self.q_proj, self.k_proj, self.v_proj), [conv.weight for conv in convs]
            start_associative(projections, filters, self.num_heads, self.lags, self.norm_weight is not None)

    def initial_state(self, batch: int) -> NeuralMemoryState:
        """The state before the first token, for `batch` rows. Gradients flow back to the learned M_0."""
        return self.initial_state_like(batch, empty_like_weights(self))

    def _initial_state(self, batch: int, like: Tensor) -> NeuralMemoryState:
        """`initial_state` on the device of `like`, in its dtype (the memory in float32 or float64)."""
        wide = like if like.dtype == torch.float64 else like.float()
        learned = self.initial_memory(like)
        zero = tuple(wide.new_zeros(shape) for shape in self.shapes[len(learned) :])
        return self._state_shapes.first(initial_state(learned + zero, batch), like)

    initial_state_like = as_call(_initial_state)

    def empty_state(self, batch: int, like: Tensor) -> NeuralMemoryState:
        """`initial_state_like` with 0 in place of M_0. It uses no weights."""
        return self._state_shapes.zeros(batch, like)

    @overload
    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = ..., mask: Tensor | None = ..., *, update: bool = ...,
        surprise: Literal[False] = ...,
    ) -> tuple[Tensor, NeuralMemoryState]: ...  # fmt: skip
    @overload
    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = ..., mask: Tensor | None = ..., *, update: bool = ...,
        surprise: Literal[True],
    ) -> WithSurprise: ...  # fmt: skip
    @routes_methods
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: NeuralMemoryState | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        *,
        update: bool = True,
        surprise: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], NeuralMemoryState] | WithSurprise:
        """Write each token, then read the memory as it is after it (eqs. 10 to 15). T >= 0; calls may be cut anywhere.

        `mask` is False at padding, which changes no state and whose y is 0. `update=False` reads without writing: the
        state moves on to the next token, its memory does not change. `surprise=True` returns a `LayerSurprise` as well
        (`loss`, `gradient_norm`, `theta`). Raises ValueError for arguments that do not fit the layer or each other.
        """
        check_inputs(self.dim, x, state, mask)
        state = self._initial_state(x.shape[0], x) if state is None else state
        options = {"update": update, "surprise": surprise, "bypass": is_bypassed(self)}
        x = x if mask is None else masked_zero(x, mask)
        if mask is None or is_left_aligned(mask):
            out = self._forward_aligned(x, state, mask, **options)
            y, found = out.y if mask is None else masked_zero(out.y, mask), out.surprise
        else:
            order, length = left_align(mask)
            valid = torch.arange(x.shape[1], device=x.device) < length[:, None]
            out = self._forward_aligned(gather_tokens(x, order), state, valid, **options)
            y, found = undo_left_align(out.y, mask), out.surprise
            found = None if found is None else LayerSurprise(*(undo_left_align(part, mask) for part in found))
        return (y, out.state) if found is None else (y, out.state, found)

    @as_call
    def retrieve(self, x: Float[Tensor, "B T D"], state: NeuralMemoryState) -> Float[Tensor, "B T D"]:
        """Read the memory with the queries of `x`, the stream's next tokens, without writing (eq. 15)."""
        check_inputs(self.dim, x, state)
        self._state_shapes.check(state, x.shape[0])
        return self._retrieve_next(x, state.conv_state[0], state.memory.weights, None, bypass=is_bypassed(self))[0]

    def frozen(self, x: Tensor, state: NeuralMemoryState, valid: Tensor | None) -> tuple[Tensor, NeuralMemoryState]:
        warnings.warn("NeuralMemory.frozen was replaced: use update=False", DeprecationWarning, stacklevel=2)
        return self(x, state, valid, update=False)

    # Parts of `forward`, for blocks. `valid` is True for each row's first tokens. Public ones are calls of the module.

    def _project_queries(self, x: Tensor, conv_state: Tensor, valid: Tensor | None) -> tuple[ProjectedQueries, Tensor]:
        """The queries of any number of tokens, after the queries' `conv_state`; and the `conv_state` after them."""
        (q,), (conv_state,) = self._features(x, (conv_state,), valid)
        return ProjectedQueries(q, self.output_gate(x)), conv_state

    project_queries = as_call(_project_queries)

    def _retrieve_projected(
        self, queries: ProjectedQueries, weights: tuple[Tensor, ...], *, bypass: bool = False
    ) -> Float[Tensor, "B T D"]:
        """Read a memory with these `weights`."""
        if bypass:
            return queries.gate.new_zeros(*queries.gate.shape[:2], self.dim)
        return checkpointed(self._gated_output, retrieve(queries.q, weights, self.form()), queries.gate)

    retrieve_projected = as_call(_retrieve_projected)

    def _retrieve_next(
        self, x: Tensor, conv_state: Tensor, weights: tuple[Tensor, ...], valid: Tensor | None, *, bypass: bool = False
    ) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """`project_queries` and `retrieve_projected`; and the `conv_state` after."""
        if not bypass and (found := compiled_step.step_weights(self, x, weights, valid)):
            return compiled_step.read_token(self, found, x, conv_state, weights)
        queries, conv_state = self._project_queries(x, conv_state, valid)
        return self._retrieve_projected(queries, weights, bypass=bypass), conv_state

    retrieve_next = as_call(_retrieve_next)

    def _forward_aligned(
        self,
        x: Tensor,
        state: NeuralMemoryState,
        valid: Tensor | None,
        *,
        update: bool = True,
        surprise: bool = False,
        bypass: bool = False,
    ) -> NeuralMemoryOutput:
        """`scan` and `project_output`."""
        found = compiled_step.step_weights(self, x, state.memory[1], valid) if update and not bypass else None
        if found is not None:
            self._state_shapes.check(state, x.shape[0])
            return compiled_step.write_token(self, found, x, state, self._gates(x)[0] if surprise else None)
        state = state._replace(memory=state.whole_memory())
        if update and not (surprise or bypass) and compiled_layer.is_supported(self, x, state, valid):
            return compiled_layer.run(self, x, state)
        out = self._scan(x, state, valid, update=update, surprise=surprise, bypass=bypass)
        return out._replace(y=self._project_output(x, out.y, bypass=bypass))

    forward_aligned = as_call(_forward_aligned)

    def _scan(
        self,
        x: Float[Tensor, "B T D"],
        state: NeuralMemoryState,
        valid: Bool[Tensor, "B T"] | None,
        *,
        update: bool = True,
        surprise: bool = False,
        bypass: bool = False,
        max_saved_bytes: int = MAX_SAVED_BYTES,
    ) -> NeuralMemoryOutput:
        """Write each token and read after it, or only read (`update=False`): y `[B, T, H, V]`, one for each head.

        `bypass` returns zeros and the state as it was."""
        self._state_shapes.check(state, x.shape[0])
        if surprise and not update:
            raise ValueError("surprise=True needs update=True: a token's surprise is measured as it is written")
        if bypass:
            y = x.new_zeros(*x.shape[:2], self.num_heads, self.head_dim)
            return NeuralMemoryOutput(y, state, LayerSurprise(*[y[..., 0]] * 3) if surprise else None)
        memory = state.whole_memory()
        (q, k, v), conv_state = self._features(x, state.conv_state, valid)
        prev_input = None if state.prev_input is None else next_prev_input(x, state.prev_input, valid)
        if not update:
            y = retrieve(q, memory.weights, self.form())
            return NeuralMemoryOutput(y, NeuralMemoryState(memory, conv_state, prev_input, state.gates), None)
        (theta, eta, alpha), gates = self._gates(x), state.gates
        if gates is not None:
            own = (theta, eta, alpha)
            (theta, eta, alpha), gates = chunk_gates(own, gates, memory.position, self.chunk_size, valid)
        error = None if self.predictor is None else self.predictor(x, state.prev_input)
        if error is not None and self.surprise_threshold is not None:
            theta = theta * (error.detach() > self.surprise_threshold)[..., None]
        y, memory, *found = memory_scan(
            q, k, v, theta, eta, alpha, memory,
            chunk_size=self.chunk_size, form=self.form(), mask=valid, surprise=surprise, backend=self.backend,
            max_saved_bytes=max_saved_bytes,
        )  # fmt: skip
        if error is not None and y.requires_grad:
            total = (error if valid is None else error * valid).sum()
            y = AuxiliaryLoss.apply(y, total / (max(error.numel(), 1) if valid is None else valid.sum().clamp(min=1)))
        of_tokens = with_theta(found[0], theta, self.form().threshold, valid) if found else None
        return NeuralMemoryOutput(y, NeuralMemoryState(memory, conv_state, prev_input, gates), of_tokens)

    scan = as_call(_scan)

    def _project_output(
        self, x: Float[Tensor, "B T D"], y: Float[Tensor, "B T H V"], *, bypass: bool = False
    ) -> Float[Tensor, "B T D"]:
        """Normalise each head's retrieval y, gate it by x, and project it back to the model's width."""
        if bypass:
            return torch.zeros_like(x)
        return checkpointed(lambda x, y: self._gated_output(y, self.output_gate(x)), x, y)

    project_output = as_call(_project_output)

    def _features(
        self, x: Tensor, conv_state: tuple[Tensor, ...], valid: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Eq. 11, convolution, SiLU, and unit length of q and k: q, k and v `[B, T, H, head_dim]`, or the first of
        them, as many as `conv_state` has parts; and the `conv_state` after."""
        projections = (self.q_proj, self.k_proj, self.v_proj)[: len(conv_state)]
        y = torch.cat([project(x) for project in projections], -1)
        convs = () if self.convs is None else tuple(conv(x) for _, conv in zip(conv_state, self.convs, strict=False))
        filters, compiled = torch.cat(convs) if convs else None, self.backend in ("auto", "native")
        return continue_features(y, conv_state, filters, self.num_heads, self.head_dim, valid, compiled)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, eta and alpha `[B, T, H]`, in float32 or float64 (section 3.2: functions of the token)."""
        theta, eta, alpha = sigmoid_gates(x, (self.theta, self.eta, self.alpha), self.num_heads)
        return self.lr * theta, eta, alpha

    def form(self) -> MemoryForm:
        """The function M, its clip and its threshold."""
        norm = None if self.norm_weight is None or self.norm_bias is None else (self.norm_weight, self.norm_bias)
        return MemoryForm(self.activation, norm, self.clip, self.surprise_threshold if self.predictor is None else None)

    def _gated_output(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.output_norm(y).flatten(-2) * torch.sigmoid(gate))

    heads, threshold = RenamedAttribute("heads", "num_heads"), RenamedAttribute("threshold", "surprise_threshold")
    off, kept_bytes = RemovedAttribute("bypass_memory(model)"), RemovedAttribute("max_saved_bytes= of a call")
    theta_max, theta_start = RenamedAttribute("theta_max", "lr"), RenamedAttribute("theta_start", "lr_start")


def memories(model: nn.Module) -> list[NeuralMemory]:
    """All memory layers of the model."""
    return [module for module in model.modules() if isinstance(module, NeuralMemory)]
