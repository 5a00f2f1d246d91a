"""Memory stays bounded: no rank, and no tool, ever holds the whole of a model of some 500 MB."""

import json
import math

import pytest
from helpers.runs import make_model, python, torchrun

from trainer.checkpoint import Checkpoint

MIB = 2**20
ALLOWED = 64 * MIB  # beside twice the largest tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def large(prepared, tmp_path_factory):
    """A model of some 500 MB in fp32, trained for one step, its checkpoint of 1.5 GB, and the merged file."""
    out = tmp_path_factory.mktemp("large")
    model = make_model(
        out / "model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=32768
    )
    flags = [f"--model_id={model}", f"--dataset_path={prepared}", "--max_seq_len=32", "--precision=fp32", "--global_batch_size=4",
             "--max_val_samples=2", "--max_train_steps=1", f"--save_dir={out / 'ckpt'}", f"--log_dir={out / 'log'}"]  # fmt: skip
    torchrun(2, "train.py", *flags)
    python("train.py", *flags, "--merge_checkpoint")
    tensors = Checkpoint.open(out / "ckpt" / "last").tensors
    sizes = {name: math.prod(shape) * 4 for name, (_, shape) in tensors.items()}
    total = sum(size for name, size in sizes.items() if name.startswith("model."))
    assert 450 * MIB < total < 600 * MIB and max(sizes.values()) == 128 * MIB
    return out, flags, max(sizes.values()), total


def measured(out, ranks, task, *flags):
    run = torchrun if ranks > 1 else lambda _, *argv: python(*argv)
    run(ranks, "tests/helpers/memory.py", out / "peak", task, *flags)
    return [json.loads((out / f"peak.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("mode", ["--merge_checkpoint", "--export_hf"])
def test_merge_and_export_hold_two_tensors_at_most(large, tmp_path, mode):
    out, flags, largest, total = large
    (found,) = measured(tmp_path, 1, "main", *flags, mode, f"--output_path={tmp_path / 'result'}")
    print(
        mode, {"peak MiB": found["peak_bytes"] / MIB, "largest MiB": largest / MIB, "model MiB": total / MIB}
    )
    assert found["peak_bytes"] <= 2 * largest + ALLOWED


@pytest.mark.parametrize("source", ["last", "merged.ckpt"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_resuming_holds_the_ranks_own_state_and_two_tensors(large, tmp_path, ranks, source):
    out, flags, largest, total = large
    flags = [
        *flags,
        f"--resume_from={out / 'ckpt' / source}",
        f"--save_dir={tmp_path / 'c'}",
        f"--log_dir={tmp_path / 'l'}",
    ]
    for found in measured(tmp_path, ranks, "setup", *flags, "--max_train_steps=2"):
        assert 2.9 * total / ranks < found["state_bytes"] < 3.2 * total / ranks
        print(
            source,
            ranks,
            {
                "above the state, MiB": (found["peak_bytes"] - found["state_bytes"]) / MIB,
                "largest MiB": largest / MIB,
            },
        )
        assert found["peak_bytes"] - found["state_bytes"] <= 2 * largest + ALLOWED


@pytest.mark.parametrize("how", [[], ["--from_scratch"]])
def test_at_start_no_rank_grows_by_the_whole_model(large, tmp_path, how):
    _, flags, largest, total = large
    flags = [*flags, *how, f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}"]
    for found in measured(tmp_path, 4, "setup", *flags):
        print(how, {"peak MiB": found["peak_bytes"] / MIB, "model MiB": total / MIB})
        assert found["peak_bytes"] - found["state_bytes"] <= 2 * largest + ALLOWED < total
