"""When a run saves and why, which checkpoints stay, and where a run and its resume end."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
from helpers.runs import outputs, rows

import train
from cli import config as cli_config
from cli import report, settings
from trainer import trainer as trainer_module
from trainer.checkpoint import checkpoints
from trainer.trainer import Trainer

SAMPLES = 1000
BATCH = 64


def reasons(run: Path) -> dict[int, str]:
    """Return why each checkpoint was saved, by its step."""
    states = [json.loads((path / "manifest.json").read_text())["state"] for path in checkpoints(run / "ckpt")]
    return {state["step"]: state.get("signal", state["reason"]) for state in reversed(states)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; a test sets its minutes."""
    time = [0.0]
    monkeypatch.setattr(trainer_module, "minutes", lambda: time[0])
    return time


def after_each_step(monkeypatch, action) -> None:
    """Call action(step) when each step has been taken."""
    train_step = Trainer._train_step

    def step(self, batches):
        result = train_step(self, batches)
        action(self.state.step + 1)
        return result

    monkeypatch.setattr(Trainer, "_train_step", step)


# ---------------------------------------------------------------- when and why


def test_a_save_by_time_comes_when_the_last_is_so_long_ago_and_does_not_validate(
    flags, tmp_path, monkeypatch, clock
):
    after_each_step(monkeypatch, lambda step: clock.__setitem__(0, 10.0 * step))
    argv = [*flags, "--max_train_steps=8", "--save_every_n_minutes=30", *outputs(tmp_path)]
    assert train.main(argv) == 0
    assert reasons(tmp_path) == {3: "time", 6: "time", 8: "end"}
    assert list(rows(tmp_path / "log", "val_loss")) == [8]


def test_another_save_puts_the_one_by_time_off(flags, tmp_path, monkeypatch, clock):
    after_each_step(monkeypatch, lambda step: clock.__setitem__(0, 10.0 * step))
    argv = [*flags, "--max_train_steps=8", "--save_every_n_train_steps=2", *outputs(tmp_path)]
    assert train.main(argv) == 0
    assert reasons(tmp_path) == {2: "interval", 4: "interval", 6: "interval", 8: "end"}


def test_signals_are_the_reason_of_their_saves(flags, tmp_path, monkeypatch, clock):
    sent = {2: signal.SIGUSR1, 4: signal.SIGTERM}
    after_each_step(monkeypatch, lambda step: step in sent and os.kill(os.getpid(), sent[step]))
    with pytest.raises(SystemExit) as left:
        train.main([*flags, "--max_train_steps=9", *outputs(tmp_path)])
    assert left.value.code == 143
    assert reasons(tmp_path) == {2: "SIGUSR1", 4: "SIGTERM"}


def test_of_saves_by_epoch_and_time_the_newest_three_stay_and_all_others(
    flags, prepared, tmp_path, monkeypatch, clock
):
    samples = len(datasets.load_from_disk(str(prepared))["train"])
    epoch = [*flags, f"--global_batch_size={samples}", "--micro_batch_size=7"]
    assert samples % 7 == 0
    after_each_step(monkeypatch, lambda step: step in (2, 4) and os.kill(os.getpid(), signal.SIGUSR1))
    assert train.main([*epoch, "--max_train_steps=8", "--max_val_samples=1", *outputs(tmp_path)]) == 0
    expected = {2: "SIGUSR1", 4: "SIGUSR1", 5: "epoch", 6: "epoch", 7: "epoch", 8: "end"}
    best = int((tmp_path / "ckpt" / "best").readlink().name.split("-")[1])
    if best not in expected:
        expected[best] = "epoch"
    assert reasons(tmp_path) == expected


