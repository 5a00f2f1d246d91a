"""Our implementation of nnScaler's Trainer: the loop, one step, validation, and when to save."""

import logging
import math
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from errors import TrainingFailed, UserError
from trainer import folders, parallel, ranks, setup
from trainer.args import NativeOptions, TrainerArgs
from trainer.checkpoint import Checkpoint, CheckpointError, CheckpointName, lineage
from trainer.loading import load_batches
from trainer.loggers import log_save, perplexity
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


@dataclass(frozen=True)
class StepResult:
    """A step's mean loss in nats per target, its gradient norm, its tokens, and the model's own metrics."""

    loss: float
    gnorm: float
    tokens: int
    is_finite: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class Requests:
    """What some rank asks of all after a step. stop_code: the exit code with which to leave; 0: go on."""

    stop_code: int
    save_failed: bool
    save_wanted: bool  # by SIGUSR1
    time_is_due: bool

    def reason(self, scheduled: str | None) -> str | None:
        """Return why to save, for the checkpoint's manifest; None: nothing asks for it.

        scheduled: the reason of the flags. SIGUSR1 comes before an epoch's end, as what it saves stays.
        """
        if self.save_wanted and scheduled in (None, "epoch"):
            return "signal"
        if scheduled:
            return scheduled
        if self.stop_code:
            return "signal"
        return "time" if self.time_is_due else None

    def signal_name(self) -> str | None:
        """Return the signal that asks for a save."""
        if self.save_wanted:
            return "SIGUSR1"
        return signal.Signals(self.stop_code - 128).name if self.stop_code > 128 else None


