"""Runs our TrainerArgs on nnScaler 0.8: refuses what it cannot do, translates the rest, follows the run."""

import json
import logging
import math
import os
import pkgutil
import shutil
import signal
import time
import warnings
from pathlib import Path

import nnscaler
import torch
import torch.distributed as dist
from nnscaler import cli
from nnscaler.graph import tracer
from nnscaler.runtime.f16_optimizer import MixedPrecisionAdamW

from errors import TrainingFailed, UserError, raise_together
from trainer import checkpoint, folders, ranks, setup
from trainer.args import NativeOptions, TrainerArgs
from trainer.loggers import perplexity
from trainer.nnscaler_engine.files import STATE_FILE, NnScalerCheckpoint
from trainer.trainer import TrainState, minutes, peak_memory_gib

logger = logging.getLogger(__name__)


class Trainer:
    """Runs TrainerArgs on nnScaler 0.8, on every rank that torchrun started or on one without it.

    Raises UserError for what the user can mend before training, TrainingFailed if the run breaks down.
    nnScaler stops at the first step that is not finite: `max_skipped_steps` has no effect.
    """

    def __init__(self, *, train_args: TrainerArgs, options: NativeOptions | None = None):
        self.args, self.options = train_args, options or NativeOptions()
        self.save_dir = Path(train_args.checkpoint.save_dir)
        self.resumed = path = train_args.checkpoint.resume_from
        # nnScaler unpickles what it resumes. Opening a merged file refuses one that holds more than data.
        self.saved = saved = NnScalerCheckpoint(path).state if path else {}
        policy, plan = train_args.pas_policy, train_args.compute_config.plan_ngpus
        recompute, found = self.options.layout.recompute, self.save_dir.glob(f"*-*/{STATE_FILE}")
        newer = [f.parent for f in found if saved and checkpoint.step_of(f.parent) > saved["step"]]
        refusals = {
            "--compile=on": self.options.layout.compile,
            "--async_save=on": self.options.async_save,
            "--dp_replicate": self.options.layout.dp_replicate > 1,
            f"--recompute={recompute}: use none or full": recompute not in ("none", "full"),
            f"--recompute=full with --pas_policy={policy}": recompute == "full" and policy != "autodist",
            f"--pas_policy=dp with --plan_ngpus={plan}: use autodist or tp": policy == "dp" and plan > 1,
            f"--resume_from={path}, which another script wrote": self.resumed and not saved,
            f"--save_dir={self.save_dir}, which is our engine's": saved
            and checkpoint.checkpoints(self.save_dir),
            f"--save_dir={self.save_dir} with checkpoints newer than the resumed one": newer,
        }
        raise_together(
            [
                UserError(
                    f"--engine=nnscaler does not support {flag}", "Use --engine=native, or leave it out"
                )
                for flag, is_used in refusals.items()
                if is_used
            ]
        )

    def run(self) -> None:
        """Trains to the end. A SIGTERM saves and exits with 143."""
        _adapt_surroundings()
        if not self.resumed:
            ranks.by_first_rank(
                lambda: folders.make_room(self.save_dir, *folders.survey(self.save_dir, None))
            )
        setup.seed_everything(self.args.seed, self.options.deterministic)
        with ranks.noted_signals() as signals:
            hook = RunHook(self.args, self.options, self.saved, signals)
            try:
                cli.Trainer(train_args=self._translate(hook)).run()
            finally:
                for log in hook.loggers:
                    log.finalize()
                nnscaler.uninit()

    def _translate(self, hook: "RunHook") -> "NnScalerArgs":
        ours, mean = self.args, "per-token-mean"
        traced_class = pkgutil.resolve_name(ours.model.type.traced_class)
        for function, dims in getattr(traced_class, "whole_functions", {}).items():
            nnscaler.register_op(dims)(function)
        recomputed = traced_class.layer_class.__name__ if self.options.layout.recompute == "full" else ""
        limit = {"mem_constraint": gib} if (gib := self.options.mem_constraint) else {}
        plan = dict(use_zero=True, use_end2end=True, pas_config={"recompute_modules": recomputed, **limit})
        schedule, config, adam = ours.lr_scheduler, ours.optimizer, ours.optimizer.type
        if ours.precision == "bf16" and adam is torch.optim.AdamW:
            adam = MixedPrecisionAdamW  # it keeps fp32 master weights
        # Equal world sizes may partition the model differently. Then a rank's shard is not what it loads.
        partitioned = max(ours.compute_config.plan_ngpus, self.saved.get("plan_ngpus", 1)) > 1
        how = dict(with_merged=partitioned or None)  # None: merged if the world size changed
        resume = self.resumed and cli.trainer_args.ResumeOptions(str(self.resumed), **how)
        # Without a validation set, nnScaler would choose the best by training losses.
        saves = {**vars(ours.checkpoint), "resume_from": resume, "save_best": bool(ours.dataset.val_args)}
        order = dict(accumulation=ours.grad_accumulation_steps, seed=ours.seed, start=hook.state.samples)
        changed = dict(
            compute_config=nnscaler.ComputeConfig(**vars(ours.compute_config), **plan),
            # The code of another run may hold other weights or shapes.
            gen_savedir=f".nnscaler/{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ['MASTER_PORT']}",
            gen_reuse="override",
            model=cli.ModelConfig(traced_class, ours.model.args),
            optimizer=cli.OptimizerConfig(adam, config.args, config.clip_gnorm, mean, mean, sum_outputs),
            lr_scheduler=schedule and cli.LRSchedulerConfig(**vars(schedule), interval="step"),
            dataset=cli.DatasetConfig(**vars(ours.dataset)),
            dataset_sampler=cli.DatasetSamplerConfig(train_args=order),
            dataloader=cli.DataloaderConfig(**vars(ours.dataloader)),
            checkpoint=cli.CheckpointConfig(**saves),
            # RoPE's frequencies are buffers, and bf16 is too coarse for them.
            precision={"param": ours.precision, "buffer": "fp32", "input": ours.precision},
            enable_progress_bar=False,
            log=[],
            hook=cli.HookConfig(lambda _: hook),
        )
        arguments = NnScalerArgs(**{**vars(ours), **changed})
        arguments.sampler_type = ours.dataset_sampler.type
        return arguments


