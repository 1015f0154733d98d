"""Which model a memory belongs to: a description, and digests of its configuration and weights."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_NOT_IDENTITY = {
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "initializer_range",
    "classifier_dropout",
    "memory_start",
    "memory_lags",
    "memory_loss_weight",
    "memory_theta_weight",
    "max_position_embeddings",
}
"""Keys of the configuration that do not change what a trained model computes."""

_ADDED_LATER = {"memory_gates_of": "token"}
"""Keys that older models do not have, and the value that these models stand for: their memory files stay valid."""


def identity(model: PreTrainedModel) -> dict[str, str]:
    """What identifies a model: a description, and the SHA-256 of its configuration and of every parameter's bytes."""
    own = {k: v for k, v in model.config.own_fields().items() if k not in _NOT_IDENTITY}
    own = {k: v for k, v in own.items() if k not in _ADDED_LATER or v != _ADDED_LATER[k]}
    count = sum(parameter.numel() for parameter in model.base_model.parameters())
    return {
        "configuration": hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest(),
        "weights": weights_digest(model.base_model),
        "model": f"{model.config.variant}, {model.config.num_hidden_layers} layers, {count:,} parameters",
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, their names, types and shapes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        whole: Any = parameter.detach()
        if isinstance(whole, DTensor):  # sharded by FSDP: a collective call
            whole = whole.full_tensor()
        digest.update(whole.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digests(model: PreTrainedModel) -> dict[str, str]:
    """The two digests of `identity`: results of models that have both are of one model."""
    found = identity(model)
    return {key: found[key] for key in ("configuration", "weights")}


class Identity:
    """Which model a state belongs to: a description and two SHA-256 digests, as in `cache_file.Card`.

    Hashing all weights takes a while, and training changes them. So `describe` hashes them only when a file is written,
    as they are then. Pickling stores the result; a model that continues an unpickled state gives it its own identity.
    """

    def __init__(self, describe: Callable[[], dict[str, str]]):
        self.describe = describe

    def __call__(self) -> dict[str, str]:
        return self.describe()

    def __reduce__(self) -> tuple[Any, ...]:
        return _described, (self(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Identity":
        return self


def _described(known: dict[str, str]) -> Identity:
    return Identity(partial(dict, known))
