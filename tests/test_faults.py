"""A bug keeps its traceback and exits with 1; only what the user can mend becomes a sentence."""

import errno
import json

import pytest
import torch
from helpers.runs import outputs

import train
from dataset import sampler
from llama3 import model
from trainer import checkpoint, loggers, setup, trainer


def raises(error: Exception):
    """Return a function that raises the error whatever it is called with."""

    def fail(*_, **__):
        raise error

    return fail


def unpack(*_):
    first, second = (1, 2, 3)  # noqa: F841


def multiply(*_):
    return torch.ones(2, 3) @ torch.ones(2, 3)


def zip_strictly(*_):
    return list(zip([1], [1, 2], strict=True))


def look_up(*_, **__):
    return {}["step"]


# The fault -> where it is planted, what happens there, and the last line of the traceback.
BUGS = {
    "a step that unpacks wrongly": (trainer.Trainer, "_train_step", unpack, "ValueError: too many values"),
    "a product of wrong shapes": (model.Llama, "forward", multiply, "RuntimeError: mat1 and mat2"),
    "rows of unequal length": (sampler.GlobalBatchSampler, "indices", zip_strictly, "ValueError: zip()"),
    "JSON that nobody wrote": (setup, "rng_state", lambda: json.loads("{"), "json.decoder.JSONDecodeError"),
    "a missing shared library": (
        setup,
        "seed_everything",
        raises(OSError("libcudart.so.13: cannot open shared object file: No such file or directory")),
        "OSError: libcudart.so.13",
    ),
    "bytes that are not UTF-8": (
        trainer,
        "peak_memory_gib",
        lambda *_: b"\xff".decode(),
        "UnicodeDecodeError: 'utf-8'",
    ),
    "a missing key": (loggers.JsonlLogger, "log_metrics", look_up, "KeyError: 'step'"),
    "a missing attribute": (trainer.Trainer, "_finish", lambda self: self.nothing, "AttributeError"),
    "a file of our own that is gone": (
        loggers.JsonlLogger,
        "setup",
        lambda *_, **__: open("/no/such/file"),
        "FileNotFoundError",
    ),
    "a division by zero": (trainer.Trainer, "_epoch", lambda *_: 1 // 0, "ZeroDivisionError"),
    "an assertion": (checkpoint, "json_digest", raises(AssertionError("never")), "AssertionError: never"),
}


@pytest.fixture
def error_file(tmp_path, monkeypatch):
    """The file in which torchrun expects a rank's error."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_keeps_its_traceback_and_exits_with_1(flags, tmp_path, monkeypatch, capsys, error_file, name):
    place, attribute, fault, last_line = BUGS[name]
    monkeypatch.setattr(place, attribute, fault)
    code = train.main([*flags, "--max_train_steps=1", *outputs(tmp_path)])
    error = capsys.readouterr().err
    assert code == 1
    assert "Traceback (most recent call last)" in error and last_line in error
    assert "train.py: " not in error
    recorded = json.loads(error_file.read_text())
    assert last_line in recorded["message"]["message"]
    assert recorded["errorTraits"] == {"category": "bug", "retryability": "False"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_file_of_the_run_that_cannot_be_written_is_a_sentence(
    flags, tmp_path, monkeypatch, capsys, error_file, number
):
    error = OSError(number, "a reason", "/runs/config.yaml")
    monkeypatch.setattr("cli.config_file.write", raises(error))
    assert train.main([*flags, "--max_train_steps=1", *outputs(tmp_path)]) == 1
    expected = "train.py: /runs/config.yaml cannot be written: a reason. Make room, or name a folder"
    assert expected in capsys.readouterr().err
    assert json.loads(error_file.read_text())["errorTraits"]["category"] == "failed run"


def test_wrong_input_is_recorded_as_such(tmp_path, error_file):
    assert train.main(["--max_train_steps=0"]) == 2
    recorded = json.loads(error_file.read_text())
    assert recorded["errorTraits"] == {"category": "wrong input", "retryability": "False"}
