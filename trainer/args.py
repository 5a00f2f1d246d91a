"""The Trainer interface as data: nnScaler 0.8's dataclasses (its names, fields, defaults and meaning) and their checks.

train.py builds one `TrainerArgs`; either Trainer runs it. What is wrong in a dataclass is raised as one ValueError that
lists every problem. `refuse_unsupported` adds what only our own Trainer cannot do. Where nnScaler's behaviour is a defect
ours is right, and the docstring says so.
"""

import json
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TypeOrName = str | Callable[..., Any]
PRECISIONS = ("fp32", "fp16", "bf16", "none")
TENSOR_KINDS = ("param", "buffer", "input")
REDUCTIONS = ("mean", "sum", "per-token-mean")

HOOKS = (
    *("after_setup", "on_finalize", "on_train_start", "on_train_end", "on_val_start", "on_val_end"),
    *("on_epoch_start", "on_epoch_end", "on_step_start", "on_step_end"),
    *("on_train_step_start", "on_train_step_end", "on_val_step_start", "on_val_step_end"),
    *(
        "after_aggregate_train_step_outputs",
        "after_aggregate_val_step_outputs",
        "before_zero_grad",
        "after_zero_grad",
    ),
    *("before_sync_grad", "after_sync_grad", "before_gnorm_clip", "after_gnorm_clip"),
    *("before_optimizer_step", "after_optimizer_step", "before_log_train_metrics", "before_log_val_metrics"),
    *("on_load_checkpoint", "after_load_checkpoint", "on_save_checkpoint"),
)


