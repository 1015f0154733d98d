"""FSDP2 as this model needs it: accelerate's plugin, set so that float32 stays float32."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def prepare_fsdp(accelerator: Any, options: dict[str, Any] | None) -> bool:
    """Set accelerate's FSDP plugin: no casts of its own, whole weights in model files -> whether FSDP is on.

    `options` are those of `training.fsdp`, None without it; `accelerate launch` may turn FSDP on too. Raises ValueError
    for FSDP1, and for a single process that no launcher started.
    """
    state = accelerator.state
    if options is not None and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("training.fsdp needs processes to shard over: torchrun --nproc-per-node N -m titans_lm train")
    if options is not None and state.distributed_type == DistributedType.MULTI_CPU:  # accelerate would use DDP
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
    if state.distributed_type != DistributedType.FSDP:
        return False
    if state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("FSDP1 cannot shard this model: give accelerate fsdp_version: 2, or training.fsdp: true")
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    return True


def reshard(model: nn.Module) -> None:
    """Free the whole weights that the last forward pass has gathered: the model's parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
