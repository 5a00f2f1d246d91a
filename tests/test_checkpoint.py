"""Checkpoints: whole or absent, verified, readable by any world size, and harmless."""

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.runs import ROOT, environment, rows, run_cases
from safetensors.torch import load_file, save_file

import train
from trainer import checkpoint, setup
from trainer.checkpoint import Checkpoint, CheckpointError, CheckpointName
from trainer.saver import Saver
from trainer.tensorfile import Box, TensorFileReader, TensorFileWriter, file_digest

SHARDS = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")


@pytest.fixture(scope="module")
def saved(flags, tmp_path_factory):
    """A run of two ranks with checkpoints after steps 2 and 4 (`before` and `last`), the last one merged too."""
    out = tmp_path_factory.mktemp("saved")
    common = [*flags, "--global_batch_size=4", f"--save_dir={out / 'ckpt'}", f"--log_dir={out / 'log'}"]
    run = [*common, "--max_train_steps=4", "--save_every_n_train_steps=2"]
    codes = run_cases(out, 2, {"run": run, "merge": [*common, "--merge_checkpoint"]})
    assert set(codes.values()) == {0}
    return out / "ckpt"


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to break: its folder, the newest checkpoint and the one before."""
    copy = tmp_path / "ckpt"
    shutil.copytree(saved, copy, symlinks=True)
    newest, before = checkpoint.checkpoints(copy)
    return copy, newest, before


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def edit(path: Path, change) -> None:
    """Changes the manifest, and leaves its checksum as it was."""
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(kept)


def replace(path: Path, make) -> None:
    path.unlink()
    make(path)


S0, S1, MANIFEST = *SHARDS, checkpoint.MANIFEST
# What is done to the newest checkpoint and the one before, and what the sentence must say.
FAULTS = {
    "shard cut by a byte": (lambda c, b: cut(c / S0, 0.9999), [S0, "bytes"]),
    "shard cut in half": (lambda c, b: cut(c / S1, 0.5), [S1, "bytes"]),
    "shard empty": (lambda c, b: cut(c / S0, 0), [S0, "0 bytes"]),
    "shard grown": (lambda c, b: (c / S0).write_bytes((c / S0).read_bytes() + b"x"), [S0, "bytes"]),
    "bit flipped in the first byte": (lambda c, b: flip(c / S0, 0), [S0]),
    "bit flipped in the header": (lambda c, b: flip(c / S0, 200), [S0]),
    "bit flipped in the middle": (lambda c, b: flip(c / S1, (c / S1).stat().st_size // 2), [S1, "checksum"]),
    "bit flipped in the last byte": (lambda c, b: flip(c / S0, -1), [S0, "checksum"]),
    "shard missing": (lambda c, b: (c / S1).unlink(), [S1, "missing"]),
    "all shards missing": (lambda c, b: [(c / s).unlink() for s in SHARDS], [S0, "missing"]),
    "shard is a folder": (lambda c, b: replace(c / S0, Path.mkdir), [S0, "missing"]),
    "shard is a dangling link": (
        lambda c, b: replace(c / S0, lambda p: p.symlink_to("gone")),
        [S0, "missing"],
    ),
    "shard of another step": (lambda c, b: shutil.copy(b / S0, c / S0), [S0]),
    "shards exchanged": (lambda c, b: swap(c / S0, c / S1), ["shard-0000"]),
    "shard of zeros": (lambda c, b: (c / S0).write_bytes(bytes((c / S0).stat().st_size)), [S0]),
    "shard is a pickle": (lambda c, b: (c / S0).write_bytes(pickle.dumps([1])), [S0, "bytes"]),
    "manifest missing": (lambda c, b: (c / MANIFEST).unlink(), [MANIFEST]),
    "manifest empty": (lambda c, b: cut(c / MANIFEST, 0), [MANIFEST]),
    "manifest cut": (lambda c, b: cut(c / MANIFEST, 0.7), [MANIFEST]),
    "manifest no JSON": (lambda c, b: (c / MANIFEST).write_text("step: 4"), [MANIFEST]),
    "manifest not UTF-8": (lambda c, b: (c / MANIFEST).write_bytes(b"\xff\xfe\x00"), [MANIFEST]),
    "manifest a list": (lambda c, b: (c / MANIFEST).write_text("[]"), [MANIFEST]),
    "manifest of another step": (lambda c, b: shutil.copy(b / MANIFEST, c), ["shard-0000"]),
}
LIES = {
    "the step": lambda m: m["state"].update(step=9),
    "a size": lambda m: m["files"][S0].update(size=1),
    "a checksum": lambda m: m["files"][S0].update(xxh3_128="0" * 32),
    "the shards": lambda m: m["files"].pop(S1),
    "a file outside": lambda m: m["files"].update({"../../x": {"size": 1, "xxh3_128": ""}}),
}
FAULTS |= {
    f"manifest lies about {what}": (lambda c, b, lie=lie: edit(c / MANIFEST, lie), [MANIFEST, "own checksum"])
    for what, lie in LIES.items()
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused_with_the_files_name(broken, fault):
    _, newest, before = broken
    damage, words = FAULTS[fault]
    damage(newest, before)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(newest).verify()
    said = str(refused.value)
    assert all(word in said for word in words) and "\n" not in said, said


@pytest.mark.parametrize(
    "fault", ["bit flipped in the middle", "manifest cut", "shard missing", "manifest missing"]
)
def test_last_falls_back_to_the_newest_good_one_and_says_so(broken, flags, tmp_path, fault, capsys, caplog):
    folder, newest, before = broken
    caplog.set_level("INFO")
    FAULTS[fault][0](newest, before)
    code = train.main(
        [
            *flags,
            "--resume_from=last",
            "--max_train_steps=3",
            f"--save_dir={folder}",
            f"--log_dir={tmp_path / 'log'}",
        ]
    )
    assert code == 0, capsys.readouterr().err
    assert f"resumed from {before}" in caplog.text
    assert f"Falling back to {before}" in caplog.text
    assert sorted(rows(tmp_path / "log", "train_loss")) == [3]


def test_a_named_bad_checkpoint_is_never_replaced_by_another(broken, flags, tmp_path, capsys):
    folder, newest, before = broken
    flip(newest / SHARDS[0], -1)
    code = train.main(
        [*flags, f"--resume_from={newest}", f"--save_dir={folder}", f"--log_dir={tmp_path / 'log'}"]
    )
    assert code == 2 and SHARDS[0] in capsys.readouterr().err


MERGED_FAULTS = {
    "cut": (lambda f: cut(f, 0.9), ["not a whole"]),
    "empty": (lambda f: cut(f, 0), ["not a whole"]),
    "bit flipped in a tensor": (lambda f: flip(f, -5), ["tensor", "checksum"]),
    "header broken": (lambda f: flip(f, 8), ["not a whole"]),
    "state altered": (
        lambda f: f.write_bytes(f.read_bytes().replace(b'\\"step\\": 4', b'\\"step\\": 5')),
        ["altered"],
    ),
    "tensors exchanged for zeros": (
        lambda f: f.write_bytes(
            f.read_bytes()[: f.stat().st_size // 2] + bytes(f.stat().st_size - f.stat().st_size // 2)
        ),
        ["checksum"],
    ),
    "state no JSON": (
        lambda f: f.write_bytes(f.read_bytes().replace(b'\\"step\\": 4', b'\\"step\\"; 4')),
        ["damaged"],
    ),
    "only weights": (
        lambda f: save_file({"model.x": torch.ones(2)}, f),
        ["no training state", "--merge_checkpoint"],
    ),
    "a text": (lambda f: f.write_text("hello, I am not a checkpoint"), ["not a whole"]),
}


@pytest.mark.parametrize("fault", MERGED_FAULTS)
def test_a_damaged_merged_file_is_refused(broken, fault):
    file = broken[0] / "merged.ckpt"
    damage, words = MERGED_FAULTS[fault]
    damage(file)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(file).verify()
    assert all(word in str(refused.value) for word in words) and "merged.ckpt" in str(refused.value), (
        refused.value
    )


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("place", ["merged.ckpt", "manifest.json", SHARDS[0]])
def test_a_pickle_made_to_run_code_runs_nothing(broken, place, monkeypatch):
    folder, newest, _ = broken
    monkeypatch.chdir(folder)
    path = folder / place if place.endswith(".ckpt") else newest / place
    for payload in (pickle.dumps(Payload()), torch_zip(folder)):
        path.write_bytes(payload)
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder / "merged.ckpt" if place.endswith(".ckpt") else newest).verify()
    assert not (folder / "pwned").exists()


def torch_zip(folder: Path) -> bytes:
    torch.save({"model": Payload()}, folder / "evil.pt")
    return (folder / "evil.pt").read_bytes()


def test_merging_a_damaged_checkpoint_leaves_no_file(broken, capsys):
    folder, newest, _ = broken
    (folder / "merged.ckpt").unlink()
    flip(newest / SHARDS[1], -1)
    assert train.main(["--merge_checkpoint", f"--save_dir={folder}"]) == 2
    assert SHARDS[1] in capsys.readouterr().err
    assert not list(folder.glob("*merged*")) + list(folder.glob(".*merged*"))


def test_left_overs_are_cleaned_up_and_other_peoples_files_are_not(broken, flags, tmp_path):
    folder, newest, before = broken
    (folder / ".saving-0000-0009").mkdir()
    (folder / ".saving-0000-0009" / SHARDS[0]).write_text("half")
    os.rename(newest, folder / f".replaced-{newest.name}")  # a save died between its two renames
    mine = [
        folder / "notes.txt",
        folder / ".saving-notes",
        folder / "0000-0001-copy",
        folder / ".hidden-0000",
    ]
    for path in mine:
        path.write_text("mine")
    code = train.main(
        [
            *flags,
            "--resume_from=last",
            "--max_train_steps=5",
            f"--save_dir={folder}",
            f"--log_dir={tmp_path / 'log'}",
        ]
    )
    assert code == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert newest.is_dir() and not list(folder.glob(".saving-0*")) + list(folder.glob(".replaced-*"))
    assert sorted(rows(tmp_path / "log", "train_loss")) == [5]  # from step 4, not from 2


def test_keeping_the_last_n_never_deletes_the_newest_or_the_best(flags, tmp_path):
    folders = [f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}"]
    run = [*flags, *folders, "--global_batch_size=4", "--save_every_n_train_steps=1", "--learning_rate=1e-2"]
    assert train.main([*run, "--max_train_steps=5", "--keep_last_n_checkpoints=2"]) == 0
    kept = {path.name.split("-")[1] for path in checkpoint.checkpoints(tmp_path / "c")}
    best = min(rows(tmp_path / "l", "val_loss").values(), key=lambda row: row["val_loss"])["step"]
    assert kept == {"0004", "0005", f"{best:04d}"}
    assert (tmp_path / "c" / "best").resolve().name.endswith(f"{best:04d}")
    validated = {path.name.split(".")[0][-4:] for path in (tmp_path / "c").glob("*.validation.json")}
    assert validated == kept


def test_a_full_disk_is_a_sentence_and_loses_nothing(broken, flags, tmp_path):
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond it."""
    folder, newest, _ = broken
    limit = (newest / SHARDS[0]).stat().st_size  # one rank's shard is twice as large
    command = [
        sys.executable,
        "train.py",
        *flags,
        "--resume_from=last",
        "--max_train_steps=6",
        f"--save_dir={folder}",
    ]
    done = subprocess.run(
        [*command, f"--log_dir={tmp_path / 'log'}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be saved" in done.stderr and "File too large" in done.stderr
    Checkpoint.open(folder / "last").verify()
    assert (folder / "last").resolve() == newest and not list(folder.glob(".saving-*"))


def test_a_folder_that_cannot_be_written_is_said_before_training(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*flags, "--global_batch_size=4", f"--save_dir={tmp_path / 'file' / 'ckpt'}"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_saving_in_the_background_gives_the_same_files(flags, tmp_path):
    runs = {}
    for how in ("on", "off"):
        runs[how] = [*flags, "--global_batch_size=4", "--max_train_steps=6", "--save_every_n_train_steps=1", f"--async_save={how}",
                     f"--save_dir={tmp_path / how}", f"--log_dir={tmp_path / how / 'log'}"]  # fmt: skip
    run_cases(tmp_path, 2, runs)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "on")]
    assert len(names) == 6
    for name in names:
        for shard in SHARDS:
            one, other = (load_file(tmp_path / how / name / shard) for how in ("on", "off"))
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    costs = [
        row
        for row in map(json.loads, (tmp_path / "on" / "log" / "metrics.jsonl").read_text().splitlines())
        if "save_total_seconds" in row
    ]
    assert len(costs) == 6 and all(
        0 < row["save_blocked_seconds"] <= row["save_total_seconds"] for row in costs[:-1]
    )


def test_random_number_generators_are_part_of_a_checkpoint():
    before = setup.rng_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) != first
    setup.set_rng_state(before)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


