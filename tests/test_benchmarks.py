"""benchmarks/gpu.py runs every part on a CPU, and its arithmetic is right."""

import json

import pytest
from common import RunFailed, interleave, medians, run_ours
from gpu import LAYERS, TINY, difference, extrapolated
from helpers.runs import make_model, python


def test_8b_is_extrapolated_from_what_two_more_layers_cost(tmp_path):
    model = make_model(tmp_path / "model", **TINY)
    T, D, V, W = 64, TINY["hidden_size"], TINY["vocab_size"], TINY["intermediate_size"]
    K = D * TINY["num_key_value_heads"] // TINY["num_attention_heads"]

    def numbers(layers):
        # Six operations a parameter; attention's two products, forward and twice backward, over D and T.
        flops = 6 * (layers * (2 * D * D + 2 * D * K + 3 * D * W) + V * D) + 12 * layers * D * T
        speed = 1000 / (0.5 + 0.25 * layers)
        found = dict(step_seconds=1000 / speed, tokens_per_second=speed, mfu=speed * flops / 1e12)
        return found | dict(layers=layers, peak_memory_gib=3 + 2 * layers)

    way = dict(trainer="train.py", seq_len=T, recompute="full", compile="on", documents=False)
    rows = [way | numbers(layers) | dict(losses=[]) for layers in (LAYERS, LAYERS // 2, LAYERS)]
    rows[-1]["recompute"] = "none"  # this row has no partner
    (found,) = extrapolated(rows, model)
    assert way.items() <= found.items()
    assert {name: found[name] for name in found.keys() - way} == pytest.approx(numbers(32), rel=1e-9)


def test_a_run_that_ends_early_says_why():
    with pytest.raises(RunFailed, match="train.py: --max_seq_len must be >= 2"):
        run_ours(["--max_seq_len=1"])


def test_ways_take_turns_and_medians_are_of_the_numbers_that_all_rows_have():
    calls = []
    found = interleave({name: lambda n=name: calls.append(n) or len(calls) for name in "ab"}, 3)
    assert calls == list("ababab") and found == {"a": [1, 3, 5], "b": [2, 4, 6]}
    rows = [{"x": 1, "y": 2.0, "on": True}, {"x": 3, "on": True}, {"x": 9, "on": False}]
    assert medians(rows) == {"x": 3}
    assert difference({"losses": [1, 2]}, {"losses": [1.5, 1]}) == 1


@pytest.mark.slow
def test_every_part_of_make_gpu_runs_on_a_cpu(tmp_path):
    file = tmp_path / "gpu.json"
    flags = ["--device=cpu", "--skip_tests", "--repeats=1", "--minutes=30", f"--output_path={file}"]
    done, report = python("benchmarks/gpu.py", *flags, timeout=1800), json.loads(file.read_text())
    assert "nothing is wrong" in done.stdout and len(report["training"]) == 16
    for row in report["training"] + report["against_transformers"]["runs"]:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(256)
    assert len(report["extrapolated_8b"]) == 3 and report["against_transformers"]["loss_difference"] < 1e-2
    names = {row["name"] for row in report["loss"] + report["attention"]}
    assert {"ours, compiled", "ours, 16 documents"} <= names
