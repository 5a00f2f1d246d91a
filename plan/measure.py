"""Measures what a run's layers and its loss take of memory, with fake tensors, and keeps it in a cache.

A model of three layers runs through `parallel.parallelize` and one step, under torch's FSDPMemTracker and on
a fake process group. Each further layer takes the same again. All sizes are in bytes.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 3  # the first and the last differ from those between them


class NotMeasured(LookupError):
    """The cache lacks it, and there shall be no measurement now."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is measured.

    `make(num_layers)` makes it on the meta device, with all its layers if that is None; `batch(rows)` makes a
    batch. Both can be pickled, and are called only for what the cache lacks; `key` tells apart all that they
    depend on.
    """

    key: str
    make: Callable
    batch: Callable
    tokens: int  # in a row
    precision: str
    now: bool = True  # measure what the cache lacks


def facts(model: Model) -> dict:
    """The number of layers, the parameters of a layer and of the rest, and the FLOPs of a token.

    A parameter is (rows, elements, trained?). Products count forward and backward.
    """
    return _cached(f"facts {model.tokens} {model.key}", lambda: _facts(model))


def _facts(model: Model) -> dict:
    module = model.make(None)
    layers = module.layers
    repeated = {parameter for layer in layers for parameter in layer.parameters()}
    groups = dict(layer=layers[0].parameters(), others=[p for p in module.parameters() if p not in repeated])
    found = {
        name: [(p.shape[0], p.numel(), p.requires_grad) for p in group] for name, group in groups.items()
    }
    products = sum((6 if p.requires_grad else 4) * math.prod(p.shape) for p in repeated if p.ndim == 2)
    once, twice = (module.flops_per_token({"input_ids": torch.empty(1, n * model.tokens)}) for n in (1, 2))
    found["flops"] = dict(layers=products, head=2 * once - twice - products, attention=twice - once)
    return found | dict(layers=len(layers), longest_sample=module.longest_sample)


def parameters(model: Model) -> tuple[int, int]:
    """The numbers of all parameters, and of those that train."""
    found = facts(model)
    sizes = [(size, trained) for _, size, trained in found["layer"] * found["layers"] + found["others"]]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def point(model: Model, recompute: str, rows: int, ranks: int) -> dict[str, float]:
    """`measure`, or what an earlier call found."""
    key = f"point {recompute} {rows} x {model.tokens} {model.precision} {ranks} {model.key}"

    def compute():
        if not model.now:
            raise NotMeasured(key)
        # One rank computes with frozen weights themselves, which the tracker cannot follow.
        arguments = model, recompute, rows, dict(dp_shard=max(2, ranks))
        if not torch.distributed.is_initialized():
            return measure(*arguments)
        # A fake process group, and what torch remembers of its meshes, must not meet the real one.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, *arguments).result()

    return _cached(key, compute)


def measure(
    model: Model, recompute: str | int, rows: int, mesh: dict, layers: int = LAYERS
) -> dict[str, float]:
    """What a layer keeps for backward, what else there is at three peaks, and the whole peak.

    The three are those of forward, of a layer's backward, and of all backward; they leave out weights and
    gradients. The whole peak includes these, and AdamW's moments.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPModState

    from trainer import parallel

    cpu, module = torch.device("cpu"), model.make(layers)
    replicas, reshard = mesh.get("dp_replicate", 1), mesh.get("reshard_after_forward", True)
    with _pretended_ranks(mesh["dp_shard"] * replicas), FakeTensorMode(allow_non_fake_inputs=True):
        parallel.parallelize(module, cpu, model.precision, recompute, False, replicas, reshard)
        for parameter in module.parameters():  # as in every micro-batch but the first
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        batch, tracker = model.batch(rows), FSDPMemTracker(module)
        with tracker, _NothingIgnored():
            module(batch)["loss_sum"].backward()
        stats = {m: stat.snapshots for m, stat in tracker.memory_tracking.items()}
        local = [(parallel.local(p).nbytes, p.requires_grad) for p in module.parameters()]
        weights, trained = sum(size for size, _ in local), sum(size for size, trained in local if trained)
        peak = tracker.get_tracker_snapshot("peak")[cpu]["Total"]

    def besides(m, moment: str) -> float:
        return stats[m][_FSDPModState[moment]][0][cpu]["Total"] - weights - trained

    found = [m for m in stats if isinstance(m, module.layer_class)]
    kept = besides(found[-1], "BEF_PRE_FW") - besides(found[-2], "BEF_PRE_FW")
    moments = dict(forward=(module, "PEAK_FW"), backward=(found[-1], "PEAK_BW"), end=(module, "PEAK_BW"))
    works = {name: besides(*moment) - len(found) * kept for name, moment in moments.items()}
    # The tracker does not see the states of a fused AdamW.
    return dict(layer=kept, peak=peak + 2 * trained, **works)


@contextlib.contextmanager
def _pretended_ranks(count: int) -> Iterator[None]:
    """A process group whose other ranks do not exist, and whose collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _NothingIgnored(TorchDispatchMode):
    """Selects all where a mask of fake values selects: as of samples without ignored positions."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0].clone()
        return function(*args, **(kwargs or {}))


_RESULTS: dict[str, dict] = {}  # what this process has read or measured


def _cached(key: str, compute: Callable[[], dict]) -> dict:
    """The result of this key. Of the processes that lack it, one computes, and the others wait for it."""
    if key in _RESULTS:
        return _RESULTS[key]
    import filelock

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llama3-demo", "plans")
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # without a cache, each process computes
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(filelock.FileLock(folder / "lock"))
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):  # it is not there, or a kill cut it
            found = compute()
            with contextlib.suppress(OSError):
                file.write_text(json.dumps(found))
    return _RESULTS.setdefault(key, found)
