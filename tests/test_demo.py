"""The demo, as the README starts it: real weights, real text, two ranks."""

import subprocess

import pytest
from helpers.runs import ROOT, environment, rows

from trainer.checkpoint import Checkpoint


@pytest.mark.slow
def test_the_demo_learns_resumes_merges_and_exports(tmp_path):
    options = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)
    done = subprocess.run(["make", "demo", f"OUT={tmp_path}"], **options)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stderr[-5000:]
    assert sorted(rows(tmp_path / "log", "train_loss")) == list(range(1, 17))  # three launches, one log
    losses = {step: row["val_loss"] for step, row in rows(tmp_path / "log", "val_loss").items()}
    assert sorted(losses) == [0, 12, 14, 16]
    assert 3.0 < losses[0] < 3.6  # what the pretrained model has on such text: a wrong conversion shows
    assert losses[16] < losses[0] - 0.12  # in bf16 and in fp32
    assert f"val_loss={losses[16]:.6f}" in done.stdout  # --evaluate, on one rank, of what one rank saved
    assert f"{losses[0]:.4f} at step 0, {losses[16]:.4f} at step 16" in done.stdout
    assert Checkpoint.open(tmp_path / "checkpoints" / "last").state["step"] == 16
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert len(done.stdout[done.stdout.index("My fellow Americans, the state of our union") :]) > 150
