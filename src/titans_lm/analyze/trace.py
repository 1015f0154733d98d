"""`trace`: read a text, and note for each token what the memory did with it."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from titans_lm.analyze.arrays import Trace
from titans_lm.analyze.recorder import MemoryCall, Recorder, gates_of, memory_blocks, memory_of, recording
from titans_lm.inference.token_bits import TokenBits
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM

PIECE = 512
"""Tokens of one forward call, and the distance between two checkpoints of a trace."""
SNAPSHOTS = 16
"""Checkpoints at which the weights themselves are compared; as many memories are held at once."""
TOP = 3
"""Predictions noted for each token."""
Span = tuple[int, int]
"""Tokens from the first to before the second."""
Progress = Callable[[int], None]
"""Called with the number of tokens read since the last call."""


def trace(
    model: TitansForCausalLM,
    ids: Tensor | NDArray[np.integer[Any]] | list[int],
    state: TitansState | None = None,
    *,
    mode: Literal["learning", "frozen"] = "learning",
    frozen: bool = True,
    top: int = TOP,
    piece: int = PIECE,
    snapshots: int = SNAPSHOTS,
    progress: Progress | None = None,
) -> Trace:
    """Read ids `[T]` or `[1, T]` after those of `state` (None: a new stream), and return what the memory did.

    The model's outputs are those of calls with `piece` tokens each, to the last bit, and `state` stays as it is. A
    second reading, with the memory frozen as it is at the start, gives what is called "without memory"; `frozen=False`
    leaves it out. Takes memory in proportion to T for the arrays, and otherwise as much as one call.

    Args:
        mode: "frozen" reads without writing, and then nothing is known of surprise and gates.
        top: predictions noted for each token, 0 or more.
        piece: tokens of one call; norms are noted after each, so it is the distance of checkpoints too.
        snapshots: checkpoints whose weights are compared by `similarity` and `singular_values`; 0: none.
        progress: called with the number of tokens of each piece read, in either reading.

    Raises ValueError for a model without a memory, ids of another shape, an empty text, a state of several rows, and
    numbers out of range.
    """
    if piece < 1 or top < 0 or snapshots < 0:
        raise ValueError(f"piece must be at least 1, top and snapshots 0 or more: {piece}, {top}, {snapshots}")
    if mode not in ("learning", "frozen"):
        raise ValueError(f"mode={mode!r} is not one of: learning, frozen")
    tokens = one_stream(ids, model.config.vocab_size)
    if state is not None and state.batch_size != 1:
        raise ValueError(f"one stream is traced at a time, this state has {state.batch_size} rows")
    top = min(top, model.config.vocab_size)
    with torch.no_grad():
        begin = model.initial_state(1) if state is None else model.with_pending_read(state)
        found = _Collected(model, len(tokens), top, piece, snapshots)
        after = begin.shallow_copy()
        after.frozen = mode == "frozen"
        with recording(model) as recorder:
            for part, logits, surprise in _calls(model, tokens, after, piece, surprise=mode == "learning"):
                found.add(part, logits, surprise, recorder)
                recorder.clear()
                if progress is not None:
                    progress(len(part))
        arrays = found.arrays(learned=mode == "learning")
        if frozen and mode == "learning":
            bits, predictions = read_bits(model, tokens, begin, [(0, len(tokens))], top, piece, progress)
            arrays["bits_frozen"] = bits
            arrays |= {f"{name}_frozen": value for name, value in predictions.items()}
    after.frozen = begin.frozen
    attributes: dict[str, str | int] = {
        "variant": model.config.variant, "reading": mode, "piece": piece, "position": int(begin.position[0]),
        "vocabulary": model.config.vocab_size, "chunk_size": model.config.memory_chunk_size,
    }  # fmt: skip
    return Trace({"token_id": tokens.numpy(), **arrays}, attributes, after)


@torch.no_grad()
def read_bits(
    model: TitansForCausalLM,
    tokens: Tensor,
    state: TitansState | None,
    frozen: list[Span],
    top: int = 0,
    piece: int = PIECE,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Read tokens `[T]` after those of `state`, with the memory frozen in the spans `frozen`, and written elsewhere.

    Returns the bits of each token `[T]`, and the `prediction`s with their `probability`, each `[T, top]`. `state` stays
    as it is.
    """
    state = model.initial_state(1) if state is None else model.with_pending_read(state).shallow_copy()
    predictions, first = _Predictions(len(tokens), top), 0
    for end, still in _stretches(len(tokens), frozen):
        state.frozen = still
        for part, logits, _ in _calls(model, tokens[first:end], state, piece, surprise=False):
            predictions.add(part, logits)
            if progress is not None:
                progress(len(part))
        first = end
    return predictions.bits, predictions.arrays()


