"""--verify_resume: equal runs pass, a difference is named with its step or tensor."""

import json
import shutil

import pytest
from helpers.runs import python, run_cases

from tools.verify_resume import first_difference


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("verified")
    common = [*flags, "--global_batch_size=4", "--max_train_steps=3"]
    cases = {
        name: [
            *common,
            f"--seed={seed}",
            f"--save_dir={out / name / 'checkpoints'}",
            f"--log_dir={out / name / 'log'}",
        ]
        for name, seed in (("one", 0), ("other", 1))
    }
    assert set(run_cases(out, 2, cases).values()) == {0}
    return out


def test_a_copy_has_no_difference(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "copy", symlinks=True)
    assert first_difference(runs / "one", tmp_path / "copy") is None


def test_a_loss_that_differs_in_its_last_bit_is_found(runs, tmp_path):
    copy = shutil.copytree(runs / "one", tmp_path / "copy", symlinks=True)
    lines = (copy / "log" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    row["train_loss"] *= 1 + 2**-52
    lines[1] = json.dumps(row)
    (copy / "log" / "metrics.jsonl").write_text("\n".join(lines))
    assert "step 2: train_loss" in first_difference(runs / "one", copy)


def test_a_step_that_is_missing_is_found(runs, tmp_path):
    copy = shutil.copytree(runs / "one", tmp_path / "copy", symlinks=True)
    lines = (copy / "log" / "metrics.jsonl").read_text().splitlines()
    (copy / "log" / "metrics.jsonl").write_text("\n".join(lines[1:]))
    assert "step 1" in first_difference(runs / "one", copy)


def test_weights_that_differ_are_named(runs, tmp_path):
    copy = shutil.copytree(runs / "one", tmp_path / "copy", symlinks=True)
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(runs / "other" / "checkpoints", copy / "checkpoints", symlinks=True)
    assert "the last checkpoints differ, first in model." in first_difference(runs / "one", copy)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_the_command_kills_resumes_and_says_so(flags, tmp_path, attempt):
    done = python(
        "train.py",
        *flags,
        "--verify_resume",
        "--global_batch_size=4",
        "--max_train_steps=8",
        f"--save_dir={tmp_path / 'ckpt'}",
    )
    assert "resume is exact: 8 steps on 2 ranks" in done.stdout and not list(tmp_path.iterdir())
