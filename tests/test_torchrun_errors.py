"""A failure's reason stays in sight under torchrun, and SLURM repeats only what a restart may cure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import HELPERS, ROOT, environment, python, torchrun

import train

WRONG = "--max_train_steps=0"
SENTENCE = "train.py: --max_train_steps must be >= 1 (got 0). Give 1 or more."


def test_torchrun_names_our_sentence_and_code_as_the_root_cause(flags):
    done = torchrun(2, "train.py", *flags, "--dataset_path=x", check=False, real=True)
    before, root = done.stderr.split("Root Cause")
    sentence = "train.py: x is not prepared"
    assert done.returncode == 1 and before.count("train.py: ") == before.count(sentence) == 1
    assert f"traceback : {sentence}" in root and "exitcode  : 2 " in root and "<N/A>" not in root


TOGETHER = {
    WRONG: SENTENCE,
    "--prepare_data": "train.py: --prepare_data runs in one process, and torchrun started 2. Start it with",
}


@pytest.mark.parametrize("wrong", TOGETHER)
def test_ranks_that_are_wrong_together_print_one_sentence_and_give_torchrun_another(flags, tmp_path, wrong):
    file = tmp_path / "error.json"
    done = torchrun(2, "train.py", *flags, wrong, check=False, TORCHELASTIC_ERROR_FILE=str(file))
    assert done.returncode == 1 and done.stderr.count("train.py: ") == done.stderr.count(TOGETHER[wrong]) == 1
    assert json.loads(file.read_text())["message"]["message"].startswith(TOGETHER[wrong])


def test_a_node_without_rank_0_says_its_sentence_too():
    done = python("train.py", WRONG, check=False, RANK="8", LOCAL_RANK="0", timeout=15)
    assert SENTENCE in done.stderr and done.returncode == 2


# Unhandled error -> may a restart cure it?
UNHANDLED = {
    "RuntimeError('CUDA error: unspecified launch failure')": "True",
    "torch.distributed.DistBackendError('broken')": "True",
    "KeyError('a bug')": "False",
}


@pytest.mark.parametrize("error", UNHANDLED)
def test_an_unhandled_error_leaves_at_once_with_its_traceback(tmp_path, error):
    (tmp_path / "broken.py").write_text(
        "import runpy, threading, torch, cli.plan\n"
        f"def show(*_): raise {error}\n"
        "cli.plan.show = show\n"
        "threading.Thread(target=threading.Event().wait).start()  # never ends\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    file = tmp_path / "error.json"
    env = dict(TORCHELASTIC_ERROR_FILE=str(file), **HELPERS)
    done, said = (
        python(tmp_path / "broken.py", "--plan", check=False, timeout=60, **env),
        json.loads(file.read_text()),
    )
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert said["message"]["message"] in done.stderr
    assert said["errorTraits"]["retryability"] == UNHANDLED[error]


def test_out_of_gpu_memory_is_a_sentence_with_the_fix(monkeypatch, capsys):
    def show(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setitem(train.MODES, "plan", show)
    assert train.main(["--plan"]) == 1
    said = capsys.readouterr().err
    assert "rank 0 has too little GPU memory (CUDA out of memory). Use --recompute=full" in said
    assert said.count("\n") == 1


# What happens to rank 1 as it starts -> is the job queued again?
ENDS = {
    "": False,  # only the flag is wrong
    "os.kill(os.getpid(), 9)": True,
    "os.kill(os.getppid(), 15); time.sleep(60)": True,  # the time limit: torchrun gets SIGTERM
}


@pytest.mark.parametrize("end", ENDS)
def test_slurm_queues_again_only_what_a_restart_may_cure(tmp_path, end):
    scontrol = f"echo $1 >> {tmp_path}/calls; echo localhost #"
    for name, text in {"srun": "shift; SLURM_PROCID=0 exec", "scontrol": scontrol}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{text} "$@"\n')
        (tmp_path / name).chmod(0o755)
    start = f"import os, time\nif os.environ.get('RANK') == '1': {end or 'pass'}\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    job = f"test-{os.getpid()}-{len(end)}"
    slurm = dict(SLURM_JOB_ID=job, SLURM_JOB_NODELIST="here", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2")
    slurm |= dict(MAX_RESTARTS="0", MASTER_PORT="0", PYTHONPATH=str(tmp_path))
    slurm["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "tools/train.sbatch", "--dataset_id=none", *([] if end else [WRONG])]
    options = dict(cwd=ROOT, env=environment(**slurm), capture_output=True, text=True, timeout=90)
    done = subprocess.run(command, **options)
    (ROOT / f".stalled-{job}").unlink(missing_ok=True)
    calls = (tmp_path / "calls").read_text().split()
    assert (calls[1:], done.returncode) == ((["requeue"], 0) if ENDS[end] else ([], 1)), done.stderr
    assert (SENTENCE in done.stderr) == (not end) and not (ROOT / f".errors-{job}").exists()


# What the stub of torchrun does, the restarts so far, the stalled starts so far -> is the job queued again?
RESTARTS = {
    "it saves a checkpoint": ("ln -sfn 0000-0008 ckpt/last; exit 1", 3, "1", True),
    "it saves none for the first time": ("exit 1", 3, "0", True),
    "it saves none for the second time": ("exit 1", 3, "1", False),
    "it was restarted 20 times": ("ln -sfn 0000-0008 ckpt/last; exit 1", 20, "0", False),
}


@pytest.mark.parametrize("case", RESTARTS)
def test_slurm_stops_a_job_that_restarts_without_end(tmp_path, case):
    torchrun_does, restarts, stalled, is_queued = RESTARTS[case]
    programs = {
        "srun": 'shift; SLURM_PROCID=0 exec "$@"',
        "scontrol": f"echo $1 >> {tmp_path}/calls; echo localhost",
        "torchrun": f'cd {tmp_path}; echo "$@" > arguments; {torchrun_does}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "last").symlink_to("0000-0004")
    job = f"7{os.getpid()}"
    stalled_file = ROOT / f".stalled-{job}"
    stalled_file.write_text(stalled)
    slurm = dict(SLURM_JOB_ID=job, SLURM_JOB_NODELIST="here", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2")
    slurm["SLURM_RESTART_COUNT"] = str(restarts)
    slurm["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "run.yaml").write_text(f"save_dir: {tmp_path / 'ckpt'}\n")
    command = ["bash", "tools/train.sbatch", f"--config={tmp_path / 'run.yaml'}"]
    options = dict(cwd=ROOT, env=environment(**slurm), capture_output=True, text=True, timeout=90)
    process = subprocess.run(command, **options)
    stalled_file.unlink(missing_ok=True)
    calls = (tmp_path / "calls").read_text().split()
    assert ("requeue" in calls) == is_queued, process.stderr
    assert process.returncode == (0 if is_queued else 1)
    assert ("not queued again" in process.stderr) == (not is_queued)
    port = 20000 + int(job) % 10000
    assert f"--rdzv-endpoint=localhost:{port}" in (tmp_path / "arguments").read_text()
