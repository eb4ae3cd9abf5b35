"""Sharding of the student over several ranks with FSDP2. A layer is unsharded only while it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.distributed import Ranks
from trainer.errors import ConfigError


def make_mesh(device: str, ranks: Ranks) -> DeviceMesh:
    """Return a one-dimensional mesh of all ranks. All ranks must call it together."""
    return init_device_mesh(device.partition(":")[0], (ranks.size,))


def shard(module: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Shard a module on the CPU in place: every layer moves to the mesh's device, where each rank keeps its shard.

    The call does not communicate, so ranks need not make it at the same time. With bf16, weights are gathered in bf16
    and gradients reduced in float32.

    Embeddings, head and final norm are one group. It stays unsharded from the forward pass to the end of the backward
    pass, because a tied head shares its weight with the embeddings and the loss needs it in both passes.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for child in module.modules():
        if isinstance(child, FSDPModule):
            # sum instead of average: the training step divides once by the global number of tokens
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)


@contextmanager
def all_unsharded(module: nn.Module) -> Iterator[None]:
    """Keep the weights of all layers complete during the block, which runs within the forward pass of `module`.

    Without sharding this does nothing. All ranks must enter the block together; within it they do not communicate, so
    that they may run different numbers of forward passes.
    """
    layers = [child for child in module.modules() if isinstance(child, FSDPModule) and child is not module]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the layers of the decoder. Raises ConfigError if the model has no list of layers."""
    layers = getattr(model.get_decoder(), "layers", None) or getattr(model.get_decoder(), "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"student.model: the decoder of {type(model).__name__} has no list of layers to shard or compile"
        )
    return layers
