"""How unlikely a model found each token."""

import torch
import torch.nn.functional as F
from torch import Tensor


def target_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of `targets` `[...]` by `logits` `[..., V]` -> `[...]` on the logits' device, in float64 for float64
    logits, else in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.device)
    nats = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return nats.view(targets.shape)