def test_with_a_number_to_keep_the_newest_stay_whatever_their_reason(flags, tmp_path, monkeypatch, clock):
    after_each_step(monkeypatch, lambda step: clock.__setitem__(0, 100.0 * step))
    keep = ["--keep_last_n_checkpoints=2", "--save_every_n_train_steps=100", "--max_val_samples=1"]
    assert train.main([*flags, "--max_train_steps=6", *keep, *outputs(tmp_path)]) == 0
    assert reasons(tmp_path) == {5: "time", 6: "end"}


# ---------------------------------------------------------------- the end


def test_only_the_end_that_is_given_counts_as_explicit():
    command = cli_config.parse(["--demo", "--max_epochs=2"])
    assert command.is_explicit("max_epochs") and not command.is_explicit("max_train_steps")
    assert "max_train_steps" not in report.repeated(command, merge_checkpoint="")


# The command line, the checkpoint's flags -> the two flags that end a run, and its last step.
ENDS = [
    ("", {}, (1000, None), 1000),
    ("--demo", {}, (12, None), 12),
    ("--max_train_steps=7", {}, (7, None), 7),
    ("--max_epochs=2", {}, (None, 2), 32),
    ("--max_epochs=2 --max_train_steps=20", {}, (20, 2), 20),
    ("--max_epochs=2 --max_train_steps=40", {}, (40, 2), 32),
    ("--demo --max_epochs=1", {}, (None, 1), 16),
    ("", {"max_train_steps": 40, "max_epochs": None}, (40, None), 40),
    ("", {"max_train_steps": None, "max_epochs": 3}, (None, 3), 47),
    ("", {"max_train_steps": 40, "max_epochs": 3}, (40, 3), 40),
    ("--demo", {"max_train_steps": 40, "max_epochs": None}, (40, None), 40),
    ("--max_train_steps=50", {"max_train_steps": 40, "max_epochs": 3}, (50, None), 50),
    ("--max_epochs=1", {"max_train_steps": 40, "max_epochs": 3}, (None, 1), 16),
    ("--max_epochs=1 --max_train_steps=9", {"max_train_steps": 40, "max_epochs": 3}, (9, 1), 9),
]


@pytest.mark.parametrize("argv, saved, ends, step", ENDS)
def test_a_run_ends_where_its_flags_its_checkpoint_or_its_preset_say(argv, saved, ends, step):
    command = cli_config.parse(argv.split())
    if saved:
        command = command.resumed(saved)
    config = command.config
    assert (config.max_train_steps, config.max_epochs) == ends
    assert settings.last_step(config, SAMPLES, BATCH) == step


def test_a_bare_resume_finishes_the_run_and_its_schedule(flags, tmp_path, monkeypatch, caplog):
    whole = [*flags, "--max_train_steps=6", "--lr_scheduler=linear"]
    assert train.main([*whole, *outputs(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main([*whole, *outputs(tmp_path / "stopped")])
    assert train.main(["--resume_from=last", *outputs(tmp_path / "stopped")]) == 0
    rates = [rows(tmp_path / run / "log", "lr") for run in ("whole", "stopped")]
    assert [{step: row["lr"] for step, row in run.items()} for run in rates][1] == {
        step: row["lr"] for step, row in rates[0].items()
    }
    caplog.set_level("INFO")
    assert train.main(["--resume_from=last", *outputs(tmp_path / "stopped")]) == 0
    assert "nothing to do: step 6 of 6 is reached" in caplog.text


def test_epochs_alone_end_a_run_and_are_saved_as_such(flags, prepared, tmp_path):
    samples = len(datasets.load_from_disk(str(prepared))["train"])
    argv = [*flags, "--max_epochs=1", "--global_batch_size=64", "--max_val_samples=1", *outputs(tmp_path)]
    assert train.main(argv) == 0
    last_step = -(-samples // 64)
    assert list(rows(tmp_path / "log", "train_loss")) == list(range(1, last_step + 1))
    state = json.loads((tmp_path / "ckpt" / "last" / "manifest.json").read_text())["state"]
    assert (state["config"]["max_train_steps"], state["config"]["max_epochs"]) == (None, 1)
    assert state["last_step"] == last_step
