"""TrainerArgs derives and refuses as nnScaler's does, with sentences that name the fix."""

import pytest
import torch

from errors import UserError
from trainer.args import (
    ComputeConfig,
    DataloaderConfig,
    DatasetConfig,
    DatasetSamplerConfig,
    ModelConfig,
    OptimizerConfig,
    TrainerArgs,
)
from trainer.trainer import Trainer, TrainState


def make(plan=1, ranks=2, **changes):
    """A valid TrainerArgs of two ranks, with changes."""
    base = dict(
        compute_config=ComputeConfig(plan, ranks),
        model=ModelConfig(torch.nn.Linear),
        optimizer=OptimizerConfig(torch.optim.AdamW),
        dataset=DatasetConfig(list),
        dataset_sampler=DatasetSamplerConfig(list),
        dataloader=DataloaderConfig({}),
        max_train_steps=3,
    )
    return TrainerArgs(**{**base, **changes})


@pytest.mark.parametrize(
    "given, derived",
    [
        ({}, (2, 1)),
        ({"micro_batch_size": 4}, (8, 1)),
        ({"grad_accumulation_steps": 8}, (16, 8)),
        ({"micro_batch_size": 2, "global_batch_size": 64}, (64, 16)),
        ({"micro_batch_size": 2, "global_batch_size": 64, "grad_accumulation_steps": 16}, (64, 16)),
        ({"plan": 2, "ranks": 4, "micro_batch_size": 3, "grad_accumulation_steps": 2}, (12, 2)),
    ],
)
def test_batch_sizes_follow_from_each_other(given, derived):
    args = make(**given)
    assert (args.global_batch_size, args.grad_accumulation_steps) == derived


def test_all_problems_come_at_once():
    with pytest.raises(UserError) as caught:
        make(micro_batch_size=10, global_batch_size=64, precision="fp64", pas_policy="pp")
    said = "does not divide global_batch_size 64", "precision is 'fp64'. Choose one of fp32, bf16"
    said += ("pas_policy is 'pp'. Choose one of autodist, dp, tp",)
    assert all(words in str(caught.value) for words in said)


def test_our_engine_partitions_no_model():
    with pytest.raises(UserError, match="plan_ngpus must be 1"):
        Trainer(train_args=make(plan=2))


@pytest.mark.parametrize("plan", [0, 3])
def test_copies_of_a_model_take_equal_numbers_of_ranks(plan):
    with pytest.raises(UserError, match=rf"plan_ngpus \({plan}\) does not divide the number of ranks \(4\)"):
        ComputeConfig(plan, 4)


def test_a_saved_state_may_have_more_fields_or_fewer():
    assert TrainState.from_dict({"step": 3, "of_a_later_version": 1}) == TrainState(step=3)
