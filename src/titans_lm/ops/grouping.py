"""How many chunks are processed as one group, and whether a group's activations are saved: limits and rules.

A backward pass needs the activations of each chunk's forward pass. A call whose activations fit `max_saved_bytes` saves
them. A longer call saves the state at the start of each group of chunks, and recomputes one group at a time.
"""

import math
from typing import NamedTuple

MAX_SAVED_BYTES = 256 * 2**20
"""Default of `memory_scan`: a call whose activations take no more than this saves them all, and recomputes nothing."""
GROUP_BYTES = 128 * 2**20
"""What the activations of one recomputed group may take, or for "native" the states at the starts of all groups."""
CACHE_BYTES = 6 * 2**20
"""What stays in a core's cache: the size of a group where nothing is saved."""


class GroupSize(NamedTuple):
    chunks: int
    save: bool
    """Whether the activations are saved. They are only where the whole run is one group."""


def group_size(chunks: int, chunk_bytes: int, max_saved_bytes: float) -> GroupSize:
    """The groups of a run of `chunks` chunks whose activations take `chunk_bytes` each.

    A run that does not fit `max_saved_bytes` has groups of `GROUP_BYTES`, or of sqrt(chunks) if that is more.
    """
    if chunks * chunk_bytes <= max_saved_bytes:
        return GroupSize(chunks, save=True)
    return GroupSize(min(chunks, max(round(math.sqrt(chunks)), GROUP_BYTES // chunk_bytes)), save=False)


def group_size_without_grad(chunk_bytes: int) -> int:
    """Chunks of a group where nothing is saved: as many as fit a core's cache."""
    return max(1, CACHE_BYTES // chunk_bytes)


def group_size_in_cache(chunks: int, chunk_bytes: int, state_bytes: int) -> int:
    """Chunks that "native" recomputes together: as many as fit a core's cache.

    The state at each group's start is saved, `state_bytes` each. Groups are longer where these states would be more
    than sqrt(chunks) and take more than `GROUP_BYTES`.
    """
    max_groups = max(math.isqrt(chunks), GROUP_BYTES // state_bytes)
    return max(1, CACHE_BYTES // chunk_bytes, -(-chunks // max_groups))


def group_size_sqrt(chunks: int) -> int:
    """Chunks of a group of "triton", which saves the state at the start of every group."""
    return max(1, round(math.sqrt(chunks)))
