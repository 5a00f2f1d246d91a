"""Memory stays bounded: no rank, and no tool, ever holds the whole of a model of some 500 MB."""

import json
import math

import pytest
from helpers.runs import HELPERS, make_model, outputs, python, torchrun

from trainer.checkpoint import Checkpoint

MIB = 2**20
SIZES = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=32768)

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def large(flags, tmp_path_factory):
    """A model of some 500 MB in fp32, trained for one step, its checkpoint of 1.5 GB, and the merged file."""
    out = tmp_path_factory.mktemp("large")
    model = make_model(out / "model", **SIZES)
    flags = [*flags, f"--model_id={model}", "--max_val_samples=2", "--max_train_steps=1", *outputs(out)]
    torchrun(2, "train.py", *flags)
    python("train.py", *flags, "--merge_checkpoint")
    tensors = Checkpoint.open(out / "ckpt" / "last").tensors
    sizes = {name: math.prod(shape) * 4 for name, (_, shape) in tensors.items()}
    total = sum(size for name, size in sizes.items() if name.startswith("model."))
    assert 450 * MIB < total < 600 * MIB and max(sizes.values()) == 128 * MIB
    return out, flags, 2 * max(sizes.values()) + 64 * MIB, total  # two tensors and a little is the bound


def measured(out, ranks, task, *flags):
    argv = ["tests/helpers/memory.py", out / "peak", task, *flags]
    python(*argv, ranks=ranks if ranks > 1 else None, real=True, **HELPERS)  # a fork may reuse memory
    found = [json.loads((out / f"peak.{rank}").read_text()) for rank in range(ranks)]
    print(flags[-3:], {key: [row[key] / MIB for row in found] for key in found[0]})
    return found


@pytest.mark.parametrize("mode", ["--merge_checkpoint", "--export_hf"])
def test_merge_and_export_hold_two_tensors_at_most(large, tmp_path, mode):
    _, flags, bound, _ = large
    (found,) = measured(tmp_path, 1, "main", *flags, mode, f"--output_path={tmp_path / 'result'}")
    assert found["peak_bytes"] <= bound


@pytest.mark.parametrize("source", ["last", "merged.ckpt"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_resuming_holds_the_ranks_own_state_and_two_tensors(large, tmp_path, ranks, source):
    out, flags, bound, total = large
    resumed = [f"--resume_from={out / 'ckpt' / source}", "--max_train_steps=2", *outputs(tmp_path)]
    for found in measured(tmp_path, ranks, "setup", *flags, *resumed):
        assert 2.9 * total / ranks < found["state_bytes"] < 3.2 * total / ranks
        assert found["peak_bytes"] - found["state_bytes"] <= bound


@pytest.mark.parametrize("how", [[], ["--from_scratch"]])
def test_at_start_no_rank_grows_by_the_whole_model(large, tmp_path, how):
    _, flags, bound, total = large
    for found in measured(tmp_path, 4, "setup", *flags, *how, *outputs(tmp_path)):
        assert found["peak_bytes"] - found["state_bytes"] <= bound < total


FAULTS = """
import resource, sys, torch
from trainer import setup
if sys.argv[1] == "keep":
    setup.keep_freed_memory()
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add(1)  # 64 MiB: more than glibc ever keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_kept_memory_is_not_asked_for_again():
    faults = {how: int(python("-c", FAULTS, how, real=True).stdout) for how in ("plain", "keep")}
    assert faults["keep"] < 1000 < faults["plain"]
