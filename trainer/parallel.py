"""Lays a model out over the ranks (recompute, compile, FSDP2) and fills its shards."""

import functools
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.tensorfile import Box
from trainer.trainable import TrainableModel

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: the master weights' own fp32


def pick_device() -> torch.device:
    """This rank's CUDA device, or the CPU."""
    if torch.cuda.device_count() == 0:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def parallelize(
    model: TrainableModel,
    device: torch.device,
    precision: str,
    recompute: str | int,
    compile_layers: bool,
    dp_replicate: int = 1,
    reshard_after_forward: bool = True,
) -> None:
    """Shards the model in place and allocates its shards. FSDP gathers around compile, which has recompute.

    precision: of the computation, and of frozen parameters. Gradients are reduced, and master weights kept,
    in fp32.
    recompute: 'none', 'selective', 'full', or how many layers recompute all their activations in backward.
    dp_replicate: how many groups of ranks hold a whole model each, sharded inside the group.
    reshard_after_forward: free a layer's gathered weights after its forward, and gather them for backward.
    """
    layers = model.layers
    # Replacing forward, not the module, keeps parameter names, and FSDP's hooks stay outside of the graph.
    for layer in layers[: {"none": 0, "selective": None, "full": None}.get(recompute, recompute)]:
        layer.forward = _recomputing(layer.forward, recompute == "selective")
    for layer in layers if compile_layers else []:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    if compile_layers:
        model.compile_loss(functools.partial(torch.compile, dynamic=True))
    # Consecutive ranks share a replica: they are the ones of a node.
    shape = (dp_replicate, dist.get_world_size() // dp_replicate)
    with unset_fake_temporarily():  # the planner's tensors have no values, but a mesh needs its own
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    mesh = mesh if dp_replicate > 1 else mesh["dp_shard"]
    dtypes = dict(param_dtype=COMPUTE_DTYPES[precision], reduce_dtype=torch.float32)
    ignored = _cast_frozen(model, device, dtypes["param_dtype"] or torch.float32, whole=shape[1] == 1)
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    alone = model.sharded_alone
    for module in [*layers, *alone, model]:
        reshard = None if reshard_after_forward or module not in layers else False  # None: all but the root
        how = dict(mesh=mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(module, **how, reshard_after_forward=reshard)
        if mesh.size() > 1:  # or FSDP would copy all gradients to divide them by 1
            # Gradients are plain sums: the trainer divides once, by the number of targets.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        if dist.get_backend() == "gloo":
            module.set_custom_reduce_scatter(_GlooReduceScatter())
    for module in alone:
        module.set_unshard_in_backward(False)
    model._apply(functools.partial(_allocated, device=device))


def _cast_frozen(
    model: nn.Module, device: torch.device, dtype: torch.dtype, whole: bool
) -> set[nn.Parameter]:
    """Casts the frozen parameters; returns those that FSDP must leave alone.

    These are all of them where a rank holds the whole model, so that it computes with them, not with copies.
    """
    cast = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                if parameter not in cast:
                    value = parameter.detach().to(dtype)
                    value = _allocated(value, device) if whole else value
                    cast[parameter] = nn.Parameter(value, requires_grad=False)
                setattr(module, name, cast[parameter])
    return set(cast.values()) if whole else set()


def _allocated(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


class _GlooReduceScatter(ReduceScatter):
    """Sums each rank's part where it belongs; gloo's own sums everything everywhere, in thrice the time."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        torch.sum(parts.view(dist.get_world_size(group), -1), 0, out=output_tensor)


def _recomputing(forward: Callable, selective: bool) -> Callable:
    """The same function, whose activations are computed again in backward; selective: only the cheap ones."""
    how = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, _kept)) if selective else {}

    def forward_recomputed(*args, **kwargs):  # Dynamo skips a partial of checkpoint, and traces this
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return forward_recomputed


def _kept(context, operator, *args, **kwargs) -> CheckpointPolicy:
    """Selective recompute keeps the results of matrix products and attention."""
    name = operator.name().split("::")[-1]
    kept = name in ("mm", "addmm", "bmm") or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


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
