"""Lays a model out over the ranks (recompute, compile, FSDP2) and fills its shards."""

import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from trainer.tensorfile import Box

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: the master weights' own fp32


def pick_device() -> torch.device:
    """This rank's CUDA device, or the CPU."""
    if torch.cuda.device_count() == 0:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def parallelize(
    model: nn.Module, device: torch.device, precision: str, recompute: str | int, compile_layers: bool
) -> None:
    """Shards the model in place and allocates its shards. Compile includes recompute; FSDP gathers around
    both.

    precision: of the computation. Gradients are reduced, and master weights kept, in fp32.
    recompute: 'none', 'full', or how many layers recompute their activations during backward.
    """
    layer_class = getattr(model, "layer_class", ())
    layers = [module for module in model.modules() if layer_class and isinstance(module, layer_class)]
    for layer in layers[: {"none": 0, "full": None}.get(recompute, recompute)]:
        # Replacing forward, not the module, keeps parameter names and runs FSDP's hooks once.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    for layer in layers if compile_layers else []:
        layer.compile(dynamic=False)
    # One axis: every rank is data parallel and holds a shard of every parameter.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    dtypes = dict(param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32)
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    for module in [*layers, *getattr(model, "sharded_alone", []), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # Gradients are plain sums: the trainer divides once, by the number of targets.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a distributed tensor; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a distributed tensor, gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: torch.Tensor) -> Box:
    """Where `local(tensor)` lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return Box(tuple(offsets), tuple(shape))


def is_first_replica(tensor: torch.Tensor) -> bool:
    """Is this rank the first of those that hold the same part of the tensor?"""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    coordinates = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in coordinates if placement.is_replicate())
