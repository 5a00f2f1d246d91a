"""Runs that are killed, stopped and restarted lose nothing and end as if undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.runs import ROOT, environment, make_model, python, rows, run_cases, torchrun

import train
from trainer.checkpoint import Checkpoint
from trainer.sampler import load_batches

EXACT = ("train_loss", "lr", "gnorm", "tokens", "epoch")


def exact(log_dir):
    return {step: tuple(row[key] for key in EXACT) for step, row in rows(log_dir, "train_loss").items()}


def same_weights(one, other):
    one, other = (dict(Checkpoint.open(folder / "last").parameters()) for folder in (one, other))
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.fixture(scope="module")
def heavier(prepared, tmp_path_factory):
    """Flags of a model whose save takes a little while: some 20 MB of weights and optimizer."""
    folder = make_model(tmp_path_factory.mktemp("heavier") / "model", hidden_size=256, intermediate_size=512)
    return [f"--model_id={folder}", f"--dataset_path={prepared}", "--max_seq_len=32", "--precision=fp32", "--global_batch_size=4",
            "--max_val_samples=2"]  # fmt: skip


def fuzz(heavier, folder, kills):
    seed = int(os.environ.get("KILL_SEED", int.from_bytes(os.urandom(3), "big")))
    done = python("tests/helpers/killer.py", folder, kills, seed, *heavier, timeout=1500)
    summary = json.loads(done.stdout.splitlines()[-1])
    print(summary)
    assert summary["kills"] == kills and summary["during_save"] >= kills // 2, summary
    steps = summary["steps"]
    undisturbed = [
        *heavier,
        f"--max_train_steps={steps}",
        f"--save_dir={folder / 'whole'}",
        f"--log_dir={folder / 'whole-log'}",
    ]
    run_cases(folder, 2, {"whole": undisturbed})
    assert exact(folder / "log") == exact(folder / "whole-log") and len(exact(folder / "log")) == steps
    assert same_weights(folder / "ckpt", folder / "whole")


def test_killed_at_random_moments_a_run_continues_from_a_whole_checkpoint(heavier, tmp_path):
    fuzz(heavier, tmp_path, int(os.environ.get("KILLS", 12)))


@pytest.mark.slow
def test_killed_more_than_a_hundred_times_a_run_loses_nothing(heavier, tmp_path):
    fuzz(heavier, tmp_path, int(os.environ.get("KILLS", 120)))


@pytest.fixture
def launch():
    """Starts python with these arguments in the background; what still runs after the test is ended."""
    started = []

    def start(*argv):
        command = [sys.executable, *map(str, argv)]
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for pid in [*workers(process), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.wait()


def on_two_ranks(*argv):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv]


def workers(launcher) -> list[int]:
    """Process ids of the ranks that a torchrun started, by rank."""
    with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as f:
        children = f.read().split()

    def rank(pid):
        with open(f"/proc/{pid}/environ", "rb") as f:
            return next(
                (int(v.split(b"=")[1]) for v in f.read().split(b"\0") if v.startswith(b"RANK=")), None
            )

    return [int(pid) for _, pid in sorted((rank(pid), pid) for pid in children if rank(pid) is not None)]


def wait_for_step(log_dir, step, launcher, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and launcher.poll() is None:
        path = log_dir / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{launcher.communicate()[0]}")


@pytest.mark.parametrize("whom", ["torchrun", "one rank"])
def test_sigterm_saves_and_stops_at_a_step_of_all_ranks(launch, heavier, tmp_path, whom):
    run = [*heavier, f"--save_dir={tmp_path / 'ckpt'}", f"--log_dir={tmp_path / 'log'}"]
    launcher = launch(*on_two_ranks("train.py", *run, "--max_train_steps=100000"))
    wait_for_step(tmp_path / "log", 3, launcher)
    if whom == "torchrun":
        launcher.send_signal(signal.SIGTERM)
    else:
        os.kill(workers(launcher)[1], signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 1, said  # torchrun's own
    stopped = max(exact(tmp_path / "log"))
    assert f"SIGTERM: saved step {stopped}" in said
    source = Checkpoint.open(tmp_path / "ckpt" / "last")
    source.verify()
    assert source.state["step"] == stopped
    run_cases(tmp_path, 2, {"rest": [*run, "--resume_from=last", f"--max_train_steps={stopped + 3}"]})
    whole = [f"--save_dir={tmp_path / 'whole'}", f"--log_dir={tmp_path / 'whole-log'}"]
    run_cases(tmp_path, 2, {"whole": [*heavier, *whole, f"--max_train_steps={stopped + 3}"]})
    assert exact(tmp_path / "log") == exact(tmp_path / "whole-log")
    assert same_weights(tmp_path / "ckpt", tmp_path / "whole")


def test_a_rank_stopped_by_sigterm_exits_with_143(launch, heavier, tmp_path):
    process = launch(
        "train.py",
        *heavier,
        "--max_train_steps=100000",
        f"--save_dir={tmp_path / 'c'}",
        f"--log_dir={tmp_path / 'log'}",
    )
    wait_for_step(tmp_path / "log", 2, process)
    process.send_signal(signal.SIGUSR1)  # saves, and goes on
    deadline = time.monotonic() + 30
    while not (tmp_path / "c" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    saved = Checkpoint.open(tmp_path / "c" / "last").state["step"]
    wait_for_step(tmp_path / "log", saved + 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in said, said
    assert Checkpoint.open(tmp_path / "c" / "last").state["step"] > saved


def test_sigterm_does_not_wait_for_the_end_of_a_validation(flags, tmp_path, monkeypatch):
    def trainer(name, *more):
        folders = [f"--save_dir={tmp_path / name / 'ckpt'}", f"--log_dir={tmp_path / name / 'log'}"]
        every = ["--save_every_n_train_steps=2", "--max_train_steps=5", "--global_batch_size=4"]
        return train.build_trainer(train.parse_args([*flags, *every, *folders, *more]))

    stopped, seen = trainer("stopped"), []

    def stop_in_the_second_validation(dataset, *rest):
        for batch in load_batches(dataset, *rest):
            if dataset is stopped.val_set:
                seen.append(stopped.state.step)
            if seen.count(4) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr("trainer.trainer.load_batches", stop_in_the_second_validation)
        stopped.run()
    assert left.value.code == 143 and seen.count(4) == 2 < seen.count(2)
    ckpt, whole = tmp_path / "stopped" / "ckpt", tmp_path / "whole" / "ckpt"
    assert [Checkpoint.open(ckpt / link).state["step"] for link in ("last", "best")] == [4, 2]
    assert list(rows(tmp_path / "stopped" / "log", "val_loss")) == [2]
    trainer("stopped", "--resume_from=last").run()
    trainer("whole").run()
    assert list(rows(tmp_path / "whole" / "log", "val_loss")) == [2, 4, 5]
    for key in ("train_loss", "val_loss"):
        one, other = (rows(tmp_path / name / "log", key) for name in ("stopped", "whole"))
        assert {step: row[key] for step, row in one.items()} == {
            step: row[key] for step, row in other.items()
        }
    assert same_weights(ckpt, whole)
    assert [(ckpt / link).readlink() for link in ("last", "best")] == [
        (whole / link).readlink() for link in ("last", "best")
    ]


def test_torchrun_restarts_carry_on_by_themselves(launch, heavier, tmp_path):
    run = [*heavier, "--max_train_steps=30", "--save_every_n_train_steps=4", "--resume_from=last"]
    mine = [f"--save_dir={tmp_path / 'ckpt'}", f"--log_dir={tmp_path / 'log'}"]
    launcher = launch(*on_two_ranks("--max_restarts=3", "train.py", *run, *mine))
    wait_for_step(tmp_path / "log", 6, launcher)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 0, said
    assert "resumed from" in said
    torchrun(2, "train.py", *run, f"--save_dir={tmp_path / 'whole'}", f"--log_dir={tmp_path / 'whole-log'}")
    assert exact(tmp_path / "log") == exact(tmp_path / "whole-log") and same_weights(
        tmp_path / "ckpt", tmp_path / "whole"
    )
