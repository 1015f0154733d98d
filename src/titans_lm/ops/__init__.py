"""The memory operation, `memory_scan`, in several forms that compute the same numbers; and its state.

Dimensions, everywhere in this project: `B` rows, `T` tokens, `H` heads, `C` tokens of a chunk, `N` chunks, `K` key
width, `V` value width, `P` persistent tokens, `W` window, `D` model width, `L` layers of the memory.
"""

from titans_lm.ops.api import Backend, memory_scan, resolve_backend
from titans_lm.ops.mlp import retrieve
from titans_lm.ops.ragged import Layout, cleared, lay_out, left_align, restore, take
from titans_lm.ops.types import (
    Activation,
    Call,
    MemoryForm,
    MemoryState,
    Surprise,
    Tokens,
    initial_state,
    where_rows,
)

__all__ = [
    "Activation",
    "Backend",
    "Call",
    "Layout",
    "MemoryForm",
    "MemoryState",
    "Surprise",
    "Tokens",
    "cleared",
    "initial_state",
    "lay_out",
    "left_align",
    "memory_scan",
    "resolve_backend",
    "restore",
    "retrieve",
    "take",
    "where_rows",
]