class NnScalerArgs(cli.TrainerArgs):
    """nnScaler's arguments also create the parts of a run: this replaces the parts that must be ours."""

    def to_dict(self) -> dict:
        return {"checkpoint": {"save_type": "sharded"}}  # tells nnScaler what a shard is

    def create_model(self) -> torch.nn.Module:
        """With its weights, because nnScaler starts from those of the model that it traces."""
        model = super().create_model()
        for parameter in model.parameters():
            if parameter.is_meta:  # swapped in place, so that tied parameters stay tied
                on_cpu = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                torch.utils.swap_tensors(parameter, on_cpu)
        setup.fill_weights(model)
        return model

    def create_dataloader(self, stage="train", dataset=None):
        """In our sample order, from where the resumed run stopped; to nnScaler the run is one epoch."""
        if dataset is None:
            return None
        place = dict(rank=dist.get_rank() // self.compute_config.plan_ngpus, world_size=self.scaling_factor)
        order = dict(shuffle=False, stop=len(dataset)) if stage == "val" else self.dataset_sampler.train_args
        sampler = self.sampler_type(len(dataset), self.micro_batch_size, **place, **order)
        # The global generator's state must not depend on how many loaders were started.
        options = dict(self.dataloader.train_args, generator=torch.Generator())
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, **options)


