"""nnScaler's Trainer behind ours: the same TrainerArgs, with what its version 0.8 gets wrong or leaves out put right around it.

Imported only where nnScaler runs. Data come in our sample order as one long epoch; positions are counted in samples.
"""

import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import warnings
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import nnscaler
import torch
import torch.distributed as dist
from nnscaler.cli import train_hook, trainer_args
from nnscaler.cli import trainer as nnscaler_trainer
from nnscaler.graph.tracer import wrap_utils
from nnscaler.graph.tracer.torch_fx_patcher import TorchFXPatcher
from nnscaler.runtime.f16_optimizer import MixedPrecisionAdamW

from trainer import checkpoint, foreign, hooks
from trainer.args import DatasetSamplerConfig, TrainerArgs, load_type, refuse_unsupported
from trainer.sampler import GlobalBatchSampler
from trainer.tensorfile import TensorFileReader
from trainer.trainer import SIGTERM_EXIT_CODE, TrainingFailed, peak_memory_gib, perplexity, set_aside
from trainer.trainer import Trainer as NativeTrainer

logger = logging.getLogger(__name__)


class Trainer:
    """Runs TrainerArgs on nnScaler 0.8. Raises ValueError for what it cannot do, TrainingFailed when the run breaks down."""

    def __init__(self, argv: list[str] | None = None, *, train_args: TrainerArgs):
        _refuse(train_args)
        self.train_args = train_args

    def run(self) -> None:
        """Trains to the end; a SIGTERM saves and exits with 143."""
        _pretend_torchrun()
        _fit_torch()
        logging.getLogger("nnscaler").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "Length of .* dataset")  # short micro-batches are padded
        config = self.train_args.checkpoint
        if (
            config.get_resume_checkpoint() is None
            and not config.no_save
            and _rank() == 0
            and (Path(config.save_dir) / "last").exists()
        ):
            set_aside(Path(config.save_dir))
        try:
            nnscaler_trainer.Trainer(train_args=_translate(self.train_args)).run()
        finally:
            if dist.is_initialized():
                nnscaler.uninit()

    def evaluate(self) -> float:
        """The validation loss; nothing of it needs a plan, so our own Trainer computes it."""
        return NativeTrainer(train_args=self.train_args).evaluate()

    @classmethod
    def merge_checkpoint(cls, checkpoint_files, out_file) -> None:
        """Merges the shards of one checkpoint into one file."""
        checkpoint.merge(Path(checkpoint_files[0]).parent, out_file)


def _refuse(args: TrainerArgs) -> None:
    refuse_unsupported(args)
    options, resume = args.compute_config.pas_config, args.checkpoint.get_resume_checkpoint()
    mapped = args.hook if args.hook and not hasattr(args.hook, "args") else None
    refusals = [
        (options.get("compile"), "compile: its generated code is run as it is; use --compile=off"),
        (options.get("async_save"), "async_save: use --async_save=off"),
        (
            options.get("recompute", "none") not in ("none", "full"),
            "recompute of some layers: use --recompute=full or none",
        ),
        (
            options.get("recompute") == "full" and args.pas_policy == "dp",
            "recompute with pas_policy 'dp': use 'autodist'",
        ),
        (mapped and (mapped.on_epoch_start or mapped.on_epoch_end), "epoch hooks: use the step hooks"),
        (not args.checkpoint.symlink_best_and_last, "checkpoint.symlink_best_and_last=False: leave it True"),
        (
            resume and not (foreign.is_shards(resume) or resume.is_file() and foreign.is_merged(resume)),
            f"resuming from {resume}, which our Trainer wrote: use --engine=native, or start from its export (--export_hf, --model_id)",
        ),
        (
            resume and checkpoint.checkpoints(Path(args.checkpoint.save_dir)),
            f"saving among our Trainer's checkpoints in {args.checkpoint.save_dir}: give another --save_dir",
        ),
    ]
    if problems := [f"--engine=nnscaler does not support {text}" for asked, text in refusals if asked]:
        raise ValueError("\n".join(problems))
    if resume and resume.is_file():
        foreign.MergedFile(
            resume
        )  # nnScaler unpickles whatever it is given; what holds more than data stops here


