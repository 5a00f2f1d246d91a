"""--verify_resume: equal runs pass, a difference is named with its step or tensor."""

import json
import shutil

import pytest
from helpers.devices import SEVERAL, on_cuda, visible
from helpers.runs import python, run_cases

from tools.verify_resume import first_difference


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
