"""A model's own metrics are logged beside the loss, and a step's time holds all of the step."""

import time

import pytest
import torch
from helpers.runs import column, outputs, rows, run_cases

import train
from llama3 import model

STEPS = 4


@pytest.fixture
def positions_logged(monkeypatch):
    """Change Llama.forward as a user would: one line more, which logs the mean position of the tokens."""
    forward = model.Llama.forward

    def with_positions(self, batch):
        sums = forward(self, batch)
        return {**sums, "position_sum": batch["position_ids"].sum()}

    monkeypatch.setattr(model.Llama, "forward", with_positions)


def test_a_metric_that_forward_returns_is_logged_in_training_and_validation(
    flags, tmp_path, positions_logged, caplog
):
    caplog.set_level("INFO")
    argv = [*flags, f"--max_train_steps={STEPS}", *outputs(tmp_path)]
    assert train.main(argv) == 0
    means = column(tmp_path, "position")
    assert len(means) == STEPS and all(1 < mean < 32 for mean in means)
    (validation,) = rows(tmp_path / "log", "val_loss").values()
    assert 1 < validation["val_position"] < 32
    assert f" val_position={validation['val_position']:.4f}" in caplog.text


def test_a_metrics_mean_does_not_depend_on_the_ranks_or_the_loss_on_the_metric(
    flags, tmp_path, positions_logged
):
    argv = [*flags, f"--max_train_steps={STEPS}"]
    assert train.main([*argv, *outputs(tmp_path / "with")]) == 0
    run_cases(tmp_path, 2, {"without": [*argv, *outputs(tmp_path / "without")]})
    losses = [column(tmp_path / run, "train_loss") for run in ("with", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_steps_time_holds_the_optimizer_and_leaves_out_the_save(flags, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def slow_step(self, *args, **kwargs):
        time.sleep(0.2)
        return step(self, *args, **kwargs)

    def slow_save(*args, **kwargs):
        time.sleep(0.5)
        return save(*args, **kwargs)

    from trainer.saver import Saver

    save = Saver.save
    monkeypatch.setattr(torch.optim.AdamW, "step", slow_step)
    monkeypatch.setattr(Saver, "save", slow_save)
    argv = [*flags, f"--max_train_steps={STEPS}", "--save_every_n_train_steps=1", *outputs(tmp_path)]
    assert train.main(argv) == 0
    seconds = column(tmp_path, "step_seconds")
    tokens_per_second = column(tmp_path, "tokens_per_second")
    assert all(value >= 0.2 for value in seconds)
    assert [a * b for a, b in zip(seconds, tokens_per_second, strict=True)] == pytest.approx([128] * STEPS)
    assert min(seconds) < 0.5  # none holds the save before it


def test_a_picture_that_cannot_be_drawn_is_a_warning(flags, tmp_path, monkeypatch, caplog):
    def draw(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("tools.curves.draw", draw)
    assert train.main([*flags, "--max_train_steps=1", *outputs(tmp_path)]) == 0
    assert "curves.png cannot be drawn: no fonts" in caplog.text


def test_a_planner_that_fails_is_a_warning(flags, tmp_path, monkeypatch, caplog):
    def choose(*_, **__):
        raise AttributeError("module has no attribute _FSDPModState")

    monkeypatch.setattr("plan.planner.choose", choose)
    assert train.main([*flags, "--max_train_steps=1", *outputs(tmp_path)]) == 0
    assert "the planner failed, so that the flags lay the run out: AttributeError" in caplog.text
