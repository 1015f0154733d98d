"""The neural long-term memory as a layer: projections, convolutions, gates, norm around `ops.memory_scan`."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from titans_lm.layers.associative import start_associative
from titans_lm.layers.called import at_home, in_steps, is_plain
from titans_lm.layers.checkpointing import recomputed
from titans_lm.layers.features import FirstWeights, ShortConvolution, features
from titans_lm.layers.memory_options import check_options
from titans_lm.layers.memory_state import NeuralMemoryState, gates_of_chunks, last_input
from titans_lm.layers.predictor import Predictor, TrainAlong
from titans_lm.ops import (
    Activation,
    Backend,
    MemoryForm,
    MemoryState,
    Surprise,
    gather_tokens,
    initial_state,
    left_align,
    masked_zero,
    memory_scan,
    retrieve,
    undo_left_align,
)

KEPT_BYTES = 128 * 2**20
"""What a call may keep for its backward pass (`ops.memory_scan`): a model has many layers."""
LONGEST_MOMENTUM = 256
"""Tokens that momentum spans at most before training."""


class Queries(NamedTuple):
    """All of a reading that does not depend on what the memory knows, of tokens `[B, T]`."""

    q: Float[Tensor, "B T H K"]
    gate: Float[Tensor, "B T I"]
    """Of the output, before its sigmoid."""


class NeuralMemory(nn.Module):
    """A layer whose memory is a small network per head that learns while it reads (arXiv:2501.00663, section 3).

        y, state = memory(x, state)        # x, y [B, T, D]; state None begins; write, then read, token by token
        y = memory.retrieve(x, state)      # read only, changes nothing

    Args:
        dim: model width D.
        heads: memory heads; each has its own memory of width `head_dim` (default D / heads).
        depth: layers of the memory, L >= 1. One is a matrix; two or more remember what no matrix can.
        hidden: width between those layers (default 4 x head_dim).
        chunk_size: tokens C whose gradients are taken at the same weights. 1: the paper to the letter; more: faster.
        theta_max: upper bound of the step, in (0, 1].
        theta_start: where the step begins, in (0, 1], at most half of its bound. Small, whatever that is: who begins by
            writing little learns what to write; who begins by writing much has to learn what not to.
        form: "residual", M(k) = k + norm(MLP(k)), the default because it stays finite; or the paper's "plain" MLP.
        clip: bound of each token's output gradient (see `ops.MemoryForm`); None: unbounded.
        momentum, forgetting: False fixes eta or alpha at 0.
        gates_of: theta, eta and alpha are those of each "token"; or of each "chunk", its first token's (section 3.2 has
            them constant in a chunk; a mean over it would tell a token of later ones).
        alpha_bias: where forgetting begins, before the sigmoid: -5 forgets over some 150 tokens, -8 over 3,000. What a
            memory does after the length at which it settles was trained only if that is below a training sequence's.
        conv_size: width of the causal convolutions on q, k, v; 1: none.
        init: "learned": M_0 is a parameter. "zero": M_0(k) = 0, its last layer starts at 0.
        start: where projections and convolutions begin: "associative", as a memory of what followed what, which learns
            in context from its first step (`associative`); "random", each by itself, as linear layers and convolutions
            usually do; "auto": associative where there are convolutions, which it needs.
        lags: of an associative start, how many tokens a key looks at, each in a group of channels; at most
            conv_size - 1 are.
        threshold: tokens whose surprise is not above it are not written (None: all are); a chunk in which none is takes
            less time, where no gradients are asked for.
        threshold_on: which surprise that is: the "reconstruction" loss || M(k) - v ||^2 of each head, or the error of a
            "prediction" of the input from the one before it, by a linear map that is learned along.
        backend: see `ops.memory_scan`.

    Raises ValueError for values outside these ranges.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        depth: int = 2,
        hidden: int | None = None,
        chunk_size: int = 16,
        theta_max: float = 0.1,
        theta_start: float = 0.01,
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
        threshold: float | None = None,
        threshold_on: Literal["reconstruction", "prediction"] = "reconstruction",
        backend: Backend = "auto",
    ):
        super().__init__()
        head_dim = dim // max(heads, 1) if head_dim is None else head_dim
        hidden = 4 * head_dim if hidden is None else hidden
        counts = {"dim": dim, "heads": heads, "head_dim": head_dim, "depth": depth, "hidden": hidden,
                  "chunk_size": chunk_size, "conv_size": conv_size, "lags": lags}  # fmt: skip
        steps = {"theta_max": theta_max, "theta_start": theta_start}
        words: dict[str, str] = {
            "form": form,
            "init": init,
            "start": start,
            "threshold_on": threshold_on,
            "gates_of": gates_of,
        }
        check_options(counts, steps, words)
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.chunk_size, self.clip, self.threshold = chunk_size, clip, threshold
        self.theta_max, self.theta_start = theta_max, theta_start
        self.activation, self.backend = activation, backend
        self.alpha_bias, self.gates_of = alpha_bias, gates_of
        self.start, self.lags = start, lags
        self.kept_bytes = KEPT_BYTES
        self.off = False  # see `memory_off`
        inner = heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, inner, bias=False)
        self.v_proj = nn.Linear(dim, inner, bias=False)
        self.convs = nn.ModuleList(ShortConvolution(inner, conv_size) for _ in "qkv") if conv_size > 1 else None
        self.tail_shape = (conv_size - 1, inner)
        self.theta = nn.Linear(dim, heads)
        self.eta = nn.Linear(dim, heads) if momentum else None
        self.alpha = nn.Linear(dim, heads) if forgetting else None
        self.output_gate = nn.Linear(dim, inner, bias=False)
        self.output_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        widths = [self.head_dim] + [hidden] * (depth - 1) + [self.head_dim]
        self.shapes = [(heads, i, o) for i, o in itertools.pairwise(widths)]
        learned = self.shapes if init == "learned" else self.shapes[:-1]
        self.predictor = Predictor(dim) if threshold_on == "prediction" else None
        self.initial_memory = FirstWeights(nn.Parameter(torch.empty(s)) for s in learned)
        norm = torch.empty(heads, self.head_dim) if form == "residual" else None
        self.norm_weight = None if norm is None else nn.Parameter(norm)
        self.norm_bias = None if norm is None else nn.Parameter(norm.clone())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what is the memory's own: M_0, the convolutions, where the gates begin, the norm; projections for
        an associative start.

        Each layer of M_0 keeps the scale of what goes through it. Keys have length 1, not 1 in each channel: the first
        of several layers makes them large enough to be bent by its activation, and so to differ.
        """
        for layer, w in enumerate(self.initial_memory):
            nn.init.normal_(w, std=1.0 if layer == 0 and len(self.shapes) > 1 else w.shape[1] ** -0.5)
        part = min(self.theta_start / self.theta_max, 0.5)
        nn.init.constant_(self.theta.bias, math.log(part / (1 - part)))
        if self.eta is not None:  # momentum begins to span about a chunk: 1 / (1 - eta) = C
            nn.init.constant_(self.eta.bias, math.log(min(max(self.chunk_size, 2), LONGEST_MOMENTUM) - 1))
        if self.alpha is not None:
            nn.init.constant_(self.alpha.bias, self.alpha_bias)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        convs = [] if self.convs is None else [conv for conv in self.convs if isinstance(conv, ShortConvolution)]
        for conv in convs:
            conv.reset_parameters()
        if self.start != "random" and convs:
            filters = [conv.weight for conv in convs]
            projections = (self.q_proj, self.k_proj, self.v_proj)
            start_associative(projections, filters, self.heads, self.lags, scale_values=self.norm_weight is not None)

    def initial_state(self, batch: int) -> NeuralMemoryState:
        """A memory that has read nothing, for `batch` rows; gradients flow back to the learned M_0."""
        return self(batch, at_home(self), step="begin")

    def empty_state(self, batch: int, like: Tensor) -> NeuralMemoryState:
        """`initial_state` with 0 in place of M_0, with the device and dtype (float32 at least) of `like`."""
        wide = like if like.dtype == torch.float64 else like.float()
        zeros = tuple(wide.new_zeros(batch, *shape) for shape in self.shapes)
        memory = MemoryState(zeros, zeros, zeros, torch.zeros(batch, dtype=torch.long, device=like.device))
        return NeuralMemoryState(memory, *self._nothing_read(batch, like))

    def _begin(self, batch: int, like: Tensor) -> NeuralMemoryState:
        wide = like if like.dtype == torch.float64 else like.float()
        learned = self.initial_memory(like)
        zero = tuple(wide.new_zeros(shape) for shape in self.shapes[len(learned) :])
        return NeuralMemoryState(initial_state(learned + zero, batch), *self._nothing_read(batch, like))

    def _nothing_read(self, batch: int, like: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        """The tails, the last input and the gates of a chunk."""
        wide = like if like.dtype == torch.float64 else like.float()
        last = None if self.predictor is None else like.new_zeros(batch, self.dim)
        gates = None if self.gates_of == "token" else wide.new_zeros(batch, self.heads, 3)
        return tuple(like.new_zeros(batch, *self.tail_shape) for _ in "qkv"), last, gates

    @in_steps
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: NeuralMemoryState | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        *,
        surprise: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], NeuralMemoryState] | tuple[Float[Tensor, "B T D"], NeuralMemoryState, Surprise]:
        """Write each token, then read the memory as it is after it (eqs. 10 to 15). T >= 0; cut anywhere.

        `mask` is False at padding, which leaves no trace; y is 0 there. With `surprise=True` a `Surprise`
        (`loss` and `gradient_norm`, each `[B, T, H]`) is returned as well.
        """
        state = self._begin(len(x), x) if state is None else state
        if mask is not None:
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
            x = masked_zero(x, mask)
        if mask is not None and not _is_aligned(mask):
            order, length = left_align(mask)
            aligned = torch.arange(x.shape[1], device=x.device) < length[:, None]
            x = gather_tokens(x, order)
            y, state, *seen = self._write(x, state, aligned, surprise)
            y = undo_left_align(self._output(x, y), mask)
            seen = [Surprise(*(undo_left_align(part, mask) for part in s)) for s in seen]
        else:
            y, state, *seen = self._write(x, state, mask, surprise)
            y = self._output(x, y)
            y = y if mask is None else masked_zero(y, mask)
        return (y, state, *seen)

    def retrieve(self, x: Float[Tensor, "B T D"], state: NeuralMemoryState) -> Float[Tensor, "B T D"]:
        """Read the memory with the queries of `x`, the stream's next tokens: nothing is written (eq. 15)."""
        return self(x, state, step="retrieve")

    def frozen(
        self, x: Float[Tensor, "B T D"], state: NeuralMemoryState, present: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T D"], NeuralMemoryState]:
        """As `forward`, but the memory is only read: the stream goes on, and leaves no trace in the weights."""
        x = x if present is None else masked_zero(x, present)
        return self(x, state, present, frozen=True, surprise=False, step="remember")[:2]

    # ------------------------------------ steps (see `called`): blocks take a forward pass apart, or into many segments

    def _retrieve(self, x: Tensor, state: NeuralMemoryState) -> Tensor:
        return self._answers(self._queries(x, state.tails[0], None)[0], state.memory.weights)

    def _queries(self, x: Tensor, tail: Tensor, present: Tensor | None) -> tuple[Queries, Tensor]:
        """Going on from the queries' `tail`, for any number of tokens at once; `present` is True for each row's first
        tokens."""
        (q,), (tail,) = self._features(x, (tail,), present)
        return Queries(q, self.output_gate(x)), tail

    def _answers(self, queries: Queries, weights: tuple[Tensor, ...]) -> Float[Tensor, "B T D"]:
        """What a memory of these `weights` says."""
        if self.off:
            return queries.gate.new_zeros(*queries.gate.shape[:2], self.dim)
        y = retrieve(queries.q, weights, self._form())
        return recomputed(self._gated, y, queries.gate)

    def _remember(
        self, x: Tensor, state: NeuralMemoryState, present: Tensor | None, frozen: bool, surprise: bool
    ) -> tuple[Tensor, NeuralMemoryState, Surprise | None]:
        """`_learn` and its `_output`."""
        y, state, seen = self._learn(x, state, present, frozen, surprise)
        return self._output(x, y), state, seen

    def _learn(
        self, x: Tensor, state: NeuralMemoryState, present: Tensor | None, frozen: bool, surprise: bool
    ) -> tuple[Tensor, NeuralMemoryState, Surprise | None]:
        """Written and read, or only read where the memory is `frozen`: what each token reads `[B, T, H, V]`."""
        if frozen:
            return *self._look(x, state, present), None
        y, state, *seen = self._write(x, state, present, surprise)
        return y, state, seen[0] if seen else None

    def _write(
        self, x: Float[Tensor, "B T D"], state: NeuralMemoryState, present: Bool[Tensor, "B T"] | None, surprise: bool
    ) -> tuple[Any, ...]:
        """What each token reads `[B, T, H, V]`, the state, and if it is asked for the surprise; `present` is True for
        each row's first tokens."""
        if self.off:
            y = x.new_zeros(*x.shape[:2], self.heads, self.head_dim)
            return (y, state, Surprise(y[..., 0], y[..., 0])) if surprise else (y, state)
        (q, k, v), tails = self._features(x, state.tails, present)
        gates, held = self._gates(x), state.gates
        if held is not None:
            gates, held = gates_of_chunks(gates, held, state.memory.position, self.chunk_size, present)
        theta, eta, alpha = gates
        error = None if self.predictor is None or state.last is None else self.predictor(x, state.last)
        if error is not None and self.threshold is not None:
            theta = theta * (error.detach() > self.threshold)[..., None]
        y, memory, *seen = memory_scan(
            q, k, v, theta, eta, alpha, state.memory,
            chunk_size=self.chunk_size, form=self._form(), mask=present, surprise=surprise, backend=self.backend,
            max_saved_bytes=self.kept_bytes,
        )  # fmt: skip
        if error is not None and y.requires_grad:
            there = error if present is None else error * present
            count = max(error.numel(), 1) if present is None else present.sum().clamp(min=1)
            y = TrainAlong.apply(y, there.sum() / count)
        return y, NeuralMemoryState(memory, tails, last_input(x, state.last, present), held), *seen

    def _look(self, x: Tensor, state: NeuralMemoryState, present: Tensor | None) -> tuple[Tensor, NeuralMemoryState]:
        """As `_write`, of a memory that is frozen."""
        (q, _, _), tails = self._features(x, state.tails, present)
        y = retrieve(q, state.memory.weights, self._form())
        return y, NeuralMemoryState(state.memory, tails, last_input(x, state.last, present), state.gates)

    def _output(self, x: Float[Tensor, "B T D"], y: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T D"]:
        """Normalise what each head of x read, gate, project back to the model's width."""
        if self.off:
            return torch.zeros_like(x)
        return recomputed(lambda x, y: self._gated(y, self.output_gate(x)), x, y)

    # ---------------------------------------------------------------------------------------------- parts

    def _features(
        self, x: Tensor, tails: tuple[Tensor, ...], present: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Eq. 11, convolution, SiLU, and the unit of q and k: q, k, v `[B, T, H, head_dim]`, or the first of them, as
        many as there are `tails`; and the tails after."""
        count, length = len(tails), x.shape[1]
        y = torch.cat([project(x) for project in (self.q_proj, self.k_proj, self.v_proj)[:count]], -1)
        past = torch.cat([torch.cat(tails, -1).to(y.dtype), y], 1)  # [B, R + T, count * I]
        convs = () if self.convs is None else tuple(conv(x) for _, conv in zip(tails, self.convs, strict=False))
        filters = torch.cat(convs) if convs else None
        made = features(past, filters, self.heads, self.head_dim, compiled=self.backend in ("auto", "native"))
        if present is None:
            after = past[:, length:] if length == 1 else past[:, length:].clone()  # else a view of all of past
        else:
            after = gather_tokens(past, present.sum(1)[:, None] + torch.arange(self.tail_shape[0], device=x.device))
        return made, after.chunk(count, -1)

    def _gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """theta, eta, alpha `[B, T, H]`, in float32 at least (section 3.2: functions of the token)."""
        maps = [gate for gate in (self.theta, self.eta, self.alpha) if gate is not None]
        if all(map(is_plain, maps)):  # few rows each: one product for all
            z = F.linear(x, torch.cat([gate.weight for gate in maps]), torch.cat([gate.bias for gate in maps]))
        else:
            z = torch.cat([gate(x) for gate in maps], -1)
        theta, *others = torch.sigmoid(z if z.dtype == torch.float64 else z.float()).split(self.heads, -1)
        eta, alpha = (torch.zeros_like(theta) if gate is None else others.pop(0) for gate in (self.eta, self.alpha))
        return self.theta_max * theta, eta, alpha

    def _form(self) -> MemoryForm:
        norm = None if self.norm_weight is None or self.norm_bias is None else (self.norm_weight, self.norm_bias)
        return MemoryForm(self.activation, norm, self.clip, self.threshold if self.predictor is None else None)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.output_norm(y).flatten(-2) * torch.sigmoid(gate))


def memories(model: nn.Module) -> list[NeuralMemory]:
    """All that the model has."""
    return [module for module in model.modules() if isinstance(module, NeuralMemory)]


@contextlib.contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Every memory of the model says 0 to whatever it is asked, writes nothing, and gets no gradient."""
    try:
        for memory in memories(model):
            memory.off = True
        yield
    finally:
        for memory in memories(model):
            memory.off = False


def _is_aligned(mask: Tensor) -> bool:
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())
