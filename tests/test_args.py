"""TrainerArgs derives and refuses as nnScaler's does, with sentences that name the fix."""

import dataclasses
import json
import pickle
import re

import pytest
import torch

from trainer import args as interface
from trainer.args import (
    AggregatedOutputs,
    CheckpointConfig,
    ComputeConfig,
    DataloaderConfig,
    DatasetConfig,
    DatasetSamplerConfig,
    HookConfig,
    HookMapConfig,
    LogConfig,
    LRSchedulerConfig,
    ModelConfig,
    OptimizerConfig,
    ResumeOptions,
    TrainerArgs,
    load_type,
    refuse_unsupported,
)


def compute(plan=1, runtime=2, **more):
    return ComputeConfig(plan, runtime, use_end2end=True, **more)


def make(**changes):
    """A valid TrainerArgs of two ranks, with changes."""
    base = {
        "compute_config": compute(),
        "model": ModelConfig("torch.nn.Linear"),
        "optimizer": OptimizerConfig("torch.optim.AdamW"),
        "dataset": DatasetConfig("builtins.list"),
        "max_train_steps": 3,
        "seed": 0,
    }
    return TrainerArgs(**{**base, **changes})


@pytest.mark.parametrize(
    "given, derived",
    [
        ({}, (2, 1, 1)),
        ({"micro_batch_size": 4}, (8, 1, 1)),
        ({"grad_accumulation_steps": 8}, (16, 8, 8)),
        ({"micro_batch_size": 2, "global_batch_size": 64}, (64, 16, 16)),
        ({"micro_batch_size": 2, "global_batch_size": 64, "grad_accumulation_steps": 16}, (64, 16, 16)),
        (
            {
                "compute_config": compute(plan=2, runtime=4),
                "micro_batch_size": 3,
                "grad_accumulation_steps": 2,
            },
            (12, 2, 2),
        ),
    ],
)
def test_batch_sizes_follow_from_each_other(given, derived):
    args = make(**given)
    assert (args.global_batch_size, args.grad_accumulation_steps, args.update_freq) == derived


def test_indivisible_batch_names_the_sizes_that_fit():
    with pytest.raises(
        ValueError, match=r"micro_batch_size 10 x 4 data-parallel ranks .* 64: use micro_batch_size 4 or 8"
    ):
        make(compute_config=compute(runtime=4), micro_batch_size=10, global_batch_size=64)


