"""Kills training runs of two ranks at random moments, resumes each time, and checks what is left: python killer.py OUT KILLS SEED FLAGS...

Ranks are forked from this process, which has imported everything: a start costs a fraction of a second. Prints a JSON summary.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import trainer.trainer  # noqa: E402, F401
from trainer import checkpoint  # noqa: E402

RANKS = 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(argv: list[str], log: Path) -> list[int]:
    """Forks the ranks of one run; their output goes to the log."""
    port, processes = free_port(), []
    for rank in range(RANKS):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import train

        code = 1
        try:
            code = train.main(argv)
        finally:
            os._exit(code)
    return processes


def ended(process: int) -> bool:
    return os.waitpid(process, os.WNOHANG)[0] == process


def kill(processes: list[int], draw: random.Random) -> None:
    for index, process in enumerate(draw.sample(processes, len(processes))):
        if index:
            time.sleep(draw.choice([0, 0, 0.02]))
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def newest_step(save_dir: Path) -> int:
    """The step that --resume_from=last would continue from, after a full check; 0: none."""
    for path in checkpoint.candidates(save_dir, "last"):
        source = checkpoint.Checkpoint.open(
            path
        )  # the first one must be good: nothing here damages a finished checkpoint
        source.verify()
        return source.state["step"]
    return 0


def wait_for(condition, processes: list[int], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert not ended(process), f"a rank ended by itself:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"no progress:\n{log.read_text()[-3000:]}"
        time.sleep(0.0005)


def main(out: Path, kills: int, seed: int, flags: list[str]) -> None:
    draw, save_dir, during_save, log = random.Random(seed), out / "ckpt", 0, out / "log.txt"
    flags = [*flags, f"--save_dir={save_dir}", f"--log_dir={out / 'log'}"]
    for number in range(kills):
        before = newest_step(save_dir)
        log.write_text("")
        asynchronous = draw.choice(["on", "off"])
        saves = [
            "--save_every_n_train_steps=1",
            "--keep_last_n_checkpoints=2",
            f"--async_save={asynchronous}",
        ]
        processes = start([*flags, *saves, "--max_train_steps=1000000", "--resume_from=last"], log)
        begun = f"resumed from {save_dir.resolve()}" if before else "train_loss="
        wait_for(lambda: begun in log.read_text(), processes, log)  # noqa: B023
        if number % 4:  # three of four: as soon as a save is under way, and a little later
            wait_for(lambda: any(save_dir.glob(".saving-*")), processes, log)
            time.sleep(draw.uniform(0, 0.015))
        else:
            time.sleep(draw.uniform(0, 0.4))
        reached = os.readlink(save_dir / "last") if (save_dir / "last").is_symlink() else "0000-0000"
        kill(processes, draw)
        during_save += any(save_dir.glob(".saving-*"))
        text = log.read_text()
        assert "WARNING" not in text.replace("OMP_NUM_THREADS", ""), text
        if before:
            assert f"step {before}," in text, f"step {before} was whole, but:\n{text}"
        after = newest_step(save_dir)
        assert after >= int(reached.split("-")[1]), (
            f"step {reached} was whole before the kill, {after} after it"
        )
    last = newest_step(save_dir) + 3
    for process in start([*flags, f"--max_train_steps={last}", "--resume_from=last"], log):
        assert os.waitpid(process, 0)[1] == 0, log.read_text()[-3000:]
    print(json.dumps({"kills": kills, "during_save": during_save, "seed": seed, "steps": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
