"""`TitansState`: what a model remembers, as a value: save, load, fork, reset, reorder. It is transformers' `Cache`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from titans_lm.models import cache_file
from titans_lm.models.block_cache import (
    AttentionCache,
    BlockCache,
    as_value,
    concat_rows,
    is_in_buffers,
    map_tensors,
    named_tensors,
)
from titans_lm.models.cache_file import Card, Source
from titans_lm.models.model_identity import Identity, identity
from titans_lm.ops import MemoryState
from titans_lm.utils.deprecation import RenamedAttribute
from titans_lm.utils.memory_lock import MemoryLock


class TitansState(Cache):
    """What a model remembers of `B` streams, one per row: KV caches, convolution states and memory weights.

    Its size is constant, unless attention is unlimited. `model.initial_state(batch)` makes one. A call with it as
    `past_key_values` continues the streams and updates it. No tensor is ever written in place, so autograd may go
    through a state, and `clone` is a fork. While it `is_decoding`, its own buffers are; a fork shares none of them.
    """

    def __init__(self, layer_caches: list[BlockCache], position: Tensor, identity: Identity):
        super().__init__(layers=[])
        self.layer_caches = layer_caches
        """One per layer; none at all before the first call: the layers then make their own."""
        self.position = position
        """Tokens that each row has read, `[B]`. A row at 0 starts with the model's first memory."""
        self.frozen = False
        """True: later tokens are read but not written to the memory."""
        self.columns = 0
        """Columns of `input_ids` so far, padding included: the sequence length of `generate`."""
        self.pending: Tensor | None = None
        """`[B]`: the last token that `generate` made in each row, which the model has not read; -1: none in this row;
        None: none in any row. A `continuation` reads it first. Otherwise the next tokens have to begin with it, as
        transformers passes them, or are refused. `model.read_pending(state)` reads it at once."""
        self.sources: list[Source] = []
        """The texts that a `Reader` has read. Memory files store them."""
        self.identity = identity
        """The model that this state belongs to, for memory files."""
        self.replay: Any = None
        """While it `is_decoding`, maybe a `DecodingReplay`."""
        self._known: tuple[Tensor, int, list[int]] | None = None
        """A `position`, its version, and its values: see `positions`."""
        self._begun: Tensor | None = None
        """A `position` without a 0: see `has_begun`."""

    restarts = False
    """Whether rows start anew in the next call of any process of a training run. Then the first memory is part of the
    graph in all of them, as FSDP needs: it adds up the gradients of the same weights everywhere."""

    memories = RenamedAttribute("memories", "layer_caches")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "replay": None}  # its addresses are of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, also a state of an older version."""
        self._known = self._begun = self.replay = None
        self.__dict__.update({"layer_caches" if name == "memories" else name: value for name, value in state.items()})

    # ------------------------------------------------------------------------------------------ as a value

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def positions(self) -> list[int]:
        """The values of `position`. After calls without padding they are known without asking a GPU."""
        if self._known is not None:
            tensor, version, values = self._known
            if tensor is self.position and _version(tensor) == version:
                return values
        values = self.position.tolist()
        self.note_positions(values)
        return values

    def knows_positions(self) -> bool:
        """Whether `positions` can be asked; on the meta device only if they are known on the host."""
        return not self.position.is_meta or (self._known is not None and self._known[0] is self.position)

    def note_positions(self, values: list[int]) -> None:
        """Say what the values of `position` are, where that is known on the host."""
        self._known = (self.position, _version(self.position), values)
        self._begun = None if 0 in values else self.position

    def has_begun(self) -> bool:
        """Whether it is known, without asking for values, that no row is at its first token. A compiled call decides by
        it whether its graph has the first memory in it."""
        return self._begun is self.position

    def assume_begun(self) -> None:
        """Say that no row is at its first token. A traced call checks it when it runs."""
        self._begun = self.position

    def memory_states(self) -> list[MemoryState]:
        """The state of each layer's memory, of the layers that have one."""
        caches = [cache for cache in self.layer_caches if not isinstance(cache, AttentionCache)]
        return [cache.memory.whole_memory() for cache in caches]

    @property
    def is_decoding(self) -> bool:
        """Whether it has buffers that calls write in place, which `model.begin_decoding(state)` made."""
        return any(map(is_in_buffers, self.layer_caches))

    def end_decoding(self) -> None:
        """Be a value again, without buffers: no tensor is written in place from now on."""
        self.layer_caches, self.replay = self._values(), None

    def _values(self) -> list[BlockCache]:
        return [as_value(cache, self.position) for cache in self.layer_caches]

    def _value(self) -> "TitansState":
        """Itself, or while it is decoding, a copy that is not."""
        if not self.is_decoding:
            return self
        other = self._copy()
        other.end_decoding()
        return other

    def clone(self) -> "TitansState":
        """An independent copy: a fork."""
        return self._value()._map_tensors(lambda t: t.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> "TitansState":
        return self.clone()

    def detach(self) -> "TitansState":
        """The same state, cut off from the autograd graph: truncated BPTT continues from it."""
        return self._value()._map_tensors(lambda t: t.detach())

    def to(self, device: str | torch.device | int | None, non_blocking: bool = False) -> "TitansState":
        """The state on `device`; None: where it is.

        A state that is there already is returned itself: accelerate's hooks pass on what they move, and a call has to
        update the state that it was given."""
        goal = self.position.device if device is None else torch.empty(0, device=device).device
        if device is None or all(t.device == goal for t in self.tensors().values()):
            return self
        return self._value()._map_tensors(lambda t: t.to(goal, non_blocking=non_blocking))

    def select(self, rows: list[int] | Tensor) -> "TitansState":
        """The state of these rows, in this order. A row may be selected several times."""
        index = self._index(rows)
        return self._map_tensors(lambda t: t[index])

    def _index(self, rows: list[int] | Tensor) -> Tensor:
        dtype = None if isinstance(rows, Tensor) else torch.long  # an empty list would become float32
        return torch.as_tensor(rows, dtype=dtype, device=self.position.device)

    def shallow_copy(self) -> "TitansState":
        """Another object with the same tensors: a call that updates one does not change the other."""
        return self._value()._map_tensors(lambda t: t)

    __copy__ = shallow_copy

    def continuation(self) -> "TitansState":
        """A fork whose sequence length is 0, for `generate(new_ids, past_key_values=state.continuation())`.

        `generate` then takes the new tokens alone; otherwise it expects all earlier tokens too. The fork reads
        `pending` tokens first."""
        fork = self.clone()
        fork.columns = 0
        return fork

    def reset(self, rows: list[int] | Tensor | None = None) -> None:
        """Forget everything in these rows (None: in all): they start again with the model's first memory."""
        if rows is None:
            rows = list(range(self.batch_size))
            self.columns, self.sources = 0, []
        self.end_decoding()
        keep = torch.ones(self.batch_size, dtype=torch.bool, device=self.position.device)
        keep[self._index(rows)] = False
        pending = self.pending
        self._apply(lambda t: torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros_like(t)))
        self._begun = None
        self.pending = None if pending is None else torch.where(keep, pending, -1)

    def set_pending(self, tokens: Tensor, rows: Tensor | bool) -> None:
        """Make `tokens` `[B]` pending in these `rows` (`[B]`, or True: in all)."""
        tokens = tokens.to(self.position.device)
        self.pending = torch.where(torch.as_tensor(rows, device=tokens.device), tokens, -1)

    def take_pending(self) -> tuple[Tensor, Tensor]:
        """Remove the pending tokens; return them and their mask, each `[B, 1]`."""
        assert self.pending is not None
        ids, self.pending = self.pending[:, None], None
        return ids.clamp(min=0), (ids >= 0).long()

    def after_pending(self, x: Tensor, mask: Tensor | None, embed: nn.Module) -> "TitansState":
        """The state for a call whose tokens begin with the pending ones: these are no longer pending.

        `x` `[B, T, D]` are the call's tokens, embedded by `embed`; `mask` is True at tokens. A row without a token in
        this call keeps its pending token. Raises ValueError for a row that begins with another token.
        """
        assert self.pending is not None
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        expected = (self.pending >= 0) & mask.any(1)
        row = torch.arange(x.shape[0], device=x.device)
        first = x[row, mask.int().argmax(1)] if x.shape[1] else x.new_zeros(x.shape[0], x.shape[2])
        if bool((expected & (first != embed(self.pending.clamp(min=0))).any(1)).any()):
            raise ValueError(
                f"past_key_values has not read the last tokens generated, {self.pending.tolist()}: pass them first, "
                f"call model.read_pending(state), or continue with state.continuation()"
            )
        state = self.shallow_copy()
        left = torch.where(expected, -1, self.pending)
        state.pending = left if bool((left >= 0).any()) else None
        return state

    def advanced(
        self,
        layer_caches: list[BlockCache],
        position: Tensor,
        columns: int,
        positions: list[int] | None = None,
        begun: bool = False,
    ) -> "TitansState":
        """Another state, `columns` columns later, with these caches and positions; `positions` are their values, where
        they are known on the host, and `begun` says that none of them is 0."""
        other = self._copy()
        other.layer_caches, other.position = layer_caches, position
        other.columns = self.columns + columns
        other._known, other._begun = None, position if begun else None
        if positions is not None:
            other.note_positions(positions)
        return other

    def assign(self, other: "TitansState") -> None:
        """Take over the tensors, rows and columns of `other`, of the same model. `frozen` and `sources` stay."""
        self.layer_caches, self.position = other.layer_caches, other.position
        self.columns, self.pending = other.columns, other.pending
        self._known, self._begun = other._known, other._begun

    @staticmethod
    def concat(states: list["TitansState"]) -> "TitansState":
        """The rows of several states of one model, one after another; the rest is that of the first."""
        whole, decoding = states[0]._copy(), all(state.is_decoding for state in states)
        layers = zip(*(state.layer_caches if decoding else state._values() for state in states), strict=True)
        whole.layer_caches = [concat_rows(list(caches)) for caches in layers]
        whole.position = torch.cat([state.position for state in states])
        if any(state.pending is not None for state in states):
            none = (torch.full_like(state.position, -1) for state in states)
            whole.pending = torch.cat(
                [n if s.pending is None else s.pending for s, n in zip(states, none, strict=True)]
            )
        return whole

    def save(self, path: str | Path, lock: MemoryLock | None = None) -> Card:
        """Write a memory file, whole or not at all -> its card. See `cache_file.save_file`, also for what it raises.

        `lock` is the file's lock, if the caller holds it. Raises ValueError for numbers that are not finite, and then
        leaves an existing file as it was."""
        cache_file.check_finite(path, self.tensors())  # such a file could not be loaded, and would replace a good one
        card = Card(**self.identity(), columns=self.columns, sources=self.sources)
        pending = {} if self.pending is None else {"pending": self.pending}
        return cache_file.save_file(path, {**self.tensors(), **pending}, card, lock)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "TitansState":
        """Load a file that `save` wrote, for the same `model` (`TitansModel` or `TitansForCausalLM`).

        Raises ValueError for a file of another model, another configuration or another format, and for a damaged one.
        """
        tensors, card = cache_file.load_file(path)
        with torch.no_grad():
            state = model.initial_state(1)
        model = model.base_model
        state.frozen = False  # `begin_with` a frozen memory does not freeze the memory of a file
        for part, value in identity(model).items():
            if getattr(card, part) != value:
                raise ValueError(f"{path} belongs to another model: its {part} differs from this model's")
        expected, pending = state.tensors(), tensors.pop("pending", None)
        cache_file.check_pending(path, pending, len(tensors["position"]), model.config.vocab_size)
        cache_file.check_shapes(
            path, {name: tuple(t.shape) for name, t in tensors.items()}, expected, model.config.window_size
        )
        for name, tensor in expected.items():
            if tensors[name].dtype not in cache_file.possible_dtypes(name, tensor.dtype):
                raise ValueError(f"{path} does not fit this model: {name!r} is {tensors[name].dtype}")
        state.set_tensors({name: t.to(model.device) for name, t in tensors.items()})
        state.columns, state.sources = card.columns, list(card.sources)
        state.pending = None if pending is None else pending.to(model.device)
        return state

    # ------------------------------------------------------------------------------------------ as a Cache

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - equal in all layers
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return self.columns + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda t: t.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"a memory cannot unread tokens (crop({tokens_to_remove})): clone() the state before they are read"
        )

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    max_batch_size = batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layer_caches)

    @property
    def is_linear(self) -> list[bool]:
        """False: `generate` passes the columns that come after `get_seq_length`, as to a cache of attention."""
        return [False] * max(1, len(self.layer_caches))

    def __len__(self) -> int:
        return len(self.layer_caches)

    def __repr__(self) -> str:
        position = self.positions() if self.knows_positions() else "unknown"
        return f"TitansState(rows={self.batch_size}, position={position}, nbytes={self.nbytes})"

    # ------------------------------------------------------------------------------------------ details

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in memory files, in the order of `map_tensors`."""
        named = {f"layers.{i}{name}": t for i, cache in enumerate(self._values()) for name, t in named_tensors(cache)}
        return {**named, "position": self.position}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take these tensors, named as in memory files, in place of its own."""
        names = iter(self.tensors())
        self.layer_caches = [map_tensors(cache, lambda _: tensors[next(names)]) for cache in self._values()]
        self.position = tensors["position"]

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.layer_caches, begun = [map_tensors(cache, function) for cache in self.layer_caches], self.has_begun()
        self.position = function(self.position)
        self._begun = self.position if begun else None  # rows are copied, dropped or moved
        self.pending = None if self.pending is None else function(self.pending)

    def _copy(self) -> "TitansState":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.sources = list(self.sources)
        return other

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "TitansState":
        other = self._copy()
        other._apply(function)
        return other


_RENAMED = {"shared": "shallow_copy", "leave": "set_pending", "begun_by": "after_pending", "moved": "advanced",
            "become": "assign", "joined": "concat"}  # fmt: skip
for _old, _new in _RENAMED.items():
    setattr(TitansState, _old, RenamedAttribute(_old, _new))


def _version(tensor: Tensor) -> int:
    """How often the tensor was written in place; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version