# ---------------------------------------------------------------- the file format


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def test_files_are_what_the_safetensors_library_writes_and_reads(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.randn(2, 2).bfloat16()}
    tensors |= {"empty": torch.empty(0, 3), "one": torch.tensor(2.0)}
    assert write(tmp_path / "ours", tensors, {"k": "v"})["size"] == (tmp_path / "ours").stat().st_size
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())
    save_file(tensors, tmp_path / "theirs")
    reader = TensorFileReader(tmp_path / "theirs")
    assert all(torch.equal(reader.read(name, Box.whole(t.shape)), t) for name, t in tensors.items())


def boxed_file(path: Path, matrix: torch.Tensor, box: Box) -> TensorFileReader:
    boxes = json.dumps({"m": [list(matrix.shape), box.offsets]})
    write(path, {"m": matrix[box.slices].contiguous()}, {"rng": "", "boxes": boxes})
    return TensorFileReader(path)


def test_tensors_sharded_in_two_dims_are_put_together(tmp_path):
    """As tensor parallelism would save them: four boxes of one matrix, read back whole and in parts."""
    matrix = torch.randn(6, 4)
    quarters = [Box((r, c), (3, 2)) for r in (0, 3) for c in (0, 2)]
    boxes = {box: boxed_file(tmp_path / str(index), matrix, box) for index, box in enumerate(quarters)}
    whole = Checkpoint(tmp_path, {}, {"m": (torch.float32, (6, 4))}, {"m": boxes})
    assert torch.equal(whole.read("m"), matrix)
    assert torch.equal(whole.read("m", Box((2, 1), (3, 2))), matrix[2:5, 1:3])
    boxes.pop(quarters[3])
    with pytest.raises(CheckpointError, match="elements of tensor m are missing"):
        whole.read("m")


