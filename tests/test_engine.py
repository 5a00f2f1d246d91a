"""The choice of engine is said first, with its reason; what nnScaler misses here is one sentence, before anything starts."""

import importlib.util

import pytest
import torch
from helpers.runs import python

from trainer import engine


def missing():
    """What --engine=nnscaler has to name in this environment."""
    if importlib.util.find_spec("nnscaler") is None:
        return "nnScaler is not installed"
    return None if torch.cuda.device_count() else "there is no CUDA device"


def test_native_is_native(caplog):
    with caplog.at_level("INFO"):
        assert engine.choose("native") == "native"
    assert caplog.messages == ["engine: native (--engine=native)"]


@pytest.mark.skipif(missing() is None, reason="nnScaler runs here")
def test_auto_is_native_where_nnscaler_cannot_run_and_says_why(caplog):
    with caplog.at_level("INFO"):
        assert engine.choose("auto") == "native"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("engine: native (nnScaler ")


@pytest.mark.skipif(missing() is None, reason="nnScaler runs here")
def test_asking_for_nnscaler_where_it_cannot_run_is_a_sentence(flags, tmp_path):
    done = python("train.py", *flags, "--engine=nnscaler", f"--save_dir={tmp_path}", check=False)
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("train.py: --engine=nnscaler: nnScaler ") and sentence.endswith(
        "or use --engine=native"
    )
    assert missing() in sentence or "transformers" in sentence
    assert "Traceback" not in done.stderr


def test_the_engine_is_the_first_line(flags, tmp_path):
    argv = [
        f"--save_dir={tmp_path / 'ckpt'}",
        f"--log_dir={tmp_path / 'log'}",
        "--max_train_steps=1",
        "--engine=native",
    ]
    done = python("train.py", *flags, *argv)
    assert done.stderr.splitlines()[0] == "engine: native (--engine=native)"


def test_files_of_another_kind_are_refused_as_checkpoints(flags, tmp_path):
    """A pickle that holds more than data never runs: whatever looks like torch.save's is read with weights_only."""
    evil = tmp_path / "merged.ckpt"
    torch.save({"model": print}, evil)
    done = python("train.py", *flags, f"--resume_from={evil}", "--engine=native", check=False)
    assert done.returncode == 2 and "is no merged checkpoint" in done.stderr