class TrainableModel(Protocol):
    """What a model may tell the engine beside `forward(batch) -> loss` or `(loss, ...)`. Every member is optional.

    `layer_class`: the repeated layer's class; layers are sharded, recomputed and compiled one by one. `sharded_alone`: other large
    modules, gathered one at a time.
    `name_prefix`: the wrapper's prefix (such as "model."), dropped from parameter names in checkpoints.
    `for_tracing`: a class of the same parameters and loss that nnScaler's tracer takes in this one's place. Its `whole_functions`
    are those not to look into: function -> the dims of its tensors, in nnScaler's notation.
    """

    layer_class: type
    sharded_alone: "list[torch.nn.Module]"
    name_prefix: str
    for_tracing: TypeOrName

    def weight_files(self) -> "dict[str, Path] | None":
        """Checkpoint name of each parameter -> the safetensors file that holds its value; None: train from scratch."""

    def initial_values(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Elements [start, stop) of the flattened parameter `name` from scratch: fp32, a function of seed and name only."""


def load_type(type_or_name: TypeOrName) -> Any:
    """The class or function itself, imported when it came as a dotted name. ValueError: no such thing."""
    if not isinstance(type_or_name, str):
        return type_or_name
    try:
        return pkgutil.resolve_name(type_or_name)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"type '{type_or_name}' was not found ({error}): give 'module.Name', or the callable itself"
        ) from error


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))


def _not_positive(owner: object, *names: str) -> list[str]:
    """A problem for each named field that is neither None nor a positive whole number."""
    values = {name: getattr(owner, name) for name in names}
    return [
        f"{name} is {value!r}: it must be a whole number of at least 1"
        for name, value in values.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]


@dataclass(frozen=True)
class ComputeConfig:
    """Devices, and how the model is laid out on them.

    `runtime_ngpus` ranks are groups of `plan_ngpus`: the model is partitioned inside a group, replicated across groups.
    None takes WORLD_SIZE, and one rank without torchrun (where nnScaler stops).
    `pas_config` also carries what the interface has no field for; keys of the user's own begin with "_".
    """

    plan_ngpus: int
    runtime_ngpus: int | None = None
    constant_folding: bool = False
    trace_strategy: str = "cuda_run_cpu_offload"
    use_zero: bool = False
    zero_ngroups: int = 1
    zero_use_reduce_scatter: bool = False
    inference_only: bool = False
    use_end2end: bool = False
    use_async_reducer: bool = False
    reducer_bucket_cap_mb: float | None = None
    pas_config: dict[str, Any] = field(default_factory=dict)
    user_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.runtime_ngpus is None:
            object.__setattr__(self, "runtime_ngpus", int(os.environ.get("WORLD_SIZE") or 1))
        problems = _not_positive(self, "plan_ngpus", "runtime_ngpus")
        if not problems and self.runtime_ngpus % self.plan_ngpus:
            problems.append(
                f"runtime_ngpus {self.runtime_ngpus} is no multiple of plan_ngpus {self.plan_ngpus}"
            )
        if not self.use_zero and self.zero_ngroups != 1:
            logger.warning("zero_ngroups is %s without use_zero: taken as 1", self.zero_ngroups)
            object.__setattr__(self, "zero_ngroups", 1)
        problems += _not_positive(self, "zero_ngroups")
        if self.use_zero and self.zero_use_reduce_scatter and self.zero_ngroups != 1:
            problems.append(f"zero_use_reduce_scatter needs zero_ngroups 1, which is {self.zero_ngroups}")
        if (self.reducer_bucket_cap_mb or 0) < 0:
            problems.append(f"reducer_bucket_cap_mb is {self.reducer_bucket_cap_mb}: it must not be negative")
        _raise(problems)


@dataclass
class ModelConfig:
    """`type(**args)` is the module; the whole batch is its forward's first argument, the loss its first output."""

    type: TypeOrName | None = None
    args: dict[str, Any] = field(default_factory=dict)
    parallel_modules: list[Any] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    """`type(parameters, **args)`. At `clip_gnorm` 0 the gradient norm is still computed and logged.

    `loss_reduction` says how the logged loss, `grad_reduction` how the gradient is reduced over the global batch;
    per-token-mean divides by the `num_tokens` of `aggregate_outputs_fn(forward's outputs, process group)`.
    """

    type: TypeOrName | None = None
    args: dict[str, Any] = field(default_factory=dict)
    clip_gnorm: float = 0.0
    loss_reduction: str = "mean"
    grad_reduction: str = "mean"
    aggregate_outputs_fn: TypeOrName | None = None

    def __post_init__(self):
        problems = []
        for name in ("loss_reduction", "grad_reduction"):
            value = getattr(self, name)
            if value not in REDUCTIONS:
                problems.append(f"{name} is {value!r}: choose one of {', '.join(REDUCTIONS)}")
            elif value == "per-token-mean" and not self.aggregate_outputs_fn:
                problems.append(f"{name} per-token-mean needs aggregate_outputs_fn, which counts the tokens")
        if self.clip_gnorm is None or self.clip_gnorm < 0:
            problems.append(f"clip_gnorm is {self.clip_gnorm}: give a positive norm, or 0 not to clip")
        _raise(problems)


@dataclass
class DatasetConfig:
    """`type(**train_args)`; a validation or test set exists only if its args are not empty."""

    type: TypeOrName | None = None
    train_args: dict[str, Any] = field(default_factory=dict)
    val_args: dict[str, Any] = field(default_factory=dict)
    test_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataloaderConfig(DatasetConfig):
    """`type(dataset=..., batch_size=micro_batch_size, **train_args)`; empty val_args or test_args mean train_args."""

    type: TypeOrName | None = "torch.utils.data.DataLoader"


@dataclass
class DatasetSamplerConfig(DatasetConfig):
    """As DataloaderConfig; what splits the samples over the data-parallel ranks."""

    type: TypeOrName | None = "torch.utils.data.DistributedSampler"


@dataclass
class LRSchedulerConfig:
    """`type(optimizer, **args)`, stepped after each epoch or each optimizer step."""

    type: TypeOrName | None = None
    args: dict[str, Any] = field(default_factory=dict)
    interval: str = "epoch"

    def __post_init__(self):
        if self.interval not in ("epoch", "step"):
            raise ValueError(f"lr_scheduler interval is {self.interval!r}: choose 'epoch' or 'step'")


@dataclass
class ResumeOptions:
    """`checkpoint`: 'last' or 'best' of save_dir, a checkpoint directory, or a merged file.

    `convert_fn(state) -> state` adapts a foreign file. `with_merged` True merges a directory's shards while loading, False
    refuses another world size, None merges only then; our Trainer loads shards on any world size and has no need of it.
    """

    checkpoint: str | Path = "last"
    convert_fn: TypeOrName | None = None
    with_merged: bool | None = None


@dataclass
class CheckpointConfig:
    """Where and when to save, and what to resume from. Every n steps or every n epochs; neither: every epoch.

    A missing 'last' or 'best' is a warning and a fresh start, any other missing path an error. A plain string for
    `resume_from` is taken as its `checkpoint` (nnScaler's constructor crashes on one).
    """

    save_dir: str | Path = "./checkpoints"
    no_save: bool = False
    save_type: str = "sharded"
    save_last: bool = True
    save_best: bool = True
    symlink_best_and_last: bool = True
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    keep_last_n_checkpoints: int | None = None
    resume_from: ResumeOptions | None = None

    def __post_init__(self):
        if isinstance(self.resume_from, (str, Path)):
            self.resume_from = ResumeOptions(checkpoint=self.resume_from)
        problems = []
        wanted = self.resume_from.checkpoint if self.resume_from else None
        if wanted and str(wanted) not in ("last", "best"):
            if not Path(wanted).exists():
                problems.append(
                    f"resume_from: {wanted} does not exist; give 'last', 'best', a checkpoint directory or a merged file"
                )
        elif wanted and self.save_dir and self.get_resume_checkpoint() is None:
            # An older one may still be found beside it: whoever resumes says so.
            logger.warning(
                "resume_from: there is no '%s' checkpoint in %s: training starts fresh if there is no other",
                wanted,
                self.save_dir,
            )
        if not self.save_dir and (wanted in ("last", "best") or not self.no_save):
            problems.append("save_dir is empty: name the folder that holds the checkpoints")
        if not self.no_save:
            if self.save_type not in ("sharded", "deduped", "merged"):
                problems.append(f"save_type is {self.save_type!r}: choose sharded, deduped or merged")
            if self.every_n_epochs is not None and self.every_n_train_steps is not None:
                problems.append("every_n_epochs and every_n_train_steps exclude each other: give one")
            problems += _not_positive(
                self, "every_n_train_steps", "every_n_epochs", "keep_last_n_checkpoints"
            )
            if self.every_n_epochs is None and self.every_n_train_steps is None:
                self.every_n_epochs = 1
        _raise(problems)

    def get_resume_checkpoint(self) -> Path | None:
        """What to resume from; None: a fresh start."""
        if not self.resume_from or not self.resume_from.checkpoint:
            return None
        if str(self.resume_from.checkpoint) not in ("last", "best"):
            return Path(self.resume_from.checkpoint)
        path = Path(self.save_dir) / self.resume_from.checkpoint
        return path if path.exists() else None


@dataclass
class LogConfig:
    """`type(**args)` is a logger; a name without a dot is one of trainer.loggers."""

    type: TypeOrName | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.type:
            raise ValueError("log: type is required")
        if isinstance(self.type, str) and "." not in self.type:
            self.type = f"trainer.loggers.{self.type}"


@dataclass
class DebugConfig:
    """Our Trainer shards every gradient, so that no two ranks hold a copy to compare; both values mean the same there."""

    check_gradient_sync_cross_devices: bool = True


@dataclass
class HookConfig:
    """`type(args)` is a hook object; the dict is its one argument, as nnScaler passes it."""

    type: TypeOrName | None = None
    args: dict[str, Any] = field(default_factory=dict)


HookMapConfig = make_dataclass(
    "HookMapConfig", [(name, TypeOrName | None, None) for name in HOOKS], namespace={"__module__": __name__}
)
HookMapConfig.__doc__ = "One function for each callback wanted."


@dataclass
class AggregatedOutputs:
    """What forward returned, summed over a global batch (or over a validation batch)."""

    loss_sum: float | None = None
    num_batches: int | None = None
    num_tokens: int | None = None
    aggregated_outputs: Any = None

    @classmethod
    def aggregate(cls, loss_outputs, sync_group, loss_fn, ntokens_fn=None) -> "AggregatedOutputs":
        """Sum `loss_fn(output)` and `ntokens_fn(output)` (scalar tensors or numbers) over micro-batches and ranks."""
        import torch
        import torch.distributed as dist

        losses = [torch.as_tensor(loss_fn(output)).detach() for output in loss_outputs]
        tokens = (
            [torch.as_tensor(ntokens_fn(output)).detach() for output in loss_outputs] if ntokens_fn else []
        )
        device = losses[0].device if losses else ("cuda" if torch.cuda.is_available() else "cpu")
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # float64 counts exactly up to 2^53 tokens
        for index, values in enumerate((losses, tokens)):
            for value in values:
                sums[index] += value.to(sums)
        sums[2] += len(losses)
        if dist.is_initialized():
            dist.all_reduce(sums, group=sync_group)
        loss_sum, num_tokens, num_batches = sums.tolist()
        return cls(loss_sum, int(num_batches), int(num_tokens) if ntokens_fn else None)


def resolve_precision(precision: str | dict[str, str] | None) -> dict[str, str]:
    """{'param', 'buffer', 'input'} -> precision; what a dict leaves out is 'none' (left as it is).

    A bare 'bf16' or 'fp16' keeps buffers in fp32 (nnScaler casts them too, which shifts RoPE by whole turns at long context).
    """
    if not precision or isinstance(precision, str):
        precision = dict.fromkeys(TENSOR_KINDS, precision or "none")
        if precision["buffer"] in ("bf16", "fp16"):
            precision["buffer"] = "fp32"
    resolved = {kind: precision.get(kind, "none") for kind in TENSOR_KINDS}
    unknown = sorted(set(precision) - set(TENSOR_KINDS)) + sorted(set(resolved.values()) - set(PRECISIONS))
    if unknown:
        raise ValueError(
            f"precision {unknown}: choose {', '.join(PRECISIONS)}, for each of {', '.join(TENSOR_KINDS)} if they differ"
        )
    return resolved


@dataclass
class TrainerArgs:
    """All a Trainer needs. After construction the batch sizes, the precision and `gen_reuse` are filled in.

    `micro_batch_size` samples a rank and forward; `global_batch_size` samples an optimizer step. With neither it nor
    `grad_accumulation_steps` given, the accumulation is 1; one given, the other follows. One of `max_epochs` and
    `max_train_steps` is needed; the earlier ends the run. `max_val_steps` counts global batches.
    """

    init_module: str | None = None
    vars: dict[str, Any] = field(default_factory=dict)
    compute_config: ComputeConfig | None = None
    gen_savedir: str = "./.nnscaler"
    gen_reuse: str = "auto"
    pas_policy: TypeOrName = "autodist"
    broadcast_strategy: str = "all"
    instance_name: str | None = None
    run_mode: str = "run"
    dummy_sample_gen_fn: TypeOrName | None = None
    tracing_from_weights: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    dataset_sampler: DatasetSamplerConfig | None = None
    lr_scheduler: LRSchedulerConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: list[LogConfig] = field(default_factory=list)
    hook: HookConfig | HookMapConfig | None = None
    debug: DebugConfig = field(default_factory=DebugConfig)
    precision: dict[str, str] | str | None = None
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    grad_accumulation_steps: int | None = None
    max_epochs: int | None = None
    max_train_steps: int | None = None
    max_val_steps: int | None = None
    val_every_n_train_steps: int | None = None
    val_every_n_epochs: int | None = 1
    enable_progress_bar: bool = True
    log_progress_every_n_train_steps: int | None = 100
    seed: int | None = None
    init_env_fn: TypeOrName | None = None

    def __post_init__(self):
        counts = (
            "micro_batch_size",
            "global_batch_size",
            "grad_accumulation_steps",
            "max_epochs",
            "max_train_steps",
        )
        problems = _not_positive(self, *counts)
        if self.compute_config is None:
            problems.append("compute_config is required")
        elif not self.compute_config.use_end2end:
            problems.append(
                "compute_config: use_end2end must be True (forward takes the batch and returns the loss)"
            )
        if self.compute_config and not problems:
            problems += self._derive_batch_sizes()
        if not self.max_epochs and not self.max_train_steps:
            problems.append("max_epochs or max_train_steps is required: nothing else ends the run")
        for name in ("model", "optimizer", "dataset", "dataloader", "dataset_sampler", "lr_scheduler"):
            config = getattr(self, name)
            if config and not config.type:
                problems.append(f"{name}: type is required")
        for stage in ("train_args", "val_args", "test_args"):
            if "batch_size" in getattr(self.dataloader, stage):
                problems.append(f"dataloader {stage}: batch_size is not set here; use micro_batch_size")
        choices = {
            "run_mode": ("compile", "run"),
            "gen_reuse": ("auto", "match", "override", "moo", "graph"),
            "broadcast_strategy": ("none", "all", "no_weights", "code"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.gen_reuse == "auto":
            self.gen_reuse = "moo" if self.compile_mode else "match"
        try:
            self.precision = resolve_precision(self.precision)
        except ValueError as error:
            problems.append(str(error))
        _raise(problems)
        if self.seed is None and self.init_env_fn is None:
            logger.warning("neither seed nor init_env_fn is given: the run cannot be repeated")

    def _derive_batch_sizes(self) -> list[str]:
        samples = self.micro_batch_size * self.scaling_factor  # a forward of every data-parallel rank
        given = f"micro_batch_size {self.micro_batch_size} x {self.scaling_factor} data-parallel ranks"
        if not self.global_batch_size:
            self.grad_accumulation_steps = self.grad_accumulation_steps or 1
            self.global_batch_size = samples * self.grad_accumulation_steps
        elif self.global_batch_size % samples:
            ranks = self.scaling_factor
            fit = [
                n
                for n in range(1, self.global_batch_size // ranks + 1)
                if self.global_batch_size % (n * ranks) == 0
            ]
            near = sorted(sorted(fit, key=lambda n: abs(n - self.micro_batch_size))[:2])
            fix = (
                f"use micro_batch_size {' or '.join(map(str, near))}"
                if near
                else f"use a multiple of {samples}"
            )
            return [f"{given} does not divide global_batch_size {self.global_batch_size}: {fix}"]
        elif not self.grad_accumulation_steps:
            self.grad_accumulation_steps = self.global_batch_size // samples
        elif self.global_batch_size != samples * self.grad_accumulation_steps:
            product = f"{given} x grad_accumulation_steps {self.grad_accumulation_steps} = {samples * self.grad_accumulation_steps}"
            return [f"{product} is not global_batch_size {self.global_batch_size}: give one of the two"]
        return []

    @property
    def scaling_factor(self) -> int:
        """The data-parallel degree: how many copies of the plan run side by side."""
        return self.compute_config.runtime_ngpus // self.compute_config.plan_ngpus

    @property
    def update_freq(self) -> int:
        """Micro-batches of one rank in an optimizer step."""
        return self.global_batch_size // self.micro_batch_size // self.scaling_factor

    @property
    def enable_log_progress(self) -> bool:
        """Whether progress is printed as lines, in place of the bar."""
        return not self.enable_progress_bar and bool(self.log_progress_every_n_train_steps)

    @property
    def compile_mode(self) -> bool:
        """Whether to stop once the model is compiled."""
        return self.run_mode == "compile"

    def to_dict(self) -> dict[str, Any]:
        """Plain values all the way down: callables by their dotted names, paths as strings."""

        def plain(value: Any) -> Any:
            if is_dataclass(value) and not isinstance(value, type):
                return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
                return f"{value.__module__}.{value.__qualname__}"
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            # never an object's address: the same on every rank and in every run
            return (
                str(value)
                if isinstance(value, Path)
                else f"{type(value).__module__}.{type(value).__qualname__}"
            )

        return plain(self)


# Keys of pas_config that our Trainer acts on, beside the user's own, which begin with "_".
PAS_CONFIG_KEYS = {
    *("recompute_modules", "mem_constraint", "recompute", "compile", "async_save", "deterministic"),
    *("max_skipped_steps", "validate_first"),
}
DATALOADER_KEYS = {
    *("collate_fn", "num_workers", "pin_memory", "prefetch_factor", "persistent_workers"),
    *("multiprocessing_context", "timeout", "drop_last"),
}


def refuse_unsupported(args: TrainerArgs) -> None:
    """Raise a ValueError for each field that our Trainer does not support and that would change the training.

    Accepted without effect on the numbers: what only steers nnScaler's tracing and code generation, or its communication.
    """
    compute, model, loader = args.compute_config, args.model, args.dataloader
    sampler, resume = args.dataset_sampler or DatasetSamplerConfig(), args.checkpoint.resume_from
    unknown_pas = sorted(
        key for key in compute.pas_config if key not in PAS_CONFIG_KEYS and not key.startswith("_")
    )
    loader_args = sorted({*loader.train_args, *loader.val_args} - DATALOADER_KEYS)
    sampler_args = sorted({*sampler.train_args, *sampler.val_args} - {"shuffle", "seed"})
    text = json.dumps(args.to_dict())
    reference = next((mark for mark in ("$!(", "$!{", "__type", "__value_type") if f'"{mark}' in text), None)
    refusals = [  # (is it asked for, the field, what to use instead)
        (args.init_module, "init_module", "import the module before building TrainerArgs"),
        (args.vars, "vars", "put the values where they are used"),
        (reference, f"{reference} in an args value", "put the value itself there"),
        (args.compile_mode, "run_mode 'compile'", "use run_mode 'run': nothing is compiled ahead of the run"),
        (
            args.pas_policy not in ("autodist", "dp"),
            f"pas_policy {args.pas_policy!r}",
            "use 'autodist' or 'dp'",
        ),
        (
            args.tracing_from_weights,
            "tracing_from_weights",
            "name the files in the model class's weight_files()",
        ),
        (
            compute.plan_ngpus != 1,
            "compute_config.plan_ngpus other than 1",
            "use 1: all ranks are data parallel",
        ),
        (compute.inference_only, "compute_config.inference_only", "leave it False"),
        (
            compute.zero_ngroups != 1,
            "compute_config.zero_ngroups other than 1",
            "use 1: shards lie over all ranks",
        ),
        (
            unknown_pas,
            f"compute_config.pas_config {unknown_pas}",
            f"the keys are {', '.join(sorted(PAS_CONFIG_KEYS))}",
        ),
        (model.parallel_modules, "model.parallel_modules", "leave it empty: the whole model is parallelized"),
        (args.dataset.test_args, "dataset.test_args", "use val_args: no stage reads a test set"),
        (loader.test_args, "dataloader.test_args", "use val_args: no stage reads a test set"),
        (sampler.test_args, "dataset_sampler.test_args", "use val_args: no stage reads a test set"),
        (not _is_default(loader), "dataloader.type", "use torch.utils.data.DataLoader"),
        (loader_args, f"dataloader args {loader_args}", f"the keys are {', '.join(sorted(DATALOADER_KEYS))}"),
        (
            not _is_default(sampler),
            "dataset_sampler.type",
            "use the default: the order is a function of seed and position",
        ),
        (sampler_args, f"dataset_sampler args {sampler_args}", "the keys are shuffle and seed"),
        (
            args.checkpoint.save_type == "merged",
            "checkpoint.save_type 'merged'",
            "use 'sharded', and merge afterwards",
        ),
        (resume and resume.convert_fn, "resume_from.convert_fn", "convert the file before the run"),
        ("fp16" in args.precision.values(), "precision 'fp16'", "use 'bf16', which needs no loss scaling"),
        (args.precision["buffer"] == "bf16", "precision 'bf16' for buffers", "use 'fp32': RoPE needs it"),
    ]
    _raise(
        [f"{name} is not supported by our Trainer: {instead}" for asked, name, instead in refusals if asked]
    )


def _is_default(config: DatasetConfig) -> bool:
    default = type(config)().type
    return config.type == default or config.type is load_type(default)
