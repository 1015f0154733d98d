"""The architectures, side by side: how attention, memory and persistent tokens are joined (section 4 of the paper).

Each block is x + branch(norm(x)), then x + MLP(norm(x)). Its cache goes in and out, as a type of its own per variant.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from titans_lm.layers import compiled_segments
from titans_lm.layers.attention import RotaryEmbedding, SegmentAttention
from titans_lm.layers.bypass import is_bypassed
from titans_lm.layers.compiled_segments import SegmentLayers
from titans_lm.layers.few_rows import add, rms_norm
from titans_lm.layers.gating import SwiGLU, residual_mlp
from titans_lm.layers.key_values import KeyValues, SegmentBuffers, writes_in_place
from titans_lm.layers.memory_state import LayerSurprise, NeuralMemoryOutput, NeuralMemoryState, ProjectedQueries
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.block_cache import (
    AttentionCache,
    BlockCache,
    Cache,
    LMMCache,
    MACCache,
    MAGCache,
    MALCache,
    SegmentSnapshot,
    as_value,
    expand_rows,
    restart_rows,
)
from titans_lm.models.block_layers import make_gate, make_memory, make_window
from titans_lm.models.block_parts import attend, write_and_read
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.forward_context import ForwardContext
from titans_lm.models.segments import (
    SegmentInputs,
    SegmentOutput,
    concat_surprises,
    lay_out_segments,
    read_segments,
    read_segments_as_loop,
    split_whole,
)
from titans_lm.ops import is_traced
from titans_lm.utils.deprecation import renamed

PREFILL_TOKENS = 4096
"""Tokens of one forward call of a prefill. Without gradients a block also splits a longer call into parts of this many
tokens, so memory use does not depend on the text's length. A part is large enough to keep a processor busy."""
SEGMENT_SAVED_BYTES = 32 * 2**20
"""What the scan of one MAC segment may save for its backward pass. It is small because a step scans many segments."""

__getattr__ = renamed(__name__, {"PIECE": "PREFILL_TOKENS", "Ahead": "SegmentInputs"})


class BlockOutput(NamedTuple):
    """What a block, or its branch, returns."""

    x: Tensor
    cache: BlockCache
    surprise: LayerSurprise | None  # the memory's, if the call asked for it; None otherwise, and without a memory


