"""Dynamic evaluation (arXiv:1709.07432): a model without its memory trains all its weights on what it reads.

The classic alternative to a memory that learns at test time: after predicting a segment, take one SGD step on its loss.
The state is the whole model; a memory's state is a few small matrices per row.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from titans_lm.layers.bypass import bypass_memory
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.nats import target_nats


def dynamic_nats(
    model: TitansForCausalLM, ids: Tensor, *, rate: float, segment: int = 64, max_grad_norm: float = 1.0
) -> Iterator[tuple[int, Tensor]]:
    """Read ids `[1, T]` with a copy of `model`, its memory bypassed, `segment` tokens at a time. Take an SGD step after
    each segment.

    Carries attention's cache from segment to segment, detached. Clips the gradient to `max_grad_norm`, so that one
    segment cannot ruin the weights. Does not change `model`. Yields `(t, nats)` as `perplexity.token_nats` does. Raises
    ValueError for a rate that is not above 0 or a segment below 1.
    """
    if not rate > 0 or segment < 1:
        raise ValueError(f"dynamic evaluation needs a rate above 0 and a segment of at least 1, got {rate}, {segment}")
    learner = copy.deepcopy(model).eval().requires_grad_(True)  # a graft's base is frozen
    optimizer = torch.optim.SGD(learner.parameters(), lr=rate)
    state = learner.initial_state(1).detach()
    with bypass_memory(learner):
        for first in range(0, ids.shape[1] - 1, segment):
            inputs = ids[:, first : first + segment].to(learner.device)
            targets = ids[0, first + 1 : first + segment + 1]
            with torch.enable_grad():
                logits = learner(inputs, past_key_values=state).logits[0, : len(targets)]
                nats = target_nats(logits, targets)
            yield first + 1, nats.detach().double().cpu()
            nats.mean().backward()
            torch.nn.utils.clip_grad_norm_(learner.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            state = state.detach()
