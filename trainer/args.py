"""The Trainer interface as data: the part of nnScaler 0.8's dataclasses that train.py and the engines read.

Names and meaning are nnScaler's. `NativeOptions` holds what nnScaler's interface has no field for.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "bf16")
PAS_POLICIES = ("autodist", "dp", "tp")


@dataclass(frozen=True)
class ComputeConfig:
    """`runtime_ngpus` ranks in groups of `plan_ngpus`: nnScaler partitions the model inside a group."""

    plan_ngpus: int
    runtime_ngpus: int

    def __post_init__(self):
        if self.plan_ngpus < 1 or self.runtime_ngpus % self.plan_ngpus:
            has = f"plan_ngpus {self.plan_ngpus} does not divide {self.runtime_ngpus} ranks"
            raise ValueError(f"{has}: give a number that does")


@dataclass
class ModelConfig:
    """`type(**args)` is the model. An engine asks this of it; all but forward is optional.

    `forward(batch)` returns (loss summed over the batch's targets, the same detached, number of targets). A
    batch is a dict of tensors; its `num_tokens` counts the tokens in it.
    `layer_class`: the class of the repeated layer, which is sharded, recomputed and compiled one by one.
    `sharded_alone`: other large modules that are gathered one at a time, and not for backward: their own
    gradients do not need their parameters.
    `compile_loss(compile)`: replaces what the loss computes elementwise by `compile` of it.
    `checkpoint_name(name)`: what checkpoints call the parameter of that name; the same without it.
    `weight_files()`: checkpoint name of each parameter -> the safetensors file that holds it, or None.
    `initial_values(name, start, stop)`: those elements of the flattened fresh parameter, in fp32, a function
    of seed and name only; called if there are no weight files.
    Parameters that require no gradient are frozen: then only they have weight files, and checkpoints hold the
    others alone. They are kept in the computation's precision.
    `flops_per_token(batch)`: floating-point operations of a training step, for MFU.
    `longest_sample`: the number of tokens that it was made for.
    `for_tracing`: the dotted name of a class with the same parameters and loss that nnScaler can trace. Its
    `whole_functions` maps each function that nnScaler must not trace into to its tensors' dims.
    """

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


@dataclass
class NativeOptions:
    """Options that nnScaler's interface has no field for. Its engine refuses those that it cannot honour.

    recompute: 'none', 'full', and not with nnScaler 'selective' (all but matrix products and attention), or
    the number of layers that recompute their activations.
    validate_first: validate before the first step, and log the result as step 0.
    max_skipped_steps: stop after so many steps in a row with a loss or gradient norm that is not finite.
    timeout_seconds: longest time that a step may take, and a tenth of what its first one, a validation or a
    save may take; then the run ends.
    run_id: what the checkpoints and metrics of this run are known by.
    dp_replicate: replicas of the model; its shards lie over the ranks inside a replica.
    reshard_after_forward: free a layer's gathered weights after its forward, or only when a step is over.
    mem_constraint: GiB of a device that nnScaler's autodist may use; our own plan is made before.
    predicted_peak_gib: of a rank's tensors; compared with the measured peak in the end.
    """

    recompute: str | int = "none"
    deterministic: bool = False
    validate_first: bool = False
    compile: bool = False
    async_save: bool = False
    max_skipped_steps: int = 3
    timeout_seconds: int = 600
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    dp_replicate: int = 1
    reshard_after_forward: bool = True
    mem_constraint: float | None = None
    predicted_peak_gib: float | None = None


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
        problems, micro = [], self.micro_batch_size
        try:
            sizes = self.global_batch_size, self.grad_accumulation_steps
            sizes = derive_batch_sizes(micro, self.scaling_factor, *sizes)
            self.global_batch_size, self.grad_accumulation_steps = sizes
        except ValueError as error:
            problems.append(str(error))
        for name, choices in (("precision", PRECISIONS), ("pas_policy", PAS_POLICIES)):
            if getattr(self, name) not in choices:
                problems.append(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def scaling_factor(self) -> int:
        """The data-parallel degree."""
        return self.compute_config.runtime_ngpus // self.compute_config.plan_ngpus


def derive_batch_sizes(
    micro: int, ranks: int, total: int | None, accumulation: int | None
) -> tuple[int, int]:
    """The global batch and the accumulation, where either may be missing; ValueError if they do not agree."""
    samples = micro * ranks  # in one forward of every data-parallel rank
    given = f"micro_batch_size {micro} x {ranks} data-parallel ranks"
    accumulated = accumulation or (total // samples if total else 1)
    if not total or total == samples * accumulated:
        return samples * accumulated, accumulated
    if total % samples:
        fit = [n for n in range(1, total // ranks + 1) if total % (n * ranks) == 0]
        near = sorted(sorted(fit, key=lambda n: abs(n - micro))[:2])
        above = samples * (total // samples + 1)
        more = f"a number of ranks that divides it, or global_batch_size {above}"
        fix = f"micro_batch_size {' or '.join(map(str, near))}" if near else more
        raise ValueError(f"{given} does not divide global_batch_size {total}: use {fix}")
    given += f" x grad_accumulation_steps {accumulation} = {samples * accumulation}"
    fix = f"leave grad_accumulation_steps out, or give global_batch_size {samples * accumulation}"
    raise ValueError(f"{given} is not global_batch_size {total}: {fix}")
