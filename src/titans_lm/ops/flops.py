"""What `torch.utils.flop_counter` counts for the operators: their matrix products, as `chunked` computes them.

A count follows from shapes alone, as for every operator: that of a call that begins at a chunk start, of which every
token is written.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from titans_lm.ops.chunked.scan import plan_runs
from titans_lm.ops.operators import SCAN, SCAN_BACKWARD, STEP, STEP_BACKWARD
from titans_lm.ops.ragged import Layout

Shape = Sequence[int]


def _scan_flops(tokens: Sequence[Shape], weights: Sequence[Shape], chunk_size: int) -> int:
    """The forward pass. Each layer's W and S are read and written, its keys run forward, and backward but for the first
    layer; scores have a width of the chunk's tokens."""
    batch, slots, heads, _ = tokens[0]
    layout = Layout(0, slots, chunk_size, torch.empty(0, dtype=torch.long))
    total = 0
    for plan in plan_runs(layout):
        for layer, (*_, i, o) in enumerate(weights):
            products = (5 if layer == 0 else 6) * i * o + plan.chunk_size * (i + o)
            total += 2 * batch * heads * (plan.end - plan.start) * products
    return total


@register_flop_formula(SCAN)
def scan_flops(
    tokens: Sequence[Shape],
    anchor: Any,  # noqa: ARG001
    weights: Sequence[Shape],
    momentum: Any,  # noqa: ARG001
    norm_weight: Any,  # noqa: ARG001
    norm_bias: Any,  # noqa: ARG001
    mask: Any,  # noqa: ARG001
    position: Any,  # noqa: ARG001
    chunk_size: int,
    *_: Any,
    **__: Any,
) -> int:
    return _scan_flops(tokens, weights, chunk_size)


@register_flop_formula(SCAN_BACKWARD)
def scan_backward_flops(saved: Sequence[Shape], grads: Any, *arguments: Any, **options: Any) -> int:  # noqa: ARG001
    """Two products for each of the forward pass, and that once more where nothing is saved of it."""
    return (2 if saved else 3) * scan_flops(*arguments)


@register_flop_formula(STEP)
def step_flops(tokens: Sequence[Shape], anchor: Any, weights: Sequence[Shape], *_: Any, **__: Any) -> int:  # noqa: ARG001
    """Query and key run forward, the key backward but for the first layer. Writing is a rank-one update, no product."""
    rows = tokens[0][0] * tokens[0][2]
    return sum(2 * rows * (2 if layer == 0 else 3) * i * o for layer, (*_, i, o) in enumerate(weights))


@register_flop_formula(STEP_BACKWARD)
def step_backward_flops(grads: Any, *arguments: Any, **options: Any) -> int:  # noqa: ARG001
    """It runs as a chunk of one token, forward and backward."""
    tokens, _, weights, *_ = arguments
    return 3 * _scan_flops(tokens, weights, 1)