class MetricSums:
    """Adds up what TrainableModel.forward returns, over micro-batches."""

    def __init__(self):
        self.values: dict[str, torch.Tensor] = {}

    def add(self, outputs: dict[str, torch.Tensor]) -> None:
        """Add the sums of one micro-batch, in float64."""
        for name, value in outputs.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach().double()

    def means(self, totals: list[float]) -> tuple[dict[str, float], float]:
        """Return each metric's mean by its name, and the number of targets.

        totals: `values`, summed over the ranks. Without targets every mean is nan.
        """
        by_name = dict(zip(self.values, totals, strict=True))
        targets = by_name.pop("targets")
        means = {}
        for name, total in by_name.items():
            means[name.removesuffix("_sum")] = total / targets if targets else math.nan
        return means, targets


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
        self.save_dir = Path(train_args.checkpoint.save_dir)
        self.state, self.loggers = TrainState(), []
        self.signals = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), False)
        self.step_seconds, self._log_problem = 0.0, ""
        self._postponed: str | None = None  # why a save is due that waits for a good step
        self._skipped_in_a_row = 0
        self._flops_per_token: float | None = None

    def run(self) -> None:
        """Trains to the end. A SIGTERM saves and exits with 143, a Ctrl-C with 130."""
        with ranks.process_group(), ranks.noted_signals() as self.signals:
            self.watchdog = ranks.Watchdog(self.options.timeout_seconds)
            self.watchdog.note("loading", times=10)
            try:
                self.build()
                if self.prepare_training():
                    self._train_to_the_end()
            finally:
                self.watchdog.stopped.set()
                for log in self.loggers:
                    log.finalize()

    def _train_to_the_end(self) -> None:
        try:
            self._train()
            hook = self.args.hook.on_train_end
            if hook:
                hook(self)
        except (TrainingFailed, SystemExit):
            self.saver.wait()  # all ranks are here: after another error, a rank would wait for ever
            raise

    def evaluate(self) -> float:
        """The validation loss of the pretrained model, or of the checkpoint that `resume_from` names."""
        with ranks.process_group():
            self.build()
            return self.validate()["loss"]

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
                logger.info("nothing to do: %s (raise --max_train_steps or --max_epochs to go on)", reached)
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
        args = self.args
        state = self.state
        if self.device.type == "cpu":
            setup.keep_freed_memory()
        self.sampler = args.dataset_sampler.type(
            len(self.train_set),
            args.micro_batch_size,
            accumulation=args.grad_accumulation_steps,
            rank=self.rank,
            world_size=self.world_size,
            seed=args.seed,
            start=state.samples,
        )
        batches = load_batches(self.train_set, self.sampler, args.dataloader.train_args, self.device)
        self._validate_before_the_first_step()
        first = state.step
        self._step_ended = time.perf_counter()
        self._saved_at = minutes()
        while state.step < args.max_train_steps:
            epoch = self._epoch()
            self.watchdog.note(f"step {state.step + 1}", times=10 if state.step == first else 1)
            result, metrics = self._next_step(batches)
            requests = self._end_step(metrics, result.tokens)
            if requests.save_failed:
                self.saver.wait()  # raises on every rank
            self._log_step({"epoch": epoch, **metrics}, result.is_finite)
            if self._save_and_validate(epoch, result.is_finite, requests):
                self._step_ended = time.perf_counter()  # no part of the next step
        self._finish()

    def _next_step(self, batches: Iterator[dict]) -> tuple["StepResult", dict[str, float]]:
        """Take a step on the next global batch, and count it; return it and its metrics so far."""
        state = self.state
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.args.grad_accumulation_steps)]
        data_seconds = time.perf_counter() - began
        lr = self.optimizer.param_groups[0]["lr"]
        result = self._train_step(micro_batches)
        state.step += 1
        state.samples += self.args.global_batch_size
        state.tokens += result.tokens
        state.updates += result.is_finite
        self._step_scheduler(1)
        metrics = {
            "lr": lr,
            "train_loss": result.loss,
            "gnorm": result.gnorm,
            "tokens": state.tokens,
            "data_seconds": data_seconds,
            **result.metrics,
        }
        self._flops_per_token = self.model.flops_per_token(micro_batches[0])
        return result, metrics

    def _end_step(self, metrics: dict[str, float], tokens: int) -> "Requests":
        """Add the step's time to its metrics; return what the ranks ask for.

        The reduction waits for the device, so that the optimizer's work is inside the step's time.
        """
        memory, stop_code, save_failed, save_wanted, time_is_due = self._largest(
            peak_memory_gib(self.device),
            self._stop_code(),
            self.saver.failed,
            self.signals[signal.SIGUSR1],
            self._time_is_due(),
        )
        now = time.perf_counter()
        self.step_seconds = now - self._step_ended
        self._step_ended = now
        metrics["tokens_per_second"] = tokens / self.step_seconds
        metrics["step_seconds"] = self.step_seconds
        metrics["peak_memory_gib"] = memory
        metrics |= self._utilization(metrics["tokens_per_second"])
        return Requests(int(stop_code), bool(save_failed), bool(save_wanted), bool(time_is_due))

    def _log_step(self, metrics: dict, is_finite: bool) -> None:
        """Log the step. Raises TrainingFailed if too many in a row were skipped."""
        if is_finite:
            self.saver.confirm()
            self._skipped_in_a_row = 0
        else:
            batch = self.args.global_batch_size
            positions = np.arange(self.state.samples - batch, self.state.samples)
            metrics["skipped_samples"] = self.sampler.indices(positions).tolist()
            self._skipped_in_a_row += 1
        self._log(metrics, "train")
        if self._skipped_in_a_row >= self.options.max_skipped_steps:
            self.saver.retreat()
            raise TrainingFailed(
                f"the loss or the gradient norm was not finite for {self._skipped_in_a_row} steps in a row, "
                f"until step {self.state.step}: {self.saver.last_good()}. Lower --learning_rate, raise "
                "--warmup_steps, or look at the samples that metrics.jsonl names"
            )

    def _finish(self) -> None:
        (self.grown_gib,) = self._largest(peak_memory_gib(self.device) - self.memory_before_gib)
        self.saver.wait()
        self._after_save()
        if self.rank == 0:
            self.saver.prune(self.saver.newest or self.saver.good)
        if self._log_problem:
            self._leave(LOG_FAILED)

    def _train_step(self, micro_batches: list[dict]) -> "StepResult":
        """Zero, accumulate, reduce, clip, update.

        An update whose loss or gradient norm is not finite is skipped; all ranks skip together, as both are
        sums over all ranks.
        """
        self.optimizer.zero_grad()
        sums = MetricSums()
        tokens = 0
        layout = self.options.layout
        for batch in micro_batches:
            is_last = batch is micro_batches[-1]
            if not layout.reshard_after_forward:  # the weights change after the last one
                self.model.set_reshard_after_backward(is_last)
            if layout.dp_replicate > 1:  # replicas exchange their gradients once a step
                self.model.set_requires_all_reduce(is_last)
            outputs = self.model(batch)
            outputs["loss_sum"].backward()  # FSDP sums the gradients over the ranks
            sums.add(outputs)
            tokens += batch["num_tokens"]
        *totals, tokens = self._sum(*sums.values.values(), tokens)
        means, targets = sums.means(totals)
        loss = means.pop("loss")
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        norm = parallel.whole(torch.nn.utils.get_total_norm(gradients)).item()
        gnorm = norm / targets if targets else math.nan
        is_finite = math.isfinite(loss) and math.isfinite(gnorm)
        if is_finite:
            limit = self.args.optimizer.clip_gnorm
            clip = min(1.0, limit / (gnorm + 1e-6)) if limit else 1.0
            torch._foreach_mul_([parallel.local(gradient) for gradient in gradients], clip / targets)
            self.optimizer.step()
        return StepResult(loss, gnorm, int(tokens), is_finite, means)

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        """Return the share of the devices' bf16 rate that the model's operations take, if it is known."""
        tflops = self.options.device_tflops
        if tflops is None or self._flops_per_token is None:
            return {}
        return {"mfu": tokens_per_second * self._flops_per_token / (tflops * 1e12 * self.world_size)}

    def _save_and_validate(self, epoch: int, finite: bool, requests: "Requests") -> bool:
        """Do what is due after a step: first the save, then the validation, then `best`.

        Returns whether anything was due.
        """
        step = self.state.step
        is_last = step == self.args.max_train_steps
        self._after_save()
        scheduled = self._scheduled_reason(epoch) or self._postponed
        # The weights may be what broke the step: wait for the next good one.
        self._postponed = None if finite else scheduled
        if not finite:
            scheduled = None
        val_every = self.args.val_every_n_train_steps
        val_due = self.val_set is not None and (bool(scheduled) or bool(val_every and step % val_every == 0))
        reason = requests.reason(scheduled) if finite else None
        saved = CheckpointName(epoch, step) if reason else None
        if saved:
            self.signals[signal.SIGUSR1] = False
            self._save(saved, val_due, reason, requests.signal_name())
        elif is_last:
            self._end_on_a_skipped_step(CheckpointName(epoch, step))
        if saved and requests.stop_code and (val_due or not is_last):
            self._leave(requests.stop_code)
        if val_due:
            self._validate_and_log(saved)
        return bool(saved) or val_due

    def _scheduled_reason(self, epoch: int) -> str | None:
        """Return why the flags ask for a save after this step of the epoch; None: they do not."""
        save_every = self.args.checkpoint.every_n_train_steps
        if self.state.step == self.args.max_train_steps:
            return "end"
        if save_every:
            return "interval" if self.state.step % save_every == 0 else None
        return "epoch" if self._epoch() > epoch else None

    def _time_is_due(self) -> bool:
        """Return whether rank 0's clock asks for a save."""
        return self.rank == 0 and minutes() - self._saved_at >= self.options.save_every_n_minutes

    def _end_on_a_skipped_step(self, name: CheckpointName) -> None:
        self._save(name, validation_due=False, reason="end", move_last=False)
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
    def validate(self) -> dict[str, float] | None:
        """Return the means of the validation set a target, the loss in nats; None: a signal came first."""
        sampler = self.args.dataset_sampler.type(
            len(self.val_set),
            self.args.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            shuffle=False,
            stop=len(self.val_set),
        )
        sums = MetricSums()
        self.model.eval()
        try:
            for batch in load_batches(self.val_set, sampler, self.args.dataloader.train_args, self.device):
                if self._largest(self._stop_code())[0]:
                    return None
                sums.add(self.model(batch))
        finally:
            self.model.train()
        means, _ = sums.means(self._sum(*sums.values.values()))
        return means

    def _validate_and_log(self, saved: CheckpointName | None) -> None:
        """Validates. `saved` is this step's checkpoint, if there is one.

        A signal ends the run at once: the step is saved, and a resume repeats the validation.
        """
        self.watchdog.note(f"the validation of step {self.state.step}", times=10)
        means = self.validate()
        if means is None:
            if not saved:
                stop_code = int(self._largest(self._stop_code())[0])
                name = CheckpointName(self._epoch(), self.state.step)
                self._save(name, True, "signal", Requests(stop_code, False, False, False).signal_name())
            self._leave(int(self._largest(self._stop_code())[0]))
        val_loss = means.pop("loss")
        others = {f"val_{name}": mean for name, mean in means.items()}
        self._log({"val_loss": val_loss, "perplexity": perplexity(val_loss), **others}, "val")
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

    def _save(
        self,
        name: CheckpointName,
        validation_due: bool,
        reason: str,
        signal_name: str | None = None,
        move_last: bool = True,
    ) -> None:
        """Save the step, for a reason that the manifest records: interval, epoch, time, signal or end."""
        args = self.args
        self._saved_at = minutes()
        state = {**vars(self.state), "epoch": name.epoch, "validation_due": validation_due, "seed": args.seed}
        state |= {"world_size": self.world_size, "global_batch_size": args.global_batch_size}
        state |= {"run": self.options.run_id, "parents": self.parents}
        state["layout"] = asdict(self.options.layout)
        state["reason"] = reason
        if reason == "signal":
            state["signal"] = signal_name
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


def minutes() -> float:
    """Return this machine's monotonic clock, in minutes."""
    return time.monotonic() / 60


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory so far: the device's, or on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
