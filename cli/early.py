"""Answers wrong input before anything heavy is imported: flags, paths and combinations, in under a second."""

import os
import tempfile
from pathlib import Path

from cli import checks, settings
from cli.config import Command, parse
from dataset import preparation
from errors import UserError
from llama3 import presets

# Mode -> the flags whose paths it writes.
WRITES = {
    "prepare_data": ("dataset_path",),
    "train": ("save_dir", "log_dir"),
    "merge_checkpoint": ("output_path",),
    "export_hf": ("output_path",),
    "export_adapter": ("output_path",),
    "plan": ("output_path",),
    "doctor": ("output_path",),
}
READS_MODEL = ("train", "evaluate", "generate", "chat", "plan")
WRITES_A_FILE = ("plan", "doctor")
SOURCES = ("merge_checkpoint", "export_hf", "export_adapter")


def parse_on_all_nodes(argv: list[str] | None, description: str) -> Command:
    """Return the command. Its error also ends the ranks of other nodes, which may be started otherwise."""
    try:
        return parse_and_check(argv, description)
    except UserError:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            from trainer import ranks

            with ranks.process_group():
                ranks.together(parse_and_check, argv)
        raise


def parse_and_check(argv: list[str] | None, description: str = "") -> Command:
    """Return the command of these arguments. Raises UserError."""
    command = parse(argv, description)
    check_names(command)
    check_sources(command)
    check_preparation(command)
    check_targets(command)
    return command


def check_names(command: Command) -> None:
    """Raise UserError for a model or tokenizer that is needed, and is neither a folder nor a hub id."""
    config = command.config
    is_needed = config.mode == "prepare_data" or command.is_typed("tokenizer_id")
    if is_needed and config.tokenizer_id != "llama3" and config.mode != "doctor":
        presets.check_name(config.tokenizer_id)
    comes_from_checkpoint = bool(config.resume_from)
    if config.mode in ("generate", "chat") and Path(config.save_dir, "last").exists():
        comes_from_checkpoint = True
    if config.mode in READS_MODEL and (command.is_typed("model_id") or not comes_from_checkpoint):
        presets.check_name(config.model_id)


def check_sources(command: Command) -> None:
    """Raise UserError for a checkpoint that does not exist, beside which there is no other to name."""
    config = command.config
    paths = []
    if config.resume_from not in (None, "last", "best"):
        paths.append(Path(config.resume_from))
    if config.mode in SOURCES:
        paths.append(Path(getattr(config, config.mode) or f"{config.save_dir}/last"))
    for path in paths:
        if not path.exists() and not any(path.parent.glob("*/manifest.json")):
            raise UserError(
                f"there is no checkpoint {path}",
                "Train first, or name a merged file or folder (--output_path is where a result goes)",
            )


def check_preparation(command: Command) -> None:
    """Raise UserError for data that are not prepared, or for a batch that does not divide, of a fresh run."""
    config = command.config
    if config.mode not in ("train", "evaluate") or config.resume_from:
        return
    prepared = preparation.require(config.dataset_path, checks.prepare_command(config))
    preparation.check_length(config.dataset_path, prepared, config.max_seq_len)
    if config.mode == "train":
        settings.global_batch(command, settings.world_size() // config.plan_ngpus or 1, {})


def check_targets(command: Command) -> None:
    """Raise UserError for a path of this mode that cannot be written; from rank 0, which writes."""
    if not settings.is_first_rank():
        return
    config = command.config
    for name in WRITES.get(config.mode, ()):
        path = getattr(config, name)
        if path is None:
            continue
        if name == "dataset_path":
            check_dataset_path(Path(path))
        elif config.mode in WRITES_A_FILE:
            check_file(name, Path(path))
        else:
            check_target(name, Path(path))


def check_dataset_path(path: Path) -> None:
    """Raise UserError if data cannot be prepared there: in a folder beside it, which is renamed."""
    if preparation.read(path) is None:
        check_target("dataset_path", path.absolute().parent / f"{path.name}.preparing")


def check_file(flag: str, path: Path) -> None:
    """Raise UserError if the file cannot be written. What exists is overwritten in place, a device too."""
    if path.is_dir():
        raise UserError(f"--{flag}={path} is a folder, and a file is needed", "Name a file")
    if not path.exists():
        check_target(flag, path)
    elif not os.access(path, os.W_OK):
        raise UserError(f"--{flag}={path} cannot be written: Permission denied", f"Name another --{flag}")


def check_target(flag: str, path: Path) -> None:
    """Raise UserError if nothing can be made at the path, or in the nearest folder above that exists."""
    try:
        place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not place.is_dir() and place != path.absolute():
            raise NotADirectoryError(f"{place} is not a folder")
        folder = place if place.is_dir() else place.parent
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=folder))
    except OSError as error:
        raise UserError(
            f"--{flag}={path} cannot be written: {error.strerror or error}",
            f"Name a folder that can be written, such as another --{flag}",
        ) from None