def sum_outputs(outputs: list[tuple], group) -> cli.AggregatedOutputs:
    """Sums what forward returned over micro-batches and ranks."""
    sums = torch.stack([torch.stack((loss.double(), count.double())) for _, loss, count in outputs]).sum(0)
    dist.all_reduce(sums, group=group)
    loss_sum, targets = sums.cpu().numpy()  # without targets the mean is nan, not an exception
    # nnScaler divides training losses by num_tokens, and validation losses by num_batches.
    return cli.AggregatedOutputs(loss_sum, num_batches=targets, num_tokens=targets or math.nan)


def _adapt_surroundings() -> None:
    """Sets what torchrun sets, and repairs two places where nnScaler's tracer does not know torch 2.13."""
    alone = dict(RANK="0", LOCAL_RANK="0", GROUP_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    alone |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID=str(os.getpid()))
    os.environ |= {**alone, **os.environ}
    table = tracer.wrap_utils.default_autowrap_leaf_function
    for function in [f for f in table if "pybind11_detail" in str(getattr(f, "__qualname__", ""))]:
        del table[function]  # torch lists the name, but has no such function
    patcher = tracer.torch_fx_patcher.TorchFXPatcher
    is_impure = patcher.is_impure_new
    patcher.is_impure_new = staticmethod(lambda node, *_, **__: is_impure(node))
    # Our collate_fn fills short batches, and a resume replays the schedule.
    warnings.filterwarnings("ignore", "Length of .* dataset|Detected call of .lr_scheduler.step")


