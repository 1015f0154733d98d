"""What a model remembers, as a value: save, load, fork, reset, reorder. All that touches `Cache` is here."""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from titans_lm.models import cache_file as memory_file
from titans_lm.models.cache_file import Card, Source
from titans_lm.models.reading import LayerState, map_tensors, widened
from titans_lm.utils.memory_lock import MemoryLock

if TYPE_CHECKING:
    from titans_lm.models.modeling import TitansModel

_IDENTITY_FREE = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "initializer_range",
    "memory_start",
    "memory_lags",
    "memory_loss_weight",
    "max_position_embeddings",
}

_CAME_LATER = {"memory_gates_of": "token"}
"""Keys, and what models were before them: files written then still belong to theirs."""


class Identity:
    """Which model a state belongs to: a description and two SHA-256, as in `memory_file.Card`.

    To hash all weights takes a while, and training changes them. So they are hashed when a file is written, as they are
    then. What is pickled is the result; a model that reads on with an unpickled state gives it its own identity.
    """

    def __init__(self, describe: Callable[[], dict[str, str]]):
        self.describe = describe

    def __call__(self) -> dict[str, str]:
        return self.describe()

    def __reduce__(self) -> tuple[Any, ...]:
        return _described, (self(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Identity":
        return self


def _described(known: dict[str, str]) -> Identity:
    return Identity(partial(dict, known))


class TitansState(Cache):
    """The memory of `B` streams, one per row: attention windows, convolution tails, memory weights, of constant size.

    `model.initial_state(batch)` makes one; passing it as `past_key_values` reads on from it and updates it in place. No
    tensor is ever written in place, so autograd may go through it, and `clone` is a fork.
    """

    def __init__(self, layers: list[LayerState], position: Tensor, identity: "Identity"):
        super().__init__(layers=[])
        self.memories = layers
        self.position = position
        """Tokens each row has read, `[B]`. A row at 0 begins anew with the model's first memory."""
        self.frozen = False
        """True: what follows is read but not written to the memory."""
        self.columns = 0
        """Columns of `input_ids` so far, padding included: what `generate` calls the sequence length."""
        self.pending: Tensor | None = None
        """`[B]`: the token that `generate` wrote last in each row, which it has not read; -1: none. None: none in any
        row. A `continuation` reads it before anything else; otherwise the next tokens have to begin with it, as
        transformers passes them, or are refused. `model.read_pending(state)` reads it at once."""
        self.sources: list[Source] = []
        """What was read, as far as a `Reader` read it; kept in memory files."""
        self.identity = identity
        """Which model reads this, for memory files."""

    # ------------------------------------------------------------------------------------------ as a value

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self._tensors().values())

    def clone(self) -> "TitansState":
        """An independent copy: a fork of what was read so far."""
        return self._with(lambda t: t.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> "TitansState":
        return self.clone()

    def detach(self) -> "TitansState":
        """The same memory without its history of gradients."""
        return self._with(lambda t: t.detach())

    def to(self, device: str | torch.device | int | None, **options: Any) -> "TitansState":
        """The same memory on `device`: this object if it is there, as accelerate's hooks need it, who pass on what they
        move, while what a call has read is to be in the state that it was given. None: no other device. Options are
        those of `Tensor.to`."""
        goal = self.position.device if device is None else torch.empty(0, device=device).device
        if device is None or all(t.device == goal for t in self._tensors().values()):
            return self
        return self._with(lambda t: t.to(goal, **options))

    def select(self, rows: list[int] | Tensor) -> "TitansState":
        """The memory of these rows, in this order; a row may be taken several times."""
        index = self._index(rows)
        return self._with(lambda t: t[index])

    def _index(self, rows: list[int] | Tensor) -> Tensor:
        """An empty list would be one of float32 numbers."""
        return torch.as_tensor(
            rows, dtype=None if isinstance(rows, Tensor) else torch.long, device=self.position.device
        )

    def shared(self) -> "TitansState":
        """The same memory in another object: what one reads does not change the other."""
        return self._with(lambda t: t)

    def continuation(self) -> "TitansState":
        """A fork whose sequence length is 0, for `generate(new_ids, past_key_values=state.continuation())`: only new
        tokens are passed (otherwise `generate` expects all before them too). It reads `pending` tokens first."""
        fork = self.clone()
        fork.columns = 0
        return fork

    def reset(self, rows: list[int] | Tensor | None = None) -> None:
        """Forget everything, in these rows or in all: they begin anew with the model's first memory."""
        if rows is None:
            rows = list(range(self.batch_size))
            self.columns, self.sources = 0, []
        keep = torch.ones(self.batch_size, dtype=torch.bool, device=self.position.device)
        keep[self._index(rows)] = False
        pending = self.pending
        self._apply(lambda t: torch.where(keep.view(-1, *[1] * (t.dim() - 1)), t, torch.zeros_like(t)))
        self.pending = None if pending is None else torch.where(keep, pending, -1)

    def leave(self, tokens: Tensor, rows: Tensor | bool) -> None:
        """`tokens` `[B]` are pending, in these `rows` `[B]` or in all."""
        tokens = tokens.to(self.position.device)
        self.pending = torch.where(torch.as_tensor(rows, device=tokens.device), tokens, -1)

    def take_pending(self) -> tuple[Tensor, Tensor]:
        """The pending tokens and their mask, each `[B, 1]`; afterwards there are none."""
        assert self.pending is not None
        ids, self.pending = self.pending[:, None], None
        return ids.clamp(min=0), (ids >= 0).long()

    def begun_by(self, x: Tensor, mask: Tensor | None, embed: nn.Module) -> "TitansState":
        """The same memory, of which no token is pending in rows that have tokens in `x` `[B, T, D]`, what `embed` makes
        of them, `mask` True where they are. Raises ValueError where these do not begin with the pending ones."""
        assert self.pending is not None
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        waits = (self.pending >= 0) & mask.any(1)
        row = torch.arange(len(x), device=x.device)
        first = x[row, mask.int().argmax(1)] if x.shape[1] else x.new_zeros(len(x), x.shape[2])
        if bool((waits & (first != embed(self.pending.clamp(min=0))).any(1)).any()):
            raise ValueError(
                f"past_key_values has not read the last tokens generated, {self.pending.tolist()}: pass them first, "
                f"call model.read_pending(state), or go on with state.continuation()"
            )
        state = self.shared()
        state.pending = torch.where(waits, -1, self.pending)
        return state

    def moved(self, layers: list[LayerState], position: Tensor, columns: int) -> "TitansState":
        """This state after `columns` more columns, in another object."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.sources, other.memories, other.position = list(self.sources), layers, position
        other.columns = self.columns + columns
        return other

    def become(self, other: "TitansState") -> None:
        """Take over what `other`, of the same model, remembers; its rows, too. `frozen` and `sources` stay."""
        self.memories, self.position = other.memories, other.position
        self.columns, self.pending = other.columns, other.pending

    @staticmethod
    def joined(states: list["TitansState"]) -> "TitansState":
        """The rows of all of them, of one model, one after another; else as the first."""
        whole = states[0].shared()
        layers = [list(same) for same in zip(*(state.memories for state in states), strict=True)]
        whole.memories = [_joined(same) for same in layers]
        whole.position = torch.cat([state.position for state in states])
        return whole

    def save(self, path: str | Path, lock: MemoryLock | None = None) -> Card:
        """Write a memory file (see `memory_file.write`, which also says what it raises): whole or not at all. -> what
        it says of itself. `lock`: the file's, if the caller holds it. Raises ValueError for numbers that are not
        finite, and leaves the file as it was."""
        memory_file.check_finite(path, self._tensors())  # or a good file would be replaced by one that none can read
        card = Card(**self.identity(), columns=self.columns, sources=self.sources)
        pending = {} if self.pending is None else {"pending": self.pending}
        return memory_file.write(path, {**self._tensors(), **pending}, card, lock)

    @classmethod
    def load(cls, path: str | Path, model: "TitansModel") -> "TitansState":
        """Read a file that `save` wrote, for the same `model` (`TitansModel` or `TitansForCausalLM`).

        Raises ValueError for a file of another model, another configuration, another format, or a damaged one.
        """
        model = model.base_model
        tensors, card = memory_file.read(path)
        with torch.no_grad():
            state = model.initial_state(1)
        state.frozen = False  # a model that begins with a frozen memory does not freeze what a file holds
        for part, value in identity(model).items():
            if getattr(card, part) != value:
                raise ValueError(f"{path} belongs to another model: its {part} differs from this model's")
        expected, pending = state._tensors(), tensors.pop("pending", None)
        if pending is not None and (pending.shape != tensors["position"].shape or pending.is_floating_point()):
            raise ValueError(f"{path} does not fit this model: 'pending' is {list(pending.shape)}, {pending.dtype}")
        _check_shapes(path, {name: tuple(t.shape) for name, t in tensors.items()}, expected, model.config.window_size)
        for name, tensor in expected.items():
            if tensors[name].dtype not in _possible(name, tensor.dtype):
                raise ValueError(f"{path} does not fit this model: {name!r} is {tensors[name].dtype}")
        names = iter(expected)
        for layer in range(len(state.memories)):
            state.memories[layer] = map_tensors(state.memories[layer], lambda _: tensors[next(names)].to(model.device))
        state.position = tensors["position"].to(model.device)
        state.columns, state.sources = card.columns, list(card.sources)
        state.pending = None if pending is None else pending.to(model.device)
        return state

    # ------------------------------------------------------------------------------------------ as a Cache

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers have read the same
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
        raise ValueError(f"a memory cannot unread tokens (crop({tokens_to_remove})); clone() the state before reading")

    @property
    def batch_size(self) -> int:
        return len(self.position)

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

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
        return [False] * len(self.memories)

    def __len__(self) -> int:
        return len(self.memories)

    def __repr__(self) -> str:
        return f"TitansState(rows={self.batch_size}, position={self.position.tolist()}, nbytes={self.nbytes})"

    # ------------------------------------------------------------------------------------------ parts

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, the order that of `map_tensors`."""
        named = {f"layers.{i}{name}": t for i, layer in enumerate(self.memories) for name, t in _walk(layer, "")}
        return {**named, "position": self.position}

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.memories = [map_tensors(layer, function) for layer in self.memories]
        self.position = function(self.position)
        self.pending = None if self.pending is None else function(self.pending)

    def _with(self, function: Callable[[Tensor], Tensor]) -> "TitansState":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.sources = list(self.sources)
        other._apply(function)
        return other


def _walk(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        fields = getattr(tree, "_fields", range(len(tree)))
        for field, part in zip(fields, tree, strict=True):
            yield from _walk(part, f"{name}.{field}")


def _joined(layers: list[LayerState]) -> LayerState:
    slots = max((x.attention.keys[0].shape[2] for x in layers if x.attention is not None), default=0)
    trees = [x if x.attention is None else x._replace(attention=widened(x.attention, slots)) for x in layers]
    return map_tensors(trees[0], lambda *parts: torch.cat(parts), *trees[1:])


# ------------------------------------------------------------------------------------------------ files


def identity(model: "TitansModel") -> dict[str, str]:
    """What the model is: in words, and the SHA-256 of its configuration and of every parameter's bytes."""
    own = {k: v for k, v in model.config.own_fields().items() if k not in _IDENTITY_FREE}
    own = {k: v for k, v in own.items() if k not in _CAME_LATER or v != _CAME_LATER[k]}
    weights, count = hashlib.sha256(), 0
    for name, parameter in sorted(model.base_model.named_parameters()):
        weights.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        weights.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        count += parameter.numel()
    return {
        "configuration": hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "model": f"{model.config.variant}, {model.config.num_hidden_layers} layers, {count:,} parameters",
    }


def _possible(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """The types that a tensor may have in a file, where the model's first state has `dtype`: autocast makes windows and
    convolutions shorter, never the memory itself."""
    shorter = dtype == torch.float32 and memory_file.OF_MEMORY not in name
    return {dtype, torch.bfloat16, torch.float16} if shorter else {dtype}


def _check_shapes(
    path: str | Path, found: dict[str, tuple[int, ...]], expected: dict[str, Tensor], window: int | None
) -> None:
    """Every tensor there, and no other, with the model's shapes, and one number of rows."""
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise ValueError(f"{path} does not fit this model: tensor {odd!r} is in only one of them")
    rows = found["position"][:1]
    for name, shape in found.items():
        wanted = rows + tuple(expected[name].shape[1:])
        if window is None and ".attention." in name:  # grows with what was read
            wanted, shape = wanted[:2] + wanted[3:], shape[:2] + shape[3:]
        if shape != wanted:
            raise ValueError(f"{path} does not fit this model: {name!r} is {list(shape)}, not {list(wanted)}")
