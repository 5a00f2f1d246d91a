"""Runs that are killed, stopped and restarted lose nothing and end as if undisturbed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import processes, runs
from helpers.killer import Killer
from helpers.runs import assert_same, outputs, python, rows, run_cases, torchrun

import train
from cli.config import parse
from trainer import ranks
from trainer.checkpoint import Checkpoint
from trainer.loading import load_batches


@pytest.fixture(scope="module")
def heavier(flags, tmp_path_factory):
    """Flags of a model whose save takes a little while: some 20 MB of weights and optimizer."""
    sizes = dict(hidden_size=256, intermediate_size=512)
    folder = runs.make_model(tmp_path_factory.mktemp("heavier") / "model", **sizes)
    return [*flags, f"--model_id={folder}", "--max_val_samples=2"]


@pytest.mark.parametrize("kills", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_continues_from_a_whole_checkpoint(heavier, tmp_path, kills):
    kills = int(os.environ.get("KILLS", kills))
    seed = int(os.environ.get("KILL_SEED", int.from_bytes(os.urandom(3), "big")))
    summary = Killer(tmp_path, seed, heavier).run(kills)
    print(kills, seed, summary)
    assert summary["during_save"] >= kills // 2, summary
    undisturbed = [*heavier, f"--max_train_steps={summary['steps']}", *outputs(tmp_path / "whole")]
    run_cases(tmp_path, 2, {"whole": undisturbed})
    assert len(rows(tmp_path / "log", "train_loss")) == summary["steps"]
    assert_same(tmp_path, tmp_path / "whole")


@pytest.mark.parametrize("whom", ["torchrun", "one rank"])
def test_sigterm_saves_and_stops_at_a_step_of_all_ranks(launch, heavier, tmp_path, whom):
    endless = [*heavier, "--max_train_steps=100000"]
    run = launch("train.py", *endless, ranks=2, real=whom == "torchrun")
    run.wait_for_step(3)
    os.kill(run.process.pid if whom == "torchrun" else run.ranks()[1], signal.SIGTERM)
    said, stopped = run.end(code=1), max(rows(tmp_path / "log", "train_loss"))  # torchrun's own code
    assert f"SIGTERM: saved step {stopped}" in said
    source = Checkpoint.open(tmp_path / "ckpt" / "last")
    source.verify()
    assert source.state["step"] == stopped
    longer = [*heavier, f"--max_train_steps={stopped + 3}"]
    rest, whole = [*outputs(tmp_path), "--resume_from=last"], outputs(tmp_path / "whole")
    run_cases(tmp_path, 2, {"rest": [*longer, *rest], "whole": [*longer, *whole]})
    assert_same(tmp_path, tmp_path / "whole")


def test_a_rank_stopped_by_sigterm_exits_with_143(launch, heavier, tmp_path):
    run, last = launch("train.py", *heavier, "--max_train_steps=100000"), tmp_path / "ckpt" / "last"
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGUSR1)  # saves, and goes on
    run.wait_for(last.exists)
    saved = Checkpoint.open(last).state["step"]
    run.wait_for_step(saved + 3)
    run.process.send_signal(signal.SIGTERM)
    assert "Traceback" not in run.end(code=143)
    assert Checkpoint.open(last).state["step"] > saved


@pytest.fixture
def group():
    """A process group of this process alone."""
    with ranks.process_group():
        yield


@pytest.mark.usefixtures("group")
def test_sigterm_does_not_wait_for_the_end_of_a_validation(flags, tmp_path, monkeypatch):
    def trainer(name, *more):
        every = ["--save_every_n_train_steps=2", "--max_train_steps=5", *outputs(tmp_path / name)]
        return train.build_trainer(parse([*flags, *every, *more]))[0]

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
    one, whole = tmp_path / "stopped", tmp_path / "whole"
    assert [Checkpoint.open(one / "ckpt" / link).state["step"] for link in ("last", "best")] == [4, 2]
    assert list(rows(one / "log", "val_loss")) == [2]
    trainer("stopped", "--resume_from=last").run()
    trainer("whole").run()
    assert_same(one, whole)
    validations = rows(whole / "log", "val_loss")
    assert list(validations) == [2, 4, 5] and rows(one / "log", "val_loss") == validations
    for link in ("last", "best"):
        assert (one / "ckpt" / link).readlink() == (whole / "ckpt" / link).readlink()


def test_torchrun_restarts_carry_on_by_themselves(launch, heavier, tmp_path):
    flags = [*heavier, "--max_train_steps=30", "--save_every_n_train_steps=4", "--resume_from=last"]
    run = launch("--max_restarts=3", "--shutdown_timeout=3", "train.py", *flags, ranks=2, real=True)
    run.wait_for_step(6)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert "resumed from" in run.end(code=0)
    torchrun(2, "train.py", *flags, *outputs(tmp_path / "whole"))
    assert_same(tmp_path, tmp_path / "whole")


def test_a_rank_whose_torchrun_is_killed_ends_even_while_it_imports():
    rank = "import time, train\nprint(flush=True)\ntrain.early.parse_on_all_nodes = lambda *_: time.sleep(60)"
    rank += "\ntrain.main([])"
    killed = f"import subprocess, sys\nrank = subprocess.Popen([sys.executable, '-c', {rank!r}])"
    killed += "\nprint(rank.pid, flush=True)\nrank.wait()"
    options = dict(cwd=runs.ROOT, env=runs.environment(TORCHELASTIC_RUN_ID="x"), text=True)
    with subprocess.Popen([sys.executable, "-c", killed], stdout=subprocess.PIPE, **options) as torchrun:
        pid = int(torchrun.stdout.readline())
        torchrun.stdout.readline()  # train.py is imported
        time.sleep(0.5)
        torchrun.kill()
    try:
        processes.wait_for_end([pid], seconds=10)
    finally:
        processes.kill_all([pid])


def test_a_second_ctrl_c_leaves_at_once():
    # torchrun passes the second one on as a SIGTERM; a wrapper may send the first one twice.
    code = "import os, time\nfrom trainer import ranks\nwith ranks.noted_signals():\n"
    code += "    for number, wait in SENT:\n        os.kill(os.getpid(), number)\n        time.sleep(wait)"
    for sent, expected in (([(2, 0.1), (2, 0.1)], 0), ([(2, 1.2), (15, 9)], 143)):
        assert python("-c", code.replace("SENT", str(sent)), check=False).returncode == expected
