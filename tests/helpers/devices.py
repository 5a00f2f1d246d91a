"""The devices that a test runs on: the CPU and, marked gpu, CUDA."""

import os

import pytest
import torch

CUDA_DEVICES = torch.cuda.device_count()


def on_cuda(*values, devices: int = 1):
    """A parameter of pytest that is skipped where there are fewer devices."""
    few = pytest.mark.skipif(devices > CUDA_DEVICES, reason=f"needs {devices} CUDA devices")
    return pytest.param(*values, marks=[pytest.mark.gpu, few])


def visible(device: str) -> dict[str, str]:
    """The environment in which a run sees no CUDA device, or all of them."""
    every = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(CUDA_DEVICES))))
    return {"CUDA_VISIBLE_DEVICES": every if device == "cuda" else ""}


# A device and ranks: as many devices as there are, of which a power of two divides the batch.
SEVERAL = on_cuda("cuda", 1 << max(0, CUDA_DEVICES.bit_length() - 1), devices=2)
