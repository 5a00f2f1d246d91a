"""Fixtures that all tests share: a tiny model, prepared text, and the flags of a run on them."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.forks import ZYGOTE
from helpers.runs import Run, make_model, make_text, prepare

# Seconds that the longest files take: they start first, so that all of pytest-xdist's workers end together.
SECONDS = {
    "test_interruption.py": 95,
    "test_planner.py": 84,
    "test_training.py": 65,
    "test_lora.py": 64,
    "test_folders.py": 47,
    "test_nodes.py": 41,
    "test_parallel.py": 41,
    "test_resume.py": 37,
    "test_data.py": 33,
    "test_seen.py": 33,
    "test_hub.py": 31,
    "test_doctor.py": 27,
    "test_torchrun_errors.py": 27,
    "test_report_to.py": 23,
    "test_checkpoint.py": 20,
    "test_chat.py": 19,
    "test_data_chat.py": 17,
}
# The same, of the tests that are marked slow.
SLOW_SECONDS = {
    "test_docs.py": 400,
    "test_planner.py": 380,
    "test_data.py": 300,
    "test_benchmarks.py": 300,
    "test_memory.py": 250,
    "test_demo.py": 240,
    "test_interruption.py": 150,
    "test_gpu.py": 100,
    "test_verify_resume.py": 100,
    "test_hang.py": 90,
}


@pytest.hookimpl(trylast=True)  # what is not chosen has gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; within a file, the order stays."""
    seconds = {}
    for item in items:
        table = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS
        seconds[item.path] = max(seconds.get(item.path, 0), table.get(item.path.name, 0))
    items.sort(key=lambda item: -seconds[item.path])


def pytest_sessionfinish() -> None:
    ZYGOTE.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    """Frees the process groups of runs that failed: a process forked later must not find them."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return the folder of that name, which the first of pytest-xdist's workers fills for all of them."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def call(name: str, fill: Callable[[Path], None]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (shared / f"{name}.done").touch()
        return folder

    return call


@pytest.fixture(scope="session")
def tiny(once) -> Path:
    """The tiny model's folder."""
    return once("tiny", make_model)


@pytest.fixture(scope="session")
def prepared(tiny, once) -> Path:
    """Text for the tiny model: 32 tokens a sample, a fifth of the documents for validation."""

    def fill(folder: Path) -> None:
        prepare(tiny, make_text(folder / "text.jsonl", documents=60), validation_fraction=0.2)

    return once("data", fill) / "text.prepared"


@pytest.fixture(scope="session")
def flags(tiny, prepared) -> list[str]:
    """What every run on the tiny model shares."""
    values = ["--max_seq_len=32", "--precision=fp32", "--learning_rate=1e-3", "--global_batch_size=4"]
    return [f"--model_id={tiny}", f"--dataset_path={prepared}", *values]


@pytest.fixture
def launch(tmp_path):
    """Starts python in the background; what still runs after the test is ended."""
    started = []

    def call(*argv, **options) -> Run:
        started.append(Run(tmp_path, *argv, **options))
        return started[-1]

    yield call
    for run in started:
        run.stop()
