"""Checkpoints: whole or absent, verified, readable by any world size, and harmless."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.runs import ROOT, environment, rows, run_cases
from safetensors.torch import load_file, save_file

import train
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.tensorfile import Box, TensorFileReader, TensorFileWriter

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


# What is done to (newest, before), and what the sentence must say.
FAULTS = {
    "shard cut by a byte": (
        lambda c, b: (c / SHARDS[0]).write_bytes((c / SHARDS[0]).read_bytes()[:-1]),
        [SHARDS[0], "bytes"],
    ),
    "shard cut in half": (lambda c, b: cut(c / SHARDS[1], 0.5), [SHARDS[1], "bytes"]),
    "shard empty": (lambda c, b: cut(c / SHARDS[0], 0), [SHARDS[0], "0 bytes"]),
    "shard grown": (
        lambda c, b: (c / SHARDS[0]).write_bytes((c / SHARDS[0]).read_bytes() + b"x"),
        [SHARDS[0], "bytes"],
    ),
    "bit flipped in the first byte": (lambda c, b: flip(c / SHARDS[0], 0), [SHARDS[0]]),
    "bit flipped in the header": (lambda c, b: flip(c / SHARDS[0], 200), [SHARDS[0]]),
    "bit flipped in the middle": (
        lambda c, b: flip(c / SHARDS[1], (c / SHARDS[1]).stat().st_size // 2),
        [SHARDS[1], "checksum"],
    ),
    "bit flipped in the last byte": (lambda c, b: flip(c / SHARDS[0], -1), [SHARDS[0], "checksum"]),
    "shard missing": (lambda c, b: (c / SHARDS[1]).unlink(), [SHARDS[1], "missing"]),
    "all shards missing": (lambda c, b: [(c / s).unlink() for s in SHARDS], [SHARDS[0], "missing"]),
    "shard is a folder": (
        lambda c, b: ((c / SHARDS[0]).unlink(), (c / SHARDS[0]).mkdir()),
        [SHARDS[0], "missing"],
    ),
    "shard is a dangling link": (
        lambda c, b: ((c / SHARDS[0]).unlink(), (c / SHARDS[0]).symlink_to("gone")),
        [SHARDS[0], "missing"],
    ),
    "shard of another step": (lambda c, b: shutil.copy(b / SHARDS[0], c / SHARDS[0]), [SHARDS[0]]),
    "shards exchanged": (lambda c, b: swap(c / SHARDS[0], c / SHARDS[1]), ["shard-0000"]),
    "shard of zeros": (
        lambda c, b: (c / SHARDS[0]).write_bytes(bytes((c / SHARDS[0]).stat().st_size)),
        [SHARDS[0]],
    ),
    "shard is a pickle": (lambda c, b: (c / SHARDS[0]).write_bytes(pickle.dumps([1])), [SHARDS[0], "bytes"]),
    "manifest missing": (lambda c, b: (c / "manifest.json").unlink(), [checkpoint.MANIFEST]),
    "manifest empty": (lambda c, b: cut(c / "manifest.json", 0), [checkpoint.MANIFEST]),
    "manifest cut": (lambda c, b: cut(c / "manifest.json", 0.7), [checkpoint.MANIFEST]),
    "manifest no JSON": (lambda c, b: (c / "manifest.json").write_text("step: 4"), [checkpoint.MANIFEST]),
    "manifest not UTF-8": (
        lambda c, b: (c / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        [checkpoint.MANIFEST],
    ),
    "manifest a list": (lambda c, b: (c / "manifest.json").write_text("[]"), [checkpoint.MANIFEST]),
    "manifest of another step": (lambda c, b: shutil.copy(b / "manifest.json", c), ["shard-0000"]),
    "manifest lies about the step": (
        lambda c, b: edit(c / "manifest.json", lambda m: m["state"].update(step=9)),
        ["manifest.json", "own"],
    ),
    "manifest lies about a size": (
        lambda c, b: edit(c / "manifest.json", lambda m: m["files"][SHARDS[0]].update(size=1)),
        [checkpoint.MANIFEST, "own checksum"],
    ),
    "manifest lies about a checksum": (
        lambda c, b: edit(c / "manifest.json", lambda m: m["files"][SHARDS[0]].update(xxh3_128="0" * 32)),
        [checkpoint.MANIFEST, "own checksum"],
    ),
    "manifest leaves a shard out": (
        lambda c, b: edit(c / "manifest.json", lambda m: m["files"].pop(SHARDS[1])),
        [checkpoint.MANIFEST, "own checksum"],
    ),
    "manifest names a file outside": (
        lambda c, b: edit(
            c / "manifest.json", lambda m: m["files"].update({"../../x": {"size": 1, "xxh3_128": ""}})
        ),
        [checkpoint.MANIFEST, "own checksum"],
    ),
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
    common = [
        *flags,
        "--global_batch_size=4",
        "--save_every_n_train_steps=1",
        f"--save_dir={tmp_path / 'c'}",
        f"--log_dir={tmp_path / 'l'}",
    ]
    assert (
        train.main([*common, "--max_train_steps=5", "--keep_last_n_checkpoints=2", "--learning_rate=1e-2"])
        == 0
    )
    kept = {path.name.split("-")[1] for path in checkpoint.checkpoints(tmp_path / "c")}
    best = min(rows(tmp_path / "l", "val_loss").values(), key=lambda row: row["val_loss"])["step"]
    assert kept == {"0004", "0005", f"{best:04d}"}
    assert (tmp_path / "c" / "best").resolve().name.endswith(f"{best:04d}")


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
    import random

    import numpy as np

    before = checkpoint.rng_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) != first
    checkpoint.set_rng_state(before)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


# ---------------------------------------------------------------- the file format


def test_files_are_what_the_safetensors_library_writes_and_reads(tmp_path):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.arange(4),
        "c": torch.randn(2, 2).bfloat16(),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(2.0),
    }
    with TensorFileWriter(
        tmp_path / "ours",
        {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()},
        {"k": "v"},
        "file",
    ) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        entry = writer.finish()
    assert entry["size"] == (tmp_path / "ours").stat().st_size
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())
    save_file(tensors, tmp_path / "theirs")
    reader = TensorFileReader(tmp_path / "theirs")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0, 0), (4, 3, 2)),
        Box((1, 0, 0), (2, 3, 2)),
        Box((1, 1, 0), (3, 2, 1)),
        Box((4, 0, 0), (0, 3, 2)),
    ],
)
def test_any_box_of_a_tensor_can_be_read(tmp_path, box):
    tensor = torch.randn(4, 3, 2)
    save_file({"t": tensor}, tmp_path / "f")
    assert torch.equal(TensorFileReader(tmp_path / "f").read("t", box), tensor[box.slices])


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tensors_sharded_in_two_dims_are_put_together(tmp_path, alone):
    """As tensor parallelism will save them: four boxes of one matrix, read back whole and in parts."""
    matrix = torch.randn(6, 4)
    quarters = [Box((r, c), (3, 2)) for r in (0, 3) for c in (0, 2)]
    parts = []
    for index, box in enumerate(quarters):
        with TensorFileWriter(
            tmp_path / f"{index}",
            {"m": (torch.float32, box.shape)},
            {"rng": "", "boxes": json.dumps({"m": [[6, 4], box.offsets]})},
        ) as file:
            file.add("m", matrix[box.slices].contiguous())
            file.finish()
        parts.append((TensorFileReader(tmp_path / f"{index}"), box))
    whole = Checkpoint(tmp_path, {}, {"m": (torch.float32, (6, 4))}, {"m": parts}, {})
    assert torch.equal(whole.read("m"), matrix)
    assert torch.equal(whole.read("m", Box((2, 1), (3, 2))), matrix[2:5, 1:3])
    holed = Checkpoint(tmp_path, {}, {"m": (torch.float32, (6, 4))}, {"m": parts[:3]}, {})
    with pytest.raises(CheckpointError, match="elements of tensor m are missing"):
        holed.read("m")


def test_what_json_makes_of_the_state_is_what_is_checked(tmp_path, alone):
    saver = checkpoint.Saver(tmp_path, None, dist.new_group(backend="gloo"))
    state = {
        "model": {"id2label": {number: f"LABEL_{number}" for number in range(12)}}
    }  # keys sort otherwise as strings
    saver.save("0000-0001", [], state, ("last",))
    assert Checkpoint.open(tmp_path / "last").state["model"]["id2label"]["10"] == "LABEL_10"


def test_checkpoints_of_an_abandoned_future_are_neither_counted_nor_preferred(tmp_path, alone):
    saver = checkpoint.Saver(tmp_path, 2, dist.new_group(backend="gloo"))
    for step in (5, 6, 2, 3, 4):  # 5 and 6 came of a run that was then continued from 1
        saver.save(f"0000-000{step}", [], {"step": step}, ("last",))
    assert len(checkpoint.checkpoints(tmp_path)) == 5  # until the last has proved good
    saver.prune()
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["6", "5", "4", "3"]
    assert [path.name[-1] for path in checkpoint.candidates(tmp_path, "last")] == ["4", "3", "6", "5"]


def test_a_failed_save_in_the_background_stops_the_run_at_the_next_step(flags, tmp_path, monkeypatch):
    common = [
        *flags,
        "--global_batch_size=4",
        f"--save_dir={tmp_path / 'c'}",
        f"--log_dir={tmp_path / 'l'}",
        "--max_train_steps=60",
    ]
    monkeypatch.setattr(
        checkpoint, "_write_json", lambda path, value: open("/dev/full", "w", buffering=1).write("x\n")
    )
    assert train.main([*common, "--async_save=on", "--save_every_n_train_steps=30"]) == 1
    assert 30 <= max(rows(tmp_path / "l", "train_loss")) < 60
    assert not (tmp_path / "c" / "last").exists()


def test_a_second_save_waits_for_the_first(tmp_path, alone):
    saver = checkpoint.Saver(tmp_path, None, dist.new_group(backend="gloo"))
    data = torch.randn(1000, 1000)
    for step in (1, 2, 3):
        data.add_(1)
        piece = checkpoint.Piece("model.w", (1000, 1000), Box.whole((1000, 1000)), data)
        saver.save(f"0000-000{step}", [piece], {"step": step}, ("last",), in_background=True)
        expected = data.clone()
        data.add_(100)  # training goes on in the same memory
    saver.wait()
    assert torch.equal(Checkpoint.open(tmp_path / "last").read("model.w"), expected)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["0000-0003", "0000-0002", "0000-0001"]
