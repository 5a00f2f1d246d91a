"""The first line names the engine and the reason; what nnScaler lacks here is one sentence."""

import importlib.util

import pytest
import torch
from helpers.runs import python

from trainer import engine

MISSING = None if torch.cuda.device_count() else "there is no CUDA device"
if importlib.util.find_spec("nnscaler") is None:
    MISSING = "nnScaler is not installed"
cannot_run = pytest.mark.skipif(MISSING is None, reason="nnScaler runs here")


def test_native_is_native(caplog):
    with caplog.at_level("INFO"):
        assert engine.choose("native") == "native"
    assert caplog.messages == ["engine: native (--engine=native)"]


@cannot_run
def test_auto_is_native_where_nnscaler_cannot_run_and_says_why(caplog):
    with caplog.at_level("INFO"):
        assert engine.choose("auto") == "native"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("engine: native (nnScaler ")


@cannot_run
def test_asking_for_nnscaler_where_it_cannot_run_is_a_sentence(flags, tmp_path):
    done = python("train.py", *flags, "--engine=nnscaler", f"--save_dir={tmp_path}", check=False)
    sentence = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence.startswith("train.py: --engine=nnscaler cannot run: nnScaler ") and MISSING in sentence
    assert sentence.endswith("or use --engine=native.")


def test_a_pickle_that_holds_more_than_data_is_no_checkpoint(flags, tmp_path):
    """Whatever looks like torch.save's is read with weights_only, so its code never runs."""
    torch.save({"model": print}, tmp_path / "merged.ckpt")
    argv = [f"--export_hf={tmp_path / 'merged.ckpt'}", f"--output_path={tmp_path / 'hf'}"]
    done = python("train.py", *flags, *argv, check=False)
    assert done.returncode == 2 and "is not a merged checkpoint" in done.stderr
