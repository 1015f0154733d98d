"""Where a memory's projections and convolutions begin, so that it learns what followed what from its first step.

With q and k projected alike, q looking at the tokens t, t-1, ..., and k at those one before, the memory's loss
|| M(k_t) - v_t ||^2 is that of predicting token t from the tokens before it, and M(q_t) is the prediction of token
t + 1: an online n-gram regression, before anything was trained (derivation in ops/README.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NOISE = 0.2
"""Of the convolutions' usual start this much is left beside the shifts: filters that are alike learn alike."""
QUERY_SCALE = 0.25
"""Standard deviation of projected queries and keys for inputs of unit variance: so small that SiLU hardly bends them,
which would give all of them a common mean."""
VALUE_SCALE = 1.6
"""That of projected values: after SiLU they have about unit variance, as the norm of a residual memory's output has."""


@torch.no_grad()
def start_associative(
    projections: Sequence[nn.Linear], filters: Sequence[Tensor], heads: int, lags: int, scale_values: bool
) -> None:
    """Set the projections of q, k, v and their convolutions' `filters` `[I, size]`, as they are made, in place.

    The channels of each head are in `lags` groups, at most size - 1. Those of group g = 0, 1, ... look at the token g
    before the one at hand in q, and at the one g + 1 before in k; v looks at the token at hand. Values are scaled to
    the size of what a residual memory says, where `scale_values`. What a checkpoint gave stays (transformers marks it).
    """
    q_proj, k_proj, v_proj = projections
    nn.init.normal_(q_proj.weight, std=QUERY_SCALE * q_proj.in_features**-0.5)
    _set(k_proj.weight, q_proj.weight)
    if scale_values:
        nn.init.normal_(v_proj.weight, std=VALUE_SCALE * v_proj.in_features**-0.5)
    channels, size = filters[0].shape
    groups, per_head = min(lags, size - 1), channels // heads
    group = torch.arange(per_head, device=filters[0].device) * groups // per_head
    looks_at = (group, group + 1, torch.zeros_like(group))
    for weight, lag in zip(filters, looks_at, strict=True):
        shift = nn.functional.one_hot(size - 1 - lag, size).to(weight.dtype)
        _set(weight, NOISE * weight + shift.repeat(heads, 1))


def _set(parameter: Tensor, value: Tensor) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
