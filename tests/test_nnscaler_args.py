"""Our TrainerArgs against nnScaler's own, built from the same table of arguments: what they derive, and what they refuse."""

import dataclasses

import pytest

from trainer import args as ours

real = pytest.importorskip(
    "nnscaler.cli.trainer_args", reason="nnScaler is not installed (requirements-nnscaler.txt)"
)
pytestmark = pytest.mark.nnscaler

# Where ours differ on purpose, with the reason. Every other difference is a failure.
DEVIATIONS = {
    "bf16": "RoPE's frequencies lose 14.7 rad of phase at position 8191 in bf16: buffers stay in fp32 unless a dict says otherwise",
    "fp16": "as bf16",
    "resume-string": "nnScaler's constructor crashes on a plain string (AttributeError): it is taken as ResumeOptions.checkpoint",
    "no-world-size": "without torchrun nnScaler stops: plain `python train.py` trains on one rank",
    "global-0": "0 is no batch size: nnScaler takes it for unset",
    "accumulation-0": "as global-0",
    "max-steps-0": "0 steps are no run: nnScaler takes it for unset",
    "micro-0": "nnScaler fails on it with a ZeroDivisionError, or derives a global batch of 0: a sentence instead",
    "micro-0-global": "as micro-0",
    "negative-micro": "nnScaler derives a negative global batch",
    "negative-steps": "nnScaler's run ends after its first step",
    "negative-clip": "nnScaler would turn every gradient around",
    "loader-batch-size": "nnScaler refuses it too, but only when the loader is built, after the process group has started",
    "log-unknown": "a name without a dot is one of trainer.loggers, not of nnscaler.cli.loggers",
}


