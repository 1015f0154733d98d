"""The memory operation, `memory_scan`, its state, and tools for rows of different length.

Dimensions, everywhere in this project: `B` rows, `T` tokens, `H` heads, `C` tokens of a chunk, `N` chunks, `K` key
width, `V` value width, `P` persistent tokens, `W` window, `D` model width, `L` layers of the memory.
"""

from titans_lm.ops import flops as flops  # registers the formulas
from titans_lm.ops.api import Backend, memory_scan, resolve_backend
from titans_lm.ops.factored import FactoredMemory
from titans_lm.ops.mlp import retrieve
from titans_lm.ops.ragged import (
    Layout,
    gather_tokens,
    is_left_aligned,
    lay_out,
    lay_out_by_shape,
    left_align,
    masked_zero,
    undo_left_align,
)
from titans_lm.ops.types import (
    Activation,
    MemoryForm,
    MemoryState,
    ScanInputs,
    ScanOutput,
    Surprise,
    Tokens,
    assert_traced,
    for_all_lengths,
    has_values,
    initial_state,
    is_traced,
    select_rows,
    where_rows,
)
from titans_lm.utils.deprecation import renamed

__all__ = [
    "Activation",
    "Backend",
    "FactoredMemory",
    "Layout",
    "MemoryForm",
    "MemoryState",
    "ScanInputs",
    "ScanOutput",
    "Surprise",
    "Tokens",
    "assert_traced",
    "for_all_lengths",
    "gather_tokens",
    "has_values",
    "initial_state",
    "is_left_aligned",
    "is_traced",
    "lay_out",
    "lay_out_by_shape",
    "left_align",
    "masked_zero",
    "memory_scan",
    "resolve_backend",
    "retrieve",
    "select_rows",
    "undo_left_align",
    "where_rows",
]
__getattr__ = renamed(
    __name__,
    {"Call": "ScanInputs", "cleared": "masked_zero", "restore": "undo_left_align", "take": "gather_tokens"},
)
