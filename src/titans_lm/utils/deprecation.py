"""Old names of modules, attributes and arguments: they do what the new names do, with a DeprecationWarning."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `module`, for `names` old -> new. Raises AttributeError for any other name."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} was renamed: use {module}.{names[name]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    find.names = names  # type: ignore[attr-defined]  # a module that has moved too warns of both at once
    return find


class RenamedAttribute:
    """An old attribute or method of a class: it gets and sets the `new` one, with a DeprecationWarning."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def __get__(self, instance: Any, owner: type) -> Any:
        self._warn(owner)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        self._warn(type(instance))
        setattr(instance, self.new, value)

    def _warn(self, owner: type) -> None:
        message = f"{owner.__name__}.{self.old} was renamed: use {owner.__name__}.{self.new}"
        warnings.warn(message, DeprecationWarning, stacklevel=3)


class RemovedAttribute:
    """An old attribute that now decides nothing. Raises AttributeError, which says what to use."""

    def __init__(self, use: str):
        self.use = use

    def __set_name__(self, owner: type, name: str) -> None:
        self.message = f"{owner.__name__}.{name} was removed: use {self.use}"

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(self.message)

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(self.message)


def renamed_arguments(names: dict[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function also takes keyword arguments by the `names` old -> new, with a DeprecationWarning.

    Raises TypeError where an argument is given by both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old} is the old name of {new}: give {new} alone")
                message = f"the argument {old} of {function.__qualname__} was renamed: use {new}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return run

    return decorate
