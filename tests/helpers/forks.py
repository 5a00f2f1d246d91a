"""Starts processes by forking the zygote, with the interface of subprocess.Popen."""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Read while modules are imported, which the zygote has done: a process with another value starts for real.
READ_AT_IMPORT = {"HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HOME", "LANG", "LC_ALL", "TMPDIR"}
READ_AT_IMPORT |= {"ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
SECONDS_TO_LEAVE = 30  # torchrun's own, between SIGTERM and SIGKILL

os.environ.setdefault("OMP_NUM_THREADS", "1")  # four ranks fit two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without what torchrun sets, and without CUDA devices."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("TORCHELASTIC")}
    return {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def free_port() -> int:
    """Return a port that nobody takes by chance: below those that the kernel gives out."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start_process(command: list, **options) -> subprocess.Popen:
    """Start a new interpreter or another program. Ctrl-C reaches it even where the tests ignore it."""

    def attend():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `nohup` and `&` leave it ignored

    options = dict(cwd=ROOT, env=environment()) | options
    return subprocess.Popen([*map(str, command)], preexec_fn=attend, **options)


class Zygote:
    """The process that forks, and what it has said of its children. It starts with the first of them."""

    def __init__(self):
        self.process = None
        self.environment: dict[str, str] = {}
        self.codes: dict[int, int] = {}  # process id -> exit code
        self.unread = b""

    def open(self) -> None:
        """Start the process, unless it runs."""
        if self.process:
            return
        self.environment = environment()
        self.channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "helpers.zygote", str(theirs.fileno())]
            paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
            streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            options = dict(cwd=ROOT, env=self.environment | paths, pass_fds=[theirs.fileno()])
            self.process = subprocess.Popen(command, **streams, **options)

    def close(self) -> None:
        """End the process, and with it what it forked."""
        if self.process:
            self.channel.close()
            self.process.wait(60)
            self.process = None

    def read(self, seconds: float | None) -> list[dict]:
        """Return the next messages; none if there is none in that time."""
        ready, _, _ = select.select([self.channel], [], [], seconds)
        if not ready:
            return []
        data = self.channel.recv(65536)
        if not data:
            raise RuntimeError(f"the zygote has ended with code {self.process.wait()}")
        *lines, self.unread = (self.unread + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        for message in messages:
            if "code" in message:
                self.codes[message["pid"]] = message["code"]
        return messages

    def fork(self, start: dict) -> int:
        """Return the process id of a new child."""
        self.channel.sendall(json.dumps(start).encode() + b"\n")
        while True:
            for message in self.read(None):
                if "code" not in message:
                    self.codes.pop(message["pid"], None)  # of a process that had the number before
                    return message["pid"]


ZYGOTE = Zygote()


class Fork:
    """One process."""

    def __init__(self, argv: list, env: dict[str, str], stdout, stderr, stdin=os.devnull, **options):
        ZYGOTE.open()
        changed = {name for name in READ_AT_IMPORT if env.get(name) != ZYGOTE.environment.get(name)}
        assert not changed, f"{changed}: read at import, which a fork has behind it: start it with real=True"
        start = dict(argv=[*map(str, argv)], env=env, cwd=str(ROOT), file_size=0) | options
        start |= dict(stdin=str(stdin), stdout=str(stdout), stderr=str(stderr))
        self.args = ["python", *start["argv"]]
        self.pid = ZYGOTE.fork(start)
        self.returncode = None

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        while self.returncode is None:
            messages = ZYGOTE.read(0)
            self.returncode = ZYGOTE.codes.pop(self.pid, None)
            if not messages:
                break
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code of the process once it has ended."""
        deadline = time.monotonic() + (timeout or 1e6)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            ZYGOTE.read(min(1.0, max(0.0, deadline - time.monotonic())))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may end meanwhile
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Ranks:
    """The ranks of a node, started and ended as torchrun does: one that fails ends all, with code 1.

    env: that of all ranks. node, nodes: its number, and how many there are, which share a port.
    """

    def __init__(self, count, argv, env, stdout, stderr, node=0, nodes=1, port=None, **options):
        common = dict(WORLD_SIZE=count * nodes, LOCAL_WORLD_SIZE=count, GROUP_RANK=node)
        common |= dict(GROUP_WORLD_SIZE=nodes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port or free_port())
        self.ranks = []
        for rank in range(count):
            own = common | dict(RANK=node * count + rank, LOCAL_RANK=rank)
            texts = {name: str(value) for name, value in own.items()}
            self.ranks.append(Fork(argv, env | texts, stdout, stderr, **options))
        self.args = self.ranks[0].args
        self.deadline = None  # of those that go on after another has failed

    def poll(self) -> int | None:
        """Return the exit code; None while a rank runs. Ends the others if one has failed."""
        codes = [rank.poll() for rank in self.ranks]
        if any(codes) and None in codes:
            if self.deadline is None:
                self.send_signal(signal.SIGTERM)
                self.deadline = time.monotonic() + SECONDS_TO_LEAVE
            elif time.monotonic() > self.deadline:
                self.kill()
        if None in codes:
            return None
        return int(any(codes))

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code of the ranks once all have ended."""
        deadline = time.monotonic() + (timeout or 1e6)
        while True:
            code = self.poll()
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            ZYGOTE.read(0.1)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