# ---------------------------------------------------------------- surroundings


def _pretend_torchrun() -> None:
    """Without torchrun nnScaler does not start at all."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= dict(
        TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="1", RANK="0"
    )
    os.environ |= dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0")


def _rank() -> int:
    return int(os.environ["RANK"])


def _fit_torch() -> None:
    """Two places where the tracer does not know torch 2.13 yet."""
    table = wrap_utils.default_autowrap_leaf_function
    for function in [f for f in table if "pybind11_detail" in str(getattr(f, "__qualname__", ""))]:
        del table[function]  # named in torch's listing, but not to be found there
    if not hasattr(TorchFXPatcher, "is_impure_of_0_8"):
        TorchFXPatcher.is_impure_of_0_8 = TorchFXPatcher.is_impure_new
        TorchFXPatcher.is_impure_new = staticmethod(
            lambda node, *_, **__: TorchFXPatcher.is_impure_of_0_8(node)
        )


# ---------------------------------------------------------------- arguments


def _translate(args: TrainerArgs) -> "_Args":
    """Our dataclasses into nnScaler's of the same names, with what it needs to be told differently."""
    model_type = load_type(args.model.type)
    traced = load_type(getattr(model_type, "for_tracing", model_type))
    for function, dims in getattr(traced, "whole_functions", {}).items():
        nnscaler.register_op(dims)(function)
    options = args.compute_config.pas_config
    passed = {key: value for key, value in options.items() if key.startswith("_") or key == "mem_constraint"}
    passed["recompute_modules"] = options.get("recompute_modules", "")
    if options.get("recompute") == "full":
        passed["recompute_modules"] = model_type.layer_class.__name__
    optimizer = args.optimizer
    if args.precision["param"] == "bf16" and load_type(optimizer.type) is torch.optim.AdamW:
        optimizer = replace(optimizer, type=MixedPrecisionAdamW)  # keeps master weights in fp32
    changes = {
        "compute_config": replace(args.compute_config, pas_config=passed),
        "model": replace(args.model, type=traced),
        "optimizer": optimizer,
        "checkpoint": replace(
            args.checkpoint,
            every_n_epochs=None,
            every_n_train_steps=args.checkpoint.every_n_train_steps or sys.maxsize,
            save_best=args.checkpoint.save_best
            and bool(args.dataset.val_args),  # without validation the newest would be the best
        ),
        "gen_reuse": "moo",  # what a killed run left unfinished is generated again
        "max_epochs": None,
        "val_every_n_epochs": None,  # epochs are counted by the hook
    }
    given = {item.name: changes.get(item.name, getattr(args, item.name)) for item in fields(args)}
    real = _Args(**{name: _real(value) for name, value in given.items()})
    real.prepare(args)
    return real


