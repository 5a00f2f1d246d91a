"""The rates and the memory of each kind of device."""

import re
from typing import NamedTuple

import torch

from errors import UserError
from trainer import machine


class Device(NamedTuple):
    """`tflops`: of dense bf16 products with fp32 sums. GB/s (1e9 bytes): of its memory, and to a neighbour.

    `link_gbps` is what a device sends to the others of its node, in one direction.
    """

    memory_gib: float  # all of it, as CUDA reports it
    tflops: float
    memory_gbps: float
    link_gbps: float


# The makers' data sheets. On the CPU, a server of today: only its proportions matter.
DEVICES = {
    "h100-80g": Device(79.1, 989.0, 3350.0, 450.0),
    "h200": Device(139.8, 989.0, 4800.0, 450.0),
    "a100-80g": Device(79.2, 312.0, 2039.0, 300.0),
    "a100-40g": Device(39.4, 312.0, 1555.0, 300.0),
    "l40s": Device(44.4, 362.0, 864.0, 32.0),
    "rtx4090": Device(23.5, 165.2, 1008.0, 32.0),
    "cpu": Device(64.0, 1.0, 100.0, 10.0),
}
# What CUDA calls them -> the name above. An H100 on PCIe has another rate.
CUDA_NAMES = {
    r"H100 80GB HBM3": "h100-80g",
    r"H200(?! NVL)": "h200",
    r"A100.*80GB": "a100-80g",
    r"A100.*40GB": "a100-40g",
    r"L40S": "l40s",
    r"RTX 4090(?! D)": "rtx4090",
}


def parse_device(text: str, node_ranks: int = 1) -> Device:
    """A device by its name in the table, or as GiB:TFLOPS:GBps[:link GBps]. Raises UserError."""
    text = text.lower()
    if text == "cpu":  # this machine
        return at_hand(torch.device("cpu"), node_ranks)
    if text in DEVICES:
        return DEVICES[text]
    try:
        numbers = [float(number) for number in text.split(":")]
        device = Device(*numbers, *[32.0] * (4 - len(numbers)))
    except (ValueError, TypeError):
        numbers = []
    if not 3 <= len(numbers) <= 4 or not all(0 < number < float("inf") for number in numbers):
        raise UserError(
            f"--device_type={text} is not a device of the table",
            f"Give one of {', '.join(DEVICES)}, or GiB:TFLOPS:GBps[:link GBps]",
        )
    return device


def of(device: torch.device) -> Device | None:
    """What the table says of this device; None if it is not there, and for a CPU: those differ too much."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((DEVICES[kind] for pattern, kind in CUDA_NAMES.items() if re.search(pattern, name)), None)


def at_hand(device: torch.device, node_ranks: int) -> Device:
    """This rank's device with its own memory; a CPU is shared by the node's ranks.

    What the table lacks counts as an A100: a plan compares rates, and its memory is right.
    """
    if device.type == "cpu":
        cpu = DEVICES["cpu"]._replace(memory_gib=machine.memory().total / 2**30)
        shared = "memory_gib", "tflops", "memory_gbps"
        return cpu._replace(**{name: getattr(cpu, name) / node_ranks for name in shared})
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return (of(device) or DEVICES["a100-80g"])._replace(memory_gib=memory_gib)
