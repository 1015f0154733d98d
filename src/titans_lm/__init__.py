"""Titans: models and layers with a long-term memory that keeps learning while it reads (arXiv:2501.00663).

Importing the package loads neither torch nor transformers: each public name is loaded when it is first used.
`AutoModelForCausalLM` opens Titans models in every process that imports this package, before or after transformers.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from titans_lm._moved import OldNames
from titans_lm.models.registration import register_with_transformers

if TYPE_CHECKING:
    from titans_lm.analyze.arrays import Trace
    from titans_lm.analyze.trace import trace
    from titans_lm.inference.reader import Reader
    from titans_lm.layers.memory_state import LayerSurprise
    from titans_lm.layers.neural_memory import NeuralMemory, NeuralMemoryState
    from titans_lm.models.cache import TitansState
    from titans_lm.models.classification import TitansForSequenceClassification, TitansForTokenClassification
    from titans_lm.models.configuration import DEFAULT_CONFIG, VARIANT_CONFIGS, TitansConfig
    from titans_lm.models.export import export_prefill, export_step
    from titans_lm.models.graft_files import graft
    from titans_lm.models.growth import grow_memory
    from titans_lm.models.hub import load
    from titans_lm.models.modeling import TitansForCausalLM, TitansModel
    from titans_lm.models.onnx import to_onnx
    from titans_lm.models.presets import preset
    from titans_lm.models.time_series import TitansForTimeSeriesPrediction
    from titans_lm.models.time_series_configuration import TitansTimeSeriesConfig
    from titans_lm.ops import MemoryState, Surprise, memory_scan
    from titans_lm.utils.machine import keep_freed_memory

__all__ = [
    "DEFAULT_CONFIG",
    "VARIANT_CONFIGS",
    "LayerSurprise",
    "MemoryState",
    "NeuralMemory",
    "NeuralMemoryState",
    "Reader",
    "Surprise",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForSequenceClassification",
    "TitansForTimeSeriesPrediction",
    "TitansForTokenClassification",
    "TitansModel",
    "TitansState",
    "TitansTimeSeriesConfig",
    "Trace",
    "export_prefill",
    "export_step",
    "graft",
    "grow_memory",
    "keep_freed_memory",
    "load",
    "memory_scan",
    "preset",
    "to_onnx",
    "trace",
]
__version__ = "0.2.0"

_MODULES = {
    "DEFAULT_CONFIG": "models.configuration",
    "VARIANT_CONFIGS": "models.configuration",
    "LayerSurprise": "layers.memory_state",
    "MemoryState": "ops",
    "NeuralMemory": "layers.neural_memory",
    "NeuralMemoryState": "layers.neural_memory",
    "Reader": "inference.reader",
    "Surprise": "ops",
    "TitansConfig": "models.configuration",
    "TitansForCausalLM": "models.modeling",
    "TitansForSequenceClassification": "models.classification",
    "TitansForTimeSeriesPrediction": "models.time_series",
    "TitansForTokenClassification": "models.classification",
    "TitansModel": "models.modeling",
    "TitansState": "models.cache",
    "TitansTimeSeriesConfig": "models.time_series_configuration",
    "Trace": "analyze.arrays",
    "export_prefill": "models.export",
    "export_step": "models.export",
    "graft": "models.graft_files",
    "grow_memory": "models.growth",
    "keep_freed_memory": "utils.machine",
    "load": "models.hub",
    "memory_scan": "ops",
    "preset": "models.presets",
    "to_onnx": "models.onnx",
    "trace": "analyze.trace",
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


sys.meta_path.append(OldNames())
register_with_transformers(sys.meta_path)
