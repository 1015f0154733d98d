"""Decoding by replay: a token runs the compiled steps that an earlier one ran, on other inputs, in one call.

Two tokens are recorded. The first reads a state B and writes C, the second reads C and writes D, all in tensors of
their own. Then the first is made to read D in place of B, and the two take turns.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_lm.layers.attention import RotaryEmbedding
from titans_lm.layers.bypass import is_any_bypassed
from titans_lm.layers.few_rows import is_few_rows, runs_compiled
from titans_lm.layers.memory_state import LayerSurprise
from titans_lm.layers.weight_addresses import NotPlainError, WeightAddresses
from titans_lm.models.block_cache import AttentionCache, BlockCache, map_tensors
from titans_lm.models.forward_context import ForwardContext
from titans_lm.models.packing import OutputOptions
from titans_lm.ops import FactoredMemory
from titans_lm.ops.cpu.recorder import Recorder, Replay

Caches = list[BlockCache]
LayersOutput = tuple[Tensor, Caches, list[Tensor], list[LayerSurprise]]
"""The output of all layers, their caches after it, and what was asked for of each."""


class LayersCall(NamedTuple):
    """A call of all layers."""

    x: Tensor
    """`[B, T, D]`, left-aligned."""
    caches: Any
    """Of each layer; None: all rows are at their first token."""
    context: ForwardContext
    options: OutputOptions


RunLayers = Callable[[LayersCall], LayersOutput]
MAX_FAILURES = 6
"""Tokens in a row that were recorded for nothing, after which none is: recording one takes longer than it."""
SETTINGS = ("lr", "clip", "surprise_threshold", "activation", "chunk_size", "backend", "num_heads", "window_size")
"""Attributes of layers that are among the numbers of a step, or decide which steps there are."""


class RecordedToken:
    """The steps of a token, its inputs and outputs, and the state before and after it."""

    def __init__(
        self, recorder: Recorder, model: nn.Module, x: Tensor, rope: RotaryEmbedding, y: Tensor, before: Caches,
        after: Caches,
    ):  # fmt: skip
        """Raises NotPlainError if other steps may be right for the next token."""
        if not all(map(_is_in_factors, before)):
            raise NotPlainError
        self.model, self.current = weakref.ref(model), _current(model, recorder)
        self.x, self.rope, self.y, self.before, self.after = x, rope, y, before, after
        self.replay, self.places, self._kept = Replay(recorder.steps, x.dtype), recorder.places, recorder.kept
        self.threads, self.inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def may_run(self, model: nn.Module, x: Tensor, caches: Caches) -> bool:
        """Whether it computes what the model's layers would of x `[B, 1, D]` after these caches."""
        return (
            all(map(_is, caches, self.before))
            and self.model() is model
            and x.shape == self.x.shape
            and x.dtype == self.x.dtype
            and torch.get_num_threads() == self.threads
            and torch.is_inference_mode_enabled() == self.inference
            and self.current.is_current()
        )

    def run(self, x: Tensor, rope: RotaryEmbedding, positions: list[int]) -> tuple[Tensor, Caches]:
        for mine, given in zip((self.x, *self.rope), (x, *rope), strict=True):
            mine.copy_(given)
        for numbers, cache in self.places:
            slots, ends = cache.places_at(positions)
            numbers[-2 * len(positions) :] = [*slots, *ends]
        self.replay.run()
        return self.y.clone(), list(self.after)

    def follow(self, other: "RecordedToken") -> bool:
        """Read the state after `other`, which read the one after this, in place of the one before this. False if
        their tensors differ in shape or strides."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for old, new in zip(self.before, other.after, strict=True):
            map_tensors(old, lambda a, b: pairs.append((a, b)) or a, new)  # type: ignore[func-returns-value]
        if any(a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype for a, b in pairs):
            return False
        self.replay.exchange({a.data_ptr(): b.data_ptr() for a, b in pairs if a.data_ptr() != b.data_ptr()})
        self.before = other.after
        return True


class DecodingReplay:
    """The recorded tokens of one state that is decoding. It changes the speed only."""

    def __init__(self) -> None:
        self.tokens: list[RecordedToken] = []
        self.is_possible = True
        """False once tokens in a row took more than compiled steps, as with a hook, or did not follow each other, as in
        a beam search."""
        self._failures = 0

    def find(self, model: nn.Module, x: Tensor, caches: Caches) -> RecordedToken | None:
        """The recorded token that computes what the layers would of x `[B, 1, D]`, if there is one."""
        return next((t for t in self.tokens if t.may_run(model, x, caches)), None) if len(self.tokens) == 2 else None

    def record(self, run: RunLayers, model: nn.Module, call: LayersCall) -> LayersOutput:
        """run(call), noted."""
        x = call.x.clone()
        with Recorder() as recorder:
            y, after, hidden, surprises = run(call._replace(x=x))
        try:
            self._add(RecordedToken(recorder, model, x, call.context.rope, y, call.caches, after))
        except NotPlainError:
            self._add(None)
        return y.clone(), after, hidden, surprises

    def _add(self, token: RecordedToken | None) -> None:
        """Keep a recorded token; None: its record is no list of steps."""
        last = self.tokens[-1] if self.tokens else None
        self.tokens = []  # an interrupt while `last` is changed leaves nothing to replay or to change again
        if last is None or token is None:
            follows = False
        else:
            follows = all(map(_is, last.after, token.before)) and last.follow(token)
        self.tokens = [kept for kept in (last if follows else None, token) if kept is not None]
        self._failures = 0 if follows else self._failures + 1
        self.is_possible = self._failures < MAX_FAILURES


def run_or_replay(
    run: RunLayers, model: nn.Module, call: LayersCall, replay: DecodingReplay | None, positions: list[int] | None
) -> LayersOutput:
    """run(call) of the model's layers, or what a replay of it returns. `positions` are those of the rows, if they are
    known."""
    if replay is None or not replay.is_possible or positions is None or not _may_replay(model, call, positions):
        return run(call)
    if (token := replay.find(model, call.x, call.caches)) is not None:
        return *token.run(call.x, call.context.rope, positions), [], []
    return replay.record(run, model, call)


def _may_replay(model: Any, call: LayersCall, positions: list[int]) -> bool:
    """Whether the call is that of a token which replays are for: x `[B, 1, D]`, a token in each row, and nothing asked
    for beside the output and the state."""
    x, context = call.x, call.context
    if call.options.hidden or context.valid is not None or context.new_rows is not None:
        return False
    if not context.update or context.surprise or context.eager or is_any_bypassed():
        return False
    if not (runs_compiled(x) and is_few_rows(x)):
        return False
    return not torch.autograd._profiler_enabled() and all(map(model.blocks()[0].may_replay, positions))


def _current(model: nn.Module, recorder: Recorder) -> WeightAddresses:
    """What tells whether the layers would still take the recorded steps. Raises NotPlainError if it cannot."""
    if not recorder.is_complete or not recorder.steps:
        raise NotPlainError
    current = WeightAddresses()
    current.add_modules(model, SETTINGS)
    current.add(recorder.weights)
    if not current.is_current():
        raise NotPlainError
    return current


def _is_in_factors(cache: BlockCache) -> bool:
    """Whether its memory, if it has one, is in factors. Another takes other steps where a chunk begins."""
    return isinstance(cache, AttentionCache) or isinstance(cache.memory.memory, FactoredMemory)


def _is(a: Any, b: Any) -> bool:
    return a is b
