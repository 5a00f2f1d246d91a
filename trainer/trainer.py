"""Our implementation of nnScaler's Trainer: the loop, one step, validation, and when to save."""

import logging
import math
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from errors import TrainingFailed, UserError
from trainer import devices, folders, parallel, ranks, setup
from trainer.args import NativeOptions, TrainerArgs
from trainer.checkpoint import Checkpoint, CheckpointError, CheckpointName, lineage
from trainer.loggers import log_save, perplexity
from trainer.sampler import GlobalBatchSampler, load_batches
from trainer.saver import Saver

logger = logging.getLogger(__name__)

LOG_FAILED = 1  # the exit code of a run that cannot write its metrics


@dataclass
class TrainState:
    """What changes during training besides weights and optimizer; every checkpoint holds it."""

    step: int = 0  # optimizer steps, skipped ones included
    samples: int = 0  # the position in the sample order
    tokens: int = 0
    updates: int = 0  # optimizer steps, skipped ones not included

    @classmethod
    def from_dict(cls, saved: dict) -> "TrainState":
        """Ignores what is no field, and takes the default for a field that `saved` lacks."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})


class Trainer:
    """Runs TrainerArgs on every rank that torchrun started, or on a single one without it.

    Raises UserError for what the user can mend before training, TrainingFailed if the run breaks down.
    """

    def __init__(self, *, train_args: TrainerArgs, options: NativeOptions | None = None):
        if train_args.compute_config.plan_ngpus != 1:
            raise UserError(
                f"compute_config.plan_ngpus must be 1 (got {train_args.compute_config.plan_ngpus})",
                "Leave it out: our engine shards the model over all ranks",
            )
        self.args, self.options = train_args, options or NativeOptions()
        self.device = parallel.pick_device()
        self.kind = devices.of(self.device)
        self.save_dir = Path(train_args.checkpoint.save_dir)
        self.state, self.loggers = TrainState(), []
        self.signals = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), False)
        self.step_seconds, self._save_postponed, self._log_problem = 0.0, False, ""

    def run(self) -> None:
        """Trains to the end. A SIGTERM saves and exits with 143, a Ctrl-C with 130."""
        with ranks.process_group(), ranks.noted_signals() as self.signals:
            self.build()
            if not self.prepare_training():
                return
            try:
                self.watchdog = ranks.Watchdog(self.options.timeout_seconds)
                self._train()
                if hook := self.args.hook.on_train_end:
                    hook(self)
            except (TrainingFailed, SystemExit):
                self.saver.wait()  # all ranks are here: after another error, a rank would wait for ever
                raise
            finally:
                self.watchdog.stopped.set()
                for log in self.loggers:
                    log.finalize()

    def evaluate(self) -> float:
        """The validation loss of the pretrained model, or of the checkpoint that `resume_from` names."""
        with ranks.process_group():
            self.build()
            return self.validate()

    def build(self) -> None:
        """Builds the model with its weights and opens the datasets: all that validation needs."""
        args, self.rank, self.world_size = self.args, dist.get_rank(), dist.get_world_size()
        if (wanted := args.compute_config.runtime_ngpus) != self.world_size:
            raise UserError(
                f"compute_config.runtime_ngpus is {wanted}, and {self.world_size} ranks run",
                "Give the number of ranks",
            )
        setup.seed_everything(args.seed, self.options.deterministic)
        self.memory_before_gib = peak_memory_gib(self.device)
        data = args.dataset
        self.train_set = data.type(**data.train_args)
        self.val_set = data.type(**data.val_args) if data.val_args else None
        self.control = dist.new_group(backend="gloo")  # for objects and barriers
        path = args.checkpoint.resume_from
        self.resumed = ranks.together(Checkpoint.open, path) if path else None
        self.parents = lineage(self.resumed.state) if self.resumed else []
        self.model, self.names = setup.build_model(args, self.options, self.device, self.resumed)
        self.frozen = setup.frozen_digest(self.model, self.resumed)

    def prepare_training(self) -> bool:
        """Sets up the rest; returns False, and touches no file, if the resumed run has nothing left to do."""
        args = self.args
        self.optimizer = args.optimizer.type(list(self.names), **args.optimizer.args)
        if self.resumed:
            self._restore()
            if self.state.step >= args.max_train_steps and not self._validation_is_missing():
                reached = f"step {self.state.step} of {args.max_train_steps} is reached"
                logger.info("nothing to do: %s (raise --max_train_steps to go on)", reached)
                return False
        self.scheduler = None
        if args.lr_scheduler:
            self.scheduler = args.lr_scheduler.type(self.optimizer, **args.lr_scheduler.args)
            # Replayed, not restored: the schedule is a function of the step and of this run's arguments.
            self._step_scheduler(self.state.step)
        dist.barrier(group=self.control)  # every rank has read what it resumes from
        self.home = ranks.by_first_rank(self._open_folders)
        keep, group = args.checkpoint.keep_last_n_checkpoints, dist.new_group(backend="gloo")
        resumed = self.resumed and (self.home or self.resumed.path)
        self.saver = Saver(self.save_dir, keep, self.options.async_save, group, resumed)
        return True

    def _open_folders(self) -> Path | None:
        """Sets aside what this run would replace; returns the resumed checkpoint's folder if it is here."""
        home, replaced = folders.survey(self.save_dir, self.resumed)
        self.loggers = [config.type(**config.args) for config in self.args.log]
        for log in self.loggers:
            log.setup(self.options.run_id, self.parents, branched=bool(replaced) or not home)
        folders.make_room(self.save_dir, home, replaced, self.resumed)
        if hook := self.args.hook.on_train_start:
            hook(self)
        return home

    def _restore(self) -> None:
        source, seed = self.resumed, self.args.seed
        if "updates" not in source.state:
            raise CheckpointError(
                f"an earlier version of this program wrote {source.path}",
                "Start from its weights (--export_hf, then --model_id)",
            )
        self.state = TrainState.from_dict(source.state)
        ranks.together(setup.restore_optimizer, source, self.optimizer, self.names, self.state.updates)
        if len(source.rng) == self.world_size:
            setup.set_rng_state(source.rng[self.rank])
        source.boxes.clear()  # unmaps the files: pruning them frees their space
        source.checks.clear()
        if (before := source.state["seed"]) != seed:
            logger.warning("the seed was %s, now %s: the order of the samples changes", before, seed)
        step, samples = self.state.step, self.state.samples
        logger.info("resumed from %s: step %d, %d samples seen", source.path, step, samples)

    def _train(self) -> None:
        args, state, accumulation = self.args, self.state, self.args.grad_accumulation_steps
        if self.device.type == "cpu":
            setup.keep_freed_memory()
        sizes = (len(self.train_set), args.micro_batch_size, accumulation, self.rank, self.world_size)
        self.sampler = GlobalBatchSampler(*sizes, args.seed, start=state.samples)
        batches = load_batches(self.train_set, self.sampler, args.dataloader.train_args, self.device)
        self._validate_before_the_first_step()
        first, skipped_in_a_row = state.step, 0
        while state.step < args.max_train_steps:
            began, epoch = time.perf_counter(), self._epoch()
            self.watchdog.note(f"step {state.step + 1}", times=10 if state.step == first else 1)
            micro_batches = [next(batches) for _ in range(accumulation)]
            data_seconds = time.perf_counter() - began
            metrics = {"epoch": epoch, "lr": self.optimizer.param_groups[0]["lr"]}
            metrics["train_loss"], metrics["gnorm"], tokens, finite = self._train_step(micro_batches)
            state.step += 1
            state.samples += args.global_batch_size
            state.tokens += tokens
            state.updates += finite
            self._step_scheduler(1)
            self.step_seconds = time.perf_counter() - began
            news = (self._stop_code(), self.saver.failed, self.signals[signal.SIGUSR1])
            memory, stopped, save_failed, save_wanted = self._largest(peak_memory_gib(self.device), *news)
            metrics |= {"tokens": state.tokens, "tokens_per_second": tokens / self.step_seconds}
            metrics |= {"step_seconds": self.step_seconds, "data_seconds": data_seconds}
            metrics["peak_memory_gib"] = memory
            metrics |= self._utilization(metrics["tokens_per_second"], micro_batches[0])
            if save_failed:
                self.saver.wait()  # raises on every rank
            if finite:
                self.saver.confirm()
            else:
                positions = np.arange(state.samples - args.global_batch_size, state.samples)
                metrics["skipped_samples"] = self.sampler.indices(positions).tolist()
            self._log(metrics, "train")
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            if skipped_in_a_row >= self.options.max_skipped_steps:
                self.saver.retreat()
                raise TrainingFailed(
                    f"the loss or the gradient norm was not finite for {skipped_in_a_row} steps in a row, "
                    f"until step {state.step}: {self.saver.last_good()}. Lower --learning_rate, raise "
                    "--warmup_steps, or look at the samples that metrics.jsonl names"
                )
            self._save_and_validate(epoch, finite, bool(save_wanted), int(stopped))
        self._finish()

    def _finish(self) -> None:
        (self.grown_gib,) = self._largest(peak_memory_gib(self.device) - self.memory_before_gib)
        self.saver.wait()
        self._after_save()
        if self.rank == 0:
            self.saver.prune(self.saver.newest or self.saver.good)
        if self._log_problem:
            self._leave(LOG_FAILED)

    def _train_step(self, micro_batches: list[dict]) -> tuple[float, float, int, bool]:
        """Zero, accumulate, reduce, clip, update.

        Returns the global batch's mean loss in nats per target, its gradient norm, its tokens, and whether
        the two are finite. Otherwise the update is skipped; all ranks skip together, as both are sums over
        all ranks.
        """
        self.optimizer.zero_grad()
        loss_sum, targets, tokens = 0.0, 0, 0
        for batch in micro_batches:
            if not self.options.layout.reshard_after_forward:  # the weights change after the last one
                self.model.set_reshard_after_backward(batch is micro_batches[-1])
            loss, detached, count = self.model(batch)
            loss.backward()  # FSDP sums the gradients over the ranks
            loss_sum, targets = loss_sum + detached.double(), targets + count
            tokens += batch["num_tokens"]
        loss_sum, targets, tokens = self._sum(loss_sum, targets, tokens)
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        norm = parallel.whole(torch.nn.utils.get_total_norm(gradients)).item()
        loss, gnorm = (loss_sum / targets, norm / targets) if targets else (math.nan, math.nan)
        finite = math.isfinite(loss) and math.isfinite(gnorm)
        if finite:
            limit = self.args.optimizer.clip_gnorm
            clip = min(1.0, limit / (gnorm + 1e-6)) if limit else 1.0
            torch._foreach_mul_([parallel.local(gradient) for gradient in gradients], clip / targets)
            self.optimizer.step()
        return loss, gnorm, int(tokens), finite

    def _utilization(self, tokens_per_second: float, batch: dict) -> dict[str, float]:
        """The share of the devices' bf16 rate that the model's operations take, where the rate is known."""
        flops_per_token = getattr(self.model, "flops_per_token", None)
        if not (self.kind and flops_per_token):
            return {}
        return {
            "mfu": tokens_per_second * flops_per_token(batch) / (self.kind.tflops * 1e12 * self.world_size)
        }

    def _save_and_validate(self, epoch: int, finite: bool, wanted: bool, stopped: int) -> None:
        """Does what is due after a step: first the save, then the validation, then `best`.

        wanted: a signal asks for a save. stopped: what `_stop_code` says on some rank.
        """
        step, last = self.state.step, self.state.step == self.args.max_train_steps
        save_every, val_every = self.args.checkpoint.every_n_train_steps, self.args.val_every_n_train_steps
        self._after_save()
        due = step % save_every == 0 if save_every else self._epoch() > epoch
        due = due or last or self._save_postponed
        # The weights may be what broke the step: wait for the next good one.
        self._save_postponed = due and not finite
        due = due and finite
        val_due = self.val_set is not None and (due or bool(val_every and step % val_every == 0))
        saved = CheckpointName(epoch, step) if finite and (due or wanted or stopped) else None
        if saved:
            self.signals[signal.SIGUSR1] = False
            self._save(saved, val_due)
        elif last:
            self._end_on_a_skipped_step(CheckpointName(epoch, step))
        if saved and stopped and (val_due or not last):
            self._leave(stopped)
        if val_due:
            self._validate_and_log(saved)

    def _end_on_a_skipped_step(self, name: CheckpointName) -> None:
        self._save(name, validation_due=False, move_last=False)
        self.saver.wait()
        what = (
            f"the last step, {name.step}, is not finite: {self.save_dir / str(name)} holds what was before it"
        )
        raise TrainingFailed(f"{what}, but 'last' does not name it; {self.saver.last_good()}")

    def _stop_code(self) -> int:
        """The exit code that a signal or a full log_dir asks for; 0: none does."""
        codes = [128 + number for number in (signal.SIGTERM, signal.SIGINT) if self.signals[number]]
        return max([*codes, LOG_FAILED if self._log_problem else 0])

    def _leave(self, code: int) -> None:
        self.saver.wait()
        step = self.state.step
        if code == LOG_FAILED:
            problem = self._log_problem or "rank 0 cannot write its metrics"
            raise TrainingFailed(f"{problem}: step {step} is saved; make room, then --resume_from=last")
        name = signal.Signals(code - 128).name
        logger.info("%s: saved step %d and stopping; --resume_from=last continues", name, step)
        dist.barrier(group=self.control)
        sys.exit(code)

    @torch.no_grad()
    def validate(self) -> float | None:
        """The mean loss of the validation set in nats per target; None: a signal came first."""
        sizes = (len(self.val_set), self.args.micro_batch_size, 1, self.rank, self.world_size)
        sampler = GlobalBatchSampler(*sizes, shuffle=False, stop=len(self.val_set))
        loss_sum, targets = 0.0, 0
        self.model.eval()
        try:
            for batch in load_batches(self.val_set, sampler, self.args.dataloader.train_args, self.device):
                if self._largest(self._stop_code())[0]:
                    return None
                _, detached, count = self.model(batch)
                loss_sum, targets = loss_sum + detached.double(), targets + count
        finally:
            self.model.train()
        loss_sum, targets = self._sum(loss_sum, targets)
        return loss_sum / targets if targets else math.nan

    def _validate_and_log(self, saved: CheckpointName | None) -> None:
        """Validates. `saved` is this step's checkpoint, if there is one.

        A signal ends the run at once: the step is saved, and a resume repeats the validation.
        """
        self.watchdog.note(f"the validation of step {self.state.step}", times=10)
        val_loss = self.validate()
        if val_loss is None:
            if not saved:
                self._save(CheckpointName(self._epoch(), self.state.step), validation_due=True)
            self._leave(int(self._largest(self._stop_code())[0]))
        metrics = {"val_loss": val_loss, "perplexity": perplexity(val_loss)}
        self._log(metrics, "val")
        if not math.isfinite(val_loss):
            self._end_on_a_bad_validation(val_loss)
        if saved and self.rank == 0:
            self.saver.record_validation(saved, val_loss)

    def _end_on_a_bad_validation(self, val_loss: float) -> None:
        """Set the checkpoint aside. Nothing is deleted: this node may compute wrongly."""
        step = self.state.step
        rejected = self.saver.reject()
        last_good = self.saver.last_good()
        if rejected is None:
            raise TrainingFailed(
                f"the validation loss at step {step} is {val_loss}, and no checkpoint was moved; "
                f"{last_good}. A bad node may be the cause: try another one"
            )
        raise TrainingFailed(
            f"the validation loss at step {step} is {val_loss}, so the checkpoint was moved to {rejected}; "
            f"{last_good}. A bad node may be the cause: --resume_from={rejected} validates the checkpoint "
            "again and continues from it"
        )

    def _validate_before_the_first_step(self) -> None:
        if self._validation_is_missing():
            self._validate_and_log(CheckpointName.parse(self.home.name) if self.home else None)
        elif self.options.validate_first and not self.resumed and self.val_set is not None:
            self._validate_and_log(None)

    def _validation_is_missing(self) -> bool:
        """Was the resumed checkpoint to be validated, and its validation cut off?"""
        due = self.val_set is not None and self.resumed and self.resumed.state.get("validation_due")
        return bool(due) and self.resumed.val_loss is None

    def _save(self, name: CheckpointName, validation_due: bool, move_last: bool = True) -> None:
        args = self.args
        state = {**vars(self.state), "epoch": name.epoch, "validation_due": validation_due, "seed": args.seed}
        state |= {"world_size": self.world_size, "global_batch_size": args.global_batch_size}
        state |= {"run": self.options.run_id, "parents": self.parents}
        state["layout"] = asdict(self.options.layout)
        state |= {"frozen": self.frozen} if self.frozen else {}
        if hook := args.hook.on_save_checkpoint:
            hook(self, state)
        began = time.perf_counter()
        self.watchdog.note(f"the save of step {self.state.step}", times=10)
        self.saver.wait()
        self._after_save()
        self.saver.save(name, self.saved_tensors(), state, setup.rng_state(), began, move_last)
        self._saving = self.save_dir / str(name)
        if not self.options.async_save:
            self._say_what_the_save_took()

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The trained weights and the optimizer's state, under the names that checkpoints use."""
        found = {f"model.{name}": parameter for parameter, name in self.names.items()}
        for parameter, name in self.names.items():
            state = self.optimizer.state.get(parameter, {})
            found |= {f"optimizer.{name}.{key}": value for key, value in state.items() if key != "step"}
        return found

    def _after_save(self) -> None:
        """Once the last save is over: moves `best`, prunes, and logs what the save cost."""
        if self.saver.busy or not self.saver.total_seconds:
            return
        if self.rank == 0:
            self.saver.update_best()
            self.saver.prune(self.saver.good)
        if self.options.async_save:
            self._say_what_the_save_took()
        blocked, total, self.saver.total_seconds = self.saver.blocked_seconds, self.saver.total_seconds, 0.0
        self._log({"save_blocked_seconds": blocked, "save_total_seconds": total}, "checkpoint")

    def _say_what_the_save_took(self) -> None:
        log_save(self._saving, self.saver.blocked_seconds, self.saver.total_seconds, self.step_seconds)

    def _epoch(self) -> int:
        return self.state.samples // len(self.train_set)

    def _log(self, metrics: dict, tag: str) -> None:
        try:
            for log in self.loggers:
                log.log_metrics(metrics, self.state.step, tag=tag)
        except OSError as error:  # all ranks save together, after the next step
            self._log_problem, self.loggers = f"{error.filename or 'the log'}: {error.strerror or error}", []

    def _step_scheduler(self, times: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that moves before the (resumed) optimizer did
            for _ in range(times if self.scheduler else 0):
                self.scheduler.step()

    def _sum(self, *values) -> list[float]:
        """The sum of each value over the ranks, in float64, which counts exactly up to 2^53."""
        tensor = torch.stack([torch.as_tensor(value, device=self.device).double() for value in values])
        dist.all_reduce(tensor)
        return tensor.tolist()

    def _largest(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory so far: the device's, or on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
