"""What nnScaler's own tests assert of its Trainer, asserted of ours on 1, 2 and 4 gloo ranks (nnScaler is not needed for it)."""

import json

import pytest
import torch
from helpers import facts
from helpers.runs import ROOT, rows, torchrun

from trainer.checkpoint import Checkpoint


@pytest.fixture(scope="module", params=[1, 2, 4])
def out(request, tmp_path_factory):
    """All cases, run once for each number of ranks."""
    folder = tmp_path_factory.mktemp(f"facts-{request.param}")
    torchrun(request.param, ROOT / "tests" / "helpers" / "facts.py", folder)
    return folder


def losses(out, name):
    return {step: row["train_loss"] for step, row in rows(out / name / "log", "train_loss").items()}


def val_loss(out, name):
    return next(iter(rows(out / name / "log", "val_loss").values()))["val_loss"]


def weights(out, name):
    return dict(Checkpoint.open(out / name / "ckpt" / "last").parameters())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name, step", [("mid", 7), ("end", 5)])
def test_resuming_mid_epoch_and_at_its_end_equals_the_whole_run_bit_for_bit(out, name, step):
    assert losses(out, name) == {key: value for key, value in losses(out, "whole").items() if key > step}
    assert same(weights(out, name), weights(out, "whole"))


def test_resuming_differs_when_the_random_state_is_withheld(out):
    assert losses(out, "withheld")[8] != losses(out, "whole")[8]


def test_a_resume_with_nothing_to_do_and_those_before_touch_no_file(out):
    assert json.loads((out / "untouched.json").read_text())


def test_resumed_from_shards_is_resumed_from_merged_is_uninterrupted(out):
    rest = {key: value for key, value in losses(out, "plain").items() if key > 7}
    assert losses(out, "from-shards") == losses(out, "from-merged") == rest
    assert same(weights(out, "from-shards"), weights(out, "plain"))
    assert same(weights(out, "from-merged"), weights(out, "plain"))


def test_the_last_step_is_saved_whatever_else_lies_in_the_folder(out):
    assert Checkpoint.open(out / "crowded" / "ckpt" / "last").state["step"] == 3


def test_mean_loss_is_the_sum_over_the_count(out):
    micro_batches = facts.GLOBAL_BATCH
    assert losses(out, "loss-sum")[1] / micro_batches == pytest.approx(losses(out, "loss-mean")[1], rel=1e-6)


def test_validation_is_unaffected_by_the_training_reduction(out):
    assert val_loss(out, "loss-sum") == val_loss(out, "loss-mean")
    found = {val_loss(out, f"still-{reduction}") for reduction in ("mean", "sum", "per-token-mean")}
    assert len(found) == 1


def test_per_token_mean_gradients_are_the_token_weighted_ones(out):
    """One SGD step at learning rate 1 over the whole set, against one backward of the token mean in a plain model."""
    torch.manual_seed(3)
    model = facts.Net(per_token=True)
    batch = {key: torch.stack([sample[key] for sample in facts.make_set()]) for key in ("x", "y", "valid")}
    loss_sum, _, count = model(batch)
    (loss_sum / count).backward()
    assert losses(out, "token-mean")[1] == pytest.approx((loss_sum / count).item(), rel=1e-5)
    stepped = weights(out, "token-mean")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stepped[name], (parameter - parameter.grad).detach(), rtol=1e-5, atol=1e-6)


def test_empty_dataset_arguments_train_without_a_validation_set(out):
    assert list(losses(out, "empty")) == [1, 2]
    assert rows(out / "empty" / "log", "val_loss") == {}


def test_event_files_appear_for_training_and_validation(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "plain" / "log")).Reload().Tags()["scalars"]
    assert {"train/train_loss", "val/val_loss"} <= set(events)


def test_bf16_training_keeps_master_weights_and_moments_in_fp32(out):
    saved = Checkpoint.open(out / "bf16" / "ckpt" / "last")
    for name in saved.tensors:
        tensor = saved.read(name)
        assert tensor.dtype == torch.float32, name
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights(out, "bf16").values())
