"""Titans: models and layers with a long-term memory that keeps learning while it reads (arXiv:2501.00663)."""

from importlib.util import find_spec

from titans_lm.memory import NeuralMemory, NeuralMemoryState
from titans_lm.ops import MemoryState, Surprise, memory_scan

if find_spec("transformers") is not None:  # the operation and the layer need torch alone
    from titans_lm.checkpoint import load
    from titans_lm.config import DEFAULT_CONFIG, VARIANT_CONFIGS, TitansConfig, preset
    from titans_lm.model import TitansForCausalLM, TitansModel
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
__version__ = "0.1.0"
