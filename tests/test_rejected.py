"""A checkpoint whose validation loss is not finite is set aside whole, and a resume can take it back."""

import math
import shutil
from pathlib import Path

import pytest
from helpers.runs import assert_same, outputs, rows

import train
from trainer import checkpoint, folders
from trainer.checkpoint import MANIFEST, Checkpoint
from trainer.trainer import Trainer


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A run of four steps, saved after 2 and 4."""
    out = tmp_path_factory.mktemp("finished")
    more = ["--max_train_steps=4", "--save_every_n_train_steps=2", "--keep_last_n_checkpoints=2"]
    assert train.main([*flags, *more, *outputs(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy that was killed during its last validation."""
    copy = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    checkpoint.validation_path(copy / "ckpt" / "0000-0004").unlink()
    metrics = copy / "log" / "metrics.jsonl"
    before = metrics.read_text().splitlines(keepends=True)
    lost = ('{"step": 4, "val_loss"', '{"step": 4, "save_blocked_seconds"')
    after = [line for line in before if not line.startswith(lost)]
    assert len(after) == len(before) - 2
    metrics.write_text("".join(after))
    return copy


def resume(run: Path, path: str | Path, steps: int = 4) -> int:
    return train.main([f"--resume_from={path}", f"--max_train_steps={steps}", *outputs(run)])


