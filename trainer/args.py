"""The Trainer interface as data: the part of nnScaler 0.8's dataclasses that train.py and the engines read.

Names and meaning are nnScaler's. `NativeOptions` holds what nnScaler's interface has no field for.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError, raise_together

PRECISIONS = ("fp32", "bf16")
PAS_POLICIES = ("autodist", "dp", "tp")


@dataclass(frozen=True)
class ComputeConfig:
    """`runtime_ngpus` ranks in groups of `plan_ngpus`: nnScaler partitions the model inside a group."""

    plan_ngpus: int
    runtime_ngpus: int

    def __post_init__(self):
        if self.plan_ngpus < 1 or self.runtime_ngpus % self.plan_ngpus:
            raise UserError(
                f"plan_ngpus ({self.plan_ngpus}) does not divide the number of ranks ({self.runtime_ngpus})",
                "Give a number that divides the ranks",
            )


@dataclass
class ModelConfig:
    """`type(**args)` is the model, a trainer.trainable.TrainableModel."""

    type: Callable
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerConfig:
    """`type(parameters, **args)` is the optimizer. `clip_gnorm` 0 turns clipping off, not the logged norm."""

    type: Callable
    args: dict[str, Any] = field(default_factory=dict)
    clip_gnorm: float = 0.0


@dataclass
class LRSchedulerConfig:
    """`type(optimizer, **args)` is the schedule, stepped after each optimizer step."""

    type: Callable
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetConfig:
    """`type(**train_args)` is the training set; without `val_args` there is no validation set."""

    type: Callable
    train_args: dict[str, Any] = field(default_factory=dict)
    val_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetSamplerConfig:
    """`type(num_samples, micro_batch_size, ...)` yields the sample indices of each micro-batch of a rank.

    Further arguments, by keyword: accumulation, rank, world_size, seed, shuffle, start and stop (positions of
    the run). `indices(positions)` returns the samples at positions (dataset.sampler.GlobalBatchSampler).
    """

    type: Callable


@dataclass
class DataloaderConfig:
    """Keyword arguments of torch's DataLoader for both sets.

    `collate_fn` makes a batch of one fixed shape from at most micro_batch_size samples, and from none.
    """

    train_args: dict[str, Any]


@dataclass
class CheckpointConfig:
    """Where to save and what to resume from. Without `every_n_train_steps`, each epoch's end saves.

    `resume_from` is a checkpoint folder or a merged file (nnScaler wraps it in ResumeOptions);
    trainer.engine.open_resumed finds and verifies it.
    """

    save_dir: str | Path = "./checkpoints"
    every_n_train_steps: int | None = None
    keep_last_n_checkpoints: int | None = None
    resume_from: str | Path | None = None


@dataclass
class LogConfig:
    """`type(**args)` is a logger (trainer.loggers)."""

    type: Callable
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class HookMapConfig:
    """The caller's functions.

    on_train_start(trainer) runs on rank 0 alone, once the run's folders hold nothing of another run.
    on_save_checkpoint(trainer, state) may add JSON values to the state that a checkpoint carries.
    on_train_end(trainer) runs after the last step's save and validation.
    """

    on_train_start: Callable | None = None
    on_save_checkpoint: Callable | None = None
    on_train_end: Callable | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run lies over its ranks: decided once, by the flags, the plan and the machine, and saved.

    dp_shard: ranks that share one copy of the model. dp_replicate: copies of the model.
    recompute: 'none', 'full', and not with nnScaler 'selective' (all but matrix products and attention), or
    the number of layers that recompute their activations.
    reshard_after_forward: free a layer's gathered weights after its forward, or only when a step is over.
    micro_batch_size: samples in one forward of a rank. grad_accumulation_steps: forwards in a step.
    compile: layers are compiled, each by itself.
    predicted_peak_gib: the plan's, of a rank's tensors; compared with the measured peak in the end.
    """

    dp_shard: int = 1
    dp_replicate: int = 1
    recompute: str | int = "none"
    reshard_after_forward: bool = True
    micro_batch_size: int = 1
    grad_accumulation_steps: int = 1
    compile: bool = False
    predicted_peak_gib: float | None = None


