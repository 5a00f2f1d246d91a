"""Fixtures that all tests share: a tiny model, prepared text, and the flags of a run on them."""

from pathlib import Path

import pytest
from helpers.runs import make_model, make_text, python


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny model's folder."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def prepared(tiny, tmp_path_factory) -> Path:
    """Text prepared for the tiny model by train.py itself: 32 tokens a sample, a fifth of the documents for validation."""
    folder = tmp_path_factory.mktemp("data")
    make_text(folder / "text.jsonl", documents=60)
    python("train.py", "--prepare_data", f"--model_id={tiny}", f"--dataset_id={folder / 'text.jsonl'}", "--max_seq_len=32",
           "--validation_fraction=0.2", f"--dataset_path={folder / 'prepared'}")  # fmt: skip
    return folder / "prepared"


@pytest.fixture(scope="session")
def flags(tiny, prepared) -> list[str]:
    """What every run on the tiny model shares."""
    return [
        f"--model_id={tiny}",
        f"--dataset_path={prepared}",
        "--max_seq_len=32",
        "--precision=fp32",
        "--learning_rate=1e-3",
    ]
