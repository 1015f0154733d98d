"""The addresses of a layer's weights for compiled code, found once, and checked at each call: a token has little to
compute, and finding them would take as long.

They are kept beside the layers, not in them: a copy of a layer, or a file, has none.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from titans_lm.layers.module_call import HOOKS_OF_ALL, eps_of, has_hooks, hooks_of
from titans_lm.ops.cpu.compiled import PLAIN_TENSORS, recording

L = TypeVar("L")

OUR_PACKAGES = (__name__.partition(".")[0], "torch")
"""Whose modules do what they are known to do."""


class NotPlainError(Exception):
    """A call of the layer does more than compiled code would do with its weights."""


class WeightAddresses:
    """What compiled code takes of a layer, and whether the layer still has it."""

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        """That of all weights."""
        self.width = 0
        """The width D of the layer's input."""
        self.eps: list[float] = []
        self.numbers: Any = ()
        """The layer's part of a call's arguments, a sequence of numbers."""
        self.is_whole = True
        """Whether compiled code takes all linear layers, or only those that it always needs."""
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[dict[int, Any]] = [*HOOKS_OF_ALL]
        self._attributes: list[dict[str, Any]] = []
        self._weights: list[Tensor] = []
        self._addresses: list[int] = []
        self._modules: list[nn.Module] = []
        self._kinds: list[tuple[type[nn.Module], int]] = []
        """Of each of `_modules` its class, and how many attributes of its own it has."""

    def is_current(self) -> bool:
        """Whether the layer has the same modules, without hooks, and their weights are where they were, row by row.

        It would not notice another shape of as many numbers at the same address."""
        return (
            not any(self._hooks)
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and list(map(Tensor.data_ptr, self._weights)) == self._addresses
            and all(map(Tensor.is_contiguous, self._weights))  # a transposed one is not
            and not any("forward" in attributes for attributes in self._attributes)
            and list(map(_kind, self._modules)) == self._kinds
        )

    def add(self, others: Iterable["WeightAddresses"]) -> None:
        """Be current only where all `others` are too."""
        for other in others:
            self._owners += other._owners
            self._names += other._names
            self._values += other._values
            self._hooks += other._hooks
            self._attributes += other._attributes
            self._weights += other._weights
            self._addresses += other._addresses
            self._modules += other._modules
            self._kinds += other._kinds
        notes = zip(self._owners, self._names, self._values, strict=True)
        once = {(id(owner), name): (owner, name, value) for owner, name, value in notes}  # others note the same
        self._owners, self._names, self._values = map(list, zip(*once.values(), strict=True))
        self._hooks = list({id(hooks): hooks for hooks in self._hooks}.values())
        self._attributes = list({id(attributes): attributes for attributes in self._attributes}.values())

    def add_modules(self, root: nn.Module, settings: Sequence[str]) -> None:
        """Be current only while `root` has the same modules, no hook looks at one in it, and what they have of these
        `settings` is the same. Raises NotPlainError for one in it that is compiled, or of a class of somebody else: its
        Python code may decide anew in each call, or compute without PyTorch's operators."""
        for module in root.modules():
            if type(module).__module__.partition(".")[0] not in OUR_PACKAGES:
                raise NotPlainError
            if module is not root:
                if self._note(module.__dict__, "_compiled_call_impl") is not None:
                    raise NotPlainError
                self._hooks += hooks_of(module)
                self._attributes.append(module.__dict__)
                self._modules.append(module)
                self._kinds.append(_kind(module))  # a method of its own would be one more
            for name in module._modules:
                self._note(cast(dict[str, Any], module._modules), name)
            for name in settings:
                if name in module.__dict__:
                    self._note(module.__dict__, name)

    def _note(self, owner: dict[str, Any], name: str) -> Any:
        value = owner.get(name)
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(value)
        return value

    def module(self, owner: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module | None:
        """The module of `owner`, which may be None. Raises NotPlainError unless a call of it is that of its class
        `kind` alone."""
        module: nn.Module | None = self._note(owner._modules, name)
        if module is not None:
            self.check(module, kind)
        return module

    def check(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Raises NotPlainError unless a call of `module` is that of its class `kind` alone."""
        if type(module) is not kind or has_hooks(module):
            raise NotPlainError
        self._hooks += hooks_of(module)
        self._attributes.append(module.__dict__)

    def shape(self, owner: nn.Module, name: str, kind: type[nn.Module]) -> torch.Size:
        """The shape of the weight of a module of `owner`."""
        module = self.module(owner, name, kind)
        weight = None if module is None else module._parameters.get("weight")
        if weight is None:
            raise NotPlainError
        return weight.shape

    def optional(self, owner: nn.Module | None, name: str, shape: tuple[int, ...]) -> int:
        """The address of a parameter of `owner`, 0 if there is none."""
        if owner is None:
            return 0
        if self._note(owner._parameters, name) is None and getattr(owner, name, None) is None:
            return 0
        return self.weight(owner, name, shape)

    def weight(self, owner: nn.Module, name: str, shape: tuple[int, ...]) -> int:
        """The address of a parameter. Raises NotPlainError for one that is not a contiguous tensor of this shape on a
        CPU, has another dtype than others, or is computed, as by a parametrization or by pruning."""
        weight = self._note(owner._parameters, name)
        if type(weight) not in PLAIN_TENSORS or weight.shape != shape:
            raise NotPlainError
        if weight.device.type != "cpu" or not weight.is_contiguous():
            raise NotPlainError
        self.dtype = weight.dtype if self.dtype is None else self.dtype
        if weight.dtype != self.dtype:
            raise NotPlainError
        self._weights.append(weight)
        self._addresses.append(weight.data_ptr())
        return self._addresses[-1]

    def linear(self, owner: nn.Module, name: str, shape: tuple[int, int]) -> int:
        """The address of the weight of a linear layer without bias."""
        module = self.module(owner, name, nn.Linear)
        if module is None or self._note(module._parameters, "bias") is not None:
            raise NotPlainError
        return self.weight(module, "weight", shape)

    def norm(self, owner: nn.Module, name: str, width: int) -> int:
        """The address of the weight of an `nn.RMSNorm`; its epsilon is the next of `eps`."""
        norm = self.module(owner, name, nn.RMSNorm)
        if norm is None:
            raise NotPlainError
        return self.norm_weight(norm, width)

    def norm_weight(self, norm: nn.Module, width: int) -> int:
        """`norm` of a module that was checked."""
        assert isinstance(norm, nn.RMSNorm)
        self._note(norm.__dict__, "eps")
        address = self.weight(norm, "weight", (width,))
        self.eps.append(eps_of(norm))
        return address


def _kind(module: nn.Module) -> tuple[type[nn.Module], int]:
    return type(module), len(module.__dict__)


_found: WeakKeyDictionary[Any, WeightAddresses] = WeakKeyDictionary()


def addresses_of(layer: L, describe: Callable[[L, WeightAddresses], None]) -> WeightAddresses | None:
    """The addresses that `describe` notes, or None where it raises NotPlainError."""
    found = _found.get(layer)
    if found is None or not found.is_current():
        found = WeightAddresses()
        try:
            describe(layer, found)
        except NotPlainError:
            return None
        _found[layer] = found
    if (recorder := recording.get()) is not None:
        recorder.note_weights(found)
    return found
