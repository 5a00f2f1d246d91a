"""Runs a script with nnScaler on a CPU, for tests: nnscaler_cpu.py train.py --engine=nnscaler ...

nnScaler asks for CUDA by name. This module replaces that at run time with the CPU as the only GPU.
"""

import contextlib
import functools
import logging
import resource
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import torch.distributed as dist

CPU = torch.device("cpu")


class Nothing:
    """Stands in for a stream or an event: every method does nothing, every comparison in time is 0."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: 0


def stand_in_for_cuda() -> None:
    """Make torch.cuda answer as one device that is the CPU, with gloo in the place of nccl."""
    real_init = dist.init_process_group
    dist.init_process_group = lambda backend=None, **rest: real_init(backend="gloo", **rest)

    memory = psutil.virtual_memory()
    properties = SimpleNamespace(total_memory=memory.total, name="cpu")
    answers = {
        "current_device": CPU,
        "device_count": 1,
        "get_rng_state": torch.get_rng_state,
        "get_device_name": "cpu",
        "get_device_properties": properties,
        "mem_get_info": lambda: (psutil.virtual_memory().available, memory.total),
        "max_memory_allocated": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "max_memory_reserved": 0,
        "memory_allocated": 0,
        "default_stream": Nothing(),
        "current_stream": Nothing(),
        **dict.fromkeys(
            ["set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_rng_state"]
        ),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer() if callable(answer) else answer)
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self


def trace_on_cpu() -> None:
    """Send what nnScaler's tracer would run on CUDA to the CPU."""
    from nnscaler.graph.tracer import trace_strategy

    def on_cpu(value):
        return CPU if isinstance(value, torch.device) and value.type == "cuda" else value

    def wrap(run):
        def run_on_cpu(self, target, args, kwargs, device):
            return run(
                self,
                target,
                tuple(map(on_cpu, args)),
                {key: on_cpu(value) for key, value in kwargs.items()},
                "cpu",
            )

        return run_on_cpu

    base = trace_strategy.BaseTraceStrategy
    for name in ("_run_call_function_on", "_run_call_method_on", "_run_call_module_on"):
        setattr(base, name, wrap(getattr(base, name)))
    place_tensors = base._place_tensors_to
    base._place_module_to = staticmethod(lambda module, device: module)
    base._place_tensors_to = staticmethod(lambda *args, device: place_tensors(*args, device="cpu"))


def profile_in_this_process() -> None:
    """autodist's profiler spawns a process for each GPU, which would start without these replacements.

    It warms up for two seconds an operator. And its times for sending are a cluster's, so that it would split
    no tiny model: here sending takes no time.
    """
    from nnscaler.autodist.cost_database import CostDatabase
    from nnscaler.profiler import database

    database.profile = functools.partial(database.profile, warmup_sec=0.01, prof_times=3)
    CostDatabase.primitive_to_cost = lambda self, num_devices, byte_size, primitive: 0.0
    real = CostDatabase.profile_comp
    CostDatabase.profile_comp = lambda self, degree, parallel_profile, re_profile: real(
        self, degree, False, re_profile
    )


stand_in_for_cuda()
trace_on_cpu()
profile_in_this_process()

if __name__ == "__main__":
    logging.getLogger("nnscaler").setLevel(logging.WARNING)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as python does for the script it runs
    runpy.run_path(sys.argv[0], run_name="__main__")
