"""Checks a set-up, a line each: ok, warning or fault, with the fix; under torchrun, it measures collectives.

A check returns (status, detail, fix). Sizes are in bytes unless a name says otherwise.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from trainer import machine

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = (3, 10), (3, 12)  # the first and the last that were tested
STATUSES = ("ok", "warning", "fault")
PROBE_SECONDS, HUB_SECONDS, CLOCK_SECONDS = 120, 5, 1.0
GIB = 2**30


class Finding(NamedTuple):
    check: str
    status: str
    detail: str
    fix: str

    def __str__(self) -> str:
        return f"{self.status:8} {self.check:12} {self.detail}{self.fix and f': {self.fix}'}"


def examine(name: str, check: Callable[[], tuple[str, str, str]]) -> Finding:
    """Calls the check; whatever it raises is a fault."""
    try:
        return Finding(name, *check())
    except UserError as error:
        return Finding(name, "fault", " ".join(error.problem.split()), error.fix)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Finding(name, "fault", what, "read what failed above, or report it")


# ---------------------------------------------------------------- the machine


def installed(requirements: Path) -> dict[str, tuple]:
    """Package -> (the tested version's specifier, the version here or None), of those that Python needs."""
    from packaging.requirements import Requirement

    found = {}
    for line in requirements.read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate():
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                version = None
            found[wanted.name] = wanted.specifier, version
    return found


def versions(requirements: Path) -> tuple[str, str, str]:
    """Compares Python and the libraries with those that were tested."""
    found, fix = installed(requirements), f"pip install -r {requirements.name}"
    if missing := [name for name, (_, version) in found.items() if version is None]:
        return "fault", f"not installed: {', '.join(missing)}", fix
    python, words = sys.version_info[:2], ".".join(map(str, sys.version_info[:3]))
    if not PYTHONS[0] <= python <= PYTHONS[1]:
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        status = "fault" if python < PYTHONS[0] else "warning"
        return status, f"Python {words}, tested with {first} to {last}", f"make .venv with Python {last}"
    others = [
        f"{name} {version} (tested: {str(wanted).removeprefix('==')})"
        for name, (wanted, version) in found.items()
        if not wanted.contains(version, prereleases=True)
    ]
    if others:
        return "warning", f"not the tested versions: {', '.join(others)}", fix
    return "ok", f"Python {words}, torch {found['torch'][1]} and {len(found) - 1} more as tested", ""


def compiler(needed: bool) -> tuple[str, str, str]:
    """Compile and link a small library, as torch.compile does. needed: the flags ask for it."""
    problem = machine.compiler_problem()
    if problem is None:
        return "ok", "C++ compiler and Python.h work: torch.compile can build for the CPU", ""
    status = "fault" if needed else "warning"
    return status, f"no torch.compile ({problem})", "install g++ and python3-dev, or use --compile=off"


def host_name() -> tuple[str, str, str]:
    """Look up this machine's own name, which torchrun makes its address of."""
    name = machine.unresolved_host_name()
    if name is None:
        return "ok", "this machine's name has an address", ""
    problem = f"the name of this machine, {name}, has no address: torchrun alone waits for ever"
    return "warning", problem, f"torchrun --local-addr=127.0.0.1, or a line '127.0.0.1 {name}' in /etc/hosts"


def _precision() -> str:
    """Return what --precision=auto means on this rank's device, and why if that is fp32."""
    from trainer import parallel

    device = parallel.pick_device()
    if machine.computes_in_bf16(device):
        return "computes in bf16"
    return f"computes in fp32 ({machine.slow_bf16_reason(device)})"


def devices() -> tuple[str, str, str]:
    """Names the GPUs, with memory and driver, or else the CPU."""
    import torch

    driver, count = Path("/proc/driver/nvidia/version"), torch.cuda.device_count()
    if not count:
        memory = machine.memory()
        free = memory.free / GIB
        total = memory.total / GIB
        cpu = f"{machine.cores():g} CPU cores, {free:.1f} of {total:.1f} GiB free, {_precision()}"
        if driver.exists():
            what = f"the NVIDIA driver is here, but torch {torch.__version__} finds no CUDA device"
            return "warning", f"{what}; {cpu}", "install torch with CUDA, or unset CUDA_VISIBLE_DEVICES"
        return "ok", f"no GPU; {cpu}", ""
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    kinds = Counter(f"{device.name} ({device.total_memory / GIB:.1f} GiB)" for device in found)
    numbers = re.findall(r"\d+\.\d+[.\d]*", driver.read_text()) if driver.exists() else []
    told = f"driver {(numbers or ['unknown'])[0]}, CUDA {torch.version.cuda}, {_precision()}"
    listed = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if len(kinds) > 1:
        return "warning", f"{listed}; {told}", "use equal devices (CUDA_VISIBLE_DEVICES): the slowest decides"
    return "ok", f"{listed}; {told}", ""


def collectives(ranks: int) -> tuple[str, str, str]:
    """Starts so many ranks on this machine, which sum a tensor over nccl, or gloo on a CPU."""
    launcher = [sys.executable, *machine.ONE_MACHINE, f"--nproc_per_node={ranks}"]
    options = dict(cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True)
    fix = f"see what NCCL_DEBUG=INFO torchrun --nproc_per_node={ranks} -m tools.doctor says"
    try:
        done = subprocess.run([*launcher, "-m", "tools.doctor"], timeout=PROBE_SECONDS, **options)
    except subprocess.TimeoutExpired:  # the ranks end with torchrun
        return "fault", f"{ranks} ranks do not answer in {PROBE_SECONDS} s", fix
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = next((line for line in lines if "Error" in line), lines[-1]).strip()
        return "fault", f"{ranks} ranks cannot work together ({reason})", fix
    return "ok", done.stdout.splitlines()[-1], ""


def measure_collectives() -> str:
    """Sums a tensor over the ranks of the running group, and tells how fast. RuntimeError if it is wrong."""
    import torch
    import torch.distributed as dist

    from trainer import parallel

    device, ranks, times = parallel.pick_device(), dist.get_world_size(), 5
    on_cuda = device.type == "cuda"
    size = 2**24 if on_cuda else 2**21
    kinds = dict.fromkeys(("cpu", device.type))  # in one order on all ranks
    tensors = [torch.full((size,), dist.get_rank() + 1.0, device=kind) for kind in kinds]
    for tensor in tensors:  # this also makes all connections
        dist.all_reduce(tensor)
    right = all((tensor == ranks * (ranks + 1) / 2).all() for tensor in tensors)
    tensor = torch.zeros(size, device=device)
    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor)
    if on_cuda:
        torch.cuda.synchronize()
    sent = times * tensor.nbytes * 2 * (ranks - 1) / ranks  # by each rank, in a ring
    speed = sent / (time.perf_counter() - began) / 1e9
    if not right:
        raise RuntimeError(f"a sum over {ranks} ranks is wrong")
    name = "nccl and gloo" if on_cuda else "gloo"
    return f"{name} sum right over {ranks} ranks; each sends {speed:.2f} GB/s"


