"""All ranks skip a step whose loss or gradient is not finite; many in a row stop the run."""

import json
import math
import shutil

import datasets
import pytest
import torch
from helpers.runs import make_text, outputs, prepare, python, rows, run_cases
from safetensors.torch import load_file, save_file
from test_training import plain_loop
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from dataset.sampler import GlobalBatchSampler
from trainer.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def run(flags, tiny, tmp_path_factory):
    """Runs on a model in which one token's embedding is NaN: `one` document has the token, or `all` have."""
    out = tmp_path_factory.mktemp("poisoned")
    model = shutil.copytree(tiny, out / "model")
    (token,) = AutoTokenizer.from_pretrained(model)("~").input_ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    text = make_text(out / "one.jsonl", documents=12)  # 12 steps see all of it, in whatever order
    text.write_text(json.dumps({"text": "the ~ union"}) + "\n" + text.read_text())
    bad = (json.dumps({"text": f"{n} the state of ~ " * 9}) + "\n" for n in range(40))
    (out / "all.jsonl").write_text("".join(bad))
    cases = {}
    for name in ("one", "all"):
        data = prepare(model, out / f"{name}.jsonl", validation_fraction=0.1)
        more = [f"--model_id={model}", f"--dataset_path={data}", "--max_train_steps=12"]
        cases[name] = [*flags, *more, *outputs(out / name)]
    explodes = ["--learning_rate=1e38", "--clip_gnorm=0", "--max_train_steps=1", "--async_save=on"]
    cases["explodes"] = [*flags, *explodes, *outputs(out / "explodes")]
    rejected = out / "explodes" / "ckpt" / "0000-0001.rejected"
    cases["again"] = [f"--resume_from={rejected}", *outputs(out / "explodes")]
    run_cases(out, 2, cases, all=1, explodes=1, again=1)
    return out, token, cases["all"]


def test_only_the_steps_with_the_bad_sample_are_skipped_and_they_name_it(run):
    out, token, _ = run
    data = datasets.load_from_disk(str(out / "one.prepared"))["train"]
    bad = {index for index, row in enumerate(data) if token in row["input_ids"]}
    batches = zip(range(1, 13), iter(GlobalBatchSampler(len(data), 4, seed=0)), strict=False)
    expected = {step: batch for step, batch in batches if bad & set(batch)}
    assert expected and len(expected) < 6
    found = rows(out / "one" / "log", "train_loss")
    skipped = {step: row["skipped_samples"] for step, row in found.items() if "skipped_samples" in row}
    assert skipped == expected
    assert all((row["train_loss"] is None) == (step in expected) for step, row in found.items())
    assert "NaN" not in (out / "one" / "log" / "metrics.jsonl").read_text()  # which is no valid JSON


def test_training_goes_on_as_if_the_skipped_steps_were_not_there(run):
    out, token, _ = run
    model = AutoModelForCausalLM.from_pretrained(out / "model").float()
    plain_loop(model, datasets.load_from_disk(str(out / "one.prepared"))["train"], batch_size=4, steps=12)
    expected = model.state_dict()
    for name, tensor in Checkpoint.open(out / "one" / "ckpt" / "last").parameters():
        if name == "model.embed_tokens.weight":
            assert tensor[token].isnan().all()
            tensor[token] = expected[name][token] = 0
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)


def test_what_has_no_finite_validation_loss_is_set_aside(flags, tmp_path):
    exploding = ["--learning_rate=1e38", "--clip_gnorm=0", "--max_train_steps=1", *outputs(tmp_path)]
    done = python("train.py", *flags, *exploding, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "validation loss at step 1 is nan" in done.stderr and "no checkpoint was saved" in done.stderr
    assert rows(tmp_path / "log", "val_loss")[1]["val_loss"] is None
    assert "NaN" not in (tmp_path / "log" / "metrics.jsonl").read_text()
    assert not (tmp_path / "ckpt" / "last").exists()
    (rejected,) = (tmp_path / "ckpt").glob("0*")
    assert rejected.name == "0000-0001.rejected" and f"moved to {rejected}; no checkpoint" in done.stderr
    Checkpoint.open(rejected).verify()


def test_two_ranks_set_a_checkpoint_aside_and_validate_it_again_together(run):
    folder = run[0] / "explodes" / "ckpt"
    assert [path.name for path in folder.glob("0*")] == ["0000-0001.rejected"]
    assert not (folder / "last").is_symlink()
    metrics = rows(run[0] / "explodes" / "log", "val_loss")  # a step that came twice would be an error
    assert metrics[1]["val_loss"] is None


def test_after_too_many_in_a_row_the_run_stops_and_saves_nothing(run, tmp_path, capsys):
    out, _, bad = run
    assert len(rows(out / "all" / "log", "train_loss")) == 3 and not (out / "all" / "ckpt" / "last").exists()
    assert train.main([*bad, "--max_skipped_steps=4", *outputs(tmp_path)]) == 1
    assert "in a row, until step 4: no checkpoint was saved before" in capsys.readouterr().err
