"""Our TrainerArgs have nnScaler's names, and derive and refuse batch sizes as nnScaler's own do."""

import dataclasses

import pytest

from errors import UserError
from trainer import args as ours

reason = "nnScaler is not installed (requirements-nnscaler.txt)"
theirs = pytest.importorskip("nnscaler.cli.trainer_args", reason=reason)
pytestmark = pytest.mark.nnscaler

OURS = [cls for cls in vars(ours).values() if dataclasses.is_dataclass(cls) and cls is not ours.NativeOptions]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_every_name_is_one_of_nnscalers(cls):
    def names(of):
        return {field.name for field in dataclasses.fields(of)}

    assert names(cls) <= names(getattr(theirs, cls.__name__))


def outcome(module, ranks, plan, sizes, compute, **required):
    """(micro batch, global batch, accumulation, data-parallel degree), or UserError."""
    micro, total, accumulation = sizes
    try:
        args = module.TrainerArgs(
            compute_config=module.ComputeConfig(plan_ngpus=plan, runtime_ngpus=ranks, **compute),
            model=module.ModelConfig(dict),
            optimizer=module.OptimizerConfig(dict),
            dataset=module.DatasetConfig(dict),
            max_train_steps=1,
            seed=0,
            **dict(micro_batch_size=micro, global_batch_size=total, grad_accumulation_steps=accumulation),
            **required,
        )
    except (UserError, ValueError):  # ours, theirs
        return UserError
    derived = args.micro_batch_size, args.global_batch_size, args.grad_accumulation_steps
    return *derived, args.scaling_factor


def test_data_parallelism_alone_partitions_nothing():
    from trainer.nnscaler_engine.trainer import Trainer

    args = ours.TrainerArgs(
        compute_config=ours.ComputeConfig(plan_ngpus=2, runtime_ngpus=4),
        model=ours.ModelConfig(dict),
        optimizer=ours.OptimizerConfig(dict),
        dataset=ours.DatasetConfig(dict),
        dataloader=ours.DataloaderConfig({}),
        max_train_steps=1,
        pas_policy="dp",
    )
    with pytest.raises(UserError, match="--pas_policy=dp with --plan_ngpus=2: use autodist or tp"):
        Trainer(train_args=args)


@pytest.mark.parametrize("ranks, plan", [(1, 1), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "sizes",  # micro batch, global batch, accumulation
    [
        (1, None, None),
        (4, None, 8),
        (2, 64, None),
        (3, 64, None),
        (8, 8, None),
        (2, 64, 8),
        (2, 64, 3),
    ],
)
def test_batch_sizes_follow_or_are_refused_as_nnscalers(ranks, plan, sizes):
    mine = outcome(ours, ranks, plan, sizes, {}, dataloader=ours.DataloaderConfig({}))
    assert mine == outcome(theirs, ranks, plan, sizes, {"use_end2end": True})
