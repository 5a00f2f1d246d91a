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


def run_rank(rank: int, port: int, flags: list[str], log: Path) -> None:
    address = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **address)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(train.main(flags))


def start(flags: list[str], log: Path) -> list:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port, fork = free.getsockname()[1], multiprocessing.get_context("fork").Process
    ranks = [fork(target=run_rank, args=(rank, port, flags, log)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def newest_step(save_dir: Path) -> int:
    """The step from which --resume_from=last would continue, after a full check; 0: none."""
    for path in checkpoint.candidates(save_dir, "last"):
        source = checkpoint.Checkpoint.open(path)  # the first must be good: no kill damages a finished one
        source.verify()
        return source.state["step"]
    return 0


def main(out: Path, kills: int, seed: int, flags: list[str]) -> None:
    draw, save_dir, log, during_save = random.Random(seed), out / "ckpt", out / "log.txt", 0
    flags = [*flags, *outputs(out), "--resume_from=last"]
    endless = [*flags, "--max_train_steps=1000000", "--save_every_n_train_steps=1"]
    endless += ["--keep_last_n_checkpoints=2"]
    for number in range(kills):
        before = newest_step(save_dir)
        log.write_text("")
        ranks = start([*endless, f"--async_save={draw.choice(['on', 'off'])}"], log)
        begun = f"resumed from {save_dir.resolve()}" if before else "train_loss="

        def wait(condition, ranks=ranks):
            wait_for(condition, lambda: all(rank.is_alive() for rank in ranks), log)

        wait(lambda begun=begun: begun in log.read_text())
        if number % 4:  # three of four: as soon as a save is under way, and a little later
            wait(lambda: any(save_dir.glob(".saving-*")))
        time.sleep(draw.uniform(0, 0.015 if number % 4 else 0.4))
        reached = checkpoint.step_of((save_dir / "last").resolve()) or 0
        for rank in draw.sample(ranks, 2):
            rank.kill()
            time.sleep(draw.choice([0, 0, 0.02]))
        for rank in ranks:
            rank.join()
        during_save += any(save_dir.glob(".saving-*"))
        said, after = log.read_text(), newest_step(save_dir)
        assert "WARNING" not in said.replace("OMP_NUM_THREADS", ""), said
        assert not before or f"step {before}," in said, f"step {before} was whole, but:\n{said}"
        assert after >= reached, f"step {reached} was whole before the kill, {after} after it"
    last = newest_step(save_dir) + 3
    for rank in start([*flags, f"--max_train_steps={last}"], log):
        rank.join()
        assert rank.exitcode == 0, log.read_text()[-3000:]
    print(json.dumps({"kills": kills, "during_save": during_save, "seed": seed, "steps": last}))


if __name__ == "__main__":
    import_all()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
