"""A step whose loss or gradient is not finite is skipped by all ranks together, recorded, and stops the run when it repeats."""

import json
import math
import shutil

import datasets
import pytest
import torch
from helpers.runs import make_text, python, rows, run_cases
from safetensors.torch import load_file, save_file
from test_training import piecewise_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.checkpoint import Checkpoint
from trainer.sampler import GlobalBatchSampler


@pytest.fixture(scope="module")
def poisoned(tiny, tmp_path_factory):
    """A model in which one token's embedding is NaN, and data in which one document has it."""
    out = tmp_path_factory.mktemp("poisoned")
    model = shutil.copytree(tiny, out / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    (token,) = tokenizer("~").input_ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    make_text(out / "text.jsonl", documents=40)
    with open(out / "text.jsonl", "a") as f:
        f.write(json.dumps({"text": "the ~ union"}) + "\n")
    (out / "bad.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} the state of ~ " * 9}) + "\n" for n in range(40))
    )
    for name in ("text", "bad"):
        python("train.py", "--prepare_data", f"--model_id={model}", f"--dataset_id={out / name}.jsonl", "--max_seq_len=32",
               f"--dataset_path={out / name}", "--validation_fraction=0.1")  # fmt: skip
    return out, model, token


@pytest.fixture(scope="module")
def run(poisoned):
    out, model, _ = poisoned
    flags = [
        f"--model_id={model}",
        "--max_seq_len=32",
        "--precision=fp32",
        "--learning_rate=1e-3",
        "--global_batch_size=4",
    ]
    codes = run_cases(
        out, 2,
        {
            "one": [*flags, f"--dataset_path={out / 'text'}", "--max_train_steps=12", f"--save_dir={out / 'c'}", f"--log_dir={out / 'l'}"],
            "all": [*flags, f"--dataset_path={out / 'bad'}", "--max_train_steps=12", f"--save_dir={out / 'cb'}", f"--log_dir={out / 'lb'}",
                    "--max_skipped_steps=4"],
        },
    )  # fmt: skip
    return out, codes


def test_only_the_steps_with_the_bad_sample_are_skipped_and_they_name_it(poisoned, run):
    out, codes = run
    assert codes["one"] == 0
    data = datasets.load_from_disk(str(out / "text"))["train"]
    bad = {index for index, row in enumerate(data) if poisoned[2] in row["input_ids"]}
    order = GlobalBatchSampler(len(data), 4, seed=0)
    steps = iter(order)
    expected = {step + 1: batch for step, batch in zip(range(12), steps, strict=False) if bad & set(batch)}
    assert expected and len(expected) < 6
    found = rows(out / "l", "train_loss")
    assert {
        step: row["skipped_samples"] for step, row in found.items() if "skipped_samples" in row
    } == expected
    assert all((row["train_loss"] is None) == (step in expected) for step, row in found.items())
    # Valid JSON: NaN is not.
    assert "NaN" not in (out / "l" / "metrics.jsonl").read_text()


def test_training_goes_on_as_if_the_skipped_steps_were_not_there(poisoned, run):
    out, model_folder, token = poisoned
    model = AutoModelForCausalLM.from_pretrained(model_folder).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    data = datasets.load_from_disk(str(out / "text"))["train"]
    for _, batch in zip(range(12), iter(GlobalBatchSampler(len(data), 4, seed=0)), strict=False):
        parts = [piecewise_loss(model, data[index]) for index in batch]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        if loss.isfinite():
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    expected = model.state_dict()
    for name, tensor in Checkpoint.open(out / "c" / "last").parameters():
        if name == "model.embed_tokens.weight":
            assert tensor[token].isnan().all()
            tensor[token] = expected[name][token] = 0
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)


def test_a_run_that_explodes_keeps_what_was_good_and_names_it(flags, tmp_path):
    common = [*flags, "--global_batch_size=4", "--save_every_n_train_steps=1", "--keep_last_n_checkpoints=1"]
    common += [f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}"]
    python("train.py", *common, "--max_train_steps=3")
    (tmp_path / "c" / "best").unlink()  # which would be kept anyway
    more = ["--max_train_steps=20", "--learning_rate=1e30", "--clip_gnorm=0", "--resume_from=last"]
    done = python("train.py", *common, *more, check=False)
    assert done.returncode == 1
    assert f"the last good checkpoint is {tmp_path / 'c' / '0000-0003'}" in done.stderr
    saved = {path.name for path in (tmp_path / "c").iterdir() if path.is_dir() and not path.is_symlink()}
    assert saved <= {
        "0000-0003",
        "0000-0004",
    }  # what the exploding step itself left cannot be told from good weights
    Checkpoint.open(tmp_path / "c" / "0000-0003").verify()


def test_what_has_no_finite_validation_loss_is_not_kept(flags, tmp_path):
    out = [f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}"]
    exploding = ["--learning_rate=1e38", "--clip_gnorm=0", "--max_train_steps=1"]
    done = python("train.py", *flags, *out, "--global_batch_size=4", *exploding, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "the validation loss of step 1 is nan, so that step does not count: no checkpoint was saved before"
        in done.stderr
    )
    assert (
        rows(tmp_path / "l", "val_loss")[1]["val_loss"] is None
        and "NaN" not in (tmp_path / "l" / "metrics.jsonl").read_text()
    )
    assert not (tmp_path / "c" / "last").exists() and not list((tmp_path / "c").glob("0*"))


def test_after_too_many_in_a_row_the_run_stops_and_saves_nothing(run, poisoned):
    out, codes = run
    assert codes["all"] == 1
    assert len(rows(out / "lb", "train_loss")) == 4 and not (out / "cb" / "last").exists()
    done = python("train.py", f"--model_id={poisoned[1]}", f"--dataset_path={out / 'bad'}", "--max_seq_len=32", "--precision=fp32",
                  f"--save_dir={out / 'cc'}", f"--log_dir={out / 'lc'}", "--global_batch_size=2", check=False)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "not finite for 3 steps in a row, until step 3: no checkpoint was saved before" in done.stderr
