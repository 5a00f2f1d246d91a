"""What nnScaler's own tests assert of its Trainer, asserted of ours on two ranks."""

import pytest
import torch
from helpers import facts
from helpers.runs import ROOT, rows, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    torchrun(2, ROOT / "tests" / "helpers" / "facts.py", folder, PYTHONPATH=str(ROOT))
    return folder


def losses(out, name, kind="train_loss", after=0):
    return {step: row[kind] for step, row in rows(out / name / "log", kind).items() if step > after}


def weights(out, name):
    return dict(Checkpoint.open(out / name / "ckpt" / "last").parameters())


@pytest.mark.parametrize(
    "name, whole, step",
    [("mid", "whole", 7), ("end", "whole", 5), ("from-shards", "plain", 7), ("from-merged", "plain", 7)],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(out, name, whole, step):
    """Mid-epoch and at an epoch's end with dropout; from shards and from a merged file without."""
    assert losses(out, name) == losses(out, whole, after=step)
    torch.testing.assert_close(weights(out, name), weights(out, whole), rtol=0, atol=0)


def test_resuming_differs_when_the_random_state_is_withheld(out):
    assert losses(out, "withheld")[8] != losses(out, "whole")[8]


def test_a_resume_with_nothing_to_do_and_those_before_touch_no_file(out):
    assert (out / "untouched").exists()


def test_the_last_step_is_saved_whatever_else_lies_in_the_folder(out):
    assert Checkpoint.open(out / "crowded" / "ckpt" / "last").state["step"] == 3


def test_one_step_and_the_losses_are_those_of_a_plain_model_with_every_token_weighing_the_same(out):
    """One SGD step at learning rate 1 over the whole set, whose samples have different numbers of targets."""
    torch.manual_seed(3)
    model = facts.Net()

    def mean_loss(samples):
        sums = model(torch.utils.data.default_collate(facts.make_set(samples)))
        return sums["loss_sum"] / sums["targets"]

    loss = mean_loss(20)
    loss.backward()
    assert losses(out, "one-step")[1] == pytest.approx(loss.item(), rel=1e-5)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    stepped = dict(model.named_parameters())
    torch.testing.assert_close(weights(out, "one-step"), stepped, rtol=1e-5, atol=1e-6)
    assert losses(out, "one-step", "val_loss")[1] == pytest.approx(mean_loss(7).item(), rel=1e-5)


def test_without_validation_arguments_there_is_no_validation(out):
    assert list(losses(out, "empty")) == [1, 2] and losses(out, "empty", "val_loss") == {}


def test_event_files_appear_for_training_and_validation(out):
    events = EventAccumulator(str(out / "plain" / "log")).Reload()
    assert {"train/train_loss", "val/val_loss"} <= set(events.Tags()["scalars"])


def test_bf16_training_keeps_master_weights_and_moments_in_fp32(out):
    saved = Checkpoint.open(out / "bf16" / "ckpt" / "last")
    assert {saved.read(name).dtype for name in saved.tensors} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights(out, "bf16").values())