def test_a_box_that_two_ranks_hold_counts_once(tmp_path):
    """As replicas would save it, if each of them did: a half that is missing is noticed all the same."""
    matrix, half = torch.randn(6, 4), Box((0, 0), (3, 4))
    for index in range(2):
        boxed_file(tmp_path / f"shard-{index}", matrix, half)
    files = {
        path.name: {"size": path.stat().st_size, "xxh3_128": file_digest(path)}
        for path in tmp_path.glob("shard*")
    }
    body = {"state": {}, "files": files}
    (tmp_path / MANIFEST).write_text(json.dumps({**body, "checksum": checkpoint.json_digest(body)}))
    opened = Checkpoint.open(tmp_path)
    opened.verify()
    assert torch.equal(opened.read("m", half), matrix[:3])
    with pytest.raises(CheckpointError, match="12 of 24 elements of tensor m are missing"):
        opened.read("m")


# ---------------------------------------------------------------- the saver


@pytest.fixture
def saver(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Saver(tmp_path, 2, False, dist.new_group(backend="gloo"), None)
    dist.destroy_process_group()


def name(step: int) -> CheckpointName:
    return CheckpointName(0, step)


def steps(save_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(save_dir)]


def test_what_json_makes_of_the_state_is_what_is_checked(tmp_path, saver):
    # keys sort differently as strings
    state = {"model": {"id2label": {number: f"LABEL_{number}" for number in range(12)}}}
    saver.save(name(1), {}, state, "", 0.0)
    assert Checkpoint.open(tmp_path / "last").state["model"]["id2label"]["10"] == "LABEL_10"


def test_checkpoints_of_an_abandoned_future_are_neither_counted_nor_preferred(tmp_path, saver):
    for step in (5, 6, 2, 3, 4):  # a run left 5 and 6; then it continued from 1
        saver.save(name(step), {}, {"step": step}, "", 0.0)
        saver.record_validation(name(step), 10.0 - step)
    saver.prune()
    assert steps(tmp_path) == [
        6,
        5,
        4,
        3,
        2,
    ]  # nothing is removed before a step has succeeded from the newest
    saver.confirm()
    saver.prune()
    assert steps(tmp_path) == [6, 5, 4, 3]
    assert [checkpoint.step_of(path) for path in checkpoint.candidates(tmp_path, "last")] == [4, 3, 6, 5]
    assert (tmp_path / "best").resolve().name == "0000-0004"


def test_a_checkpoint_that_proves_bad_is_withdrawn(tmp_path, saver):
    saver.save(name(1), {}, {}, "", 0.0)
    saver.confirm()
    saver.save(name(2), {}, {}, "", 0.0)
    saver.discard_newest()
    assert steps(tmp_path) == [1] and (tmp_path / "last").readlink() == Path("0000-0001")
    assert saver.last_good() == f"the last good checkpoint is {tmp_path / '0000-0001'}"


def test_a_second_save_waits_for_the_first(tmp_path, saver):
    data, saver.background = torch.randn(1000, 1000), True
    for step in (1, 2, 3):
        data.add_(1)
        saver.save(name(step), {"model.w": data}, {"step": step}, "", 0.0)
        expected = data.clone()
        data.add_(100)  # training continues in the same memory
    saver.wait()
    assert torch.equal(Checkpoint.open(tmp_path / "last").read("model.w"), expected)
    assert steps(tmp_path) == [3, 2, 1]


def test_a_failed_save_in_the_background_stops_the_run_at_the_next_step(flags, tmp_path, monkeypatch):
    folders = [f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}"]
    run = [*flags, *folders, "--global_batch_size=4", "--max_train_steps=60", "--save_every_n_train_steps=30"]
    full = lambda path, value: open("/dev/full", "w", buffering=1).write("x\n")  # noqa: E731
    monkeypatch.setattr("trainer.saver._write_json", full)
    assert train.main([*run, "--async_save=on", "--max_val_samples=1"]) == 1
    assert 30 <= max(rows(tmp_path / "l", "train_loss")) < 60
    assert not (tmp_path / "c" / "last").exists()
