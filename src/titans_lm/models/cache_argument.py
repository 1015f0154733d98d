"""The name of a cache: `past_key_values`, and `cache` from transformers 5.24 on. Our models take and return both."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import transformers
from packaging.version import Version
from transformers.utils.generic import ModelOutput

P = ParamSpec("P")
T = TypeVar("T")

NAMES = ("past_key_values", "cache")
"""The names of one argument."""
OF_TRANSFORMERS = NAMES[Version(transformers.__version__).release >= (5, 24)]
"""The name that the installed transformers uses between `generate` and a model, and for its own models."""


def rename_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """`arguments`, with the cache under `name`. Raises ValueError for two caches."""
    (other,) = {*NAMES} - {name}
    if other not in arguments:
        return arguments
    arguments = dict(arguments)
    cache = arguments.pop(other)
    if cache is None:
        return arguments
    if arguments.get(name) is not None:
        raise ValueError(f"{' and '.join(NAMES)} are two names of one argument: pass one of them")
    return {**arguments, name: cache}


def accepts_cache(forward: Callable[P, T]) -> Callable[P, T]:
    """`forward`, whose argument `past_key_values` may be passed as `cache` too."""

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **rename_cache(kwargs, "past_key_values"))

    signature = inspect.signature(forward)
    parameters = [*signature.parameters.values()]
    more = parameters.pop() if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None
    annotation = signature.parameters["past_key_values"].annotation
    parameters.append(inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    renamed.__signature__ = signature.replace(parameters=[*parameters, *([] if more is None else [more])])  # type: ignore[attr-defined]
    return renamed


class CacheOutput(ModelOutput):
    """An output whose field `cache` is `past_key_values` too, in every version of transformers."""

    cache: Any

    @property
    def past_key_values(self) -> Any:
        """The field `cache`."""
        return self.cache

    @past_key_values.setter
    def past_key_values(self, cache: Any) -> None:
        self.cache = cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key == "past_key_values" else key)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__("cache" if key == "past_key_values" else key)

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get("cache" if key == "past_key_values" else key, default)
