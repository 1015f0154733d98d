"""The architectures, side by side: how attention, memory and persistent tokens are joined (section 4 of the paper).

Each block is x + branch(norm(x)), then x + MLP(norm(x)). What a block remembers goes in and out as a `LayerState`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from titans_lm.layers.attention import Rotation, SegmentAttention, WindowAttention
from titans_lm.layers.checkpointing import recomputed
from titans_lm.layers.neural_memory import NeuralMemory, NeuralMemoryState, Queries
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.reading import LayerState, Reading, Retrieval, expand, start_rows
from titans_lm.ops import Surprise, lay_out

PIECE = 4096
"""Tokens that a block reads at once where no gradients are asked for: enough to keep a processor busy."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(lambda gate, up: self.down_proj(F.silu(gate) * up), self.gate_proj(x), self.up_proj(x))


class ProductGate(nn.Module):
    """y (x) m: both sides normalised with learned weights, a sigmoid on the memory's side (eqs. 25, 28)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.y_norm, self.m_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return recomputed(lambda y, m: self.y_norm(y) * torch.sigmoid(self.m_norm(m)), y, m)


class ConvexGate(nn.Module):
    """g * y + (1 - g) * m, g = sigmoid(W_g [y; m] + b_g)"""

    def __init__(self, dim: int):
        super().__init__()
        self.mix = nn.Linear(2 * dim, dim)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        g = torch.sigmoid(self.mix(torch.cat([y, m], -1)))
        return g * y + (1 - g) * m


class TitansBlock(GradientCheckpointingLayer):
    """What all variants share: the norm and residual around the branch, and the MLP after it.

    A variant says what its branch is (`branch`), and what it remembers before the first token (`initial_state`), which
    is made within `forward`: only there are a block's weights sure to be there (see `called`).
    """

    def __init__(self, config: TitansConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.constant = config.variant != "attention" or config.window_size is not None
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.mlp_norm = nn.RMSNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.prefix_size = config.num_persistent_tokens
        self.persistent = nn.Parameter(torch.empty(self.prefix_size, dim)) if self.prefix_size else None

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        """`initial_state` with 0 in place of what the weights say, of the dtype and on the device of `like`."""
        raise NotImplementedError

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        """What is remembered before the first token, on the device of `like`. Uses weights: within a call only."""
        raise NotImplementedError

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        """x `[B, T, D]`, the block's input -> what is added to it, what is remembered, how surprised the memory was."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: LayerState | None, reading: Reading
    ) -> tuple[Tensor, LayerState, Surprise | None]:
        """`state` None: all rows begin."""
        if state is None:
            state = self.initial_state(len(x), x)
        elif reading.fresh is not None:
            state = start_rows(reading.fresh, self.initial_state(len(x), x), state)
        if x.shape[1] > PIECE and self.constant and not torch.is_grad_enabled():
            return self._in_pieces(x, state, reading)
        return self._read(x, state, reading)

    def _read(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        y, state, surprise = self.branch(x, state, reading)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state, surprise

    def _in_pieces(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        """`_read` PIECE tokens at a time: a long text takes no more memory inside a block than a short one."""
        outputs, seen = [], []
        for first in range(0, x.shape[1], PIECE):
            part = slice(first, first + PIECE)
            turn = Rotation(*(p[:, part] for p in reading.turn))
            here = reading._replace(turn=turn, present=None if reading.present is None else reading.present[:, part])
            y, state, surprise = self._read(x[:, part], state, here)
            outputs.append(y)
            seen.append(surprise)
            moved = here.after(y.shape[1])
            reading = reading._replace(position=moved.position, at=moved.at)
        surprise = None if seen[0] is None else Surprise(*(torch.cat(s, 1) for s in zip(*seen, strict=True)))
        return torch.cat(outputs, 1), state, surprise

    def prefix(self, like: Tensor) -> Tensor:
        """The persistent tokens, normalised as the block's input is: `[1, P, D]`; P = 0 if it has none."""
        return like.new_zeros(1, 0, like.shape[-1]) if self.persistent is None else self.norm(self.persistent)[None]

    def begin(self, memory: NeuralMemory, batch: int, like: Tensor) -> tuple[Tensor, NeuralMemoryState]:
        """M(x~) at the persistent tokens, which a stream reads once, first; `[1, P, D]`, and the memory after them.
        They are the same in all rows, so one row reads them."""
        y, state = memory(self.prefix(like))
        return y, expand(state, batch)


def _memory(config: TitansConfig) -> NeuralMemory:
    assert config.num_memory_heads is not None
    return NeuralMemory(
        config.hidden_size,
        config.num_memory_heads,
        head_dim=config.memory_head_dim,
        depth=config.memory_layers,
        hidden=config.memory_dim,
        chunk_size=config.memory_chunk_size,
        theta_max=config.memory_lr,
        theta_start=config.memory_lr_start,
        form=config.memory_form,
        activation=config.memory_activation,
        clip=config.memory_clip,
        momentum=config.memory_momentum,
        forgetting=config.memory_forgetting,
        gates_of=config.memory_gates_of,
        alpha_bias=config.memory_alpha_bias,
        conv_size=config.memory_conv_size,
        init=config.memory_init,
        start=config.memory_start,
        lags=config.memory_lags,
        threshold=config.surprise_threshold,
        threshold_on=config.surprise_threshold_on,
    )


def _window(config: TitansConfig) -> WindowAttention:
    assert config.head_dim is not None
    return WindowAttention(config.hidden_size, config.num_attention_heads, config.head_dim, config.window_size)


def _gate(config: TitansConfig) -> nn.Module:
    if config.gate == "convex":
        return ConvexGate(config.hidden_size)
    return ProductGate(config.hidden_size, config.rms_norm_eps)


class AttentionBlock(TitansBlock):
    """No long-term memory: attention over a window, or over everything. The baseline."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention = _window(config)

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        return LayerState(attention=self.attention.initial_state(batch, like))

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return self.empty_state(batch, like)

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        assert state.attention is not None
        y, attention = self.attention(self.norm(x), self.prefix(x), state.attention, *reading.place())
        return y, LayerState(attention=attention), None


class LMMBlock(TitansBlock):
    """The memory alone: o = M([P, x])."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.memory = _memory(config)

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        return LayerState(memory=self.memory.empty_state(batch, like))

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return LayerState(memory=self.begin(self.memory, batch, like)[1])

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        assert state.memory is not None
        y, memory, surprise = self.memory(self.norm(x), state.memory, *reading.task(), step="remember")
        return y, LayerState(memory=memory), surprise


class MAGBlock(TitansBlock):
    """Memory as gate: x~ = [P, x]; o = SW-Attn*(x~) (x) M(x~) (eqs. 26 to 28)."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention, self.memory, self.gate = _window(config), _memory(config), _gate(config)

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        return LayerState(self.attention.initial_state(batch, like), self.memory.empty_state(batch, like))

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return LayerState(self.attention.initial_state(batch, like), self.begin(self.memory, batch, like)[1])

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        assert state.attention is not None and state.memory is not None
        x = self.norm(x)
        y, attention = self.attention(x, self.prefix(x), state.attention, *reading.place())
        m, memory, surprise = self.memory(x, state.memory, *reading.task(), step="remember")
        return self.gate(y, m), LayerState(attention, memory), surprise


class MALBlock(TitansBlock):
    """Memory as layer: y = M([P, x]); o = SW-Attn(y) (eqs. 29 to 31), each with its norm and residual."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention, self.memory = _window(config), _memory(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        prefix = like.new_zeros(batch, self.prefix_size, self.memory.dim)
        attention = self.attention.initial_state(batch, like)
        return LayerState(attention, self.memory.empty_state(batch, like), prefix=prefix)

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        m, memory = self.begin(self.memory, batch, like)
        prefix = m if self.persistent is None else self.attention_norm(self.persistent + m)
        return LayerState(self.attention.initial_state(batch, like), memory, prefix=prefix.expand(batch, -1, -1))

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        assert state.attention is not None and state.memory is not None and state.prefix is not None
        m, memory, surprise = self.memory(self.norm(x), state.memory, *reading.task(), step="remember")
        prefix = state.prefix.to(x.dtype)  # a state made before the model's dtype was changed
        y, attention = self.attention(self.attention_norm(x + m), prefix, state.attention, *reading.place())
        return m + y, LayerState(attention, memory, prefix=state.prefix), surprise


class Ahead(NamedTuple):
    """What MAC makes of all tokens at hand, `[B, S, ...]` in its slots, before it reads their first segment."""

    s: Tensor
    queries: Queries
    own: tuple[Tensor, ...]  # attention's q, k, v, [B, heads, S, d]
    present: Tensor | None

    def parts(self, sizes: list[int]) -> list["Ahead"]:
        """One after another; not as slices, for each of which a backward pass would make the gradient of the whole."""
        s, q, gate = (x.split(sizes, 1) for x in (self.s, *self.queries))
        own = zip(*(x.split(sizes, 2) for x in self.own), strict=True)
        present = [None] * len(sizes) if self.present is None else self.present.split(sizes, 1)
        return [Ahead(s, Queries(*q), own, here) for s, *q, own, here in zip(s, q, gate, own, present, strict=True)]


class MACBlock(TitansBlock):
    """Memory as context, segment by segment (eqs. 21 to 25).

    h is read from the memory as it was when the segment began; attention sees [P, h, S]; the memory writes the
    attention's output and is read with it, each token the memory as it is after that token.

    What it writes is norm(S + y), the attention with a residual. Attention begins as a mean of the segment, nearly the
    same for all its tokens: with y alone, or added to the block's x, which is small beside y at the beginning, no
    needle was recalled after 225 to 400 steps where this form takes 100.
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        assert config.head_dim is not None
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.segment_size = config.segment_size
        self.attention = SegmentAttention(dim, config.num_attention_heads, config.head_dim, config.segment_size)
        self.memory, self.gate = _memory(config), _gate(config)
        self.memory.kept_bytes = 32 * 2**20  # each of many segments is a call: what all keep is most of a step's memory
        self.retrieved_norm, self.memory_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def empty_state(self, batch: int, like: Tensor) -> LayerState:
        return self._before(batch, like, self.memory.empty_state(batch, like))

    def initial_state(self, batch: int, like: Tensor) -> LayerState:
        return self._before(batch, like, self.memory(batch, like, step="begin"))

    def _before(self, batch: int, like: Tensor, memory: NeuralMemoryState) -> LayerState:
        retrieval = Retrieval(memory.memory.weights, memory.tails[0])
        return LayerState(self.attention.initial_state(batch, like), memory, retrieval)

    def branch(self, x: Tensor, state: LayerState, reading: Reading) -> tuple[Tensor, LayerState, Surprise | None]:
        assert state.retrieval is not None
        x = self.norm(x)
        queries, tail = self.memory(x, state.retrieval.tail, reading.present, step="queries")
        layout = lay_out(reading.present, reading.position, x.shape[1], self.segment_size)
        s, turn = layout.to_slots(x), Rotation(*(layout.to_slots(t.expand(len(x), -1, -1)) for t in reading.turn))
        ahead = Ahead(s, Queries(*map(layout.to_slots, queries)), self.attention.own(s, turn), layout.valid)
        persistent = self.attention.persistent(self.prefix(x), len(x))
        here, parts = reading.within(self.segment_size), []
        for part in ahead.parts([width for start, end, width in layout.runs() for _ in range(start, end, width)]):
            here = here._replace(present=part.present)
            *made, state = self._segment(part, persistent, state, here)
            parts.append(made)
            here = here.after(part.s.shape[1]).within(self.segment_size)
        assert state.retrieval is not None
        state = state._replace(retrieval=state.retrieval._replace(tail=tail))
        if not parts:
            return torch.zeros_like(x), state, None
        *whole, seen = zip(*parts, strict=True)
        y, written, m = (torch.cat(part, 1) for part in whole)
        out = layout.from_slots(self.gate(y, self.memory(written, m, step="output")))
        if seen[0] is None:
            return out, state, None
        return out, state, Surprise(*(layout.from_slots(torch.cat(part, 1)) for part in zip(*seen, strict=True)))

    def _segment(
        self, part: "Ahead", persistent: tuple[Tensor, Tensor], state: LayerState, reading: Reading
    ) -> tuple[Any, ...]:
        """Tokens of one segment, or of a part of it; `reading.position` counts within the segment. -> attention's
        output, what the memory writes, what it reads, how surprised it was, and what is remembered."""
        assert state.attention is not None and state.memory is not None and state.retrieval is not None
        weights = reading.where_at(0, state.memory.memory.weights, state.retrieval.weights)
        h = self.retrieved_norm(self.memory(part.queries, weights, step="answers"))
        y, attention = self.attention.attend(
            part.own, h, persistent, state.attention, reading.position, reading.present, reading.at
        )
        written = self.memory_norm(part.s + y)
        m, memory, surprise = self.memory(written, state.memory, *reading.task(), step="learn")
        weights = reading.after(part.s.shape[1]).within(self.segment_size).where_at(0, memory.memory.weights, weights)
        return y, written, m, surprise, LayerState(attention, memory, state.retrieval._replace(weights=weights))


BLOCKS: dict[str, type[TitansBlock]] = {
    "mac": MACBlock,
    "mag": MAGBlock,
    "mal": MALBlock,
    "lmm": LMMBlock,
    "attention": AttentionBlock,
}