def rejected_by_a_bad_node(run: Path, monkeypatch, path: str | Path = "last") -> Path:
    """Resume where validations are not finite; return where the checkpoint must lie then."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda trainer: {"loss": math.nan})
        assert resume(run, path) == 1
    return run / "ckpt" / "0000-0004.rejected"


def names(save_dir: Path) -> set[str]:
    """The names of all whole checkpoints, rejected ones included."""
    return {path.parent.name for path in save_dir.glob(f"0*/{MANIFEST}")}


def last(save_dir: Path) -> str:
    return str((save_dir / "last").readlink())


def test_a_bad_node_takes_no_checkpoint_with_it(run, finished, monkeypatch, capsys):
    rejected = rejected_by_a_bad_node(run, monkeypatch)
    message = capsys.readouterr().err
    assert f"the validation loss at step 4 is nan, so the checkpoint was moved to {rejected}" in message
    assert f"the last good checkpoint is {run / 'ckpt' / '0000-0002'}" in message
    assert "bad node" in message and f"--resume_from={rejected} validates" in message
    assert names(run / "ckpt") == {"0000-0002", rejected.name} and last(run / "ckpt") == "0000-0002"
    assert checkpoint.candidates(run / "ckpt", "last") == [run / "ckpt" / "0000-0002"]
    Checkpoint.open(rejected).verify()
    assert resume(run, rejected, steps=6) == 0
    assert names(run / "ckpt") == {"0000-0004", "0000-0006"} and last(run / "ckpt") == "0000-0006"
    assert list(rows(run / "log", "train_loss")) == [1, 2, 3, 4, 5, 6]
    validations = rows(run / "log", "val_loss")
    assert list(validations) == [2, 4, 6] and validations[4] == rows(finished / "log", "val_loss")[4]
    assert checkpoint.read_validation(run / "ckpt" / "0000-0004") == validations[4]["val_loss"]
    assert not list(run.glob("*.1"))


def test_a_run_that_took_a_rejected_checkpoint_back_ends_as_if_undisturbed(flags, tmp_path, monkeypatch):
    more = [*flags, "--max_train_steps=4", "--save_every_n_train_steps=2"]
    assert train.main([*more, *outputs(tmp_path / "whole")]) == 0

    def validate(trainer, validate=Trainer.validate):
        loss = validate(trainer)
        return {"loss": math.inf} if trainer.state.step == 2 else loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", validate)
        assert train.main([*more, *outputs(tmp_path)]) == 1
    assert names(tmp_path / "ckpt") == {"0000-0002.rejected"}
    assert not (tmp_path / "ckpt" / "last").is_symlink()
    assert resume(tmp_path, tmp_path / "ckpt" / "0000-0002.rejected") == 0
    assert_same(tmp_path, tmp_path / "whole")
    assert rows(tmp_path / "log", "val_loss") == rows(tmp_path / "whole" / "log", "val_loss")
    for link in ("last", "best"):
        assert (tmp_path / "ckpt" / link).readlink() == (tmp_path / "whole" / "ckpt" / link).readlink()


def test_rejected_again_it_is_set_aside_again_under_a_free_name(run, monkeypatch):
    rejected = rejected_by_a_bad_node(run, monkeypatch)
    assert rejected_by_a_bad_node(run, monkeypatch, rejected) == rejected
    assert names(run / "ckpt") == {"0000-0002", rejected.name} and last(run / "ckpt") == "0000-0002"
    rejected_by_a_bad_node(run, monkeypatch)  # trains steps 3 and 4 anew
    assert names(run / "ckpt") == {"0000-0002", rejected.name, f"{rejected.name}.1"}
    assert resume(run, rejected.with_name(f"{rejected.name}.1")) == 0
    assert names(run / "ckpt") == {"0000-0002", rejected.name, "0000-0004"}


# The function that is cut off, and what `last` and the other name then.
CUT = {"swap_link": ("0000-0004", "0000-0004"), "reject": ("0000-0002", "0000-0004")}


@pytest.mark.parametrize("function", CUT)
def test_a_kill_while_a_checkpoint_is_set_aside_loses_nothing(run, monkeypatch, capsys, function):
    def killed(*arguments):
        raise SystemExit(9)

    def validate(trainer):
        monkeypatch.setattr(folders, function, killed)
        return {"loss": math.nan}

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "validate", validate)
        resume(run, "last")
    monkeypatch.undo()
    named, whole = CUT[function]
    assert last(run / "ckpt") == named and names(run / "ckpt") == {"0000-0002", whole}
    assert resume(run, run / "ckpt" / "0000-0004", steps=5) == 0
    assert names(run / "ckpt") == {"0000-0004", "0000-0005"} and not list(run.glob("*.1"))


@pytest.mark.parametrize("function", ["swap_link", "set_aside"])
def test_a_kill_while_a_checkpoint_is_taken_back_loses_nothing(run, monkeypatch, function):
    rejected = rejected_by_a_bad_node(run, monkeypatch)

    def killed(*arguments):
        raise SystemExit(9)

    if function == "set_aside":
        assert resume(run, "last") == 0  # another step 4, which must make room
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(folders, function, killed)
        resume(run, rejected)
    again = rejected if rejected.exists() else run / "ckpt" / "0000-0004"
    assert resume(run, again, steps=5) == 0
    assert last(run / "ckpt") == "0000-0005" and {"0000-0004", "0000-0005"} <= names(run / "ckpt")


def test_a_rejected_checkpoint_comes_back_after_another_run_took_its_place(run, monkeypatch, capsys):
    rejected = rejected_by_a_bad_node(run, monkeypatch)
    state = Checkpoint.open(rejected).state
    assert resume(run, "last", steps=6) == 0
    assert names(run / "ckpt") == {"0000-0004", "0000-0006", rejected.name}  # 0000-0002 was pruned
    capsys.readouterr()
    rejected_by_a_bad_node(run, monkeypatch, rejected)
    assert names(run / "ckpt") == {rejected.name} and names(run / "ckpt.1") == {"0000-0004", "0000-0006"}
    assert Checkpoint.open(rejected).state == state
    assert "no checkpoint was saved before" in capsys.readouterr().err  # the other run's are not its own
    assert resume(run, rejected) == 0 and last(run / "ckpt") == "0000-0004"
    assert Checkpoint.open(run / "ckpt" / "last").state == state


def test_a_fresh_start_sets_a_folder_with_only_a_rejected_checkpoint_aside(run, flags, monkeypatch):
    rejected = rejected_by_a_bad_node(run, monkeypatch)
    shutil.rmtree(run / "ckpt" / "0000-0002")
    assert train.main([*flags, "--resume_from=last", "--max_train_steps=1", *outputs(run)]) == 0
    assert names(run / "ckpt") == {"0000-0001"} and names(run / "ckpt.1") == {rejected.name}


def test_a_merged_file_is_never_set_aside(run, monkeypatch, capsys):
    assert train.main(["--merge_checkpoint", *outputs(run)]) == 0
    shutil.rmtree(run / "ckpt" / "0000-0004")
    merged = run / "ckpt" / "merged.ckpt"
    rejected_by_a_bad_node(run, monkeypatch, merged)
    assert "no checkpoint was moved" in capsys.readouterr().err
    Checkpoint.open(merged).verify()


def test_a_checkpoint_of_another_folder_is_never_set_aside(run, tmp_path, monkeypatch):
    foreign = run / "ckpt" / "0000-0004"
    before = names(run / "ckpt")
    rejected_by_a_bad_node(tmp_path / "new", monkeypatch, foreign)
    assert names(run / "ckpt") == before and last(run / "ckpt") == "0000-0004"
