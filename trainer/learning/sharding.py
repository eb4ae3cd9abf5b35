"""The student over several ranks: FSDP2, each layer whole only while it computes, gradients summed."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.errors import ConfigError
from trainer.ranks import Ranks


def mesh_of(device: str, ranks: Ranks) -> DeviceMesh:
    """All ranks in a row. All of them call it together."""
    return init_device_mesh(device.partition(":")[0], (ranks.size,))


def shard(core: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard in place what lies on the CPU: every layer moves to the mesh's device, where a rank keeps its part. No rank
    waits for another. With bf16, weights are gathered in it and gradients summed in float32.

    Embeddings, head and final norm are one group, which is whole from the forward pass to the end of the backward:
    a tied head is the embedding, and the loss needs it in both.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(core, mesh=mesh, mp_policy=policy)
    for module in core.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the step divides, once, by the global number of tokens
            module.set_force_sum_reduction_for_comms(True)


def layers_of(model: Any) -> nn.ModuleList:
    """The trunk's layers. Raises ConfigError if it has none that are known."""
    layers = getattr(model.get_decoder(), "layers", None) or getattr(model.get_decoder(), "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"student.model: {type(model).__name__} has no list of layers to shard over several ranks")
    return layers
