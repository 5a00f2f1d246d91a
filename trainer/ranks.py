"""The ranks of a run: they join, compare what they run, fail together, and watch for signals and hangs."""

import contextlib
import ipaddress
import itertools
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import TrainingFailed, UserError
from trainer import parallel
from trainer.ending import complain, end_with_torchrun

logger = logging.getLogger(__name__)

WARNING_SECONDS = 30
CONNECT_TIMEOUT = timedelta(seconds=5)  # to a store that may be that of a dead rank


@contextlib.contextmanager
def process_group(timeout_seconds: int = 600) -> Iterator[None]:
    """Joins torchrun's process group, or makes one of a single rank; keeps the caller's if there is one.

    A collective may take twenty times the timeout: `Watchdog` watches the steps. Ends the group only after
    success: after an error, the other ranks may never come to its end.
    """
    if dist.is_initialized():
        yield
        return
    device, backend = parallel.pick_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
        return
    end_with_torchrun()
    timeout = timedelta(seconds=20 * timeout_seconds)  # the watchdog comes before
    store, rank, world_size = _rendezvous(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield
    if dist.is_initialized():  # nnScaler ends it
        dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return a store that only the ranks of this start use, this rank, and their number.

    torchrun's own store outlives a restart, and holds the addresses of the ranks that died.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    is_one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    if not is_one_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank = int(os.environ["RANK"])
        return _fresh_store(rank, world_size, timeout), rank, world_size
    store, rank, world_size = next(dist.rendezvous("env://"))
    if is_one_node:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt-{attempt}", store)
    return store, rank, world_size


def _fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return a store that rank 0 makes, whose address the others read in torchrun's.

    Nodes count restarts differently, so that no key of torchrun's store names this start: what the others
    read may be the address of a rank 0 that has died. It answers nobody, and they read again.
    """
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    shared = dist.PrefixStore("train", dist.TCPStore(host, port, world_size, False, timeout))
    if rank == 0:
        own_host = _address_towards(host, port)
        if ipaddress.ip_address(own_host.partition("%")[0]).is_loopback:
            own_host = host  # this machine's name leads to itself here, and to this machine elsewhere
        own = dist.TCPStore(own_host, 0, world_size, True, timeout, wait_for_workers=False)
        token = uuid.uuid4().hex
        own.set("token", token)
        shared.set("address", f"{own_host} {own.port} {token}")
        return own
    began = time.monotonic()
    is_warned = False
    while True:
        own_host, own_port, token = shared.get("address").decode().split()
        try:
            own = dist.TCPStore(own_host, int(own_port), world_size, False, CONNECT_TIMEOUT)
            if own.get("token").decode() == token:
                own.set_timeout(timeout)
                return own
        except RuntimeError:
            waited = time.monotonic() - began
            if waited > timeout.total_seconds():
                raise
            if waited > WARNING_SECONDS and not is_warned:
                is_warned = True
                logger.error("rank %d cannot reach rank 0 at %s:%s, and tries on", rank, own_host, own_port)
        time.sleep(0.2)


def _address_towards(host: str, port: int) -> str:
    """Return this machine's address on the way to the host. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def together(action: Callable, *args, group=None):
    """Calls the action on every rank and returns its result; what one rank raises, all raise."""
    result, told = None, None
    try:
        result = action(*args)
    except (UserError, OSError, TrainingFailed) as error:
        told = error
    gathered(told, group)
    return result


def gathered(mine, group=None) -> list:
    """What each rank gives; raises the first exception among that."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group)
    for error in found:
        if isinstance(error, Exception):
            raise error
    return found


def by_first_rank(action: Callable, *args, group=None):
    """Rank 0 calls the action; all ranks return its result, or raise what it raised."""
    mine = action if dist.get_rank() == 0 else lambda *_: None
    return gathered(together(mine, *args, group=group), group)[0]


def compare(mine: dict) -> None:
    """Raises the same UserError on all ranks if a value differs from rank 0's."""
    found = gathered((os.uname().nodename, mine))
    for rank, (node, values) in enumerate(found):
        for name, first in found[0][1].items():
            if values.get(name) != first:
                raise UserError(
                    f"rank {rank} on {node} has {name} {values.get(name)!r}, rank 0 has {first!r}",
                    "Start every node with the same command, data and checkpoints",
                )


class Watchdog:
    """Ends this rank, and says which one hangs, if a step takes too long.

    A rank that waits in a collective sees no signal, but its threads run. Each rank's thread tells the
    group's store every second that it lives, and what the rank does.
    """

    def __init__(self, seconds: float):
        self.seconds, self.stopped = seconds, threading.Event()
        self._store = dist.distributed_c10d._get_default_store()
        self.note("starting", 10)
        self._beat(0)
        if dist.get_world_size() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def note(self, what: str, times: int = 1) -> None:
        """The rank begins something that may take so many times the timeout."""
        self._doing, self._limit = what, time.monotonic() + times * self.seconds

    def _beat(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # torchrun, which has the store, is gone
            self._store.set(f"alive-{dist.get_rank()}", f"{number} {self._doing} on {os.uname().nodename}")

    def _watch(self) -> None:
        for number in itertools.count(1):
            if self.stopped.wait(1):
                return
            self._beat(number)
            if time.monotonic() > self._limit:
                waited = f"rank {dist.get_rank()} waits in vain in {self._doing} (--timeout_seconds)"
                complain(f"{waited}: {self._suspects()}; resume with --resume_from=last", 1, curable=True)
                os._exit(1)

    def _suspects(self) -> str:
        """The ranks that are silent; if none is, those that do something else than this one."""
        keys = [f"alive-{rank}" for rank in range(dist.get_world_size())]
        try:
            before = self._store.multi_get(keys)
            time.sleep(5)
            after = self._store.multi_get(keys)
        except RuntimeError as error:
            return f"nobody can tell why ({error})"
        told = [text.decode().split(" ", 1)[1] for text in after]
        silent = [n for n in range(len(keys)) if before[n] == after[n] and n != dist.get_rank()]
        behind = [rank for rank in range(len(keys)) if told[rank].split(" on ")[0] != self._doing]
        found = [f"rank {rank} ({told[rank]})" for rank in (silent or behind)[:8]]
        return f"{', '.join(found) or 'no rank'} {'is silent' if silent else 'does something else'}"


@contextlib.contextmanager
def noted_signals() -> Iterator[dict[int, bool]]:
    """Yields {SIGTERM, SIGINT, SIGUSR1: arrived?}. All ranks act on them together, after the step.

    Whoever presses Ctrl-C again leaves at once; torchrun passes the second one on as a SIGTERM.
    """
    arrived = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), False)
    interrupted = []  # when. Wrappers may pass a single Ctrl-C on twice, within milliseconds.

    def note(number, frame):
        if interrupted and number != signal.SIGUSR1 and time.monotonic() - interrupted[0] > 1:
            os._exit(128 + number)
        if number == signal.SIGINT:
            interrupted.append(time.monotonic())
        arrived[number] = True

    before = {number: signal.signal(number, note) for number in arrived}
    try:
        yield arrived
    finally:
        for number in before:
            signal.signal(number, before[number])