def clocks() -> tuple[str, str, str]:
    """Compares the hosts' clocks, right after a barrier of the running group."""
    import torch.distributed as dist

    from trainer import ranks

    ranks.gathered(None)
    dist.barrier()
    found = ranks.gathered((os.uname().nodename, time.time()))
    hosts = Counter(host for host, _ in found)
    told = ", ".join(f"{host} ({count} ranks)" for host, count in hosts.items())
    host, offset = max(
        ((host, moment - found[0][1]) for host, moment in found), key=lambda pair: abs(pair[1])
    )
    if abs(offset) > CLOCK_SECONDS:
        fix = "synchronize the clocks (chronyd or another NTP client)"
        return "warning", f"{told}; the clock of {host} is {offset:+.1f} s off that of {found[0][0]}", fix
    return "ok", f"{told}; clocks within {1000 * abs(offset):.0f} ms", ""


# ---------------------------------------------------------------- what a run needs


def hub(files: dict[str, str]) -> tuple[str, str, str]:
    """Asks the hub for the head of a file of each repository. Without a network that is a warning."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    from downloads import HUB_FIXES, hub_fix, hub_trouble

    token = get_token()
    has = "a token is set" if token else "no token (HF_TOKEN) is set"
    for repo, file in files.items():
        try:
            get_hf_file_metadata(hf_hub_url(repo, file), token=token or False, timeout=HUB_SECONDS)
        except Exception as error:
            if (trouble := hub_trouble(error)) is None:
                raise
            status = "fault" if trouble in HUB_FIXES else "warning"
            return status, f"{repo} cannot be had, {trouble}; {has}", hub_fix(trouble, repo)
    return "ok", f"{', '.join(files)}: access; {has}" if files else "nothing is read from the hub", ""


def memory(needed: int, what: str, fix: str) -> tuple[str, str, str]:
    """Compares what a run takes of this host's memory with what is free."""
    has = machine.memory().free
    told = f"{what} {needed / GIB:.2f} GiB of this host, {has / GIB:.2f} are free"
    return ("ok", told, "") if needed <= has else ("fault", told, fix)


