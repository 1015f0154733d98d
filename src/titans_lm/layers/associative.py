"""The associative start: projections and convolutions that let a memory learn what follows what from its first step.

q and k have the same projection; q looks at the tokens t, t-1, ..., and k at the tokens one earlier. The memory's loss
|| M(k_t) - v_t ||^2 is then the error of predicting token t from the tokens before it, and M(q_t) predicts token
t + 1: an online n-gram regression, before any training (derivation in ops/README.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NOISE = 0.2
"""The share of the convolutions' random start that stays beside the shifts: equal filters would learn equal things."""
QUERY_SCALE = 0.25
"""Standard deviation of projected queries and keys, for inputs of unit variance. It is small because SiLU bends larger
values, which gives all of them a common mean."""
VALUE_SCALE = 1.6
"""Standard deviation of projected values. After SiLU they have about unit variance, as a residual memory's normalised
output has."""


@torch.no_grad()
def start_associative(
    projections: Sequence[nn.Linear], filters: Sequence[Tensor], heads: int, lags: int, scale_values: bool
) -> None:
    """Set, in place, the projections of q, k and v, and their convolutions' randomly initialised `filters` `[I, size]`.

    The channels of each head form `lags` groups, at most size - 1. Group g = 0, 1, ... looks g tokens back in q and
    g + 1 tokens back in k; v looks at the current token. `scale_values` gives the values the scale of a residual
    memory's output. Weights that a checkpoint provided stay (transformers marks them), and on the meta device, where
    operations take long and set nothing, all.
    """
    if filters[0].is_meta:
        return
    q_proj, k_proj, v_proj = projections
    nn.init.normal_(q_proj.weight, std=QUERY_SCALE * q_proj.in_features**-0.5)
    _set(k_proj.weight, q_proj.weight)
    if scale_values:
        nn.init.normal_(v_proj.weight, std=VALUE_SCALE * v_proj.in_features**-0.5)
    channels, size = filters[0].shape
    groups, per_head = min(lags, size - 1), channels // heads
    group = torch.arange(per_head, device=filters[0].device) * groups // per_head
    tokens_back = (group, group + 1, torch.zeros_like(group))
    for weight, back in zip(filters, tokens_back, strict=True):
        shift = nn.functional.one_hot(size - 1 - back, size).to(weight.dtype)
        _set(weight, NOISE * weight + shift.repeat(heads, 1))


def _set(parameter: Tensor, value: Tensor) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