class RunHook(cli.train_hook.TrainHook):
    """Counts, logs, saves when nnScaler does not, and repairs what it loads; nnScaler calls it on every rank.

    saved: the state of the resumed checkpoint, or {}. signals: which ones arrived (ranks.noted_signals).
    """

    def __init__(self, args: TrainerArgs, options: NativeOptions, saved: dict, signals: dict):
        self.args, self.options, self.signals = args, options, signals
        self.parents = checkpoint.lineage(saved) if saved else []
        self.state, self.best = TrainState.from_dict(saved), saved.get("best_val_loss")
        self.peak_gib, self.loggers = 0.0, []
        self.saved_at = minutes()
        self.on_train_end = args.hook.on_train_end or self.on_train_end

    def after_load_checkpoint(self, trainer, content) -> None:
        logger.info("resumed at step %d of %d", self.state.step, self.args.max_train_steps)
        trainer.dataloader_resumed = True  # else nnScaler draws and drops the batches before this step
        for moments in trainer.optimizer.state.values():
            # All parameters of a merged file share one step tensor, which each of them would advance.
            moments["step"] = moments["step"].clone()
        for group in trainer.optimizer.param_groups:
            group.pop("initial_lr", None)
            group.update(self.args.optimizer.args)  # this run's, not those of the checkpoint
        trainer.lr_scheduler = trainer.train_args.create_lr_scheduler(trainer.optimizer)
        for _ in range(self.state.step if trainer.lr_scheduler else 0):
            trainer.lr_scheduler.step()

    def after_setup(self, trainer) -> None:
        if trainer.local_rank == 0:  # all ranks have loaded the generated code
            shutil.rmtree(trainer.train_args.gen_savedir, ignore_errors=True)

    def on_train_start(self, trainer) -> None:
        ranks.by_first_rank(self._open_logs, trainer)
        trainer.train_status.best_loss = self.best or math.inf
        if self.options.validate_first and self.state.step == 0:
            trainer._validate(cli.trainer._StepStat())

    def _open_logs(self, trainer) -> None:
        for config in self.args.log:
            log = config.type(**config.args)
            log.setup(self.options.run_id, self.parents, branched=False)
            self.loggers.append(log)
        if hook := self.args.hook.on_train_start:
            hook(trainer)

    def on_train_step_start(self, trainer, batches) -> None:
        self.began, self.val_loss = time.perf_counter(), math.nan
        self.step_tokens = sum(int(batch["num_tokens"]) for batch in batches)

    def after_optimizer_step(self, trainer) -> None:
        # nnScaler resets the device's peak before it logs.
        self.peak_gib = max(self.peak_gib, peak_memory_gib(torch.device("cuda")))

    def before_log_train_metrics(self, trainer, metrics, aggregated) -> None:
        """Counts the step, and logs it under our names."""
        state, device, size = self.state, torch.cuda.current_device(), len(trainer.dataset["train"])
        tokens = torch.tensor(self.step_tokens, device=device)
        dist.all_reduce(tokens, group=trainer.sync_group)
        time_is_due = trainer.rank == 0 and minutes() - self.saved_at >= self.options.save_every_n_minutes
        requests = [self.peak_gib, *self.signals.values(), time_is_due]
        largest = torch.tensor(requests, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.peak_gib, self.terminated, self.interrupted, self.save_wanted, self.time_is_due = (
            largest.tolist()
        )
        epoch, seconds = state.samples // size, time.perf_counter() - self.began
        state.step, state.updates = state.step + 1, state.updates + 1
        state.samples += self.args.global_batch_size
        state.tokens += tokens.item()
        self.epoch_ended = state.samples // size > epoch
        row = {"epoch": epoch, **{name: metrics[name] for name in ("train_loss", "lr", "gnorm")}}
        speed = {"tokens_per_second": tokens.item() / seconds, "step_seconds": seconds}
        row |= {"tokens": state.tokens, **speed, "peak_memory_gib": self.peak_gib}
        for log in self.loggers:
            log.log_metrics(row, state.step, tag="train")
        if not math.isfinite(row["gnorm"]):
            raise TrainingFailed(f"step {state.step} is not finite: lower --learning_rate, then resume")

    def before_log_val_metrics(self, trainer, metrics) -> None:
        self.val_loss = metrics["val_loss"]
        row = {"val_loss": self.val_loss, "perplexity": perplexity(self.val_loss)}
        for log in self.loggers:
            log.log_metrics(row, self.state.step, tag="val")

    def on_step_end(self, trainer, epoch, idx, metrics, aggregated) -> None:
        """Save where nnScaler does not: at an epoch's end, and when a signal or the time asks for it."""
        if self.state.step == self.args.max_train_steps:
            return  # nnScaler saves the last step
        leaving = self.terminated or self.interrupted
        if leaving or self.save_wanted:
            self.signals.update(dict.fromkeys(self.signals, False))
            trainer._save_checkpoint(math.nan)  # at once, without a validation; nan is never the best loss
        elif self.epoch_ended and not self.args.checkpoint.every_n_train_steps:
            trainer._validate_and_save(cli.trainer._StepStat(train_loss=math.nan))
        elif self.time_is_due and self.args.checkpoint.keep_last_n_checkpoints:
            trainer._save_checkpoint(math.nan)  # nnScaler keeps every save without that number
        if leaving:
            logger.info("a signal came: saved and stopping; --resume_from=last continues")
            raise SystemExit(128 + (signal.SIGTERM if self.terminated else signal.SIGINT))

    def on_save_checkpoint(self, trainer, content: dict) -> None:
        """Adds our state to the shard; rank 0 also writes it beside the shards."""
        self.saved_at = minutes()
        if is_best := self.val_loss <= trainer.train_status.best_loss:
            self.best = self.val_loss
        state = dict(vars(self.state), best_val_loss=self.best, global_batch_size=self.args.global_batch_size)
        state |= dict(run=self.options.run_id, parents=self.parents)
        state |= dict(plan_ngpus=self.args.compute_config.plan_ngpus)
        if hook := self.args.hook.on_save_checkpoint:
            hook(trainer, state)
        content["trainer_state"] = json.dumps(state)
        if trainer.rank == 0:
            folder = Path(self.args.checkpoint.save_dir, f"0000-{self.state.step:04d}")  # one long epoch
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_FILE).write_text(content["trainer_state"])
            for link in ("last", "best")[: 1 + is_best]:  # those that nnScaler moves to this checkpoint
                for path in folder.parent.glob(f"{link}/*.ckpt"):
                    if int(path.stem) >= trainer.world_size:
                        path.unlink()  # of a run on more ranks