def disk(folder: Path, size: int, count: int) -> tuple[str, str, str]:
    """Has the folder, or where it would be made, room for so many checkpoints of that size?"""
    place = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return "fault", f"{folder} cannot be written to", "name another --save_dir"
    free = shutil.disk_usage(place).free
    told = f"{count} x {size / GIB:.2f} GiB of checkpoints in {folder}, {free / GIB:.2f} GiB are free"
    if count * size <= free:
        return "ok", told, ""
    keep = free // size - 2  # beside the best one, and the one that is written
    fix = f"--keep_last_n_checkpoints={keep}, or " if keep > 0 else ""
    return "fault", told, f"{fix}make room, or name another --save_dir"


def labels(rows, collate: Callable, ends: set[int]) -> tuple[str, str, str]:
    """Compares what the collator makes of samples with a shift by hand: what a token is to predict.

    rows: with input_ids, document_starts and loss_mask. ends: ids that end a text or a turn.
    """
    from llama3.loss import IGNORED

    possible = targets = seen = learned = 0
    for number, row in enumerate(rows):
        ids, starts, mask = (row[name].tolist() for name in ("input_ids", "document_starts", "loss_mask"))
        batch, starts, first = collate([row]), {0, *starts}, 0
        found, positions = (batch[name][0].tolist() for name in ("labels", "position_ids"))
        for token, follower in enumerate([*ids[1:], None]):
            first = token if token in starts else first  # of the token's document
            if positions[token] != token - first:
                return "fault", f"sample {number}: token {token} has position {positions[token]}", BROKEN
            follows = follower is not None and token + 1 not in starts
            is_target = follows and bool(mask[token + 1])
            if found[token] != (follower if is_target else IGNORED):
                return "fault", f"sample {number}: the label of token {token} is not the next token", BROKEN
            is_end = follows and follower in ends
            possible, targets = possible + follows, targets + is_target
            seen, learned = seen + is_end, learned + (is_end and is_target)
    masked = f"{1 - targets / max(1, possible):.1%} masked"
    told = f"{len(rows)} samples: labels are the next tokens, {masked}, {learned} of {seen} ends learned"
    if not targets or (seen and not learned):
        lost = "no end of a text or an answer" if targets else "nothing"
        return (
            "fault",
            f"{told}; {lost} is learned",
            "give data with answers or texts, and prepare them again",
        )
    return "ok", told, ""


BROKEN = "report it, with the command that prepared the data"


if __name__ == "__main__":
    from trainer import ranks

    with ranks.process_group(PROBE_SECONDS):
        told = measure_collectives()
        if os.environ["RANK"] == "0":
            print(told, flush=True)
