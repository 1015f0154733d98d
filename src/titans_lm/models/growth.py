"""A model whose memory holds more: further memory heads, longer convolutions, and the same outputs until it is trained.

What is added is multiplied by 0 at first, as in Net2Net (arXiv:1511.05641): the output projection does not read the new
heads yet, and the old heads' filters are 0 at the tokens that they did not see before.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.block_layers import make_memory
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.graft_config import GraftConfig

GROWTH = ("num_memory_heads", "memory_conv_size", "memory_lags")
"""The fields of the configuration that growth may change."""

_Model = TypeVar("_Model", bound=PreTrainedModel)


def grown_config(config: TitansConfig, **changes: Any) -> TitansConfig:
    """`config` with the `changes`: `num_memory_heads` and `memory_conv_size`, at least what they are, and for new heads
    `memory_lags`, from 1 to memory_conv_size - 1.

    Raises ValueError for another change, a value out of range or without effect, and a model without a memory that can
    grow.
    """
    for name, value in changes.items():
        if name not in GROWTH:
            raise ValueError(f"{name} cannot be changed in a trained model; {', '.join(GROWTH)} can")
        if type(value) is not int:
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if changes and (isinstance(config, GraftConfig) or config.variant == "attention"):
        what = "a graft does not grow" if isinstance(config, GraftConfig) else "attention alone has no memory"
        raise ValueError(f"{min(changes)} cannot be changed: {what}")
    type(config).from_dict({**config.to_dict(), **changes})  # raises for an impossible value
    grown = copy.deepcopy(config)  # with what a dict does not have, such as the implementation of attention
    for name, value in changes.items():
        setattr(grown, name, value)
    for name in ("num_memory_heads", "memory_conv_size"):
        if getattr(grown, name) < getattr(config, name):
            raise ValueError(f"{name} must be at least the model's {getattr(config, name)}, got {changes[name]}")
    if config.memory_conv_size == 1 < grown.memory_conv_size:
        raise ValueError(f"memory_conv_size must be 1, as this model has no convolutions, got {grown.memory_conv_size}")
    if "memory_lags" in changes:
        _check_lags(config, grown)
    return grown


def _check_lags(config: TitansConfig, grown: TitansConfig) -> None:
    """Raises ValueError for lags that no new head begins with."""
    lags, size = grown.memory_lags, grown.memory_conv_size
    if grown.num_memory_heads == config.num_memory_heads:
        raise ValueError("memory_lags has no effect without new heads, which begin with it: set num_memory_heads")
    if grown.memory_start == "random" or size == 1:
        raise ValueError("memory_lags has no effect: the heads of this model have no associative start")
    if lags > size - 1:
        raise ValueError(f"memory_lags must be at most memory_conv_size - 1, which is {size - 1}, got {lags}")


def grow_memory(model: _Model, **changes: int) -> _Model:
    """A copy of `model`, any Titans model but a graft, with the `changes` that `grown_config` describes. Its outputs
    are the same up to rounding. Memory files of `model` do not fit it.

    New heads start as those of a new model do, and so draw from torch's random numbers. Raises ValueError as
    `grown_config` does, and for a model that begins with a memory (`begin_with`) or has adapters in its memory layers.
    """
    config = grown_config(model.config, **changes)
    if any(getattr(module, "_beginning", None) is not None for module in model.modules()):
        raise ValueError("the memory that the model begins with does not fit a larger one: call begin_with(None) first")
    grown = copy.deepcopy(model)
    for module in list(grown.modules()):
        if isinstance(module, PreTrainedModel):
            module.config = config
        for name, child in list(module.named_children()):
            if isinstance(child, NeuralMemory):
                setattr(module, name, _larger(child, config))
    return grown


@torch.no_grad()
def _larger(memory: NeuralMemory, config: TitansConfig) -> NeuralMemory:
    """The memory of `config` with the weights of `memory`, their dtypes, devices and `requires_grad`."""
    larger, own = make_memory(config), dict(memory.named_parameters())
    if own.keys() != dict(larger.named_parameters()).keys():
        raise ValueError("the memory layers have adapters or other weights of their own; merge or remove them first")
    for name, parameter in larger.named_parameters():
        old = own[name]
        parameter.data = parameter.data.to(old.device, old.dtype)
        _place(name, old, parameter)
        parameter.requires_grad_(old.requires_grad)
    return larger.train(memory.training)


def _place(name: str, old: Tensor, new: Tensor) -> None:
    """Write `old` into `new`, and 0 where old parts would meet new ones. A filter's last weight is that of the token at
    hand: it grows at its front. All else grows at its end."""
    if name.startswith("convs."):
        new[: old.shape[0]] = 0
        new[: old.shape[0], new.shape[1] - old.shape[1] :] = old
        return
    if name == "o_proj.weight":
        new.zero_()
    new[tuple(slice(size) for size in old.shape)] = old
