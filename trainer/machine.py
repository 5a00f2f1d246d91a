"""The limits of this machine: memory, cores, bf16, home folder, compiler and host name."""

import getpass
import logging
import math
import os
import re
import shutil
import socket
import stat
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

COMPILER_SECONDS = 60
# torchrun's address is otherwise this machine's name, which has none in some containers and laptops.
TORCHRUN_FLAGS = ("--local-addr=127.0.0.1",)
ONE_MACHINE = ("-m", "torch.distributed.run", *TORCHRUN_FLAGS)  # starts a script's ranks with python


class Memory(NamedTuple):
    """Main memory in bytes: all that this process may use, and the part of it that is free."""

    total: int
    free: int


# ---------------------------------------------------------------- memory and cores


def memory(root: Path = Path("/")) -> Memory:
    """Return the least of the host's memory and of the limits of this process's cgroups.

    root: the folder that holds proc/ and sys/.
    """
    meminfo = (root / "proc/meminfo").read_text()
    total = _kibibytes(meminfo, "MemTotal")
    free = _kibibytes(meminfo, "MemAvailable")
    for folder in _cgroup_folders(root, "memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        usage = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or usage is None:
            continue
        total = min(total, limit)
        # The kernel drops cached file contents before it kills a process.
        free = min(free, max(0, limit - usage + _cached_file_bytes(folder)))
    return Memory(total, free)


def cores(root: Path = Path("/")) -> float:
    """Return the cores that this process may use: the least of its affinity and its cgroups' quotas."""
    number = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup_folders(root, "cpu"):
        quota = _quota(folder)
        if quota is not None:
            number = min(number, quota)
    return number


def worker_processes() -> int:
    """Return how many processes keep the cores busy."""
    return max(1, math.ceil(cores()))


def _kibibytes(meminfo: str, name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", meminfo)[1]) * 1024


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of all above it, of both versions of cgroups.

    Inside a container /proc/self/cgroup may name the host's path, which is not mounted there: the folders
    that exist count, and the mount's root is one of them.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        folders.append(mount)
        for part in Path(path).parts[1:]:
            folders.append(folders[-1] / part)
    return [folder for folder in folders if folder.is_dir()]


def _number(folder: Path, *names: str) -> int | None:
    """Return the number in the first of these files that exists; None if it holds no number, as 'max'."""
    for name in names:
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def _cached_file_bytes(folder: Path) -> int:
    """Return the bytes of file contents that the kernel can drop."""
    try:
        statistics = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    # Version 1 counts the groups below in the total alone.
    for name in ("total_inactive_file", "inactive_file"):
        match = re.search(rf"^{name} (\d+)$", statistics, re.MULTILINE)
        if match:
            return int(match[1])
    return 0


def _quota(folder: Path) -> float | None:
    """Return the cores that a cgroup's CPU quota is worth; None without a quota."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        quota = _number(folder, "cpu.cfs_quota_us")
        period = _number(folder, "cpu.cfs_period_us")
    if quota in (None, "max") or not period:
        return None
    return int(quota) / int(period)


# ---------------------------------------------------------------- bf16


def computes_in_bf16(device: "torch.device") -> bool:
    """Return whether the device has fast bf16 matrix products, as torch's own dispatch decides it.

    Elsewhere torch only emulates them: on a CPU with AVX2 alone they take 5 to 100 times as long as fp32's.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # another torch may have renamed the private operator
        capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bw") or capabilities.get("bf16"))  # x86, Arm


def preferred_precision(device: "torch.device") -> str:
    """Return what --precision=auto means on the device: bf16 where it computes in it, else fp32."""
    return "bf16" if computes_in_bf16(device) else "fp32"


def slow_bf16_reason(device: "torch.device") -> str:
    """Return why a device without bf16 is slow in it, for people."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} only emulates bf16"
    return "this CPU has no fast bf16"


# ---------------------------------------------------------------- home folder


def provide_home() -> None:
    """Point HOME to a folder below the temporary one where this user has no home folder.

    Containers started with a bare user id have none, and every library's cache asks for it.
    """
    if _home_exists():
        return
    folder = Path(tempfile.gettempdir(), f"train-home-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return  # whoever needs a cache names the folder that it cannot write
    if not _is_private(folder):
        folder = Path(tempfile.mkdtemp(prefix="train-home-"))
    os.environ["HOME"] = str(folder)
    os.environ.setdefault("USER", str(os.getuid()))  # libraries name their caches by it
    logger.warning("user id %d has no home folder: caches go to %s", os.getuid(), folder)


def _home_exists() -> bool:
    try:
        Path.home()
        getpass.getuser()
    except (RuntimeError, KeyError, OSError):
        return False
    return True


def _is_private(folder: Path) -> bool:
    """Return whether the folder is this user's alone, and no link."""
    status = folder.lstat()
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and mode & 0o077 == 0


# ---------------------------------------------------------------- compiler and host name


def compiler_problem() -> str | None:
    """Return why torch.compile cannot build C++ for the CPU, in a few words; None: it can.

    Compiles and links a shared library that includes Python.h, as torch.compile does.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"{compiler} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        include = sysconfig.get_path("include")
        command = [compiler, "-shared", "-fPIC", f"-I{include}", "-x", "c++", "-", "-o", f"{folder}/probe.so"]
        try:
            process = subprocess.run(
                command,
                input="#include <Python.h>\n#include <cmath>\n",
                capture_output=True,
                text=True,
                timeout=COMPILER_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler} does not run: {error}"
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        return lines[0] if lines else f"{compiler} exits with {process.returncode}"
    return None


def unresolved_host_name() -> str | None:
    """Return this machine's name if no address belongs to it, else None."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return name
    return None
