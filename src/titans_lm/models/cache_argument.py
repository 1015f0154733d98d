"""The name of a cache: `past_key_values`, and `cache` from transformers 5.24 on. Our models take both."""

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.utils.generic import ModelOutput

from titans_lm.models.cache import TitansState

NAMES = ("past_key_values", "cache")
"""The names of one argument."""
OF_TRANSFORMERS = NAMES["cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]
"""The name that the installed transformers uses with a model, in what `generate` returns and in its own models."""


def given_state(past_key_values: TitansState | None, cache: TitansState | None) -> TitansState | None:
    """The state that is passed under either name. Raises ValueError for two states."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(f"{' and '.join(NAMES)} are two names of one argument: pass one of them")
    return cache if past_key_values is None else past_key_values


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
        return super().__getitem__(_field(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_field(key), value)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_field(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(_field(key), default)


def _field(key: Any) -> Any:
    return "cache" if key == "past_key_values" else key
