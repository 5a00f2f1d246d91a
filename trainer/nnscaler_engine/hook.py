"""Follows a run of nnScaler's Trainer: counts, logs, saves at epoch ends and on signals, repairs what it resumes."""

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from nnscaler.cli.train_hook import TrainHook
from nnscaler.cli.trainer import _StepStat

from trainer import setup
from trainer.args import TrainingFailed, load_type
from trainer.loggers import RunLog, perplexity
from trainer.nnscaler_engine.files import STATE_FILE
from trainer.trainer import SIGTERM_EXIT_CODE, peak_memory_gib


class RunHook(TrainHook):
    """nnScaler calls these methods on every rank. args: NnScalerArgs."""

    def __init__(self, args):
        self.args, self.ours, self.state = args, args.ours, args.state
        self.log = RunLog(self.ours.log, dist.get_rank())
        self.resources = contextlib.ExitStack()
        self.peak_gib = 0.0
        self.val_loss = math.inf  # of this step's validation

    # ------------------------------------------------------------ start and end

    def after_load_checkpoint(self, trainer, content) -> None:
        optimizer = trainer.optimizer
        trainer.dataloader_resumed = True  # else nnScaler draws and drops the batches of the steps before
        for moments in optimizer.state.values():
            # All parameters of a merged file share one step tensor, which each of them would advance.
            moments["step"] = moments["step"].clone()
        # Optimizer and schedule follow this run's arguments.
        given = self.ours.optimizer.args
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)
            group.update({name: value for name, value in given.items() if name in group})
        trainer.lr_scheduler = self.args.create_lr_scheduler(optimizer)
        for _ in range(self.state.step if trainer.lr_scheduler else 0):
            trainer.lr_scheduler.step()
        self.log.info("resumed: step %d, %d samples seen", self.state.step, self.state.samples)

    def after_setup(self, trainer) -> None:
        if trainer.local_rank == 0:  # all ranks have loaded the generated code
            shutil.rmtree(self.args.gen_savedir, ignore_errors=True)
        if self.state.step >= self.ours.max_train_steps:
            reached = f"step {self.state.step} of {self.ours.max_train_steps} is reached"
            self.log.info("nothing to do: %s (raise --max_train_steps to go on)", reached)

    def on_train_start(self, trainer) -> None:
        self.signals = self.resources.enter_context(setup.noted_signals())
        self.log.open(self.ours.to_dict(), self.state.step)
        self.resources.callback(self.log.close)
        if self.state.best_val_loss is not None:
            trainer.train_status.best_loss = self.state.best_val_loss
        if self.args.options.validate_first and not self.args.resumed:
            trainer._validate(_StepStat())

    def on_train_end(self, trainer) -> None:
        if hook := self.ours.hook.on_train_end:
            load_type(hook)(trainer)

    def on_finalize(self, trainer) -> None:
        self.resources.close()

    # ------------------------------------------------------------ a step

    def on_step_start(self, trainer, epoch, idx) -> None:
        self.began, self.val_loss = time.perf_counter(), math.inf

    def on_train_step_start(self, trainer, batches) -> None:
        self.step_tokens = sum(int(batch["num_tokens"]) for batch in batches)

    def after_gnorm_clip(self, trainer, gnorm) -> None:
        if not math.isfinite(gnorm):
            raise TrainingFailed(
                f"the gradient norm of step {self.state.step + 1} is {gnorm.item()}: stopped before the update. "
                "Lower --learning_rate or raise --warmup_steps, then --resume_from=last"
            )

    def after_optimizer_step(self, trainer) -> None:
        # nnScaler resets the device's peak before it lets us log.
        self.peak_gib = max(self.peak_gib, peak_memory_gib(torch.device("cuda")))

    def before_log_train_metrics(self, trainer, metrics, aggregated) -> None:
        """Counts the step, and logs it under our names."""
        state, device = self.state, torch.cuda.current_device()
        tokens = torch.tensor(self.step_tokens, device=device)
        dist.all_reduce(tokens, group=trainer.sync_group)
        values = (self.peak_gib, *self.signals.values())
        largest = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.peak_gib, self.terminated, self.save_wanted = largest.tolist()
        self.epoch = self._epoch(trainer)
        state.step, state.updates = state.step + 1, state.updates + 1
        state.samples, state.tokens = (
            state.samples + self.ours.global_batch_size,
            state.tokens + tokens.item(),
        )
        seconds = time.perf_counter() - self.began
        row = {
            "epoch": self.epoch,
            **{name: float(metrics[name]) for name in ("train_loss", "lr", "gnorm")},
            "tokens": state.tokens,
            "tokens_per_second": tokens.item() / seconds,
            "step_seconds": seconds,
            "peak_memory_gib": self.peak_gib,
        }
        self.log.write(state.step, row, "train")
        self.log.progress(state.step, self.ours.max_train_steps, row)

    def before_log_val_metrics(self, trainer, metrics) -> None:
        self.val_loss = float(metrics["val_loss"])
        row = {"val_loss": self.val_loss, "perplexity": perplexity(self.val_loss)}
        self.log.write(self.state.step, row, "val")
        self.log.info("step %d: val_loss=%.6f perplexity=%.4f", self.state.step, *row.values())

    def on_step_end(self, trainer, epoch, idx, metrics, aggregated) -> None:
        """Saves where nnScaler does not: at an epoch's end, and when a signal asks for it."""
        if self.state.step == self.ours.max_train_steps:
            return
        if self.terminated or self.save_wanted:
            self.signals[signal.SIGUSR1] = False
            trainer._save_checkpoint(math.nan)  # at once, unvalidated: nan never is the best loss
        elif not self.ours.checkpoint.every_n_train_steps and self._epoch(trainer) > self.epoch:
            trainer._validate_and_save(_StepStat(train_loss=metrics["train_loss"]))
        if self.terminated:
            left = "SIGTERM: saved step %d and stopping; --resume_from=last continues from here"
            self.log.info(left, self.state.step)
            sys.exit(SIGTERM_EXIT_CODE)

    def _epoch(self, trainer) -> int:
        return self.state.samples // len(trainer.dataset["train"])

    # ------------------------------------------------------------ a save

    def on_save_checkpoint(self, trainer, content: dict) -> None:
        """Adds our state to the shard, and writes it beside it too."""
        is_best = self.val_loss <= trainer.train_status.best_loss
        best = min(self.val_loss, trainer.train_status.best_loss)
        self.state.best_val_loss = best if math.isfinite(best) else None
        state = {
            **vars(self.state),
            "world_size": trainer.world_size,
            "global_batch_size": self.ours.global_batch_size,
            "config": self.ours.to_dict(),
        }
        if hook := self.ours.hook.on_save_checkpoint:
            load_type(hook)(trainer, state)
        content["trainer_state"] = json.dumps(state)
        if trainer.rank > 0:
            return
        save_dir = Path(self.ours.checkpoint.save_dir)
        folder = save_dir / f"0000-{self.state.step:04d}"  # nnScaler sees one long epoch
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(content["trainer_state"])
        # Links of a run on more ranks would stay beside the new ones.
        for path in [
            path for link in ("last", "best")[: 1 + is_best] for path in save_dir.glob(f"{link}/*.ckpt")
        ]:
            if int(path.stem) >= trainer.world_size:
                path.unlink()