def test_inconsistent_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="= 12 is not global_batch_size 64: give one of the two"):
        make(micro_batch_size=2, global_batch_size=64, grad_accumulation_steps=3)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as caught:
        make(micro_batch_size=0, max_train_steps=None, precision="fp64", run_mode="walk", model=ModelConfig())
    for word in (
        "micro_batch_size is 0",
        "max_epochs or max_train_steps",
        "fp64",
        "run_mode is 'walk'",
        "model: type is required",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize("world_size, ranks", [(None, 1), ("4", 4)])
def test_runtime_ngpus_is_the_world_size_and_one_without_torchrun(world_size, ranks, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert ComputeConfig(1).runtime_ngpus == ranks


@pytest.mark.parametrize(
    "wrong, word",
    [
        (lambda: ComputeConfig(0, 2), "plan_ngpus is 0"),
        (lambda: ComputeConfig(1, -1), "runtime_ngpus is -1"),
        (lambda: ComputeConfig(2, 3), "no multiple of plan_ngpus 2"),
        (lambda: ComputeConfig(1, 2, use_zero=True, zero_ngroups=0), "zero_ngroups is 0"),
        (
            lambda: ComputeConfig(1, 4, use_zero=True, zero_ngroups=2, zero_use_reduce_scatter=True),
            "needs zero_ngroups 1",
        ),
        (lambda: ComputeConfig(1, 2, reducer_bucket_cap_mb=-1), "reducer_bucket_cap_mb"),
        (lambda: make(compute_config=ComputeConfig(1, 2)), "use_end2end"),
        (lambda: make(compute_config=None), "compute_config is required"),
        (lambda: OptimizerConfig("x.Y", grad_reduction="median"), "grad_reduction is 'median'"),
        (lambda: OptimizerConfig("x.Y", loss_reduction="per-token-mean"), "aggregate_outputs_fn"),
        (lambda: OptimizerConfig("x.Y", clip_gnorm=-1.0), "clip_gnorm"),
        (lambda: LRSchedulerConfig("x.Y", interval="minute"), "interval is 'minute'"),
        (lambda: CheckpointConfig(every_n_epochs=1, every_n_train_steps=1), "exclude each other"),
        (lambda: CheckpointConfig(every_n_train_steps=0), "every_n_train_steps is 0"),
        (lambda: CheckpointConfig(keep_last_n_checkpoints=0), "keep_last_n_checkpoints is 0"),
        (lambda: CheckpointConfig(save_type="zip"), "save_type is 'zip'"),
        (lambda: CheckpointConfig(save_dir=""), "save_dir is empty"),
        (
            lambda: CheckpointConfig(no_save=True, resume_from=ResumeOptions("no/such/place")),
            "no/such/place does not exist",
        ),
        (lambda: make(lr_scheduler=LRSchedulerConfig()), "lr_scheduler: type"),
        (lambda: make(dataset_sampler=DatasetSamplerConfig(type=None)), "dataset_sampler: type"),
        (lambda: make(dataloader=DataloaderConfig(val_args={"batch_size": 2})), "use micro_batch_size"),
        (lambda: make(precision={"weights": "fp32"}), "weights"),
        (lambda: LogConfig(), "log: type"),
        (lambda: load_type("torch.no_such.Thing"), "torch.no_such.Thing"),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(wrong, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        wrong()


def test_saving_defaults_to_every_epoch():
    assert CheckpointConfig().every_n_epochs == 1
    assert CheckpointConfig(every_n_train_steps=5).every_n_epochs is None


def test_resume_path_is_last_best_a_directory_or_a_file(tmp_path, caplog):
    assert CheckpointConfig(save_dir=tmp_path).get_resume_checkpoint() is None
    fresh = CheckpointConfig(save_dir=tmp_path, resume_from=ResumeOptions())
    assert fresh.get_resume_checkpoint() is None
    assert "training starts fresh" in caplog.text
    (tmp_path / "last").mkdir()
    assert fresh.get_resume_checkpoint() == tmp_path / "last"
    assert CheckpointConfig(resume_from=ResumeOptions(tmp_path)).get_resume_checkpoint() == tmp_path


def test_resume_from_takes_a_plain_string(tmp_path):
    config = CheckpointConfig(save_dir=str(tmp_path), resume_from="last")
    assert config.resume_from == ResumeOptions("last")


@pytest.mark.parametrize(
    "precision, resolved",
    [
        (None, ("none", "none", "none")),
        ("fp32", ("fp32", "fp32", "fp32")),
        ("bf16", ("bf16", "fp32", "bf16")),
        ({"param": "bf16"}, ("bf16", "none", "none")),
    ],
)
def test_precision_resolves_to_param_buffer_input(precision, resolved):
    assert make(precision=precision).precision == dict(
        zip(("param", "buffer", "input"), resolved, strict=True)
    )


def test_types_are_dotted_names_or_callables():
    assert load_type("torch.optim.AdamW") is torch.optim.AdamW is load_type(torch.optim.AdamW)
    assert load_type("torch.Tensor.add_") is torch.Tensor.add_


def test_hook_map_has_the_29_callbacks():
    assert len(dataclasses.fields(HookMapConfig)) == 29
    assert HookMapConfig(on_train_end="os.getpid") == pickle.loads(
        pickle.dumps(HookMapConfig(on_train_end="os.getpid"))
    )


def test_to_dict_is_json_with_names_for_callables():
    plain = make(
        model=ModelConfig(torch.nn.Linear, {"bias": True}), hook=HookMapConfig(on_train_end=print)
    ).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["model"]["type"] == "torch.nn.modules.linear.Linear"
    assert plain["hook"]["on_train_end"] == "builtins.print"


def test_aggregate_sums_losses_batches_and_tokens():
    outputs = [(torch.tensor(1.5), torch.tensor(3)), (torch.tensor(2.0), torch.tensor(5))]
    both = AggregatedOutputs.aggregate(outputs, None, lambda out: out[0], lambda out: out[1])
    assert both == AggregatedOutputs(loss_sum=3.5, num_batches=2, num_tokens=8)
    assert AggregatedOutputs.aggregate(outputs, None, lambda out: out[0]).num_tokens is None


# What our Trainer refuses: one value for each field it does not support ...
REFUSED = {
    "init_module": lambda: make(init_module="os"),
    "vars": lambda: make(vars={"width": 3}),
    "run_mode": lambda: make(run_mode="compile"),
    "pas_policy": lambda: make(pas_policy="pp"),
    "tracing_from_weights": lambda: make(tracing_from_weights="weights.pt"),
    "compute_config.plan_ngpus": lambda: make(compute_config=compute(plan=2)),
    "compute_config.inference_only": lambda: make(compute_config=compute(inference_only=True)),
    "compute_config.zero_ngroups": lambda: make(compute_config=compute(use_zero=True, zero_ngroups=2)),
    "compute_config.pas_config": lambda: make(compute_config=compute(pas_config={"pipeline_nstages": 2})),
    "model.parallel_modules": lambda: make(model=ModelConfig("torch.nn.Linear", {}, ["a"])),
    "dataset.test_args": lambda: make(dataset=DatasetConfig("builtins.list", test_args={"a": 1})),
    "dataloader.type": lambda: make(dataloader=DataloaderConfig("builtins.list")),
    "dataloader.test_args": lambda: make(dataloader=DataloaderConfig(test_args={"num_workers": 1})),
    "dataloader args": lambda: make(dataloader=DataloaderConfig(train_args={"shuffle": True})),
    "dataset_sampler.type": lambda: make(
        dataset_sampler=DatasetSamplerConfig("torch.utils.data.RandomSampler")
    ),
    "dataset_sampler.test_args": lambda: make(dataset_sampler=DatasetSamplerConfig(test_args={"seed": 1})),
    "dataset_sampler args": lambda: make(
        dataset_sampler=DatasetSamplerConfig(train_args={"drop_last": True})
    ),
    "checkpoint.save_type": lambda: make(checkpoint=CheckpointConfig(save_type="merged")),
    "resume_from.convert_fn": lambda: make(
        checkpoint=CheckpointConfig(resume_from=ResumeOptions(convert_fn="os.getpid"))
    ),
    "precision 'fp16'": lambda: make(precision="fp16"),
    "precision 'bf16' for buffers": lambda: make(precision={"buffer": "bf16"}),
    "$!(": lambda: make(optimizer=OptimizerConfig("torch.optim.AdamW", {"lr": "$!(vars.lr)"})),
    "__type": lambda: make(model=ModelConfig("torch.nn.Linear", {"config": {"__type": "builtins.dict"}})),
}
# ... what it honours ...
HONOURED = {
    *(
        "compute_config.runtime_ngpus",
        "compute_config.use_end2end",
        "compute_config.use_zero",
        "compute_config.pas_config",
    ),
    *(
        "model.type",
        "model.args",
        "optimizer.type",
        "optimizer.args",
        "optimizer.clip_gnorm",
        "optimizer.loss_reduction",
    ),
    *(
        "optimizer.grad_reduction",
        "optimizer.aggregate_outputs_fn",
        "dataset.type",
        "dataset.train_args",
        "dataset.val_args",
    ),
    *(
        "dataloader.train_args",
        "dataloader.val_args",
        "dataset_sampler.train_args",
        "dataset_sampler.val_args",
    ),
    *("lr_scheduler.type", "lr_scheduler.args", "lr_scheduler.interval"),
    *(
        "checkpoint.save_dir",
        "checkpoint.no_save",
        "checkpoint.save_type",
        "checkpoint.save_last",
        "checkpoint.save_best",
    ),
    *("checkpoint.symlink_best_and_last", "checkpoint.every_n_train_steps", "checkpoint.every_n_epochs"),
    *(
        "checkpoint.keep_last_n_checkpoints",
        "resume_from.checkpoint",
        "log.type",
        "log.args",
        "hook.type",
        "hook.args",
    ),
    *(f"hook.{name}" for name in interface.HOOKS),
    *(
        "precision",
        "micro_batch_size",
        "global_batch_size",
        "grad_accumulation_steps",
        "max_epochs",
        "max_train_steps",
    ),
    *("max_val_steps", "val_every_n_train_steps", "val_every_n_epochs", "enable_progress_bar"),
    *("log_progress_every_n_train_steps", "seed", "init_env_fn", "pas_policy"),
}
# ... and what cannot change the numbers of its training: it steers nnScaler's tracing, generated code or communication.
WITHOUT_EFFECT = {
    *(
        "compute_config.constant_folding",
        "compute_config.trace_strategy",
        "compute_config.zero_use_reduce_scatter",
    ),
    *(
        "compute_config.use_async_reducer",
        "compute_config.reducer_bucket_cap_mb",
        "compute_config.user_config",
    ),
    *("gen_savedir", "gen_reuse", "broadcast_strategy", "instance_name", "dummy_sample_gen_fn"),
    *("resume_from.with_merged", "debug.check_gradient_sync_cross_devices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_field_is_refused_by_name_with_a_way_out(name):
    with pytest.raises(ValueError, match=re.escape(name) + r".*not supported by our Trainer: \w"):
        refuse_unsupported(REFUSED[name]())


def test_every_field_of_the_interface_is_supported_or_refused():
    parts = {
        "compute_config": ComputeConfig,
        "model": ModelConfig,
        "optimizer": OptimizerConfig,
        "dataset": DatasetConfig,
        "dataloader": DataloaderConfig,
        "dataset_sampler": DatasetSamplerConfig,
        "lr_scheduler": LRSchedulerConfig,
        "checkpoint": CheckpointConfig,
        "resume_from": ResumeOptions,
        "log": LogConfig,
        "hook": HookMapConfig,
        "debug": interface.DebugConfig,
    }
    names = {field.name for field in dataclasses.fields(TrainerArgs)} - set(parts)
    names |= {f"{part}.{field.name}" for part, cls in parts.items() for field in dataclasses.fields(cls)} - {
        "checkpoint.resume_from"
    }
    names |= {f"hook.{field.name}" for field in dataclasses.fields(HookConfig)}
    assert names - HONOURED - WITHOUT_EFFECT - set(REFUSED) == set()
    assert (HONOURED | WITHOUT_EFFECT) - names == set()


def test_our_trainer_accepts_the_defaults_and_what_steers_code_generation():
    refuse_unsupported(make())
    refuse_unsupported(
        make(
            compute_config=compute(
                use_zero=True, zero_use_reduce_scatter=True, constant_folding=True, pas_config={"_mine": 1}
            ),
            gen_savedir="elsewhere",
            pas_policy="dp",
            precision="bf16",
            dataloader=DataloaderConfig(train_args={"collate_fn": list, "num_workers": 2}),
            dataset_sampler=DatasetSamplerConfig(train_args={"shuffle": False}),
        )
    )
