"""Whole runs on CUDA give what they give on a CPU: compiled, recomputed, replicated, saved, and sampled."""

import json
import re

import pytest
import torch
from helpers.devices import SEVERAL, on_cuda, visible
from helpers.runs import column, make_model, outputs, python, run_cases
from safetensors.torch import load_file

from trainer.checkpoint import Checkpoint

STEPS = ["--global_batch_size=8", "--max_train_steps=6", "--recompute=none", "--compile=off"]
WAYS = [(recompute, compiled) for recompute in ("none", "selective", "full") for compiled in ("off", "on")]
# train.py's main, and then what the run took of a GPU's memory.
MAIN = "import sys, torch, train; code = train.main(sys.argv[1:]); print(torch.cuda.max_memory_allocated())"


def run(out, flags, device, ranks, cases):
    """Trains with the flags of each case, by its name."""
    every = {name: [*flags, *STEPS, *outputs(out / name), *more] for name, more in cases.items()}
    run_cases(out, ranks, every, visible(device))
    return out


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """The run on one CPU in fp32, neither compiled nor recomputed."""
    return run(tmp_path_factory.mktemp("plain"), flags, "cpu", 1, {"plain": []}) / "plain"


@pytest.fixture(scope="module", params=[pytest.param("cpu", marks=pytest.mark.slow), on_cuda("cuda")])
def ways(request, flags, tmp_path_factory):
    """Every way to lay out the computation, in bf16."""
    cases = {f"{r}-{c}": ["--precision=bf16", f"--recompute={r}", f"--compile={c}"] for r, c in WAYS}
    return run(tmp_path_factory.mktemp("ways"), flags, request.param, 1, cases)


@pytest.mark.parametrize("recompute, compiled", WAYS)
def test_recompute_and_compile_leave_the_losses_as_they_are(ways, plain, recompute, compiled):
    for key, tolerance in (("train_loss", 2e-3), ("gnorm", 2e-2)):
        found = column(ways / f"{recompute}-{compiled}", key)
        assert found == pytest.approx(column(plain, key), rel=tolerance)


@pytest.mark.parametrize("device, ranks", [("cpu", 2), on_cuda("cuda", 1), SEVERAL])
def test_saving_in_the_background_gives_the_same_files(flags, tmp_path, device, ranks):
    save = ["--save_every_n_train_steps=1", "--deterministic"]
    run(tmp_path, flags, device, ranks, {how: [*save, f"--async_save={how}"] for how in ("on", "off")})
    files = [*(tmp_path / "on").glob("ckpt/0*/*.safetensors")]
    assert len(files) == 6 * ranks
    for file in files:
        one, other = load_file(file), load_file(tmp_path / "off" / file.relative_to(tmp_path / "on"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        Checkpoint.open(file.parent).verify()
    logged = map(json.loads, (tmp_path / "on" / "log" / "metrics.jsonl").read_text().splitlines())
    costs = [row for row in logged if "save_total_seconds" in row]
    assert len(costs) == 6
    assert all(0 < row["save_blocked_seconds"] <= row["save_total_seconds"] for row in costs[:-1])


@pytest.mark.parametrize("device, ranks", [SEVERAL])
def test_shards_and_replicas_have_the_losses_of_one_rank(flags, plain, tmp_path, device, ranks):
    run(tmp_path, flags, device, ranks, {"sharded": [], "replicated": ["--dp_replicate=2"]})
    for name in ("sharded", "replicated"):
        for key in ("train_loss", "gnorm"):
            assert column(tmp_path / name, key) == pytest.approx(column(plain, key), rel=1e-4)


@pytest.mark.parametrize("device", [on_cuda("cuda")])
def test_evaluation_and_a_sample_use_the_gpu(flags, tiny, tmp_path, device):
    evaluate = [*flags, "--evaluate", "--compile=off"]
    evaluated = python("-c", MAIN, *evaluate, **visible(device)).stdout
    sampled = python("-c", MAIN, f"--model_id={tiny}", "--generate=the state", **visible(device)).stdout
    for said in (evaluated, sampled):
        assert int(said.split()[-1]) > 0
    assert sampled.startswith("the state")
    on_cpu = python("train.py", *evaluate).stdout
    losses = [float(re.search("val_loss=(.*) ", text)[1]) for text in (evaluated, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("device", [on_cuda("cuda")])
def test_out_of_memory_is_one_sentence_and_exit_code_1(flags, tmp_path, device):
    # Weights of 50 MB fit, their gradients and the optimizer's state do not.
    model = make_model(tmp_path / "wide", intermediate_size=2**17, num_hidden_layers=1)
    limit = "torch.cuda.set_per_process_memory_fraction(2**27 / torch.cuda.mem_get_info()[1])"
    script = f"import sys, torch, train; {limit}; sys.exit(train.main(sys.argv[1:]))"
    more = [f"--model_id={model}", "--compile=off", *outputs(tmp_path)]
    done = python("-c", script, *flags, *more, check=False, **visible(device))
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr
    assert "rank 0 has too little GPU memory" in said[0] and "--recompute=full" in said[0]
