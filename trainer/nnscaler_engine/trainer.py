"""Runs our TrainerArgs on nnScaler 0.8: refuses what it cannot do, and translates the rest."""

import logging
import math
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import nnscaler
import torch
import torch.distributed as dist
from nnscaler.cli import trainer as nnscaler_trainer
from nnscaler.cli import trainer_args as theirs
from nnscaler.graph.tracer import wrap_utils
from nnscaler.graph.tracer.torch_fx_patcher import TorchFXPatcher
from nnscaler.runtime.f16_optimizer import MixedPrecisionAdamW

from trainer import setup
from trainer.args import NativeOptions, TrainerArgs, load_type
from trainer.checkpoint import checkpoints
from trainer.nnscaler_engine.files import NnScalerCheckpoint
from trainer.nnscaler_engine.hook import RunHook
from trainer.sampler import GlobalBatchSampler
from trainer.saver import set_aside
from trainer.trainer import TrainState

GENERATED = Path(".nnscaler")  # each run generates its code in a folder of its own in there


class Trainer:
    """Runs TrainerArgs on nnScaler 0.8, on every rank that torchrun started or on a single one without it.

    Raises ValueError for what the user can fix before training, TrainingFailed if the run breaks down. nnScaler
    stops at the first step that is not finite, so `max_skipped_steps` has no effect.
    """

    def __init__(self, *, train_args: TrainerArgs, options: NativeOptions | None = None):
        self.args, self.options = train_args, options or NativeOptions()
        path = train_args.checkpoint.get_resume_checkpoint()
        self.resume_path = path if path and path.exists() else None
        self._refuse_unsupported()
        # nnScaler unpickles whatever it resumes; this refuses a merged file that holds more than data.
        self.resumed = NnScalerCheckpoint(path).state if self.resume_path else None
        if self.resumed == {}:
            fix = "start from its weights (--export_hf, then --model_id)"
            raise ValueError(f"--resume_from: another script wrote {path}: {fix}")

    def run(self) -> None:
        """Trains to the end. A SIGTERM saves and exits with 143."""
        _become_single_rank()
        _adapt_to_torch()
        logging.getLogger("nnscaler").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "Length of .* dataset")  # our collate_fn fills short batches
        save_dir = Path(self.args.checkpoint.save_dir)
        holds_run = checkpoints(save_dir) or (save_dir / "last").exists()
        if holds_run and not self.resumed and os.environ["RANK"] == "0":
            set_aside(save_dir)
        try:
            nnscaler_trainer.Trainer(train_args=self._translated_args()).run()
        finally:
            if dist.is_initialized():
                nnscaler.uninit()

    def _refuse_unsupported(self) -> None:
        options, save_dir = self.options, Path(self.args.checkpoint.save_dir)
        refusals = (
            (options.compile, "compiles no layers: use --compile=off"),
            (options.async_save, "does not save in the background: use --async_save=off"),
            (
                options.recompute not in ("none", "full"),
                "recomputes all layers or none: use --recompute=full",
            ),
            (
                options.recompute == "full" and self.args.pas_policy == "dp",
                "recomputes nothing with --pas_policy=dp: use --pas_policy=autodist or --recompute=none",
            ),
            (
                self.resume_path and checkpoints(save_dir),
                f"does not save among our engine's checkpoints in {save_dir}: name another --save_dir",
            ),
        )
        if problems := [f"--engine=nnscaler {text}" for wanted, text in refusals if wanted]:
            raise ValueError("\n".join(problems))

    def _translated_args(self) -> "NnScalerArgs":
        ours, options = self.args, self.options
        model_class = load_type(ours.model.type)
        traced_class = load_type(getattr(model_class, "for_tracing", model_class))
        for function, dims in getattr(traced_class, "whole_functions", {}).items():
            nnscaler.register_op(dims)(function)
        recomputed = model_class.layer_class.__name__ if options.recompute == "full" else ""
        bf16, optimizer_type = ours.precision == "bf16", load_type(ours.optimizer.type)
        if bf16 and optimizer_type is torch.optim.AdamW:
            optimizer_type = MixedPrecisionAdamW  # keeps fp32 master weights
        mean = "per-token-mean"
        schedule = ours.lr_scheduler
        return NnScalerArgs(
            ours=ours,
            options=options,
            resumed=self.resumed,
            compute_config=nnscaler.ComputeConfig(
                plan_ngpus=ours.compute_config.plan_ngpus,
                runtime_ngpus=ours.compute_config.runtime_ngpus,
                use_zero=True,
                use_end2end=True,
                pas_config={"recompute_modules": recomputed},
            ),
            pas_policy=ours.pas_policy,
            model=theirs.ModelConfig(traced_class, ours.model.args),
            optimizer=theirs.OptimizerConfig(
                optimizer_type, ours.optimizer.args, ours.optimizer.clip_gnorm, mean, mean, sum_outputs
            ),
            dataset=theirs.DatasetConfig(ours.dataset.type, ours.dataset.train_args, ours.dataset.val_args),
            lr_scheduler=schedule and theirs.LRSchedulerConfig(schedule.type, schedule.args, interval="step"),
            checkpoint=theirs.CheckpointConfig(
                save_dir=str(ours.checkpoint.save_dir),
                every_n_train_steps=ours.checkpoint.every_n_train_steps or sys.maxsize,
                keep_last_n_checkpoints=ours.checkpoint.keep_last_n_checkpoints,
                save_best=bool(ours.dataset.val_args),  # else nnScaler compares training losses
                resume_from=self.resume_path and theirs.ResumeOptions(str(self.resume_path)),
            ),
            # RoPE's frequencies are buffers, and too coarse in bf16.
            precision={"param": ours.precision, "buffer": "fp32", "input": ours.precision},
            micro_batch_size=ours.micro_batch_size,
            global_batch_size=ours.global_batch_size,
            max_train_steps=ours.max_train_steps,
            val_every_n_train_steps=ours.val_every_n_train_steps,
            val_every_n_epochs=None,
            enable_progress_bar=False,
            log_progress_every_n_train_steps=None,
            seed=ours.seed,
        )


