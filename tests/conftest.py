"""Fixtures that all tests share: a tiny model, prepared text, and the flags of a run on them."""

import gc
import os
import signal
from pathlib import Path

import pytest
from helpers.runs import Run, make_model, make_text, prepare


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    """Frees the process groups of runs that failed: a process forked later must not find them."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny model's folder."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def prepared(tiny, tmp_path_factory) -> Path:
    """Text for the tiny model: 32 tokens a sample, a fifth of the documents for validation."""
    text = make_text(tmp_path_factory.mktemp("data") / "text.jsonl", documents=60)
    return prepare(tiny, text, validation_fraction=0.2)


@pytest.fixture(scope="session")
def flags(tiny, prepared) -> list[str]:
    """What every run on the tiny model shares."""
    values = ["--max_seq_len=32", "--precision=fp32", "--learning_rate=1e-3", "--global_batch_size=4"]
    return [f"--model_id={tiny}", f"--dataset_path={prepared}", *values]


@pytest.fixture
def launch(tmp_path):
    """Starts python in the background; what still runs after the test is ended."""
    started = []
    yield lambda *argv: started.append(Run(tmp_path, *argv)) or started[-1]
    for run in started:
        for pid in [*run.ranks(), run.process.pid] if run.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
