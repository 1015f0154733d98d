"""A graft's base: load it, tell its weights; and the graft's own weights. Runs no code of a folder, reads no pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from titans_lm.models.configuration import plain_reason, unknown_key
from titans_lm.models.graft_config import base_config
from titans_lm.models.model_files import check_weights

WEIGHTS = "model.safetensors"
_OF_AUTO_CLASSES = (
    "_from_auto", "trust_remote_code", "adapter_kwargs", "local_files_only", "use_safetensors", "low_cpu_mem_usage",
    "cache_dir", "force_download", "token",
)  # fmt: skip
"""What transformers passes to `from_pretrained`, and what makes no difference for the files of a folder."""


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""The maps that transformers makes itself."""
_ROOM = 1.25
"""Memory of a device, as a multiple of the weights, that leaves room for a call."""


def check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for an option of `from_pretrained` that would have no effect on a graft."""
    for key, value in options.items():
        if key not in _OF_AUTO_CLASSES and value is not None and value is not False:
            raise ValueError(unknown_key(key, ["config", "dtype", "device_map"], "the options of a graft"))


def one_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype of a model's weights, also by name; None for "auto". Raises ValueError for what is none."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise ValueError(f"dtype={dtype!r} is not one of weights; give one such as 'bfloat16', or 'auto'")


def one_device(device_map: Any, size: int, free: Mapping[int | str, int] | None = None) -> Any:
    """The device of a `device_map`, as `Module.to` takes it: the one that it names; where transformers would choose
    several, the accelerator with most free memory if it has room for `size` bytes of weights, else the CPU. `free` is
    the free memory by device, by default this machine's. Raises ValueError for a map of several devices."""
    devices = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    known = all(isinstance(device, str | int | torch.device | None) for device in devices)
    if not known or len(set(devices)) != 1 or devices[0] == "disk":
        raise ValueError(
            f"device_map={device_map!r}: a graft is on one device; give its name, such as 'cuda', or 'auto'"
        )
    if devices[0] not in _AUTOMATIC:
        return devices[0]
    rooms = dict(get_max_memory() if free is None else free)
    rooms = {device: room for device, room in rooms.items() if device != "cpu" and room > _ROOM * size}
    return max(rooms, key=rooms.__getitem__, default="cpu")


def load_base(name: str) -> PreTrainedModel:
    """The pretrained model of a folder or Hub name. Raises ValueError for one that cannot be loaded, or needs code or
    pickled weights."""
    base_config(name)
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    try:
        base, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"graft: the base {name} cannot be loaded: {plain_reason(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"graft: the base {name} lacks the weight {sorted(report['missing_keys'])[0]!r}")
    if base.config._attn_implementation not in ("sdpa", "eager"):
        base.set_attn_implementation("sdpa")
    model: PreTrainedModel = base
    return model


def load_weights(folder: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a graft's folder. Raises ValueError unless they are finite, and have the names and shapes of its
    `own`."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} cannot be loaded as a graft: {' '.join(str(error).split())}") from error
    foreign = sorted(weights.keys() ^ own.keys()) or [n for n, t in weights.items() if t.shape != own[n].shape]
    check_weights(folder, foreign, weights.items(), of="graft")
    return weights
