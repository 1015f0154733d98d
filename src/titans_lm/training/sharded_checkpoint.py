"""Weights and optimizer state in shards, by torch.distributed.checkpoint, for FSDP. Any number of processes loads them.

The shards are safetensors files: the usual format of torch.distributed.checkpoint holds a pickle, which a stranger's
checkpoint could execute.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

SHARDS = "sharded"
"""Folder in a checkpoint."""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this process's shards; all processes call it. Raises what torch raises, in all of them."""
    tensors = {**_weights(model), **_states(model, optimizer)}
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state where they belong, whatever the number of processes then and now,
    sharded or not. All processes call it. Raises ValueError for shards of another model."""
    if not (folder / SHARDS).is_dir():
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        _load_whole(model, optimizer, load_file(folder / "model.safetensors"), state)
        return
    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDS))
    stored = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    _make_states(model, optimizer, stored)
    tensors = {**_weights(model), **_states(model, optimizer)}
    for name in sorted(tensors.keys() ^ stored.keys()):
        raise ValueError(f"{folder / SHARDS} does not fit this model: {name} is in only one of them")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != stored[name]:
            raise ValueError(f"{folder / SHARDS}: {name} is {list(stored[name])}, not {list(tensor.shape)}")
    dcp.load(tensors, storage_reader=reader, no_dist=not _several())


def _load_whole(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Put whole weights, and an optimizer's state dictionary, into a sharded model."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(_like(weights[name], tensor))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        optimizer.state[parameter] = {
            key: _like(value, parameter) if value.shape == parameter.shape else value.to(_home(optimizer, parameter))
            for key, value in values.items()
        }
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def tied(model: nn.Module) -> set[str]:
    """Second names of weights."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def _weights(model: nn.Module) -> dict[str, Tensor]:
    twice = tied(model)
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name not in twice}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _make_states(model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, tuple[int, ...]]) -> None:
    """Empty states of the parameters that have one in the shards: those of a bypassed memory do not."""
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        keys = [key.removeprefix(prefix) for key in stored if key.startswith(prefix) and "." not in key[len(prefix) :]]
        if keys:
            optimizer.state[parameter] = {
                key: torch.zeros_like(parameter)
                if stored[prefix + key] == tuple(parameter.shape)
                else torch.zeros(stored[prefix + key], device=_home(optimizer, parameter))
                for key in keys
            }


def _home(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where the optimizer keeps its count of steps."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = group.get("fused") or group.get("capturable")
    return parameter.device if on_device else torch.device("cpu")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
    return whole.to(tensor.device)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