class TitansBlock(GradientCheckpointingLayer, Generic[Cache]):
    """The parts that all variants share: the norm and residual around the branch, and the MLP after it.

    A variant defines its `branch`, its type of cache, and the cache before the first token, `initial_cache`; `forward`
    makes that cache, because a block's weights are sure to be usable only in its call (see `module_call`)."""

    cache_type: type[Cache]

    def __init__(self, config: TitansConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.constant_size = config.variant != "attention" or config.window_size is not None
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.mlp_norm = nn.RMSNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.num_persistent = config.num_persistent_tokens
        self.persistent = nn.Parameter(torch.empty(self.num_persistent, dim)) if self.num_persistent else None

    def empty_cache(self, batch: int, like: Tensor) -> Cache:
        """`initial_cache` with 0 in place of what depends on weights, of the dtype and on the device of `like`."""
        raise NotImplementedError

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> Cache:
        """The cache before the first token, on the device of `like`. It uses weights: call it within `forward`.

        With `bypass`, the memory has not read the persistent tokens."""
        raise NotImplementedError

    def branch(self, x: Tensor, cache: Cache, context: ForwardContext) -> BlockOutput:
        """x `[B, T, D]`, the block's input -> what is added to it, and the cache after these tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: Cache | None, context: ForwardContext) -> BlockOutput:
        """x `[B, T, D]` -> the block's output and cache. `cache` None: all rows are at their first token."""
        if cache is None:
            cache = self.initial_cache(x.shape[0], x, context.bypass)
        elif context.new_rows is not None:
            first = self.initial_cache(x.shape[0], x, context.bypass)
            cache = restart_rows(context.new_rows, first, as_value(cache, context.position))
        elif not writes_in_place(x, context.valid):
            cache = as_value(cache, context.position)
        parts = self.constant_size and not torch.is_grad_enabled() and not is_traced(x)  # a trace is for all lengths
        if parts and x.shape[1] > PREFILL_TOKENS:
            return self._forward_in_parts(x, cache, context)
        return self._forward(x, cache, context)

    def may_replay(self, position: int) -> bool:
        """Whether the token at `position` takes the same steps as the one before it: what a replay does."""
        return position > 0

    def is_bypassed(self) -> bool:
        """Whether its memory is in a `bypass_memory` context."""
        return any(map(is_bypassed, self.children()))

    def _forward(self, x: Tensor, cache: Cache, context: ForwardContext) -> BlockOutput:
        out = self.branch(x, cache, context)
        return out._replace(x=residual_mlp(x, out.x, self))

    def _forward_in_parts(self, x: Tensor, cache: Cache, context: ForwardContext) -> BlockOutput:
        """`_forward` of PREFILL_TOKENS tokens at a time, so that a long text takes no more memory than a short one."""
        outputs, surprises = [], []
        for start in range(0, x.shape[1], PREFILL_TOKENS):
            part = x[:, start : start + PREFILL_TOKENS]
            here = context.part(start, start + PREFILL_TOKENS)
            out = self._forward(part, cache, here)
            cache = cast(Cache, out.cache)
            outputs.append(out.x)
            surprises.append(out.surprise)
            moved = here.advanced(part.shape[1])
            context = context._replace(position=moved.position, uniform_position=moved.uniform_position)
        return BlockOutput(torch.cat(outputs, 1), cache, concat_surprises(surprises))

    def persistent_tokens(self, like: Tensor) -> Tensor:
        """The persistent tokens, normalised as the block's input is: `[1, P, D]`; P = 0 without them."""
        return like.new_zeros(1, 0, like.shape[-1]) if self.persistent is None else self.norm(self.persistent)[None]

    def read_persistent(
        self, memory: NeuralMemory, batch: int, like: Tensor, bypass: bool
    ) -> tuple[Tensor, NeuralMemoryState]:
        """The memory's output at the persistent tokens, which a stream reads before its first token, `[1, P, D]`; and
        its state after them, for `batch` rows. One row reads them, because they are the same in all."""
        tokens = self.persistent_tokens(like)
        out = memory.forward_aligned(tokens, memory.initial_state_like(1, tokens), None, bypass=bypass)
        return out.y, expand_rows(out.state, batch)


class AttentionBlock(TitansBlock[AttentionCache]):
    """The baseline without a long-term memory: attention over a window, or over everything."""

    cache_type = AttentionCache

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention = make_window(config)

    def empty_cache(self, batch: int, like: Tensor) -> AttentionCache:
        return AttentionCache(self.attention.initial_state(batch, like))

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> AttentionCache:  # noqa: ARG002 - no memory
        return self.empty_cache(batch, like)

    def branch(self, x: Tensor, cache: AttentionCache, context: ForwardContext) -> BlockOutput:
        y, attention = attend(self.attention, rms_norm(x, self.norm), self.persistent_tokens, cache.attention, context)
        return BlockOutput(y, AttentionCache(attention), None)


class LMMBlock(TitansBlock[LMMCache]):
    """The memory alone: o = M([P, x])."""

    cache_type = LMMCache

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.memory = make_memory(config)

    def empty_cache(self, batch: int, like: Tensor) -> LMMCache:
        return LMMCache(self.memory.empty_state(batch, like))

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> LMMCache:
        return LMMCache(self.read_persistent(self.memory, batch, like, bypass)[1])

    def branch(self, x: Tensor, cache: LMMCache, context: ForwardContext) -> BlockOutput:
        y, memory, surprise = write_and_read(self.memory, rms_norm(x, self.norm), cache.memory, context)
        return BlockOutput(y, LMMCache(memory), surprise)


class MAGBlock(TitansBlock[MAGCache]):
    """Memory as gate: x~ = [P, x]; o = SW-Attn*(x~) (x) M(x~) (eqs. 26 to 28)."""

    cache_type = MAGCache

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention, self.memory, self.gate = make_window(config), make_memory(config), make_gate(config)

    def empty_cache(self, batch: int, like: Tensor) -> MAGCache:
        return MAGCache(self.attention.initial_state(batch, like), self.memory.empty_state(batch, like))

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> MAGCache:
        _, memory = self.read_persistent(self.memory, batch, like, bypass)
        return MAGCache(self.attention.initial_state(batch, like), memory)

    def branch(self, x: Tensor, cache: MAGCache, context: ForwardContext) -> BlockOutput:
        x = rms_norm(x, self.norm)
        y, attention = attend(self.attention, x, self.persistent_tokens, cache.attention, context)
        m, memory, surprise = write_and_read(self.memory, x, cache.memory, context)
        return BlockOutput(self.gate(y, m), MAGCache(attention, memory), surprise)


class MALBlock(TitansBlock[MALCache]):
    """Memory as layer: y = M([P, x]); o = SW-Attn(y) (eqs. 29 to 31), each with its norm and residual."""

    cache_type = MALCache

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.attention, self.memory = make_window(config), make_memory(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def empty_cache(self, batch: int, like: Tensor) -> MALCache:
        prefix = like.new_zeros(batch, self.num_persistent, self.memory.dim)
        return MALCache(self.attention.initial_state(batch, like), self.memory.empty_state(batch, like), prefix)

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> MALCache:
        m, memory = self.read_persistent(self.memory, batch, like, bypass)
        prefix = m if self.persistent is None else self.attention_norm(self.persistent + m)
        return MALCache(self.attention.initial_state(batch, like), memory, prefix.expand(batch, -1, -1))

    def branch(self, x: Tensor, cache: MALCache, context: ForwardContext) -> BlockOutput:
        m, memory, surprise = write_and_read(self.memory, rms_norm(x, self.norm), cache.memory, context)
        prefix = cache.prefix.to(x.dtype)  # the model's dtype may have changed since
        z = rms_norm(add(x, m), self.attention_norm)
        y, attention = attend(self.attention, z, lambda _: prefix, cache.attention, context)
        return BlockOutput(add(m, y), MALCache(attention, memory, cache.prefix), surprise)


class MACBlock(TitansBlock[MACCache]):
    """Memory as context, segment by segment (eqs. 21 to 25).

    h is retrieved from the memory as it was when the segment began. Attention sees [P, h, S]. The memory writes the
    attention's output, and each token then reads the memory as it is after that token.

    It writes norm(S + y), the attention with a residual. Attention starts as a mean over the segment, nearly equal for
    all its tokens. With y alone, or with y added to the block's x, which is small beside y at first, a model recalled
    no needle after 225 to 400 steps; this form takes 100.
    """

    cache_type = MACCache

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        assert config.head_dim is not None
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.segment_size = config.segment_size
        self.attention = SegmentAttention(dim, config.num_attention_heads, config.head_dim, config.segment_size)
        self.memory, self.gate = make_memory(config), make_gate(config)
        self.retrieved_norm, self.memory_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def empty_cache(self, batch: int, like: Tensor) -> MACCache:
        return self._first_cache(batch, like, self.memory.empty_state(batch, like))

    def initial_cache(self, batch: int, like: Tensor, bypass: bool) -> MACCache:  # noqa: ARG002 - reads no token
        return self._first_cache(batch, like, self.memory.initial_state_like(batch, like))

    def _first_cache(self, batch: int, like: Tensor, memory: NeuralMemoryState) -> MACCache:
        snapshot = SegmentSnapshot(memory.memory.weights, memory.conv_state[0])
        return MACCache(self.attention.initial_state(batch, like), memory, snapshot)

    def branch(self, x: Tensor, cache: MACCache, context: ForwardContext) -> BlockOutput:
        x = rms_norm(x, self.norm)
        if x.shape[1] == 1:
            return self._token(x, cache, context.in_segment(self.segment_size))
        queries, conv_state = self.memory.project_queries(x, cache.retrieval.conv_state, context.valid)
        layout = lay_out_segments(context, x, self.segment_size)
        s, rope = (
            layout.to_slots(x),
            RotaryEmbedding(*(layout.to_slots(t.expand(x.shape[0], -1, -1)) for t in context.rope)),
        )
        queries = ProjectedQueries(*map(layout.to_slots, queries))
        inputs = SegmentInputs(s, queries, self.attention.project_qkv(s, rope), layout.valid)
        persistent = self.attention.project_persistent(self.persistent_tokens(x), x.shape[0])

        def read(part: SegmentInputs, cache: MACCache, here: ForwardContext) -> SegmentOutput:
            return self._segment(part, persistent, cache, here)

        parts = [] if is_traced(x) else split_whole(inputs, context, self.segment_size)
        if parts and self._may_compile(parts[0].s, cache, context):
            y, m, cache = self._read_compiled(parts, persistent, cache, context)
            cache = cache._replace(retrieval=cache.retrieval._replace(conv_state=conv_state))
            return BlockOutput(self.gate(y, m), cache, None)
        run = read_segments_as_loop if is_traced(x) and layout.slots > self.segment_size else read_segments
        out, cache = run(read, inputs, layout, cache, context, self.segment_size)
        cache = cache._replace(retrieval=cache.retrieval._replace(conv_state=conv_state))
        if out is None:
            return BlockOutput(torch.zeros_like(x), cache, None)
        m = self.memory.project_output(out.written, out.retrieved, bypass=context.bypass)
        surprise = None if out.surprise is None else LayerSurprise(*map(layout.from_slots, out.surprise))
        return BlockOutput(layout.from_slots(self.gate(out.y, m)), cache, surprise)

    def may_replay(self, position: int) -> bool:
        """Not at a segment's first and last token, where the memory is taken that the segment retrieves from."""
        return 0 < position % self.segment_size < self.segment_size - 1

    def _token(self, x: Tensor, cache: MACCache, context: ForwardContext) -> BlockOutput:
        """Read one token of each row, its norm x `[B, 1, D]`; `context.position` counts within the segment."""
        cache = self._with_snapshot(cache, context)
        weights, conv_state = cache.retrieval
        h, conv_state = self.memory.retrieve_next(x, conv_state, weights, context.valid, bypass=context.bypass)
        y, attention = self._attend_token(x, rms_norm(h, self.retrieved_norm), cache, context)
        out = self._write(x, y, cache._replace(attention=attention), context, self.memory.forward_aligned)
        cache = out.cache._replace(retrieval=out.cache.retrieval._replace(conv_state=conv_state))
        return BlockOutput(self.gate(out.y, out.retrieved), cache, out.surprise)

    def _may_compile(self, s: Tensor, cache: MACCache, context: ForwardContext) -> bool:
        c = context
        plain = c.update and not (c.surprise or c.eager or c.bypass)
        return plain and compiled_segments.is_supported(self._segment_layers(), s, cache.memory)

    def _segment_layers(self) -> SegmentLayers:
        return SegmentLayers(self.memory, self.attention, self.retrieved_norm, self.memory_norm)

    def _read_compiled(
        self, parts: list[SegmentInputs], persistent: tuple[Tensor, Tensor], cache: MACCache, context: ForwardContext
    ) -> tuple[Tensor, Tensor, MACCache]:
        """Read whole segments in compiled code, then a part of one, if there is one: attention's output, the memory's,
        and the cache. Whole segments leave no keys and values."""
        layers, (whole, *rest) = self._segment_layers(), parts
        y, m, memory = compiled_segments.read(layers, whole.s, whole.queries, whole.qkv, persistent, cache.memory)
        snapshot = cache.retrieval._replace(weights=memory.memory.weights)
        cache = cache._replace(memory=memory, retrieval=snapshot)
        for part in rest:
            out = self._segment(part, persistent, cache, context.in_segment(self.segment_size))
            y, cache = torch.cat([y, out.y], 1), out.cache
            m = torch.cat([m, self.memory.project_output(out.written, out.retrieved)], 1)
        return y, m, cache

    def _attend_token(
        self, x: Tensor, h: Tensor, cache: MACCache, context: ForwardContext
    ) -> tuple[Tensor, KeyValues | SegmentBuffers]:
        c = context
        if isinstance(cache.attention, SegmentBuffers):
            return self.attention.decode(x, h, cache.attention, c.position, c.rope, c.uniform_position, c.eager)
        qkv = self.attention.project_qkv(x, c.rope)
        persistent = self.attention.project_persistent(self.persistent_tokens(x), x.shape[0])
        return self.attention.attend(
            qkv, h, persistent, cache.attention, c.position, c.valid, c.uniform_position, c.eager
        )

    def _segment(
        self, part: SegmentInputs, persistent: tuple[Tensor, Tensor], cache: MACCache, context: ForwardContext
    ) -> SegmentOutput:
        """Read the tokens of one segment, or a part of them; `context.position` counts within the segment."""
        cache = self._with_snapshot(cache, context)
        h = self.memory.retrieve_projected(part.queries, cache.retrieval.weights, bypass=context.bypass)
        c = context
        assert isinstance(cache.attention, KeyValues)  # more tokens than one leave buffers
        places = (c.position, c.valid, c.uniform_position, c.eager)
        y, attention = self.attention.attend(part.qkv, self.retrieved_norm(h), persistent, cache.attention, *places)
        write = partial(self.memory.scan, max_saved_bytes=SEGMENT_SAVED_BYTES)
        return self._write(part.s, y, cache._replace(attention=attention), context, write)

    def _write(
        self,
        s: Tensor,
        y: Tensor,
        cache: MACCache,
        context: ForwardContext,
        write: Callable[..., NeuralMemoryOutput],
    ) -> SegmentOutput:
        """`write` what attention made of S to the memory (eq. 24), and read it."""
        c = context
        written = rms_norm(add(s, y), self.memory_norm)
        out = write(written, cache.memory, c.valid, update=c.update, surprise=c.surprise, bypass=c.bypass)
        after = c.advanced(s.shape[1]).in_segment(self.segment_size)
        cache = self._with_snapshot(cache._replace(memory=out.state), after)
        return SegmentOutput(y, written, out.y, out.surprise, cache)

    def _with_snapshot(self, cache: MACCache, context: ForwardContext) -> MACCache:
        """The cache with the memory's weights as they were when the segment of `context.position` began."""
        if not context.may_be_at(0):
            return cache
        weights = context.where_position(0, cache.memory.memory.weights, cache.retrieval.weights)
        return cache._replace(retrieval=cache.retrieval._replace(weights=weights))


BLOCKS: dict[str, type[TitansBlock[Any]]] = {
    "mac": MACBlock,
    "mag": MAGBlock,
    "mal": MALBlock,
    "lmm": LMMBlock,
    "attention": AttentionBlock,
}