def table():
    """id -> (what to change of a valid set of arguments, as calls of the interface under test)."""
    compute, resume, save = (
        (lambda **k: ("compute_config", k)),
        (lambda *a, **k: ("resume", a, k)),
        (lambda **k: ("checkpoint", k)),
    )
    return {
        # batch arithmetic
        "defaults": {},
        "micro": dict(micro_batch_size=4),
        "accumulation": dict(grad_accumulation_steps=8),
        "global": dict(global_batch_size=64),
        "micro-global": dict(micro_batch_size=2, global_batch_size=64),
        "all-three": dict(micro_batch_size=2, global_batch_size=64, grad_accumulation_steps=16),
        "plan-2": dict(compute_config=compute(plan_ngpus=2, runtime_ngpus=4), micro_batch_size=3, grad_accumulation_steps=2),
        "plan-is-runtime": dict(compute_config=compute(plan_ngpus=4, runtime_ngpus=4), global_batch_size=6, micro_batch_size=2),
        "indivisible": dict(micro_batch_size=3, global_batch_size=64),
        "smaller-than-micro": dict(micro_batch_size=8, global_batch_size=8),
        "inconsistent": dict(micro_batch_size=2, global_batch_size=64, grad_accumulation_steps=3),
        "global-0": dict(global_batch_size=0),
        "accumulation-0": dict(grad_accumulation_steps=0),
        "micro-0": dict(micro_batch_size=0),
        "micro-0-global": dict(micro_batch_size=0, global_batch_size=8),
        "negative-micro": dict(micro_batch_size=-1),
        # devices
        "not-a-multiple": dict(compute_config=compute(plan_ngpus=2, runtime_ngpus=3)),
        "plan-0": dict(compute_config=compute(plan_ngpus=0, runtime_ngpus=2)),
        "runtime-negative": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=-2)),
        "no-world-size": dict(compute_config=compute(plan_ngpus=1)),
        "no-compute-config": dict(compute_config=None),
        "not-end2end": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=2, use_end2end=False)),
        "zero-groups": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=4, use_zero=True, zero_ngroups=2)),
        "zero-groups-0": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=4, use_zero=True, zero_ngroups=0)),
        "zero-groups-unused": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=4, zero_ngroups=2)),
        "reduce-scatter-groups": dict(
            compute_config=compute(plan_ngpus=1, runtime_ngpus=4, use_zero=True, zero_ngroups=2, zero_use_reduce_scatter=True)
        ),
        "negative-bucket": dict(compute_config=compute(plan_ngpus=1, runtime_ngpus=2, reducer_bucket_cap_mb=-1.0)),
        # ends
        "epochs": dict(max_train_steps=None, max_epochs=3),
        "both-ends": dict(max_epochs=3),
        "no-end": dict(max_train_steps=None),
        "max-steps-0": dict(max_train_steps=0, max_epochs=1),
        "negative-steps": dict(max_train_steps=-5),
        # precision
        "fp32": dict(precision="fp32"),
        "bf16": dict(precision="bf16"),
        "fp16": dict(precision="fp16"),
        "none": dict(precision="none"),
        "precision-dict": dict(precision={"param": "bf16", "buffer": "fp32", "input": "bf16"}),
        "precision-part": dict(precision={"param": "bf16"}),
        "precision-empty": dict(precision=""),
        "precision-unknown": dict(precision="fp8"),
        "precision-unknown-kind": dict(precision={"weights": "bf16"}),
        "precision-unknown-in-dict": dict(precision={"param": "int8"}),
        # checkpoints
        "save-steps": dict(checkpoint=save(every_n_train_steps=5)),
        "save-epochs": dict(checkpoint=save(every_n_epochs=2, keep_last_n_checkpoints=3)),
        "save-both": dict(checkpoint=save(every_n_train_steps=5, every_n_epochs=2)),
        "save-both-but-no-save": dict(checkpoint=save(every_n_train_steps=5, every_n_epochs=2, no_save=True)),
        "save-0-steps": dict(checkpoint=save(every_n_train_steps=0)),
        "save-0-epochs": dict(checkpoint=save(every_n_epochs=0)),
        "keep-0": dict(checkpoint=save(keep_last_n_checkpoints=0)),
        "no-save-dir": dict(checkpoint=save(save_dir="")),
        "save-deduped": dict(checkpoint=save(save_type="deduped")),
        "save-merged": dict(checkpoint=save(save_type="merged")),
        "save-unknown": dict(checkpoint=save(save_type="zip")),
        "save-negative": dict(checkpoint=save(every_n_train_steps=-1)),
        # resume
        "resume-default": dict(checkpoint=save(resume_from=resume())),
        "resume-best": dict(checkpoint=save(resume_from=resume("best"))),
        "resume-folder": dict(checkpoint=save(resume_from=resume("FOLDER"))),
        "resume-merged": dict(checkpoint=save(resume_from=resume("FOLDER", with_merged=True))),
        "resume-nowhere": dict(checkpoint=save(resume_from=resume("no/such/folder"))),
        "resume-nowhere-no-save": dict(checkpoint=save(resume_from=resume("no/such/folder"), no_save=True)),
        "resume-empty": dict(checkpoint=save(resume_from=resume(""))),
        "resume-last-no-dir": dict(checkpoint=save(resume_from=resume("last"), save_dir="", no_save=True)),
        "resume-string": dict(checkpoint=save(resume_from="last")),
        # parts
        "per-token-mean": dict(optimizer=("optimizer", dict(grad_reduction="per-token-mean", aggregate_outputs_fn="os.getpid"))),
        "loss-per-token": dict(optimizer=("optimizer", dict(loss_reduction="per-token-mean", aggregate_outputs_fn="os.getpid"))),
        "per-token-mean-alone": dict(optimizer=("optimizer", dict(grad_reduction="per-token-mean"))),
        "loss-per-token-alone": dict(optimizer=("optimizer", dict(loss_reduction="per-token-mean"))),
        "grad-unknown": dict(optimizer=("optimizer", dict(grad_reduction="median"))),
        "loss-unknown": dict(optimizer=("optimizer", dict(loss_reduction="median"))),
        "no-optimizer": dict(optimizer=("optimizer", dict(type=None))),
        "negative-clip": dict(optimizer=("optimizer", dict(clip_gnorm=-1.0))),
        "scheduler": dict(lr_scheduler=("lr_scheduler", dict(type="torch.optim.lr_scheduler.LambdaLR", interval="step"))),
        "scheduler-unknown-interval": dict(lr_scheduler=("lr_scheduler", dict(type="x.Y", interval="minute"))),
        "no-scheduler-type": dict(lr_scheduler=("lr_scheduler", {})),
        "no-sampler-type": dict(dataset_sampler=("sampler", dict(type=None))),
        "no-loader-type": dict(dataloader=("dataloader", dict(type=None))),
        "loader-batch-size": dict(dataloader=("dataloader", dict(train_args={"batch_size": 2}))),
        "compile-mode": dict(run_mode="compile"),
        "run-mode-unknown": dict(run_mode="walk"),
        "reuse": dict(gen_reuse="graph"),
        "reuse-unknown": dict(gen_reuse="never"),
        "broadcast-unknown": dict(broadcast_strategy="some"),
        "no-bar": dict(enable_progress_bar=False),
        "no-bar-no-lines": dict(enable_progress_bar=False, log_progress_every_n_train_steps=0),
        "log": dict(log=[("log", dict(type="a.b.Logger"))]),
        "log-unknown": dict(log=[("log", dict(type="TensorBoardLogger"))]),
        "no-log-type": dict(log=[("log", {})]),
    }  # fmt: skip


