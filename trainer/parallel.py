"""Lays a model out over the ranks: recompute, compile, FSDP2; and fills the shards. The only file that shards."""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from trainer.tensorfile import Box

_DTYPES = {
    "fp32": None,
    "none": None,
    "bf16": torch.bfloat16,
}  # None: compute in what the master weights are kept in


def pick_device() -> torch.device:
    """This rank's CUDA device, or the CPU."""
    import os

    if torch.cuda.device_count() == 0:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def build_mesh(device: torch.device) -> DeviceMesh:
    """One axis: every rank is data parallel, and holds a shard of everything."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))


def parallelize(
    model: nn.Module, mesh: DeviceMesh, precision: str, recompute_layers: int | None, compile_layers: bool
) -> None:
    """Shards the model in place. The order matters: what is recomputed is compiled with it, and FSDP gathers around both.

    precision: of the computation; gradients are reduced, and master weights kept, in fp32. recompute_layers: how many of the
    layers compute their activations again in backward (None: all).
    """
    layer_class = getattr(model, "layer_class", ())
    layers = [module for module in model.modules() if layer_class and isinstance(module, layer_class)]
    for layer in layers[:recompute_layers]:
        # On the forward, not by a wrapper module: parameter names stay, and FSDP's hooks run once.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if compile_layers:
        for layer in layers:
            layer.compile(dynamic=False)
    policy = MixedPrecisionPolicy(
        param_dtype=_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in [*layers, *getattr(model, "sharded_alone", [])]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Plain sums: the trainer divides once, by what the loss is averaged over.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives every shard that is still on the meta device its memory, and moves the buffers to the device."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: torch.Tensor) -> Box:
    """Where `local(tensor)` lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape)
    shape, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return Box(tuple(offsets), tuple(shape))


@torch.no_grad()
def fill(
    names: dict[nn.Parameter, str], put: Callable[[torch.Tensor, str, tuple[int, ...], Box], object]
) -> None:
    """Lets `put(this rank's shard, name, shape of the whole, box of the shard)` set every parameter, in place."""
    for parameter, name in names.items():
        box = local_box(parameter)
        if box.size:
            put(local(parameter), name, tuple(parameter.shape), box)
