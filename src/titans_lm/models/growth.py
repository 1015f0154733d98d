"""A model whose memory holds more: further memory heads, longer convolutions, and the same outputs until it is trained.

What is added is multiplied by 0 at first, as in Net2Net (arXiv:1511.05641): the output projection does not read the new
heads yet, and the old heads' filters are 0 at the tokens that they did not see before.
"""

import torch
from torch import Tensor

from titans_lm.models.configuration import TitansConfig
from titans_lm.models.modeling import TitansForCausalLM

GROWTH = ("num_memory_heads", "memory_conv_size", "memory_lags")
"""The fields of the configuration that growth may change."""


def grown_config(config: TitansConfig, **changes: int) -> TitansConfig:
    """`config` with the `changes`, some of `GROWTH`.

    Raises ValueError for another change, a smaller size, or a model that has nothing that could grow.
    """
    if unknown := sorted(changes.keys() - set(GROWTH)):
        raise ValueError(f"{unknown[0]} cannot be changed in a trained model; {', '.join(GROWTH)} can")
    if changes and config.variant == "attention":
        raise ValueError(f"{min(changes)} has no effect: a model of variant 'attention' has no memory")
    grown = type(config).from_dict({**config.to_dict(), **changes})
    for name in ("num_memory_heads", "memory_conv_size"):
        if getattr(grown, name) < getattr(config, name):
            raise ValueError(f"{name} must be at least the model's {getattr(config, name)}, got {changes[name]}")
    if config.memory_conv_size == 1 < grown.memory_conv_size:
        raise ValueError(f"memory_conv_size must be 1, as this model has no convolutions, got {grown.memory_conv_size}")
    if grown.memory_lags != config.memory_lags and grown.num_memory_heads == config.num_memory_heads:
        raise ValueError("memory_lags has no effect without new heads, which begin with it: set num_memory_heads")
    return grown


@torch.no_grad()
def grow_memory(model: TitansForCausalLM, **changes: int) -> TitansForCausalLM:
    """A model of `grown_config` with the weights of `model`, and the same logits up to rounding.

    New heads start as those of a new model do, and so draw from torch's random numbers. Raises what `grown_config`
    raises.
    """
    grown = type(model)(grown_config(model.config, **changes)).to(model.device, model.dtype)
    weights = model.state_dict()
    for name, tensor in grown.state_dict().items():
        _place(name, weights[name], tensor)
    return grown.train(model.training)


def _place(name: str, old: Tensor, new: Tensor) -> None:
    """Write `old` into `new`, and 0 where old parts would meet new ones. A filter's last weight is that of the token at
    hand: it grows at its front. All else grows at its end."""
    if ".convs." in name:
        new[: old.shape[0]] = 0
        new[: old.shape[0], new.shape[1] - old.shape[1] :] = old
        return
    if name.endswith("memory.o_proj.weight"):
        new.zero_()
    new[tuple(slice(size) for size in old.shape)] = old
