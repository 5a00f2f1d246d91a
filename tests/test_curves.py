"""tools.curves answers wrong use and damaged metrics with a sentence."""

import pytest
from helpers.runs import python

from tools.curves import read_metrics
from trainer.loggers import _step

DAMAGED = (b"not JSON", b"[1, 2]", b'"text"', b"\xff\xfe", b"{}", b'{"step": null}', b'{"step": Infinity}')


@pytest.fixture
def log_dir(tmp_path):
    """A run's metrics with damage between the rows, and half a line at the end."""
    good = b'{"step": 1, "train_loss": 3, "val_loss": 2.5}', b'{"step": 2, "train_loss": "x", "val_loss": 2}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *DAMAGED, good[1], b'{"step": 3, "tr']))
    return tmp_path


def test_damaged_lines_are_named_and_left_out(log_dir):
    done = python("-m", "tools.curves", log_dir, log_dir)
    assert done.stdout.count("validation loss 2.5000 at step 1, 2.0000 at step 2: -0.5000") == 2
    named = [number for number in range(1, 12) if f"metrics.jsonl, line {number} " in done.stderr]
    assert named == list(range(2, 2 + len(DAMAGED)))
    assert "Traceback" not in done.stderr and (log_dir / "curves.png").stat().st_size > 10000
    assert [row["step"] for row in read_metrics(log_dir)] == [1, 2]


def test_a_resume_ranks_damaged_lines_after_every_step():
    assert [_step(line.decode(errors="replace")) for line in DAMAGED] == [float("inf")] * len(DAMAGED)


MISSING = "tests/metrics.jsonl: No such file or directory; name a run's --log_dir"
WRONG_USE = [("--help", 0, "LOG_DIR [LOG_DIR ...]"), ("", 2, "required: LOG_DIR"), ("tests", 2, MISSING)]


@pytest.mark.parametrize("argument, code, said", WRONG_USE)
def test_wrong_use_is_a_sentence(argument, code, said):
    done = python("-m", "tools.curves", *argument.split(), check=False)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