def one_stream(ids: Any, vocabulary: int) -> Tensor:
    """The tokens `[T]` of one stream. Raises ValueError for another shape, for none, and for tokens of no model."""
    tokens = torch.as_tensor(ids)
    tokens = tokens.long() if not tokens.numel() else tokens  # an empty list would be of floats
    tokens = tokens[0] if tokens.dim() == 2 and len(tokens) == 1 else tokens
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers [T] or [1, T], got {tokens.dtype} {list(tokens.shape)}")
    if not len(tokens):
        raise ValueError("there is nothing to trace: ids is empty")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ValueError(f"ids must be 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}")
    return tokens.long().cpu()


def _stretches(length: int, frozen: list[Span]) -> Iterator[tuple[int, bool]]:
    """The end of each stretch of a text, and whether the memory is frozen in it."""
    still = np.zeros(length + 1, bool)
    for first, end in frozen:
        if not 0 <= first < end <= length:
            raise ValueError(f"a span must be within the {length:,} tokens of the text, got {first:,} to {end:,}")
        still[first:end] = True
    edges = [*(np.flatnonzero(still[1:length] != still[: length - 1]) + 1).tolist(), length]
    for end in edges:
        yield end, bool(still[end - 1])


def _calls(
    model: TitansForCausalLM, tokens: Tensor, state: TitansState, piece: int, *, surprise: bool
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """The tokens `[t]`, logits `[t, V]` and surprise of each call. Updates `state`."""
    for part in tokens.split(piece):
        out = model(part[None].to(model.device), past_key_values=state, output_surprise=surprise)
        yield part, out.logits[0], out.surprise


class _Predictions:
    """Bits and predictions of each token, from the logits before it. The first token of a text has neither."""

    def __init__(self, length: int, top: int):
        self.bits = np.full(length, np.nan, np.float32)
        self._ids, self._probability = np.full((length, top), -1, np.int32), np.zeros((length, top), np.float32)
        self._bits, self._next, self._read, self._top = TokenBits(), None, 0, top

    _next: Tensor | None

    def add(self, ids: Tensor, logits: Tensor) -> None:
        """Add the tokens `[t]` of a piece, and their logits `[t, V]`."""
        first, end = self._read, self._read + len(ids)
        self.bits[first:end] = self._bits.of(ids.numpy(), logits)
        before = logits[:-1] if self._next is None else torch.cat([self._next, logits[:-1]])
        self._next = logits[-1:]
        if self._top and len(before):
            before = before.to(torch.promote_types(before.dtype, torch.float32))
            values, ids = before.topk(self._top, -1)
            there = slice(end - len(before), end)
            self._ids[there] = ids.cpu().numpy()
            self._probability[there] = (values - before.logsumexp(-1, keepdim=True)).exp().cpu().numpy()
        self._read = end

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"prediction": self._ids, "probability": self._probability} if self._top else {}


