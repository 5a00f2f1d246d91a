"""A run writes only to folders of its own, one run at a time, and says so when it cannot."""

import os
import signal
from pathlib import Path

import pytest
from helpers.runs import outputs, rows, wait_for

import train
from trainer import folders
from trainer.checkpoint import Checkpoint
from trainer.loggers import JsonlLogger


@pytest.fixture
def living(launch, flags, tmp_path):
    """A run that goes on until the test ends."""
    run = launch("train.py", *flags, "--max_train_steps=1000000", "--save_every_n_train_steps=50")
    run.wait_for((tmp_path / "ckpt" / "last").exists)
    return run.process


def test_a_second_run_in_the_folder_of_a_living_one_is_refused(living, flags, tmp_path, capsys):
    second, other = [*flags, "--max_train_steps=1"], tmp_path / "other"
    places = [outputs(tmp_path), [f"--save_dir={tmp_path / 'ckpt'}", f"--log_dir={other}"]]
    places += [[f"--save_dir={other}", f"--log_dir={tmp_path / 'log'}"]]
    for place in places:
        for more in ([], ["--resume_from=last"]):
            assert train.main([*second, *more, *place]) == 2
            said = capsys.readouterr().err
            assert f"process {living.pid}" in said and "--save_dir" in said, said
    assert living.poll() is None and not (tmp_path / "ckpt.1").exists() and not (tmp_path / "log.1").exists()
    for mode in (["--evaluate", "--resume_from=last"], ["--merge_checkpoint"], ["--export_hf"]):
        assert train.main([*flags, *mode, *outputs(tmp_path)]) == 0, mode
    living.kill()
    living.wait()
    longer = [f"--max_train_steps={max(rows(tmp_path / 'log', 'lr')) + 1}", *outputs(tmp_path)]
    assert train.main([*flags, "--resume_from=last", *longer]) == 0  # the kernel freed the lock


def test_a_run_that_set_another_aside_holds_its_own_folders(flags, tmp_path, caplog):
    more = ["--save_every_n_train_steps=1", "--max_train_steps=3", *outputs(tmp_path)]
    assert train.main([*flags, *more]) == 0  # it leaves `.good`
    assert train.main([*flags, *more]) == 0
    assert caplog.text.count("holds another run: set aside in") == 2
    for name in ("ckpt", "log"):
        assert (tmp_path / name / folders.LOCK).exists() and not (
            tmp_path / f"{name}.1" / folders.LOCK
        ).exists()
    assert {path.name for path in (tmp_path / "ckpt.1").glob(".*")} == {".good"}


def test_ranks_save_and_leave_when_torchrun_is_killed(launch, flags, tmp_path):
    run = launch("train.py", *flags, "--max_train_steps=1000000", ranks=2, real=True)
    run.wait_for_step(1)
    left = run.ranks()
    run.process.kill()
    run.process.wait()
    gone = lambda: not any(Path("/proc", str(rank)).exists() for rank in left)  # noqa: E731
    wait_for(gone, lambda: True, run.output, seconds=30)
    assert Checkpoint.open(tmp_path / "ckpt" / "last").state["step"] == max(rows(tmp_path / "log", "lr"))


def test_a_linked_save_dir_keeps_its_target(flags, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "ckpt").symlink_to(tmp_path / "disk")
    for _ in range(2):
        assert train.main([*flags, *outputs(tmp_path), "--max_train_steps=1"]) == 0
    assert (tmp_path / "ckpt").is_symlink() and (tmp_path / "disk" / "last").exists()
    assert (tmp_path / "disk.1" / "last").exists()


def test_a_mount_point_that_holds_a_run_is_refused(flags, tmp_path, capsys, monkeypatch):
    assert train.main([*flags, *outputs(tmp_path), "--max_train_steps=1"]) == 0
    mount = (tmp_path / "ckpt").resolve()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)  # mounting needs privileges
    assert train.main([*flags, *outputs(tmp_path), "--max_train_steps=1"]) == 2
    assert "mount point" in capsys.readouterr().err and (mount / "last").exists()


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(flags, tmp_path, monkeypatch, caplog):
    def refuse(source, target, rename=os.rename):
        if ".doomed-" in str(target):
            raise PermissionError(1, "Operation not permitted", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    more = ["--save_every_n_train_steps=1", "--keep_last_n_checkpoints=1", "--max_train_steps=3"]
    assert train.main([*flags, *outputs(tmp_path), *more]) == 0
    assert "0000-0001 cannot be removed" in caplog.text and (tmp_path / "ckpt" / "0000-0003").exists()


def test_a_full_log_dir_saves_a_checkpoint_before_the_run_stops(flags, tmp_path, capsys, monkeypatch):
    def setup_on_a_full_disk(self, *args, setup=JsonlLogger.setup, **named):
        setup(self, *args, **named)
        self._file = open("/dev/full", "w", buffering=1)

    monkeypatch.setattr(JsonlLogger, "setup", setup_on_a_full_disk)
    assert train.main([*flags, *outputs(tmp_path), "--max_train_steps=50"]) == 1
    said = capsys.readouterr().err
    assert "metrics.jsonl" in said and "No space left" in said and "--resume_from=last" in said
    assert Checkpoint.open(tmp_path / "ckpt" / "last").state["step"] == 2


@pytest.mark.parametrize("ranks, code", [(None, 130), (2, 1)])  # torchrun's own code is always 1
def test_ctrl_c_saves_and_leaves(launch, flags, tmp_path, ranks, code):
    run = launch("train.py", *flags, "--max_train_steps=1000000", ranks=ranks, real=True)
    run.wait_for_step(1)
    run.process.send_signal(signal.SIGINT)
    said, step = run.end(code), max(rows(tmp_path / "log", "lr"))
    assert f"SIGINT: saved step {step}" in said
    assert Checkpoint.open(tmp_path / "ckpt" / "last").state["step"] == step
    assert "train.py" not in said.split("Traceback")[-1] or not ranks  # the only one is torchrun's
    assert "Traceback" not in said or ranks
