"""Prepares a training: compares flags, checkpoint, data, model and machine, and decides the layout."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import checks, config_file, plan, settings
from cli.config import SETTINGS, Command, Config, repeatable
from errors import UserError
from trainer import machine

if TYPE_CHECKING:
    from trainer.args import Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training that may begin: every flag resolved, and what follows from data, model and machine.

    resumed: the checkpoint that it continues, or None. global_batch_size: the samples of an optimizer step.
    last_step: the one at which it ends. train_set, val_set: the arguments of dataset.batches.open_split; the
    latter's are empty without validation samples. data_fingerprint: the prepared data's.
    """

    command: Command
    engine_name: str
    resumed: Any
    layout: "Layout"
    global_batch_size: int
    last_step: int
    model_config: Any
    train_set: dict[str, Any]
    val_set: dict[str, Any]
    data_fingerprint: str

    @property
    def config(self) -> Config:
        return self.command.config

    @property
    def saved_state(self) -> dict[str, Any]:
        """The state of the resumed checkpoint; empty for a fresh start."""
        return self.resumed.state if self.resumed else {}

    @property
    def plan_ngpus(self) -> int:
        """The devices of one copy of the model. Our engine evaluates, and does not partition."""
        return self.config.plan_ngpus if self.config.mode == "train" else 1

    def flags(self) -> dict[str, Any]:
        """Return the run's flags: those that only preparing takes are as the data were prepared."""
        from dataset import preparation

        values = self.config.select(*SETTINGS)
        prepared = preparation.read(self.config.dataset_path)
        for name in checks.PREPARED_WITH:
            values[name] = {**prepared, **prepared["settings"]}[name]
        values["micro_batch_size"] = self.layout.micro_batch_size
        values["global_batch_size"] = self.global_batch_size
        return values

    def description(self) -> dict[str, Any]:
        """Return the part of a checkpoint's state that replaces this run's flags in a resume or an export."""
        from dataset import check

        return {
            "config": self.flags(),
            "model": self.model_config.to_dict(),
            "data": self.data_fingerprint,
            "chat": check.holds_conversations(self.config.dataset_path),  # then --generate asks as a user
            "last_step": self.last_step,
        }

    def save_flags(self) -> None:
        """Write config.yaml beside metrics and checkpoints: --config=<that file> repeats the run."""
        from trainer.folders import FLAGS_FILE

        for folder in (self.config.log_dir, self.config.save_dir):
            config_file.write(Path(folder, FLAGS_FILE), repeatable(self.flags()))

    def facts(self) -> dict[str, str]:
        """Return what all ranks must have in common, by names for people."""
        import torch

        from trainer.checkpoint import json_digest

        return {
            "data": self.data_fingerprint,
            "the model": json_digest(self.model_config.to_dict()),
            "torch": torch.__version__,
            "the checkpoint": json_digest(self.saved_state),
            "the layout": str(self.layout),
        }


def prepare(command: Command) -> Run:
    """Return the run that the command asks for. Needs a process group: all ranks raise the error of one."""
    from trainer import engine, parallel, ranks

    preferred = ranks.by_first_rank(machine.preferred_precision, parallel.pick_device())
    command = settings.resolve_precision(command, preferred)
    config = command.config
    engine_name = "native"  # which evaluates
    if config.mode == "train":
        is_adapter = config.lora_rank is not None
        partitioning = settings.partitioning_flags(config)
        engine_name = ranks.together(engine.choose, config.engine, is_adapter, partitioning)
    resumed = engine.open_resumed(config.resume_from, config.save_dir, engine_name)
    run = ranks.together(_prepare, command, engine_name, resumed, preferred)
    ranks.compare(run.facts())
    return run