def build(module, changes, folder):
    """The arguments in one of the two implementations."""
    classes = {
        "compute_config": lambda **k: module.ComputeConfig(**{"use_end2end": True, **k}),
        "checkpoint": lambda **k: module.CheckpointConfig(**{"save_dir": str(folder), **k}),
        "optimizer": lambda **k: module.OptimizerConfig(**{"type": "torch.optim.AdamW", **k}),
        "resume": lambda *a, **k: module.ResumeOptions(
            *[str(folder) if x == "FOLDER" else x for x in a], **k
        ),
        "lr_scheduler": module.LRSchedulerConfig,
        "sampler": module.DatasetSamplerConfig,
        "dataloader": module.DataloaderConfig,
        "log": module.LogConfig,
    }

    def make(value):
        if isinstance(value, list):
            return [make(item) for item in value]
        if not isinstance(value, tuple):
            return value
        name, *positional, named = value
        return classes[name](
            *(positional[0] if positional else ()), **{key: make(item) for key, item in named.items()}
        )

    base = {
        "compute_config": ("compute_config", dict(plan_ngpus=1, runtime_ngpus=2)),
        "model": module.ModelConfig("torch.nn.Linear"),
        "optimizer": ("optimizer", {}),
        "dataset": module.DatasetConfig("builtins.list"),
        "checkpoint": ("checkpoint", {}),
        "max_train_steps": 3,
        "seed": 0,
    }
    return module.TrainerArgs(**{key: make(value) for key, value in {**base, **changes}.items()})


def outcome(module, changes, folder):
    """What follows from the arguments, or the kind of error they are refused with."""
    try:
        args = build(module, changes, folder)
        save = args.checkpoint
        return {
            "batch": (args.micro_batch_size, args.global_batch_size, args.grad_accumulation_steps),
            "update_freq": args.update_freq,
            "scaling_factor": args.scaling_factor,
            "runtime_ngpus": args.compute_config.runtime_ngpus,
            "zero_ngroups": args.compute_config.zero_ngroups,
            "ends": (args.max_epochs, args.max_train_steps),
            "precision": args.precision,
            "saves": (
                save.every_n_train_steps,
                save.every_n_epochs,
                save.keep_last_n_checkpoints,
                save.save_type,
            ),
            "resume": save.get_resume_checkpoint(),
            "modes": (args.gen_reuse, args.compile_mode, bool(args.enable_log_progress)),
            "log": [log.type for log in args.log],
        }
    except ValueError:
        return ValueError
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("case", table())
def test_ours_derive_and_refuse_what_nnscaler_does(case, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    changes = table()[case]
    mine, its = outcome(ours, changes, tmp_path), outcome(real, changes, tmp_path)
    assert mine is ValueError or isinstance(mine, dict), "ours never fail but with a sentence"
    if case in DEVIATIONS:
        assert mine != its, f"no deviation any more: {DEVIATIONS[case]}"
    else:
        assert mine == its


def test_every_listed_deviation_is_in_the_table():
    assert set(DEVIATIONS) <= set(table())
    assert len(table()) >= 25


@pytest.mark.parametrize(
    "name",
    "TrainerArgs ComputeConfig ModelConfig OptimizerConfig DatasetConfig DataloaderConfig DatasetSamplerConfig LRSchedulerConfig "
    "CheckpointConfig ResumeOptions LogConfig DebugConfig HookConfig HookMapConfig AggregatedOutputs".split(),
)
def test_fields_and_defaults_are_nnscalers(name):
    def described(cls):
        return {
            field.name: field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
            for field in dataclasses.fields(cls)
        }

    mine, its = described(getattr(ours, name)), described(getattr(real, name))
    assert list(mine) == list(its)
    for field, default in its.items():
        if not dataclasses.is_dataclass(default):
            assert mine[field] == default or mine[field] is default, field


def test_hooks_are_nnscalers():
    from nnscaler.cli.train_hook import TrainHook

    assert set(ours.HOOKS) == {name for name in vars(TrainHook) if not name.startswith("_")}
