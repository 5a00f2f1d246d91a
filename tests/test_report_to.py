"""--report_to: what Weights & Biases and trackio are told, without a network, is what metrics.jsonl holds."""

import json
import struct
from pathlib import Path

import pytest
from helpers.runs import outputs, python, rows

NUMBERS = ("train_loss", "lr", "gnorm", "tokens", "tokens_per_second")


def wandb_rows(log_dir: Path) -> tuple[set[str], list[dict]]:
    """The ids of the runs that wandb keeps for a later upload, and their rows.

    Its files are LevelDB's logs: a header of 7 bytes, then blocks of 32 KiB of records, each after its
    checksum (4 bytes), length (2) and kind (1); a record may lie in several blocks.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    ids, found = set(), []
    for file in sorted(log_dir.glob("wandb/offline-run-*/*.wandb")):
        data, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 2**15 - place % 2**15 < 7:  # no header fits: the rest of the block is padding
                place += 2**15 - place % 2**15
                continue
            length, kind = struct.unpack("<4xHB", data[place : place + 7])
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # all of a record, or its last part
                record, whole = Record.FromString(whole), b""
                ids |= {record.run.run_id} - {""}
                row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found += [row] if row else []
    return ids, found


def trackio_rows(folder: Path) -> tuple[set[str], list[dict]]:
    """The names of the runs in trackio's own database, and their rows."""
    read = """
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("llama3")
print(json.dumps([runs, [row for run in runs for row in SQLiteStorage.get_logs("llama3", run)]], default=str))
"""
    names, found = json.loads(python("-c", read, TRACKIO_DIR=str(folder)).stdout.splitlines()[-1])
    return {*names}, found


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_reporting_what_the_metrics_hold(flags, tmp_path, library):
    pytest.importorskip(library, reason=f"pip install {library}")
    env = dict(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false", TRACKIO_DIR=str(tmp_path / "trackio"))
    argv = ["train.py", *flags, f"--report_to={library}", *outputs(tmp_path)]
    python(*argv, "--max_train_steps=2", **env)
    python(*argv, "--max_train_steps=4", "--resume_from=last", **env)
    names, reported = (
        wandb_rows(tmp_path / "log") if library == "wandb" else trackio_rows(tmp_path / "trackio")
    )
    assert len(names) == 1, "the resumed run is another one"
    logged, seen = rows(tmp_path / "log", "train_loss"), {}
    for row in reported:
        if "train/train_loss" in row:
            seen[row["step"]] = {name: row[f"train/{name}"] for name in NUMBERS}
    assert seen == {step: {name: row[name] for name in NUMBERS} for step, row in logged.items()}
    losses = {row["step"]: row["val/val_loss"] for row in reported if "val/val_loss" in row}
    assert losses == {step: row["val_loss"] for step, row in rows(tmp_path / "log", "val_loss").items()}
    assert sorted(losses) == [2, 4] and not any((tmp_path / "log").glob("events*"))
    python(*argv, "--max_train_steps=1", **env)  # a fresh run is a run of its own there too
    names, _ = wandb_rows(tmp_path / "log") if library == "wandb" else trackio_rows(tmp_path / "trackio")
    assert len(names) == (1 if library == "wandb" else 2)  # the first run's folder is set aside
