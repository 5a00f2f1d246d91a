"""--verify_resume: equal runs pass, a difference is named; it leaves other folders and no process behind."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.devices import SEVERAL, on_cuda, visible
from helpers.processes import descendants, kill_all, wait_for_end
from helpers.runs import ROOT, environment, python, run_cases
from safetensors.torch import load_file

import train
from cli.config import parse
from errors import UserError
from tools import verify_resume
from tools.verify_resume import claimed, cpu_ranks, cuda_ranks, first_difference
from trainer import machine


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("verified")
    cases = {}
    for seed, name in enumerate(("one", "other")):
        folders = [f"--save_dir={out / name / 'checkpoints'}", f"--log_dir={out / name / 'log'}"]
        cases[name] = [*flags, "--max_train_steps=3", f"--seed={seed}", *folders]
    run_cases(out, 2, cases)
    return out


def one_bit(line):
    row = json.loads(line)
    return json.dumps({**row, "train_loss": row["train_loss"] * (1 + 2**-52)})


# How the rows of the steps 1 and 2 are changed, and what is said.
CHANGES = [([str, str], None), ([str, one_bit], "step 2: train_loss"), ([lambda _: "", str], "step 1")]


@pytest.mark.parametrize("changes, said", CHANGES)
def test_a_loss_that_differs_in_its_last_bit_or_is_missing_is_named(runs, tmp_path, changes, said):
    copy = shutil.copytree(runs / "one", tmp_path / "copy", symlinks=True)
    metrics = copy / "log" / "metrics.jsonl"
    first, second, *rest = metrics.read_text().splitlines()
    metrics.write_text("\n".join([changes[0](first), changes[1](second), *rest]))
    found = first_difference(runs / "one", copy)
    assert said in found if said else found is None


def test_weights_that_differ_are_named(runs, tmp_path):
    for folder, source in (("log", "one"), ("checkpoints", "other")):
        shutil.copytree(runs / source / folder, tmp_path / folder, symlinks=True)
    assert "the last checkpoints differ, first in model." in first_difference(runs / "one", tmp_path)


ON_CPU = [pytest.param("cpu", 2, marks=pytest.mark.slow, id=f"cpu-{attempt}") for attempt in range(3)]


@pytest.mark.parametrize("device, ranks", [*ON_CPU, on_cuda("cuda", 1), SEVERAL])
def test_the_command_kills_resumes_and_says_so(flags, tmp_path, device, ranks):
    run = [*flags, "--precision=bf16", "--max_train_steps=8", f"--save_dir={tmp_path / 'ckpt'}"]
    done = python("train.py", *run, "--verify_resume", f"--world_size={ranks}", **visible(device))
    assert f"resume is exact: 8 steps on {ranks} ranks" in done.stdout and not list(tmp_path.iterdir())


@pytest.fixture
def refused(flags, tmp_path, capsys, monkeypatch):
    """Starts --verify_resume, which must be refused before a run starts; returns the sentence."""

    def start(*more):
        monkeypatch.setattr(verify_resume.Runs, "start", None)
        assert train.main([*flags, "--verify_resume", f"--save_dir={tmp_path / 'ckpt'}/", *more]) == 2
        return capsys.readouterr().err

    return start


def test_a_folder_that_no_verification_made_is_refused_and_untouched(refused, tmp_path):
    folder = tmp_path / "ckpt.verify"
    for name in ("whole/thesis.txt", "output.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert f"the folder {folder} for its runs, and it holds other files" in refused()
    assert (folder / "whole" / "thesis.txt").read_text() == (folder / "output.txt").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} == {"whole", "output.txt"}
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert "a file has that name" in refused() and folder.read_text() == "mine"


def test_a_folder_of_an_earlier_verification_loses_only_what_that_wrote(tmp_path):
    folder = tmp_path / "ckpt.verify"
    for attempt in range(2):
        with claimed(folder):
            assert not (folder / "whole").exists() and not (folder / "output.txt").exists(), attempt
            (folder / "whole" / "log").mkdir(parents=True)
            (folder / "output.txt").touch()
            (folder / "notes.txt").write_text("mine")
            with pytest.raises(UserError, match="another --verify_resume is running"), claimed(folder):
                pass
            assert (folder / "whole" / "log").exists()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_cuda_machine_starts_no_more_ranks_than_devices(refused, tmp_path, monkeypatch):
    assert cuda_ranks(None, 4) == 4 and cuda_ranks(2, 4) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--world_size=3 is more than the 2 of this machine. Give --world_size=2 or less" in refused(
        "--world_size=3"
    )
    assert not list(tmp_path.iterdir())


# Free memory in GiB, cores, the model's state in GiB, --world_size, and the ranks or what is said.
CPU = [
    (8.0, 8, 1.0, None, 2),
    (8.0, 1, 1.0, None, 1),
    (8.0, 8, 7.0, None, 1),
    (8.0, 8, 7.5, None, "8.1 GiB of memory for the model's state and a process, and 8.0 GiB are free"),
    (8.0, 2, 1.0, 11, 11),
    (
        8.0,
        2,
        1.0,
        12,
        "8.2 GiB of memory .* 12 processes, and 8.0 GiB are free. Give --world_size=11 or less",
    ),
]


@pytest.mark.parametrize("free, cores, state, asked, expected", CPU)
def test_a_cpu_starts_no_more_ranks_than_its_memory_holds(monkeypatch, free, cores, state, asked, expected):
    memory = machine.Memory(total=2**40, free=int(free * 2**30))
    monkeypatch.setattr(machine, "memory", lambda: memory)
    monkeypatch.setattr(machine, "worker_processes", lambda: cores)
    if isinstance(expected, int):
        assert cpu_ranks(asked, state) == expected
    else:
        with pytest.raises(UserError, match=expected):
            cpu_ranks(asked, state)


def test_the_state_is_16_bytes_a_trained_parameter(flags, tiny, monkeypatch):
    parameters = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    monkeypatch.setattr(verify_resume, "cpu_ranks", lambda world_size, state_gib: state_gib * 2**30)
    assert train.verified_ranks(parse([*flags, "--verify_resume"])) == 16 * parameters


def test_more_ranks_than_memory_holds_are_refused(refused, tmp_path):
    assert "GiB are free. Give --world_size=" in refused("--world_size=100000", "--global_batch_size=100000")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["the ranks import", "the ranks train"])
def test_a_verification_that_is_killed_leaves_no_process(flags, tmp_path, moment):
    more = ["--verify_resume", "--world_size=2", "--max_train_steps=1000000"]
    command = [sys.executable, "train.py", *flags, *more, f"--save_dir={tmp_path / 'ckpt'}"]
    metrics = tmp_path / "ckpt.verify" / "whole" / "log" / "metrics.jsonl"
    left = []
    with subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while len(left) < 3 or (moment == "the ranks train" and not metrics.exists()):
                assert process.poll() is None and time.monotonic() < deadline
                left = descendants(process.pid)
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            wait_for_end(left, seconds=30)
        finally:
            kill_all([process.pid, *left])
