"""Checkpoints: whole or absent, verified, readable by any world size, and harmless."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.runs import outputs, python, rows, run_cases
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes

import train
from trainer import checkpoint, setup
from trainer.checkpoint import MANIFEST, Checkpoint, CheckpointError, CheckpointName
from trainer.saver import Saver
from trainer.tensorfile import Box, TensorFileReader, TensorFileWriter, file_digest

SHARDS = S0, S1 = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")
MERGED = "merged.ckpt"


@pytest.fixture(scope="module")
def saved(flags, tmp_path_factory):
    """A run of two ranks with checkpoints after steps 2 and 4 (`before` and `last`), the last merged too."""
    out = tmp_path_factory.mktemp("saved")
    run = [*flags, *outputs(out), "--max_train_steps=4", "--save_every_n_train_steps=2"]
    run_cases(out, 2, {"run": run, "merge": [*run, "--merge_checkpoint"]})
    return out / "ckpt"


@pytest.fixture
def broken(saved, tmp_path):
    """A copy to break: its folder, the newest checkpoint and the one before."""
    copy = shutil.copytree(saved, tmp_path / "ckpt", symlinks=True)
    return copy, *checkpoint.checkpoints(copy)


def flip(at: int):
    return lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at:][1:]


def replace(old: bytes, new: bytes):
    return lambda data: data.replace(old, new)


# The file whose bytes are changed, how, and what the sentence must say beside the file's name.
ALTERED = {
    "shard cut by a byte": (S1, lambda data: data[:-1], "bytes"),
    "shard empty": (S0, lambda _: b"", "0 bytes"),
    "shard grown": (S0, lambda data: data + b"x", "bytes"),
    "bit flipped in the first byte": (S0, flip(0), ""),
    "bit flipped in the header": (S0, flip(200), ""),
    "bit flipped inside": (S1, flip(-100_000), "checksum"),
    "bit flipped in the last byte": (S0, flip(-1), "checksum"),
    "shard of zeros": (S0, lambda data: bytes(len(data)), ""),
    "manifest cut": (MANIFEST, lambda data: data[: len(data) // 2], ""),
    "manifest not UTF-8": (MANIFEST, lambda _: b"\xff\xfe\x00", ""),
    "manifest a list": (MANIFEST, lambda _: b"[]", ""),
    "manifest with another step": (MANIFEST, replace(b'"step": 4', b'"step": 9'), "own checksum"),
    "manifest with another size": (MANIFEST, replace(b'"size": ', b'"size": 1'), "own checksum"),
    "manifest with another checksum": (MANIFEST, replace(b'128": "', b'128": "0'), "own checksum"),
    "manifest without a shard": (MANIFEST, replace(S1.encode(), S0.encode()), "own checksum"),
    "merged cut": (MERGED, lambda data: data[: len(data) * 9 // 10], "not a whole"),
    "merged bit flipped in a tensor": (MERGED, flip(-5), "checksum"),
    "merged header broken": (MERGED, flip(8), "not a whole"),
    "merged state altered": (MERGED, replace(b'\\"step\\": 4', b'\\"step\\": 5'), "altered"),
    "merged state no JSON": (MERGED, replace(b'\\"step\\": 4', b'\\"step\\"; 4'), "damaged"),
    "merged half zeros": (MERGED, lambda data: data[: len(data) // 2].ljust(len(data), b"\0"), "checksum"),
    "merged only weights": (MERGED, lambda _: save_bytes({"model.x": torch.ones(2)}), "--merge_checkpoint"),
    "merged a text": (MERGED, lambda _: b"hello, I am not a checkpoint", "not a whole"),
}


OUTSIDE = ["../secret.safetensors", "{folder}/secret.safetensors", "below/secret.safetensors", "..", ".", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    """Its checksums are right, so that only the name can be the reason."""
    folder = tmp_path / "0000-0001"
    (folder / "below").mkdir(parents=True)
    name = name.format(folder=tmp_path)
    for place in (tmp_path, folder / "below"):
        entry = write_tensors(place / "secret.safetensors", {"x": torch.ones(2)}, {"rng": "", "boxes": "{}"})
    body = {"state": {"step": 1}, "files": {name: entry}}
    (folder / MANIFEST).write_text(json.dumps({**body, "checksum": checkpoint.json_digest(body)}))
    with pytest.raises(CheckpointError, match="which is not a file beside it. Use another"):
        Checkpoint.open(folder)


def instead(make):
    return lambda path: (path.unlink(), make(path))


def of_before(file: str):
    return lambda path: shutil.copy(checkpoint.checkpoints(path.parent.parent)[1] / file, path.parent)


def exchange(path: Path) -> None:
    for one, other in ((S0, "kept"), (S1, S0), ("kept", S1)):
        os.rename(path.with_name(one), path.with_name(other))


# The same, with what is done to the file's path.
FAULTS = {
    "shard missing": (S1, Path.unlink, "missing"),
    "all shards missing": (S0, lambda path: [path.with_name(name).unlink() for name in SHARDS], "missing"),
    "shard is a folder": (S0, instead(Path.mkdir), "missing"),
    "shard is a dangling link": (S0, instead(lambda path: path.symlink_to("gone")), "missing"),
    "shard of another step": (S0, of_before(S0), ""),
    "shards exchanged": (S0, exchange, ""),
    "manifest missing": (MANIFEST, Path.unlink, ""),
    "manifest of another step": (S0, of_before(MANIFEST), ""),
}


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


FAULTS |= {name: (file, rewrite(change), word) for name, (file, change, word) in ALTERED.items()}


def refusal(folder: Path, file: str, damage) -> str:
    """Damages the file of the newest checkpoint, or the merged file; returns why it is refused."""
    whole = folder / (MERGED if file == MERGED else "last")
    damage(whole if file == MERGED else whole.resolve() / file)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(whole).verify()
    return str(refused.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused_with_the_files_name(broken, fault):
    file, damage, word = FAULTS[fault]
    said = refusal(broken[0], file, damage)
    assert file in said and word in said and "\n" not in said, said


@pytest.mark.parametrize("fault", ["bit flipped inside", "manifest cut", "shard missing", "manifest missing"])
def test_last_falls_back_to_the_newest_good_one_and_says_so(broken, flags, tmp_path, fault, caplog):
    _, newest, before = broken
    caplog.set_level("INFO")
    file, damage, _ = FAULTS[fault]
    damage(newest / file)
    assert train.main([*flags, "--resume_from=last", "--max_train_steps=3", *outputs(tmp_path)]) == 0
    assert f"resumed from {before}" in caplog.text and f"Falling back to {before}" in caplog.text
    assert sorted(rows(tmp_path / "log", "train_loss")) == [3]


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("place", [MERGED, MANIFEST, S0])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_pickle_made_to_run_code_runs_nothing(broken, place, dump, monkeypatch):
    monkeypatch.chdir(broken[0])
    assert refusal(broken[0], place, lambda path: dump({"model": Payload()}, open(path, "wb")))
    assert not (broken[0] / "pwned").exists()


def test_left_overs_are_cleaned_up_and_other_peoples_files_are_not(broken, flags, tmp_path):
    folder, newest, _ = broken
    (folder / ".saving-0000-0009").mkdir()
    (folder / ".saving-0000-0009" / S0).write_text("half")
    (folder / ".doomed-0000-0001").mkdir()  # a deletion died
    mine = [folder / name for name in ("notes.txt", ".saving-notes", "0000-0001-copy", ".hidden-0000")]
    for path in mine:
        path.write_text("mine")
    assert train.main([*flags, "--resume_from=last", "--max_train_steps=5", *outputs(tmp_path)]) == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert newest.is_dir() and not list(folder.glob(".saving-0*")) + list(folder.glob(".doomed-*"))
    assert sorted(rows(tmp_path / "log", "train_loss")) == [5]  # from step 4, not from 2


def test_keeping_the_last_n_never_deletes_the_newest_or_the_best(flags, tmp_path):
    run = [*flags, *outputs(tmp_path), "--save_every_n_train_steps=1", "--learning_rate=1e-2"]
    assert train.main([*run, "--max_train_steps=5", "--keep_last_n_checkpoints=2"]) == 0
    best = min(rows(tmp_path / "log", "val_loss").values(), key=lambda row: row["val_loss"])["step"]
    assert set(steps(tmp_path / "ckpt")) == {4, 5, best}
    assert checkpoint.step_of((tmp_path / "ckpt" / "best").resolve()) == best
    validated = {path.name.split(".")[0] for path in (tmp_path / "ckpt").glob("*.validation.json")}
    assert validated == {path.name for path in checkpoint.checkpoints(tmp_path / "ckpt")}


def test_a_full_disk_is_a_sentence_and_loses_nothing(broken, flags, tmp_path):
    """RLIMIT_FSIZE stands for the disk: no file may grow beyond it."""
    folder, newest, _ = broken
    size = (newest / S0).stat().st_size  # one rank's shard is twice as large
    run = [*flags, "--resume_from=last", "--max_train_steps=6", *outputs(tmp_path)]
    done = python("train.py", *run, check=False, file_size=size)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not be saved" in done.stderr and "File too large" in done.stderr
    Checkpoint.open(folder / "last").verify()
    assert (folder / "last").resolve() == newest and not list(folder.glob(".saving-*"))


def test_random_number_generators_are_part_of_a_checkpoint():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    before = setup.rng_state()
    first = draw()
    assert draw() != first
    setup.set_rng_state(before)
    assert draw() == first


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def test_files_are_what_the_safetensors_library_writes_and_reads(tmp_path):
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.randn(2, 2).bfloat16()}
    tensors |= {"empty": torch.empty(0, 3), "one": torch.tensor(2.0)}
    assert write_tensors(tmp_path / "ours", tensors, {"k": "v"})["size"] == (tmp_path / "ours").stat().st_size
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())
    save_file(tensors, tmp_path / "theirs")
    reader = TensorFileReader(tmp_path / "theirs")
    assert all(torch.equal(reader.read(name), t) for name, t in tensors.items())


def boxed_file(path: Path, matrix: torch.Tensor, box: Box) -> TensorFileReader:
    boxes, part = json.dumps({"m": [list(matrix.shape), box.offsets]}), box.inside(Box.whole(matrix.shape))
    write_tensors(path, {"m": matrix[part].contiguous()}, {"rng": "", "boxes": boxes})
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
    with pytest.raises(CheckpointError, match="elements of tensor m"):
        whole.read("m")


def test_a_box_that_two_ranks_hold_counts_once(tmp_path):
    """As replicas would save it, if each of them did: a half that is missing is noticed all the same."""
    matrix, half, files = torch.randn(6, 4), Box((0, 0), (3, 4)), {}
    for path in (tmp_path / "shard-0", tmp_path / "shard-1"):
        boxed_file(path, matrix, half)
        files[path.name] = {"size": path.stat().st_size, "xxh3_128": file_digest(path)}
    body = {"state": {}, "files": files}
    (tmp_path / MANIFEST).write_text(json.dumps({**body, "checksum": checkpoint.json_digest(body)}))
    opened = Checkpoint.open(tmp_path)
    opened.verify()
    assert torch.equal(opened.read("m", half), matrix[:3])
    with pytest.raises(CheckpointError, match="lacks 12 of 24 elements of tensor m"):
        opened.read("m")


@pytest.fixture
def saver(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Saver(tmp_path, 2, False, dist.new_group(backend="gloo"), None)
    dist.destroy_process_group()


def save(saver, step: int, tensors=(), **state) -> CheckpointName:
    saver.save(CheckpointName(0, step), dict(tensors), {"step": step, **state}, "", 0.0)
    return CheckpointName(0, step)


def steps(save_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(save_dir)]


def test_what_json_makes_of_the_state_is_what_is_checked(tmp_path, saver):
    # keys sort differently as strings
    save(saver, 1, model={"id2label": {number: f"LABEL_{number}" for number in range(12)}})
    assert Checkpoint.open(tmp_path / "last").state["model"]["id2label"]["10"] == "LABEL_10"


def test_checkpoints_of_an_abandoned_future_are_neither_counted_nor_preferred(tmp_path, saver):
    for step in (5, 6, 2, 3, 4):  # a run left 5 and 6; then it continued from 1
        saver.record_validation(save(saver, step), 10.0 - step)
    saver.prune(saver.good)
    assert steps(tmp_path) == [6, 5, 4, 3, 2]  # nothing goes before a step has succeeded from the newest
    saver.confirm()
    saver.prune(saver.good)
    assert steps(tmp_path) == [6, 5, 4, 3]
    assert [checkpoint.step_of(path) for path in checkpoint.candidates(tmp_path, "last")] == [4, 3, 6, 5]
    assert (tmp_path / "best").resolve().name == "0000-0004"


def test_a_rejected_checkpoint_is_renamed_and_last_names_the_good_one(tmp_path, saver):
    save(saver, 1)
    saver.confirm()
    for name in ("0000-0002.rejected", "0000-0002.rejected.1"):
        save(saver, 2)
        assert saver.reject() == tmp_path / name
        Checkpoint.open(tmp_path / name).verify()
        assert steps(tmp_path) == [1] and (tmp_path / "last").readlink() == Path("0000-0001")
        assert saver.last_good() == f"the last good checkpoint is {tmp_path / '0000-0001'}"
    saver.prune(saver.good)
    assert checkpoint.candidates(tmp_path, "last") == [tmp_path / "0000-0001"]
    assert (tmp_path / "0000-0002.rejected").exists() and (tmp_path / "0000-0002.rejected.1").exists()


def test_a_good_or_once_finite_checkpoint_is_not_rejected(tmp_path, saver):
    saver.record_validation(save(saver, 1), 2.0)
    assert saver.reject() is None  # two measurements contradict each other
    save(saver, 2)
    saver.confirm()
    assert saver.reject() is None
    assert steps(tmp_path) == [2, 1] and (tmp_path / "last").readlink() == Path("0000-0002")


def test_without_a_known_good_one_last_names_the_checkpoint_before_the_rejected_one(tmp_path, saver):
    save(saver, 1)
    save(saver, 2)  # only a finite step is saved, so 1 is good
    saver.reject()
    assert (tmp_path / "last").readlink() == Path("0000-0001")
    assert saver.last_good() == f"the last good checkpoint is {tmp_path / '0000-0001'}"


def test_a_second_save_waits_for_the_first(tmp_path, saver):
    data, saver.background = torch.randn(1000, 1000), True
    for step in (1, 2, 3):
        data.add_(1)
        save(saver, step, {"model.w": data})
        expected = data.clone()
        data.add_(100)  # training continues in the same memory
    saver.wait()
    assert torch.equal(Checkpoint.open(tmp_path / "last").read("model.w"), expected)
    assert steps(tmp_path) == [3, 2, 1]


def test_a_failed_save_in_the_background_stops_the_run_at_the_next_step(flags, tmp_path, monkeypatch):
    run = [*flags, *outputs(tmp_path), "--max_train_steps=60", "--save_every_n_train_steps=30"]
    full = lambda path, value: open("/dev/full", "w", buffering=1).write("x\n")  # noqa: E731
    monkeypatch.setattr("trainer.saver._write_json", full)
    assert train.main([*run, "--async_save=on", "--max_val_samples=1"]) == 1
    assert 30 <= max(rows(tmp_path / "log", "train_loss")) < 60
    assert not (tmp_path / "ckpt" / "last").exists()