def _prepare(command: Command, engine_name: str, resumed, preferred: str) -> Run:
    """Return the run. Raises UserError.

    preferred: the meaning of --precision=auto, which rank 0 decides for all.
    """
    from llama3 import assets

    state = resumed.state if resumed else {}
    command = _resolve(command, engine_name, resumed, preferred)
    config = command.config
    model_config = assets.load_config(config.model_id, config.num_hidden_layers)
    fingerprint, samples = checks.check_data(command, model_config, state)
    if resumed:
        checks.check_same_model(resumed.path, model_config, state)
    checks.check_adapter(command, resumed.path if resumed else None, state)
    if config.mode == "train":
        checks.check_reporters(config)
    layout, batch = _decide_layout(command, engine_name, state)
    last_step = settings.last_step(config, samples, batch)
    checks.warn_about_ineffective_flags(command, model_config, not resumed, last_step)
    if config.mode == "train":
        settings.warn_about_changed_layout(layout, state)
    if not config.from_scratch and (config.lora_rank or not resumed):
        assets.weight_files(config.model_id)  # downloads them now, so that no rank waits for it later
    train_set, val_set = _split_arguments(config, model_config.vocab_size)
    _check_samples(config, samples, val_set, layout, batch)
    return Run(
        command=command,
        engine_name=engine_name,
        resumed=resumed,
        layout=layout,
        global_batch_size=batch,
        last_step=last_step,
        model_config=model_config,
        train_set=train_set,
        val_set=val_set,
        data_fingerprint=fingerprint,
    )


def _resolve(command: Command, engine_name: str, resumed, preferred: str) -> Command:
    """Return the command with the checkpoint's flags, and with what `auto` means on this machine."""
    config = command.config
    if config.mode == "evaluate" and config.resume_from and not resumed:
        raise UserError(
            f"--resume_from={config.resume_from} is not a checkpoint in {config.save_dir}",
            "Train first, or name another --save_dir or a path",
        )
    if resumed:
        command = settings.resolve_precision(settings.resume_flags(command, resumed.state), preferred)
    command = settings.resolve_compile(command, engine_name)
    settings.warn_about_slow_bf16(command.config)
    return command


def _decide_layout(command: Command, engine_name: str, state: dict[str, Any]) -> tuple["Layout", int]:
    """Return the Layout of the run and its global batch: the plan's, or without one the flags'."""
    config = command.config
    ranks = settings.world_size()
    if config.mode == "train" and engine_name == "native":
        planned = plan.planned(command, state)
        if planned:
            best, batch = planned
            return settings.layout(config, engine_name, best, best.grad_accumulation_steps), batch
    copies = ranks // config.plan_ngpus if config.mode == "train" else ranks
    batch, accumulation = settings.global_batch(command, copies, state)
    return settings.layout(config, engine_name, None, accumulation), batch


def _split_arguments(config: Config, vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that open the training set and the validation set; none for an empty one."""
    from dataset import batches

    common = {
        "dataset_path": config.dataset_path,
        "max_seq_len": config.max_seq_len,
        "vocab_size": vocab_size,
    }
    train_set = {"split": "train", **common}
    val_set = {"split": "validation", "max_samples": config.max_val_samples, **common}
    if len(batches.open_split(**val_set)) == 0:
        val_set = {}
    return train_set, val_set


def _check_samples(
    config: Config, samples: int, val_set: dict[str, Any], layout: "Layout", batch: int
) -> None:
    """Raise UserError if the training set is smaller than a global batch, or nothing can be evaluated."""
    if config.mode == "evaluate" and not val_set:
        raise UserError(
            f"{config.dataset_path} has no validation samples",
            "Prepare it with a larger --validation_fraction",
        )
    if config.mode == "train" and samples < batch:
        copies = batch // (layout.micro_batch_size * layout.grad_accumulation_steps)
        raise UserError(
            f"{config.dataset_path} has {samples} training samples, and a global batch takes {batch} "
            f"({layout.micro_batch_size} x {layout.grad_accumulation_steps} x {copies} ranks)",
            "Prepare more text, or lower --micro_batch_size, --grad_accumulation_steps or "
            "--global_batch_size",
        )
    if config.val_every_n_train_steps and not val_set:
        logger.warning("--val_every_n_train_steps, but %s has no validation set", config.dataset_path)
