"""Our implementation of nnScaler's Trainer: set-up, the loop, one step, validation."""

import collections
import contextlib
import logging
import math
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from trainer import checkpoint, hooks, parallel
from trainer.args import AggregatedOutputs, DatasetSamplerConfig, TrainerArgs, load_type, refuse_unsupported
from trainer.checkpoint import Checkpoint, CheckpointError, Piece, TrainingFailed, set_aside
from trainer.sampler import GlobalBatchSampler
from trainer.tensorfile import TensorFileReader

logger = logging.getLogger(__name__)

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM  # 143


@dataclass
class TrainState:
    """All that changes while training, beside weights and optimizer; part of every checkpoint."""

    step: int = 0  # optimizer steps taken or skipped
    samples: int = 0  # the position in the sample order
    tokens: int = 0
    updates: int = 0  # optimizer steps taken
    best_val_loss: float | None = None
    validation_due: bool = False  # a SIGTERM came before it was done


class Trainer:
    """Runs what TrainerArgs describe on every rank that torchrun started, or on one without it.

    Raises ValueError for what the user can mend before training, TrainingFailed when the run breaks down.
    """

    def __init__(self, argv: list[str] | None = None, *, train_args: TrainerArgs | None = None):
        if argv is not None or train_args is None:
            raise ValueError("this Trainer reads no command line: build TrainerArgs and pass train_args=")
        refuse_unsupported(train_args)
        self.train_args = train_args
        self.options = train_args.compute_config.pas_config
        self.state = TrainState()
        self.hooks = hooks.create(train_args.hook)
        self.loggers = []
        self._signals = {signal.SIGTERM: False, signal.SIGUSR1: False}
        self._step_seconds, self._warned_of_shutdown, self._spare = 0.0, False, None
        self._last_saved, self._last_good, self._save_postponed = None, None, False

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Trains to the end; a SIGTERM saves and exits with 143."""
        with self._process_group(), self._signal_handlers():
            self._setup()
            if not self._set_up_training():
                return
            try:
                self._hook("on_train_start")
                if self.options.get("validate_first") and self.state.step == 0 and self.val_set is not None:
                    self._validate_and_log()
                self._train()
                self._hook("on_train_end")
            finally:
                self.saver.wait()  # however the run ends, a save under way is finished
                for log in self.loggers:
                    log.finalize()
            self._hook("on_finalize")

    def evaluate(self) -> float:
        """The validation loss of the pretrained model, or of the checkpoint that `resume_from` names."""
        with self._process_group():
            self._setup()
            return self.validate()

    @classmethod
    def merge_checkpoint(cls, checkpoint_files, out_file) -> None:
        """Merges a checkpoint folder, or the files of one, into one safetensors file; raises CheckpointError if it is damaged."""
        folders = {Path(file) if Path(file).is_dir() else Path(file).parent for file in checkpoint_files}
        if len(folders) != 1:
            raise CheckpointError(f"give the files of one checkpoint folder: these lie in {len(folders)}")
        checkpoint.merge(folders.pop(), out_file)

    # ------------------------------------------------------------ set-up

    @contextlib.contextmanager
    def _process_group(self):
        self.device = parallel.pick_device()
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        ours = not dist.is_initialized()  # a caller may bring its own
        if ours and "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://"))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
                # torchrun keeps the store over a restart, with the addresses of the ranks that died in it. (On several nodes the
                # count may differ between them: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a new store there.)
                store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        elif ours:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        try:
            yield
        finally:
            if ours:
                dist.destroy_process_group()

    def _setup(self) -> None:
        """The model with its weights, and the datasets: all that validation needs."""
        args = self.train_args
        if args.compute_config.runtime_ngpus != self.world_size:
            raise ValueError(
                f"compute_config.runtime_ngpus is {args.compute_config.runtime_ngpus}, but {self.world_size} ranks run"
            )
        if self.options.get("deterministic"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
            torch.use_deterministic_algorithms(True)
        if args.seed is not None:
            random.seed(args.seed)
            np.random.seed(args.seed)
            torch.manual_seed(args.seed)
        if args.init_env_fn:
            load_type(args.init_env_fn)(self)
        self.train_set = load_type(args.dataset.type)(**args.dataset.train_args)
        self.val_set = (
            load_type(args.dataset.type)(**args.dataset.val_args) if args.dataset.val_args else None
        )
        self.collate = (
            load_type(args.dataloader.train_args.get("collate_fn")) or torch.utils.data.default_collate
        )

        self.save_dir = Path(args.checkpoint.save_dir)
        self.control = dist.new_group(backend="gloo")  # carries objects and barriers, which nccl would not
        source = self._open_resumed()
        self.model = self._build_model(source)
        self._resumed = source

    def _build_model(self, source: Checkpoint | None) -> torch.nn.Module:
        args = self.train_args
        model = load_type(args.model.type)(**args.model.args)
        prefix = getattr(model, "name_prefix", "")
        recompute = self.options.get("recompute", "full" if self.options.get("recompute_modules") else "none")
        layers = {"full": None, "none": 0}.get(recompute, recompute)
        parallel.parallelize(
            model,
            parallel.build_mesh(self.device),
            args.precision["param"],
            layers,
            self.options.get("compile", False),
        )
        parallel.materialize(model, self.device)
        self.names = {parameter: name.removeprefix(prefix) for name, parameter in model.named_parameters()}
        if source:
            parallel.fill(
                self.names,
                lambda out, name, shape, box: _checked(source, f"model.{name}", shape).read(
                    f"model.{name}", box, out
                ),
            )
        elif files := (model.weight_files() if hasattr(model, "weight_files") else None):
            self._fill_from_files(model, files)
        elif hasattr(model, "initial_values"):
            parallel.fill(
                self.names, lambda out, name, shape, box: out.copy_(_initial(model, name, shape, box))
            )
        return model

    def _fill_from_files(self, model, files: dict[str, Path]) -> None:
        readers = {path: TensorFileReader(path) for path in set(files.values())}

        def put(out, name, shape, box):
            if name not in files:
                raise ValueError(
                    f"the pretrained weights hold no parameter {name}: they belong to another model"
                )
            reader = readers[files[name]]
            if reader.tensors[name][1] != shape:
                raise ValueError(
                    f"{reader.path}: {name} has shape {reader.tensors[name][1]}, the model's configuration says {shape}"
                )
            out.copy_(reader.read(name, box))

        parallel.fill(self.names, put)

    def _set_up_training(self) -> bool:
        """Optimizer, schedule, resumed state, loggers; False where the resumed run is already at its end, and nothing was touched."""
        args = self.train_args
        if len(self.train_set) < args.global_batch_size:
            raise ValueError(
                f"the training set has {len(self.train_set)} samples, less than one global batch of {args.global_batch_size}: "
                "prepare more text, or lower --global_batch_size or --grad_accumulation_steps"
            )
        self.optimizer = load_type(args.optimizer.type)(self.model.parameters(), **args.optimizer.args)
        if self._resumed:
            self._restore(self._resumed)
        else:
            self._set_aside_old_checkpoints()
        if self._nothing_to_do():
            return False
        self.scheduler = None
        if args.lr_scheduler:
            self.scheduler = load_type(args.lr_scheduler.type)(self.optimizer, **args.lr_scheduler.args)
            # Replayed rather than restored: the schedule is a function of the step and of this run's arguments.
            self._step_scheduler(
                self.state.step if args.lr_scheduler.interval == "step" else self._epoch(self.state.samples)
            )
        dist.barrier(group=self.control)  # every rank has read what it resumes
        if self.rank == 0 and not args.checkpoint.no_save:
            checkpoint.clean_up(self.save_dir)
        # A group of its own, as it may save while the training goes on.
        self.saver = checkpoint.Saver(
            self.save_dir, args.checkpoint.keep_last_n_checkpoints, dist.new_group(backend="gloo")
        )
        if self.rank == 0:
            self.loggers = [load_type(config.type)(**config.args) for config in args.log]
            for log in self.loggers:
                log.setup(args.to_dict(), self.state.step)
        self._hook("after_setup")
        return True

    def _set_aside_old_checkpoints(self) -> None:
        """A fresh run never writes into another run's folder."""
        found = not self.train_args.checkpoint.no_save and (
            checkpoint.checkpoints(self.save_dir) or (self.save_dir / "last").exists()
        )
        dist.barrier(group=self.control)  # every rank has looked before it moves
        if found and self.rank == 0:
            set_aside(self.save_dir)
        dist.barrier(group=self.control)

    def _nothing_to_do(self) -> bool:
        self.last_step = self._last_step()
        if self.state.step >= self.last_step and self.rank == 0:
            logger.info(
                "nothing to do: step %d of %d is reached (raise --max_train_steps to go on)",
                self.state.step,
                self.last_step,
            )
        return self.state.step >= self.last_step

    # ------------------------------------------------------------ resuming

    def _open_resumed(self) -> Checkpoint | None:
        """The checkpoint to resume from, verified by all ranks together; 'last' falls back to the newest good one."""
        resume = self.train_args.checkpoint.resume_from
        if not resume or not resume.checkpoint:
            return None
        if str(resume.checkpoint) not in ("last", "best"):
            paths = [Path(resume.checkpoint)]
        else:
            paths = checkpoint.candidates(self.save_dir, str(resume.checkpoint))
            link = self.save_dir / resume.checkpoint
            if paths and not link.exists() and self.rank == 0:
                logger.warning("WARNING: %s names no checkpoint. Falling back to %s", link, paths[0])
        for index, path in enumerate(paths):
            source, problem = self._open_verified(path)
            if problem is None:
                return source
            if index + 1 == len(paths):
                raise CheckpointError(problem)
            if self.rank == 0:
                logger.warning("WARNING: %s. Falling back to %s", problem, paths[index + 1])
        return None

    def _open_verified(self, path: Path) -> tuple[Checkpoint | None, str | None]:
        """The checkpoint, each rank having checked its share of it, and what any of them found wrong."""
        source, problem = None, None
        try:
            source = Checkpoint.open(path)
            source.verify(self.rank, self.world_size)
        except CheckpointError as error:
            problem = str(error)
        problems = [None] * self.world_size
        dist.all_gather_object(problems, problem, group=self.control)
        return source, next((problem for problem in problems if problem), None)

    def _restore(self, source: Checkpoint) -> None:
        """Optimizer, counters and random number generators from a checkpoint of any world size."""
        saved = source.state
        self.state = TrainState(**saved["train_state"])
        if saved["seed"] != self.train_args.seed and self.rank == 0:
            logger.warning(
                "WARNING: the checkpoint was trained with seed %s, not %s: the order of the samples changes",
                saved["seed"],
                self.train_args.seed,
            )
        keys = {name.rsplit(".", 1)[1] for name in source.tensors if name.startswith("optimizer.")}
        for parameter, name in self.names.items() if self.state.updates else []:
            state = self.optimizer.state[parameter]
            for key in sorted(keys):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                source.read(
                    f"optimizer.{name}.{key}", parallel.local_box(parameter), out=parallel.local(state[key])
                )
            # Where the optimizer keeps it itself: beside the parameter if fused, else on the CPU.
            fused = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
            state["step"] = torch.tensor(float(self.state.updates), device=self.device if fused else "cpu")
        if len(source.rng) == self.world_size:
            checkpoint.set_rng_state(source.rng[self.rank])
        self._hook("on_load_checkpoint", saved)
        if self.rank == 0:
            logger.info(
                "resumed from %s: step %d, %d samples seen", source.path, self.state.step, self.state.samples
            )
        self._hook("after_load_checkpoint", saved)

    # ------------------------------------------------------------ the loop

    def _last_step(self) -> int:
        args = self.train_args
        steps = [args.max_train_steps] if args.max_train_steps else []
        if args.max_epochs:
            left = args.max_epochs * len(self.train_set) - self.state.samples
            steps.append(self.state.step + math.ceil(left / args.global_batch_size))
        return min(steps)

    def _train(self) -> None:
        args, state, last_step = self.train_args, self.state, self.last_step
        batches = self._train_loader()
        skipped_in_a_row, epoch = 0, self._epoch(state.samples)
        if state.validation_due:
            before = self._resumed.state["epoch"]
            self._after_step(before, epoch > before, last_step, updated=True, stop=False, save=True)
        self._hook("on_epoch_start", epoch)
        while state.step < last_step:
            began, epoch, first_sample = time.perf_counter(), self._epoch(state.samples), state.samples
            self._hook("on_step_start", epoch, state.step)
            micro_batches = [self._to_device(next(batches)) for _ in range(args.update_freq)]
            data_seconds = time.perf_counter() - began
            lr = self.optimizer.param_groups[0]["lr"]
            loss, gnorm, tokens, aggregated = self._train_step(micro_batches)
            updated = math.isfinite(loss) and math.isfinite(gnorm)
            if updated:  # so what was saved before it is good
                self._last_good = self._last_saved
                self.saver.prune()
            state.step += 1
            state.samples = self._samples_after(state.samples)
            state.tokens += tokens
            state.updates += updated
            epoch_ended = self._epoch(state.samples) > epoch
            if self.scheduler and (args.lr_scheduler.interval == "step" or epoch_ended):
                self._step_scheduler(1)
            self._step_seconds = seconds = time.perf_counter() - began
            peak, save_failed, stop, save = self._agree(
                peak_memory_gib(self.device), self.saver.failed, *self._signals.values()
            )
            if save_failed:
                self.saver.wait()  # raises, on all ranks
            metrics = {
                "epoch": epoch,
                "train_loss": loss,
                "lr": lr,
                "gnorm": gnorm,
                "tokens": state.tokens,
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds,
                "data_seconds": data_seconds,
                "peak_memory_gib": peak,
            }
            self._hook("before_log_train_metrics", metrics, aggregated)
            skipped_in_a_row = 0 if updated else skipped_in_a_row + 1
            if not updated:
                metrics["skipped_samples"] = self._sample_ids(first_sample, state.samples)
                self._warn_of_skip(loss, gnorm, metrics["skipped_samples"])
            self._log(metrics, "train")
            self._print_progress(metrics, last_step)
            self._hook("on_step_end", epoch, state.step, metrics, aggregated)
            if skipped_in_a_row >= self.options.get("max_skipped_steps", 3):
                raise TrainingFailed(self._divergence_message(skipped_in_a_row))
            self._after_step(epoch, epoch_ended, last_step, updated, bool(stop), bool(save))
            if epoch_ended:
                self._hook("on_epoch_end", epoch)
                if state.step < last_step:
                    self._hook("on_epoch_start", epoch + 1)
        self.saver.wait()
        self.saver.prune()
        self._log_save()

    def _after_step(
        self, epoch: int, epoch_ended: bool, last_step: int, updated: bool, stop: bool, save: bool
    ) -> None:
        """Validation and saves where they are due; a SIGTERM leaves from here."""
        args, state, every = self.train_args, self.state, self.train_args.checkpoint
        last = state.step == last_step
        if not self.saver.busy:
            self._log_save()
        save_due = not every.no_save and (
            last
            or bool(every.every_n_train_steps and state.step % every.every_n_train_steps == 0)
            or bool(epoch_ended and every.every_n_epochs and (epoch + 1) % every.every_n_epochs == 0)
        )
        save_due |= self._save_postponed
        self._save_postponed = save_due and not (
            updated or last
        )  # weights that give no loss are not worth keeping
        save_due &= not self._save_postponed
        val_due = (
            save_due
            or last
            or bool(args.val_every_n_train_steps and state.step % args.val_every_n_train_steps == 0)
            or bool(epoch_ended and args.val_every_n_epochs and (epoch + 1) % args.val_every_n_epochs == 0)
        )
        best = False
        state.validation_due = val_due and stop and not last
        if val_due and self.val_set is not None and not state.validation_due:
            val_loss = self._validate_and_log(until_sigterm=not last)
            if val_loss is None:
                state.validation_due = stop = True
            elif save_due and not math.isfinite(val_loss):
                broken = f"the validation loss of step {state.step} is {val_loss}, so that step is not saved: {self._last_good_message()}"
                if last:
                    raise TrainingFailed(broken)
                if self.rank == 0:
                    logger.warning("WARNING: %s", broken)
                save_due = False
            best = (
                val_loss is not None
                and math.isfinite(val_loss)
                and (state.best_val_loss is None or val_loss < state.best_val_loss)
            )
            if best and save_due:
                state.best_val_loss = val_loss
        if (save_due or save or stop) and not every.no_save:
            self._signals[signal.SIGUSR1] = False
            self._save(epoch, best=best and save_due)
        if stop and not last:
            self.saver.wait()
            if self.rank == 0:
                logger.info(
                    "SIGTERM: saved step %d and stopping; --resume_from=last goes on from here", state.step
                )
            dist.barrier(group=self.control)
            sys.exit(SIGTERM_EXIT_CODE)

    def _train_step(self, micro_batches: list) -> tuple[float, float, int, AggregatedOutputs]:
        """Zero, accumulate, reduce, clip, update: returns the loss and the gradient norm of the global batch, and its tokens.

        A loss or norm that is not finite is so on every rank, as both are reduced over all of them; the update is skipped.
        """
        optimizer, config = self.optimizer, self.train_args.optimizer
        self._hook("before_zero_grad")
        optimizer.zero_grad()
        self._hook("after_zero_grad")
        self._hook("on_train_step_start", micro_batches)
        outputs, tokens = [], 0
        for batch in micro_batches:
            output, loss = self._forward(batch)
            loss.backward()
            if batch is not None:
                outputs.append(output)
                tokens += _num_tokens(batch)
        self._hook("on_train_step_end", outputs)
        aggregated = self._aggregate(outputs)
        loss = _reduce(aggregated, config.loss_reduction)
        self._hook("after_aggregate_train_step_outputs", aggregated, loss)
        self._hook("before_sync_grad")  # FSDP has summed the gradients over the ranks during backward
        self._hook("after_sync_grad")
        gradients = [parallel.local(p.grad) for p in self.names if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        sums = torch.stack(
            [norms.square().sum(), torch.tensor(tokens, dtype=torch.float64, device=self.device)]
        )
        dist.all_reduce(sums)
        divisor = _divisor(aggregated, config.grad_reduction)
        gnorm = (
            math.sqrt(sums[0].item()) / divisor if divisor else math.nan
        )  # a batch without targets is skipped
        tokens = int(sums[1].item())
        self._hook("before_gnorm_clip")
        clip = min(1.0, config.clip_gnorm / (gnorm + 1e-6)) if config.clip_gnorm else 1.0
        if math.isfinite(loss) and math.isfinite(gnorm):
            torch._foreach_mul_(gradients, clip / divisor)
            self._hook("after_gnorm_clip", torch.tensor(gnorm))
            self._hook("before_optimizer_step")
            optimizer.step()
            self._hook("after_optimizer_step")
        return loss, gnorm, tokens, aggregated

    def _forward(self, batch):
        """Forward's output, and its loss to differentiate; a rank that has no samples left takes part with a weight of 0."""
        if batch is None:
            if self._spare is None:
                self._spare = self._to_device(self.collate([self.train_set[0]]))
            output = self.model(self._spare)
            return output, (output[0] if isinstance(output, (tuple, list)) else output) * 0.0
        output = self.model(batch)
        return output, output[0] if isinstance(output, (tuple, list)) else output

    def _aggregate(self, outputs: list) -> AggregatedOutputs:
        function = self.train_args.optimizer.aggregate_outputs_fn
        if function:
            return load_type(function)(outputs, dist.group.WORLD)
        return AggregatedOutputs.aggregate(
            outputs, dist.group.WORLD, lambda o: o[0] if isinstance(o, (tuple, list)) else o
        )

    # ------------------------------------------------------------ validation

    @torch.no_grad()
    def validate(self, until_sigterm: bool = False) -> float | None:
        """The mean loss over the validation set, all ranks together: over its tokens where they are counted, else over its batches.

        None: a SIGTERM came, and was not to wait for the end.
        """
        args = self.train_args
        self._hook("on_val_start")
        self.model.eval()
        outputs = []
        stop = len(self.val_set)
        if args.max_val_steps:
            stop = min(stop, args.max_val_steps * args.micro_batch_size * self.world_size)
        sampler = GlobalBatchSampler(
            len(self.val_set),
            args.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            shuffle=False,
            stop=stop,
        )
        for batch in self._loader(
            self.val_set, sampler, args.dataloader.val_args or args.dataloader.train_args
        ):
            if until_sigterm and self._agree(self._signals[signal.SIGTERM])[0]:
                self.model.train()
                return None
            batch = self._to_device(batch)
            self._hook("on_val_step_start", [batch])
            output, _ = self._forward(batch)
            if batch is not None:
                outputs.append(output)
            self._hook("on_val_step_end", [output])
        self.model.train()
        aggregated = self._aggregate(outputs)
        loss = _reduce(aggregated, "per-token-mean" if aggregated.num_tokens is not None else "mean")
        self._hook("after_aggregate_val_step_outputs", aggregated, loss)
        self._hook("on_val_end", loss)
        return loss

    def _validate_and_log(self, until_sigterm: bool = False) -> float | None:
        if (val_loss := self.validate(until_sigterm)) is None:
            return None
        metrics = {"val_loss": val_loss, "perplexity": perplexity(val_loss)}
        self._hook("before_log_val_metrics", metrics)
        self._log(metrics, "val")
        if self.rank == 0:
            logger.info(
                "step %d: val_loss=%.6f perplexity=%.4f", self.state.step, val_loss, metrics["perplexity"]
            )
        return val_loss

    # ------------------------------------------------------------ data

    def _train_loader(self) -> Iterator:
        args = self.train_args
        sampler_args = (args.dataset_sampler or DatasetSamplerConfig()).train_args
        self._sampler = GlobalBatchSampler(
            len(self.train_set),
            args.micro_batch_size,
            args.update_freq,
            self.rank,
            self.world_size,
            sampler_args.get("seed", args.seed or 0),
            sampler_args.get("shuffle", True),
            start=self.state.samples,
            stop=args.max_epochs * len(self.train_set) if args.max_epochs else None,
        )
        return self._loader(self.train_set, self._sampler, args.dataloader.train_args)

    def _loader(self, dataset, sampler, loader_args: dict) -> Iterator:
        """Batches, the next ones already being made. The dataset and the collate function are to be functions of the samples alone."""
        options = {key: value for key, value in loader_args.items() if key not in ("collate_fn", "drop_last")}
        options["generator"] = (
            torch.Generator()
        )  # the global one must not depend on how often a loader was started
        return _ahead(
            DataLoader(dataset, batch_sampler=sampler, collate_fn=_CollateOrNone(self.collate), **options)
        )

    def _to_device(self, batch):
        if isinstance(batch, dict):
            return {key: self._to_device(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return type(batch)(self._to_device(value) for value in batch)
        if not isinstance(batch, torch.Tensor):
            return batch
        half = self.train_args.precision["input"] == "bf16" and batch.is_floating_point()
        return batch.to(self.device, torch.bfloat16 if half else batch.dtype, non_blocking=True)

    def _epoch(self, samples: int) -> int:
        return samples // len(self.train_set)

    def _samples_after(self, samples: int) -> int:
        after = samples + self.train_args.global_batch_size
        return min(after, self._sampler.stop) if self._sampler.stop is not None else after

    def _sample_ids(self, start: int, stop: int) -> list[int]:
        return self._sampler.indices(np.arange(start, stop)).tolist()

    # ------------------------------------------------------------ saving

    def _save(self, epoch: int, best: bool) -> None:
        config = self.train_args.checkpoint
        state = {
            "step": self.state.step,
            "epoch": epoch,
            "samples": self.state.samples,
            "world_size": self.world_size,
            "global_batch_size": self.train_args.global_batch_size,
            "seed": self.train_args.seed,
            "train_state": vars(self.state).copy(),
            "config": self.train_args.to_dict(),
            "versions": {
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": sys.version.split()[0],
            },
        }
        self._hook("on_save_checkpoint", state)
        links = (*(["last"] if config.save_last else []), *(["best"] if config.save_best and best else []))
        name = f"{epoch:04d}-{self.state.step:04d}"
        began = time.perf_counter()
        self.saver.wait()
        waited = time.perf_counter() - began
        self._log_save()
        self.saver.save(
            name, self._pieces(), state, links, in_background=bool(self.options.get("async_save"))
        )
        self.saver.blocked_seconds += waited
        self._last_saved = self.save_dir / name
        if self.rank == 0:
            logger.info(
                "%s %s",
                "saving in the background:" if self.options.get("async_save") else "saved",
                self.save_dir / name,
            )

    def _pieces(self) -> list[Piece]:
        """This rank's part of the weights and of the optimizer's state, under the names that checkpoints use."""
        found = []
        for parameter, name in self.names.items():
            found.append((f"model.{name}", parameter))
            state = self.optimizer.state.get(parameter, {})
            found += [(f"optimizer.{name}.{key}", value) for key, value in state.items() if key != "step"]
        return [Piece(name, tuple(t.shape), parallel.local_box(t), parallel.local(t)) for name, t in found]

    def _log_save(self) -> None:
        """Writes down what the last save cost, once it is over."""
        if self.saver.total_seconds:
            costs = {
                "save_blocked_seconds": self.saver.blocked_seconds,
                "save_total_seconds": self.saver.total_seconds,
            }
            self._log(costs, "checkpoint")
            if self.rank == 0:
                logger.info("the save blocked training for %.2f s and took %.2f s", *costs.values())
                self._warn_of_short_shutdown(self._step_seconds + self.saver.total_seconds)
            self.saver.total_seconds = 0.0

    def _warn_of_short_shutdown(self, seconds: float) -> None:
        """Said once: torchrun kills its ranks some time after a SIGTERM, whether they have saved or not."""
        allowed = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
        if seconds > allowed and "TORCHELASTIC_RUN_ID" in os.environ and not self._warned_of_shutdown:
            self._warned_of_shutdown = True
            logger.warning(
                "WARNING: a step and a save take %.0f s, but torchrun kills its ranks %.0f s after a SIGTERM: start it with "
                "--shutdown_timeout=%d (this is not said if TORCH_ELASTIC_SHUTDOWN_TIMEOUT is set high enough)",
                seconds, allowed, math.ceil(3 * seconds),
            )  # fmt: skip

    # ------------------------------------------------------------ small things

    def _agree(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def _step_scheduler(self, times: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that moves before the (resumed) optimizer did
            for _ in range(times):
                self.scheduler.step()

    def _hook(self, name: str, *arguments) -> None:
        if name in self.hooks:
            self.hooks[name](self, *arguments)

    def _log(self, metrics: dict, tag: str) -> None:
        for log in self.loggers:
            log.log_metrics(metrics, self.state.step, tag=tag)

    def _print_progress(self, metrics: dict, last_step: int) -> None:
        every = self.train_args.log_progress_every_n_train_steps
        if self.rank or not every or (self.state.step % every and self.state.step != last_step):
            return
        shown = " ".join(f"{key}={metrics[key]:.4g}" for key in ("lr", "gnorm", "tokens_per_second"))
        logger.info(
            "Epoch %d: %d/%d train_loss=%.4f %s",
            metrics["epoch"],
            self.state.step,
            last_step,
            metrics["train_loss"],
            shown,
        )

    def _warn_of_skip(self, loss: float, gnorm: float, samples: list[int]) -> None:
        if self.rank == 0:
            logger.warning(
                "WARNING: step %d: loss %s, gradient norm %s: its update is skipped; the samples were %s",
                self.state.step,
                loss,
                gnorm,
                samples,
            )

    def _divergence_message(self, count: int) -> str:
        return (
            f"the loss or the gradient norm was not finite for {count} steps in a row, until step {self.state.step}: "
            f"{self._last_good_message()}. Lower --learning_rate, raise --warmup_steps, or look at the samples that metrics.jsonl names"
        )

    def _last_good_message(self) -> str:
        """Names the last checkpoint from which a step succeeded, or that this run resumed."""
        good = self._last_good or (self._resumed and self._resumed.path)
        if good:
            return f"the last good checkpoint is {good}"
        return (
            f"there is only {self._last_saved}, and no step succeeded after it"
            if self._last_saved
            else "no checkpoint was saved before"
        )

    @contextlib.contextmanager
    def _signal_handlers(self):
        """SIGTERM and SIGUSR1 are noted, and acted on after the step by all ranks together."""

        def note(number, frame):
            self._signals[number] = True

        before = {number: signal.signal(number, note) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _ahead(items: Iterable, count: int = 4) -> Iterator:
    """The same items in order, `count` of them made in a thread before they are asked for."""
    iterator, end, thread = iter(items), object(), ThreadPoolExecutor(1, "data")
    try:
        made = collections.deque(thread.submit(next, iterator, end) for _ in range(count))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(
            wait=False, cancel_futures=True
        )  # whoever stops early does not wait for what nobody wants


class _CollateOrNone:
    """The user's collate function; None for a micro-batch without samples."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        return self.collate(samples) if samples else None


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: the device's, or on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _num_tokens(batch) -> int:
    """What the batch counts itself; a batch that does not count has none."""
    return int(batch.get("num_tokens", 0)) if isinstance(batch, dict) else 0


def _divisor(outputs: AggregatedOutputs, reduction: str) -> float:
    return {"sum": 1, "mean": outputs.num_batches, "per-token-mean": outputs.num_tokens}[reduction]


def _reduce(outputs: AggregatedOutputs, reduction: str) -> float:
    divisor = _divisor(outputs, reduction)
    return outputs.loss_sum / divisor if divisor else math.nan


def _checked(source: Checkpoint, name: str, shape: tuple[int, ...]) -> Checkpoint:
    if name in source.tensors and source.tensors[name][1] != shape:
        raise CheckpointError(
            f"{source.path}: {name} has shape {source.tensors[name][1]}, this model's is {shape}: give the same model flags"
        )
    return source


def _initial(model, name: str, shape: tuple[int, ...], box) -> torch.Tensor:
    """A box of a fresh parameter; boxes are runs of whole rows."""
    row = math.prod(shape[1:])
    start = box.offsets[0] * row
    return model.initial_values(name, start, start + box.size).view(box.shape)