def _real(value: Any) -> Any:
    if isinstance(value, list):
        return [_real(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return getattr(trainer_args, type(value).__name__)(
        **{item.name: _real(getattr(value, item.name)) for item in fields(value)}
    )


@dataclass
class _Args(trainer_args.TrainerArgs):
    """nnScaler's arguments, with the parts they create replaced."""

    def prepare(self, ours: TrainerArgs) -> None:
        self.ours = ours
        self.sets = {stage: self.create_dataset(stage) for stage in ("train", "val")}
        steps = [ours.max_train_steps] if ours.max_train_steps else []
        if ours.max_epochs:
            steps.append(math.ceil(ours.max_epochs * len(self.sets["train"]) / ours.global_batch_size))
        self.max_train_steps = min(steps)
        self.bookkeeper = _Bookkeeper(self)
        self.gen_savedir = str(Path(ours.gen_savedir) / self._code_key())

    def _code_key(self) -> str:
        """Names the folder of generated code after everything that determines it, the weights baked into it among them."""
        model = self.model_type(**self.ours.model.args)
        collate = (
            load_type(self.ours.dataloader.train_args.get("collate_fn")) or torch.utils.data.default_collate
        )
        batch = collate(
            [self.sets["train"][index] for index in range(self.micro_batch_size)]
        )  # the same on every rank
        classes = [
            cls for cls in self.model_type.__mro__ if not cls.__module__.startswith(("torch", "builtins"))
        ]
        sources = {
            inspect.getsourcefile(item) for item in (*classes, *getattr(model, "whole_functions", {}), _Args)
        }
        files = (model.weight_files() if hasattr(model, "weight_files") else None) or {}
        plain, config = self.ours.to_dict(), getattr(getattr(model, "model", None), "config", None)
        facts = {
            "args": [plain[key] for key in ("compute_config", "pas_policy", "model", "precision", "seed")],
            "batch": [self.global_batch_size, self.micro_batch_size, _shapes(batch)],
            "config": config and config.to_dict(),
            "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
            "weights": sorted(
                (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in set(files.values())
            ),
            "sources": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(sources)],
            "versions": [importlib.metadata.version(name) for name in ("nnscaler", "torch", "transformers")],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return self.ours.to_dict()

    def init_env(self, trainer) -> None:
        if self.ours.compute_config.pas_config.get("deterministic"):
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        super().init_env(trainer)

    def create_model(self) -> torch.nn.Module:
        """With real weights: nnScaler starts from those that it traces."""
        model = super().create_model()
        prefix, files = (
            getattr(model, "name_prefix", ""),
            model.weight_files() if hasattr(model, "weight_files") else None,
        )
        made: dict[int, torch.nn.Parameter] = {}  # a tied parameter is made once
        for module_name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.is_meta and id(parameter) not in made:
                    name = f"{module_name}.{key}".removeprefix(prefix)
                    value = (
                        TensorFileReader(files[name]).read(name)
                        if files
                        else model.initial_values(name, 0, parameter.numel())
                    )
                    made[id(parameter)] = torch.nn.Parameter(value.float().reshape(parameter.shape))
                if parameter.is_meta:
                    setattr(module, key, made[id(parameter)])
        return model

    def create_dataloader(self, stage="train", dataset=None):
        args = self.ours
        dataset = self.sets.get(stage)
        if dataset is None:
            return None
        order = (args.dataset_sampler or DatasetSamplerConfig()).train_args
        train, steps = stage == "train", self.max_train_steps
        sampler = _Sampler(
            len(dataset),
            args.micro_batch_size,
            args.update_freq if train else 1,
            _rank() // args.compute_config.plan_ngpus,
            args.scaling_factor,
            order.get("seed", args.seed or 0),
            train and order.get("shuffle", True),
            stop=len(dataset) if not train else args.max_epochs * len(dataset) if args.max_epochs else None,
        )
        each = args.micro_batch_size * args.scaling_factor
        sampler.micro_batches = steps * args.update_freq if train else math.ceil(len(dataset) / each)
        options = (args.dataloader.val_args if not train else None) or args.dataloader.train_args
        options = {
            key: load_type(value) if key == "collate_fn" else value
            for key, value in options.items()
            if key != "drop_last"
        }
        return _Loader(dataset, batch_sampler=sampler, **options)

    def create_loggers(self) -> list:
        return [self.bookkeeper.loggers]

    def create_hook(self):
        user = train_hook.TrainHook()
        for name, function in self.bookkeeper.user_hooks.items():
            if "checkpoint" not in name:  # those get our state, not nnScaler's
                setattr(user, name, function)
        return train_hook.AggregatedTrainHook([self.bookkeeper, user])


def _shapes(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: _shapes(value) for key, value in batch.items()}
    return [str(batch.dtype), list(batch.shape)] if isinstance(batch, torch.Tensor) else str(type(batch))


class _Sampler(GlobalBatchSampler):
    """With the length that nnScaler asks for: the micro-batches of the whole run, or of the validation set."""

    micro_batches: int

    def __len__(self) -> int:
        return self.micro_batches


class _Loader(torch.utils.data.DataLoader):
    """Starts where the checkpoint stopped, so that nothing is drawn and dropped."""

    def state_dict(self) -> dict:
        return {}  # the hook writes it, when the step is counted

    def load_state_dict(self, state: dict) -> None:
        self.batch_sampler.start = state["samples"]


# ---------------------------------------------------------------- the run


class _Loggers:
    """Our loggers, on rank 0, set up once the step to continue from is known."""

    def __init__(self, args: TrainerArgs):
        self.args, self.loggers = args, []

    def start(self, step: int) -> None:
        if _rank() == 0:
            self.loggers = [load_type(config.type)(**config.args) for config in self.args.log]
        for log in self.loggers:
            log.setup(self.args.to_dict(), step)

    def setup(self, config: dict) -> None:
        pass

    def log_metrics(self, metrics: dict, step: int, *, tag: str | None = None) -> None:
        if "train_loss" in metrics or "val_loss" in metrics:  # memory is among them
            for log in self.loggers:
                log.log_metrics(metrics, step, tag=tag)

    def finalize(self) -> None:
        for log in self.loggers:
            log.finalize()


class _Bookkeeper(train_hook.TrainHook):
    """Counts samples and tokens, names the metrics as ours, saves at epoch ends and on SIGTERM, repairs what was loaded."""

    def __init__(self, args: _Args):
        self.args, self.ours = args, args.ours
        self.loggers, self.user_hooks = _Loggers(args.ours), hooks.create(args.ours.hook)
        self.samples = self.tokens = self.stop = 0
        self.resumed, self.best, self.val_loss = None, math.inf, math.inf

    def _epoch(self, samples: int) -> int:
        return samples // len(self.args.sets["train"])

    def after_setup(self, trainer) -> None:
        step = trainer.train_status.finished_train_steps
        if self.resumed:
            self._repair(trainer, step)
        self.loggers.start(step)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", 1))

    def _repair(self, trainer, step: int) -> None:
        for state in trainer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()  # a merged file shares one among all parameters
        # Optimizer and schedule follow this run's arguments.
        given = {
            key: value
            for key, value in self.ours.optimizer.args.items()
            if key in trainer.optimizer.param_groups[0]
        }
        for group in trainer.optimizer.param_groups:
            group.pop("initial_lr", None)
            group.update(given)
        if self.ours.lr_scheduler:
            trainer.lr_scheduler = self.args.create_lr_scheduler(trainer.optimizer)
            for _ in range(step if self.ours.lr_scheduler.interval == "step" else self._epoch(self.samples)):
                trainer.lr_scheduler.step()
        if "on_load_checkpoint" in self.user_hooks:
            self.user_hooks["on_load_checkpoint"](trainer, self.resumed)
        if "after_load_checkpoint" in self.user_hooks:
            self.user_hooks["after_load_checkpoint"](trainer, self.resumed)
        if trainer.rank == 0:
            logger.info("resumed: step %d, %d samples seen", step, self.samples)

    def on_load_checkpoint(self, trainer, state: dict) -> None:
        text = state.get("trainer_state")
        if text is None:
            raise ValueError(
                "the checkpoint was not written by this train.py: export its weights and start from them"
            )
        self.resumed = json.loads(text[0] if isinstance(text, list) else text)
        self.samples, self.tokens = self.resumed["samples"], self.resumed["train_state"]["tokens"]
        best = self.resumed["train_state"]["best_val_loss"]
        state["train_status"] = {"finished_train_steps": self.resumed["step"]}
        self.best = math.inf if best is None else best

    def on_train_start(self, trainer) -> None:
        if self.resumed:
            trainer.train_status.best_loss = self.best
        if (
            self.ours.compute_config.pas_config.get("validate_first")
            and trainer.train_status.finished_train_steps == 0
        ):
            trainer._validate(nnscaler_trainer._StepStat())

    def on_step_start(self, trainer, epoch, idx) -> None:
        self.began = time.perf_counter()

    def on_train_step_start(self, trainer, batches) -> None:
        self.step_tokens = sum(
            int(batch.get("num_tokens", 0)) for batch in batches if isinstance(batch, dict)
        )

    def after_gnorm_clip(self, trainer, gnorm) -> None:
        if not math.isfinite(gnorm.item()):
            raise TrainingFailed(
                f"the gradient norm of step {trainer.train_status.finished_train_steps + 1} is {gnorm.item()}: stopped before the update. "
                "Lower --learning_rate, raise --warmup_steps, or use --engine=native, which skips such steps"
            )

    def before_log_train_metrics(self, trainer, metrics, aggregated) -> None:
        device = torch.cuda.current_device()
        tokens = torch.tensor(self.step_tokens, device=device)
        dist.all_reduce(tokens, group=trainer.sync_group)
        largest = torch.tensor(
            [peak_memory_gib(torch.device("cuda")), self.stop], dtype=torch.float64, device=device
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        peak, self.stop = largest.tolist()
        self.epoch, self.tokens = self._epoch(self.samples), self.tokens + tokens.item()
        seconds = time.perf_counter() - self.began
        for name in ("loss", "train_wall"):
            metrics.pop(name)
        metrics |= dict(
            epoch=self.epoch,
            tokens=self.tokens,
            tokens_per_second=tokens.item() / seconds,
            step_seconds=seconds,
        )
        metrics["peak_memory_gib"] = peak

    def on_step_end(self, trainer, epoch, idx, metrics, aggregated) -> None:
        ours = self.ours
        self.samples += ours.global_batch_size
        ended, last = (
            self._epoch(self.samples) > self.epoch,
            trainer.train_status.finished_train_steps == trainer.max_train_steps,
        )
        if ended and ours.lr_scheduler and ours.lr_scheduler.interval == "epoch":
            trainer.lr_scheduler.step()
        step_stat = nnscaler_trainer._StepStat(
            train_loss=aggregated.loss_sum / max(1, aggregated.num_tokens or aggregated.num_batches)
        )
        epochs, save, validate = (
            self._epoch(self.samples),
            ours.checkpoint.every_n_epochs,
            ours.val_every_n_epochs,
        )
        if (ended and save and epochs % save == 0 or self.stop) and not last:
            trainer._validate_and_save(step_stat)
        elif (
            ended
            and validate
            and epochs % validate == 0
            and not last
            and trainer.dataloader["val"] is not None
        ):
            trainer._validate(step_stat)
        if self.stop and not last:
            logger.info(
                "SIGTERM: saved step %d and stopping; --resume_from=last goes on",
                trainer.train_status.finished_train_steps,
            )
            self.loggers.finalize()
            sys.exit(SIGTERM_EXIT_CODE)

    def after_aggregate_val_step_outputs(self, trainer, aggregated, val_loss) -> None:
        if aggregated.num_tokens is not None:
            aggregated.num_batches = (
                aggregated.num_tokens
            )  # what nnScaler divides by: the mean is over tokens

    def before_log_val_metrics(self, trainer, metrics) -> None:
        metrics.pop("val_wall", None)
        metrics["perplexity"] = perplexity(metrics["val_loss"])
        self.val_loss = metrics["val_loss"]

    def on_save_checkpoint(self, trainer, state: dict) -> None:
        step, best = (
            trainer.train_status.finished_train_steps,
            min(trainer.train_status.best_loss, self.val_loss),
        )
        ours = {
            "step": step,
            "epoch": self.epoch,
            "samples": self.samples,
            "world_size": trainer.world_size,
            "global_batch_size": self.ours.global_batch_size,
            "seed": self.ours.seed,
            "train_state": dict(
                step=step,
                samples=self.samples,
                tokens=self.tokens,
                updates=step,
                best_val_loss=best if math.isfinite(best) else None,
            ),
            "config": self.ours.to_dict(),
        }
        if "on_save_checkpoint" in self.user_hooks:
            self.user_hooks["on_save_checkpoint"](trainer, ours)
        state["dataloader"] = {"samples": self.samples}
        state["trainer_state"] = json.dumps(ours)
        if trainer.rank == 0:
            save_dir = Path(self.ours.checkpoint.save_dir)
            folder = save_dir / f"{(step - 1) // trainer.total_train_steps_per_epoch:04d}-{step:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / foreign.STATE_FILE).write_text(state["trainer_state"])
            for path in save_dir.glob("[lb]*st/*.ckpt"):
                if int(path.stem) >= trainer.world_size:
                    path.unlink()  # of a run on more ranks