class _Collected:
    """The arrays of a trace, filled piece by piece."""

    def __init__(self, model: TitansForCausalLM, length: int, top: int, piece: int, snapshots: int):
        blocks = memory_blocks(model)
        memory = memory_of(blocks[0])
        self.predictions, self.read = _Predictions(length, top), 0
        shape = (length, len(blocks), memory.num_heads)
        names = ("surprise", "gradient_norm", "theta", "eta", "alpha", "output_gate")
        self.by_head = {name: np.zeros(shape, np.float32) for name in names}
        joins = any(getattr(block, "gate", None) is not None for block in blocks)
        self.join = np.zeros(shape[:2], np.float32) if joins else None
        self.checkpoints = [0]
        self.norms: dict[str, list[Tensor]] = {"memory_norm": [], "momentum_norm": [], "memory_change": []}
        count = -(-length // piece) + 1
        self.snapshots = _Snapshots(set(np.linspace(0, count - 1, min(snapshots, count)).round().astype(int).tolist()))
        self.start: list[tuple[Tensor, ...]] = []

    def add(self, ids: Tensor, logits: Tensor, surprise: Any, recorder: Recorder) -> None:
        """Add a piece that the model has just read."""
        self.predictions.add(ids, logits)
        here = slice(self.read, self.read + len(ids))
        self.read = here.stop
        if not self.start:
            self._checkpoint([calls[0].before.memory for calls in recorder.calls])
        for layer, calls in enumerate(recorder.calls):
            if surprise is not None:
                self._gates(here, layer, calls, surprise[layer])
            if self.join is not None and recorder.joins[layer]:
                self.join[here, layer] = torch.cat(recorder.joins[layer]).float().cpu().numpy()
        self.checkpoints.append(self.read)
        self._checkpoint([calls[-1].after.memory for calls in recorder.calls])

    def _gates(self, here: slice, layer: int, calls: list[MemoryCall], surprise: Any) -> None:
        gates = [torch.cat(part) for part in zip(*map(gates_of, calls), strict=True)]
        loss, norm, theta = (part[0] for part in surprise)
        for name, value in zip(self.by_head, (loss, norm, theta, *gates[1:]), strict=True):
            self.by_head[name][here, layer] = value.float().cpu().numpy()

    def _checkpoint(self, memories: list[Any]) -> None:
        if not self.start:
            self.start = [memory.weights for memory in memories]
        change = [
            tuple(w - w0 for w, w0 in zip(m.weights, start, strict=True))
            for m, start in zip(memories, self.start, strict=True)
        ]
        for name, parts in (
            ("memory_norm", [m.weights for m in memories]),
            ("momentum_norm", [m.momentum for m in memories]),
            ("memory_change", change),
        ):
            self.norms[name].append(torch.stack([_norm(weights) for weights in parts]).float().cpu())
        self.snapshots.add([m.weights for m in memories], change)

    def arrays(self, learned: bool) -> dict[str, NDArray[Any]]:
        """All arrays; without what only writing shows, unless the memory `learned`."""
        arrays: dict[str, NDArray[Any]] = {"bits": self.predictions.bits, **self.predictions.arrays()}
        if learned:
            arrays |= self.by_head
        if self.join is not None:
            arrays["memory_gate"] = self.join
        arrays["checkpoint"] = np.array(self.checkpoints)
        arrays |= {name: torch.stack(parts).numpy() for name, parts in self.norms.items()}
        return arrays | self.snapshots.arrays(arrays["checkpoint"])


class _Snapshots:
    """Weights at a few checkpoints: their singular values, and how similar what was learned until then is."""

    def __init__(self, at: set[int]):
        self.at, self.seen = at, 0
        self.indices: list[int] = []
        self.values: list[NDArray[np.float32]] = []
        self.changes: list[list[Tensor]] = []

    def add(self, memories: list[tuple[Tensor, ...]], change: list[tuple[Tensor, ...]]) -> None:
        """Add a checkpoint: for each layer the weights `[1, H, in, out]`, and what they differ by from the start."""
        if self.seen in self.at:
            self.indices.append(self.seen)
            self.values.append(np.stack([_singular_values(weights) for weights in memories]))
            self.changes.append([torch.cat([w[0].flatten(1) for w in layer], 1).float().cpu() for layer in change])
        self.seen += 1

    def arrays(self, checkpoints: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if not self.indices:
            return {}
        cosines = []
        for changes in zip(*self.changes, strict=True):  # of one layer, each [H, N]
            flat = torch.stack(changes, 1)  # [H, S, N]
            unit = flat / flat.norm(dim=-1, keepdim=True)  # nan before anything is learned
            with torch.autocast(unit.device.type, enabled=False):  # it would round the cosines to bfloat16
                cosines.append((unit @ unit.transpose(1, 2)).permute(1, 2, 0))
        similarity = torch.stack(cosines, 2).numpy()
        return {
            "snapshot": checkpoints[self.indices],
            "singular_values": np.stack(self.values),
            "similarity": similarity,
        }


def _norm(weights: tuple[Tensor, ...]) -> Tensor:
    """The Frobenius norm of all weights of each head, `[H]`."""
    return torch.stack([w[0].square().sum((-2, -1)) for w in weights]).sum(0).sqrt()


def _singular_values(weights: tuple[Tensor, ...]) -> NDArray[np.float32]:
    """The singular values of each weight matrix, largest first, `[H, matrices, rank]`; nan where a matrix has fewer."""
    found = [torch.linalg.svdvals(w[0].float().cpu()).numpy() for w in weights]
    rank = max(part.shape[-1] for part in found)
    padded = [np.pad(part, ((0, 0), (0, rank - part.shape[-1])), constant_values=np.nan) for part in found]
    return np.stack(padded, 1)