@dataclass
class NnScalerArgs(theirs.TrainerArgs):
    """nnScaler's arguments, which also create the parts of a run: this replaces the parts that must be ours."""

    ours: TrainerArgs | None = None
    options: NativeOptions | None = None
    resumed: dict | None = None  # the state of the checkpoint to resume from

    def __post_init__(self):
        super().__post_init__()
        self.state = TrainState.from_dict(self.resumed or {})

    def to_dict(self) -> dict:
        """Goes into every shard."""
        found = self.ours.to_dict()
        found["checkpoint"]["save_type"] = "sharded"  # by which nnScaler knows a shard
        return found

    def init_env(self, trainer) -> None:
        setup.seed_everything(self.seed, self.options.deterministic)
        # nnScaler would reuse code generated from other weights or for other shapes.
        GENERATED.mkdir(exist_ok=True)
        folder = [tempfile.mkdtemp(dir=GENERATED) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        self.gen_savedir = folder[0]

    def create_model(self) -> torch.nn.Module:
        """Fills in the weights: nnScaler starts from those of the model that it traces."""
        model = super().create_model()
        names = setup.parameter_names(model)
        for parameter in names:
            if parameter.is_meta:  # swapped in place, so that tied parameters stay tied
                empty = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                torch.utils.swap_tensors(parameter, empty)
        setup.fill_initial(model, names)
        return model

    def create_dataloader(self, stage="train", dataset=None):
        """One long epoch in our sample order, from where the resumed run stopped."""
        if dataset is None:
            return None
        train, ranks, micro = stage == "train", self.scaling_factor, self.micro_batch_size
        sampler = SizedSampler(
            len(dataset),
            micro,
            self.update_freq if train else 1,
            dist.get_rank() // self.compute_config.plan_ngpus,
            ranks,
            self.seed,
            shuffle=train,
            start=self.state.samples if train else 0,
            stop=None if train else len(dataset),
        )
        steps = self.max_train_steps * self.update_freq
        sampler.size = steps if train else math.ceil(len(dataset) / (micro * ranks))
        # The global generator's state must not depend on how many loaders were started.
        options = dict(self.ours.dataloader.train_args, generator=torch.Generator())
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, **options)

    def create_hook(self) -> RunHook:
        return RunHook(self)


class SizedSampler(GlobalBatchSampler):
    """`size` is the number of micro-batches of the whole run, or of one validation; nnScaler asks for it."""

    size: int

    def __len__(self) -> int:
        return self.size


def sum_outputs(outputs: list[tuple], group) -> theirs.AggregatedOutputs:
    """Sums what forward returned over micro-batches and ranks."""
    sums = torch.stack([torch.stack((loss.double(), count.double())) for _, loss, count in outputs]).sum(0)
    dist.all_reduce(sums, group=group)
    # NumPy's numbers, because their mean over no target is nan, which ends the run with a message.
    loss_sum, targets = sums.cpu().numpy()
    # nnScaler divides the training loss by num_tokens, and the validation loss by num_batches.
    return theirs.AggregatedOutputs(loss_sum, num_batches=targets, num_tokens=targets or math.nan)


def _become_single_rank() -> None:
    """Sets what torchrun would, without which nnScaler does not start."""
    if "RANK" not in os.environ:
        rank = {name: "0" for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT")}  # 0: any free port
        world = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {**rank, **world, "TORCHELASTIC_RUN_ID": "none"}


def _adapt_to_torch() -> None:
    """Works around two places where nnScaler's tracer does not know torch 2.13."""
    table = wrap_utils.default_autowrap_leaf_function
    for function in [f for f in table if "pybind11_detail" in str(getattr(f, "__qualname__", ""))]:
        del table[function]  # torch lists the name, but has no such function
    is_impure = TorchFXPatcher.is_impure_new
    TorchFXPatcher.is_impure_new = staticmethod(lambda node, *_, **__: is_impure(node))
