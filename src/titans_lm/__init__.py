"""Titans: models and layers with a long-term memory that keeps learning while it reads (arXiv:2501.00663).

Importing the package loads neither torch nor transformers: each public name is loaded when it is first used.
`AutoModelForCausalLM` opens Titans models in every process that imports this package, before or after transformers.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from titans_lm._registration import register_with_transformers

if TYPE_CHECKING:
    from titans_lm.checkpoint import load
    from titans_lm.config import DEFAULT_CONFIG, VARIANT_CONFIGS, TitansConfig, preset
    from titans_lm.memory import NeuralMemory, NeuralMemoryState
    from titans_lm.model import TitansForCausalLM, TitansModel
    from titans_lm.ops import MemoryState, Surprise, memory_scan
    from titans_lm.reader import Reader
    from titans_lm.state import TitansState

__all__ = [
    "DEFAULT_CONFIG",
    "VARIANT_CONFIGS",
    "MemoryState",
    "NeuralMemory",
    "NeuralMemoryState",
    "Reader",
    "Surprise",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansState",
    "load",
    "memory_scan",
    "preset",
]
__version__ = "0.2.0"

_MODULES = {
    "DEFAULT_CONFIG": "config",
    "VARIANT_CONFIGS": "config",
    "MemoryState": "ops",
    "NeuralMemory": "memory",
    "NeuralMemoryState": "memory",
    "Reader": "reader",
    "Surprise": "ops",
    "TitansConfig": "config",
    "TitansForCausalLM": "model",
    "TitansModel": "model",
    "TitansState": "state",
    "load": "checkpoint",
    "memory_scan": "ops",
    "preset": "config",
}
"""The module that defines each public name; the operation and the layer need torch alone."""

if not TYPE_CHECKING:  # a type checker knows the names above, and reports any other

    def __getattr__(name: str) -> Any:
        """A public name, or a module of this package, loaded now."""
        if name in _MODULES:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
            globals()[name] = value  # the next use does not come here
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


register_with_transformers(sys.meta_path)
