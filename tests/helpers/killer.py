"""Kills runs of two ranks at random moments and resumes each time: python killer.py OUT KILLS SEED FLAGS...

Forks the ranks from this process, which has imported everything, so that a start takes a fraction of a
second. Checks after each kill what is left, and prints a JSON summary.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from pathlib import Path

from helpers.runs import import_all, outputs, wait_for

import train
from trainer import checkpoint


def run_rank(rank: int, port: int, flags: list[str]) -> None:
    address = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **address)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(train.main(flags))


def start(*flags: str) -> list:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port, fork = free.getsockname()[1], multiprocessing.get_context("fork").Process
    ranks = [fork(target=run_rank, args=(rank, port, [*common, *flags])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def newest_step() -> int:
    """The step from which --resume_from=last would continue, after a full check; 0: none."""
    for path in checkpoint.candidates(save_dir, "last"):
        source = checkpoint.Checkpoint.open(path)  # the first must be good: no kill damages a finished one
        source.verify()
        return source.state["step"]
    return 0


def kill_one_run(in_save: bool) -> bool:
    """Returns whether the kill hit a save. in_save: it comes when a save is under way, or a little later."""
    before = newest_step()
    log.write_text("")
    saves = ["--save_every_n_train_steps=1", "--keep_last_n_checkpoints=2"]
    ranks = start(*saves, "--max_train_steps=1000000", f"--async_save={draw.choice(['on', 'off'])}")
    begun = f"resumed from {save_dir.resolve()}" if before else "train_loss="
    going_on = lambda: all(rank.is_alive() for rank in ranks)  # noqa: E731
    wait_for(lambda: begun in log.read_text(), going_on, log)
    if in_save:
        wait_for(lambda: any(save_dir.glob(".saving-*")), going_on, log)
    time.sleep(draw.uniform(0, 0.015 if in_save else 0.4))
    link = save_dir / "last"
    reached = checkpoint.step_of(link.readlink()) if link.is_symlink() else 0
    for rank in draw.sample(ranks, 2):
        rank.kill()
        time.sleep(draw.choice([0, 0, 0.02]))
    for rank in ranks:
        rank.join()
    hit, said, after = any(save_dir.glob(".saving-*")), log.read_text(), newest_step()
    assert "WARNING" not in said.replace("OMP_NUM_THREADS", ""), said
    assert not before or f"step {before}," in said, f"step {before} was whole, but:\n{said}"
    assert after >= reached, f"step {reached} was whole before the kill, {after} after it"
    return hit


import_all()
out, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
save_dir, log, common = out / "ckpt", out / "log.txt", [*sys.argv[4:], *outputs(out), "--resume_from=last"]
hits = sum(kill_one_run(in_save=number % 4 > 0) for number in range(kills))
last = newest_step() + 3
for process in start(f"--max_train_steps={last}"):
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
print(json.dumps({"kills": kills, "during_save": hits, "seed": sys.argv[3], "steps": last}))