@dataclass
class NativeOptions:
    """Options that nnScaler's interface has no field for. Its engine refuses those that it cannot honour.

    layout: how the run lies over its ranks; its batch sizes are also TrainerArgs'.
    validate_first: validate before the first step, and log the result as step 0.
    max_skipped_steps: stop after so many steps in a row with a loss or gradient norm that is not finite.
    timeout_seconds: longest time that a step may take, and a tenth of what its first one, a validation or a
    save may take; then the run ends.
    run_id: what the checkpoints and metrics of this run are known by.
    mem_constraint: GiB of a device that nnScaler's autodist may use; our own plan is made before.
    save_every_n_minutes: save, without a validation, when the last save is so long ago on rank 0's clock.
    device_tflops: a device's rate of dense bf16 products, for MFU; None: unknown.
    """

    layout: Layout = field(default_factory=Layout)
    deterministic: bool = False
    validate_first: bool = False
    async_save: bool = False
    max_skipped_steps: int = 3
    timeout_seconds: int = 600
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    mem_constraint: float | None = None
    save_every_n_minutes: float = 30.0
    device_tflops: float | None = None


@dataclass
class TrainerArgs:
    """Everything that a Trainer needs.

    `micro_batch_size` counts the samples in one forward of a rank, `global_batch_size` those in an optimizer
    step. If neither it nor `grad_accumulation_steps` is given, accumulation is 1; if one is given, the other
    follows. The logged loss and the gradient are means over all valid targets of the global batch (nnScaler's
    per-token-mean). Precision 'bf16' keeps buffers in fp32 (nnScaler rounds them, which breaks RoPE).
    """

    compute_config: ComputeConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    dataset: DatasetConfig
    dataset_sampler: DatasetSamplerConfig
    dataloader: DataloaderConfig
    max_train_steps: int
    pas_policy: str = "autodist"
    lr_scheduler: LRSchedulerConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: list[LogConfig] = field(default_factory=list)
    hook: HookMapConfig = field(default_factory=HookMapConfig)
    precision: str = "fp32"
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    grad_accumulation_steps: int | None = None
    val_every_n_train_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        errors = []
        try:
            self.global_batch_size, self.grad_accumulation_steps = derive_batch_sizes(
                self.micro_batch_size,
                self.scaling_factor,
                self.global_batch_size,
                self.grad_accumulation_steps,
            )
        except UserError as error:
            errors.append(error)
        for name, choices in (("precision", PRECISIONS), ("pas_policy", PAS_POLICIES)):
            value = getattr(self, name)
            if value not in choices:
                errors.append(UserError(f"{name} is {value!r}", f"Choose one of {', '.join(choices)}"))
        raise_together(errors)

    @property
    def scaling_factor(self) -> int:
        """The data-parallel degree."""
        return self.compute_config.runtime_ngpus // self.compute_config.plan_ngpus


def derive_batch_sizes(
    micro: int, ranks: int, total: int | None, accumulation: int | None
) -> tuple[int, int]:
    """Return the global batch and the accumulation, of which either may be None. Raises UserError.

    micro: samples in one forward of a rank. ranks: data-parallel ones. total: samples in an optimizer step.
    """
    samples = micro * ranks  # in one forward of every data-parallel rank
    if total is None:
        accumulation = accumulation or 1
        return samples * accumulation, accumulation
    if total % samples:
        raise UserError(
            f"micro_batch_size {micro} x {ranks} data-parallel ranks does not divide "
            f"global_batch_size {total}",
            _dividing_sizes(micro, ranks, total),
        )
    if accumulation is not None and total != samples * accumulation:
        raise UserError(
            f"micro_batch_size {micro} x {ranks} data-parallel ranks x grad_accumulation_steps "
            f"{accumulation} = {samples * accumulation} is not global_batch_size {total}",
            f"Leave grad_accumulation_steps out, or give global_batch_size {samples * accumulation}",
        )
    return total, total // samples


def _dividing_sizes(micro: int, ranks: int, total: int) -> str:
    """Return the fix with the two nearest micro-batches that divide the global batch, if there are any."""
    sizes = [size for size in range(1, total // ranks + 1) if total % (size * ranks) == 0]
    if not sizes:
        above = micro * ranks * (total // (micro * ranks) + 1)
        return f"Use a number of ranks that divides it, or global_batch_size {above}"
    sizes.sort(key=lambda size: abs(size - micro))
    nearest = " or ".join(str(size) for size in sorted(sizes[:2]))
    return f"Use micro_batch_size {nearest}"
