"""train.py on 1, 2 and 4 ranks: a plain PyTorch loop's numbers, resuming, world sizes, merging, export."""

import json
import math
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import assert_same, column, outputs, python, rows, run_cases, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from dataset.sampler import GlobalBatchSampler
from trainer.checkpoint import Checkpoint

RANKS = (1, 2, 4)
GLOBAL_BATCH = 8
SCHEDULE = "--lr_scheduler=cosine --warmup_steps=3 --global_batch_size=8 --max_train_steps=10".split()


@pytest.fixture(scope="module")
def runs(flags, prepared, tmp_path_factory):
    """Every run of this module; one torchrun for each number of ranks (4 twice: it resumes what 1 left)."""
    out = tmp_path_factory.mktemp("runs")
    epoch = 4 * GLOBAL_BATCH // len(datasets.load_from_disk(str(prepared))["train"])

    def case(name, *more, run=None):
        return {name: [*flags, *SCHEDULE, *outputs(out / (run or name)), *more]}

    def onto(ranks, saved):  # from what was saved after the 5th step, as shards and merged
        shards, merged = out / f"{saved}-half", out / f"{saved}-full" / "merged.ckpt"
        cases = case(f"{saved}-to-{ranks}-half", f"--resume_from={shards}")
        return cases | case(f"{saved}-to-{ranks}-merged", f"--resume_from={merged}")

    def here(ranks):
        full, half = out / f"{ranks}-full", out / f"{ranks}-half"
        half.symlink_to(full / "ckpt" / f"{epoch:04d}-0005")
        merge = [f"--merge_checkpoint={half}", f"--output_path={full / 'merged.ckpt'}"]
        whole = case(f"{ranks}-full", "--save_every_n_train_steps=5") | case(f"{ranks}-merge", *merge)
        scratch = case(f"{ranks}-scratch", "--from_scratch", "--max_train_steps=1")
        return whole | onto(ranks, ranks) | scratch

    constant, both = "--lr_scheduler=constant", "2-five-and-five"
    more = case("2-accumulated", "--micro_batch_size=2") | case("2-constant", constant)
    more |= case("2-five", constant, "--max_train_steps=5", run=both)
    more |= case("2-and-five", constant, "--resume_from=last", run=both)
    run_cases(out, 4, here(4))
    run_cases(out, 2, here(2) | onto(2, 4) | more)
    run_cases(out, 1, here(1) | onto(1, 2))
    run_cases(out, 4, onto(4, 1))
    return out


def mean_loss(model, samples):
    """Cross entropy of packed samples over all targets, each document piece run through the model alone."""
    total, count = 0.0, 0
    for sample in samples:
        for piece in torch.tensor(sample["input_ids"]).tensor_split(sample["document_starts"]):
            if len(piece) > 1:
                logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1]
                total = total + F.cross_entropy(logits, piece[1:], reduction="sum")
                count += len(piece) - 1
    return total / count


def plain_loop(model, data, batch_size, steps, factor=lambda step: 1.0):
    """Trains transformers' own model; returns losses and gradient norms. Skips a loss that is not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses, norms = [], []
    batches = iter(GlobalBatchSampler(len(data), batch_size, seed=0))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * factor(step)
        optimizer.zero_grad()
        loss = mean_loss(model, [data[index] for index in next(batches)])
        if loss.isfinite():
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            losses.append(loss.item())
            optimizer.step()
    return losses, norms


def factor(step):
    """Three steps of warmup, then half a cosine down to 0 at step 10."""
    return (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 7))


@pytest.fixture(scope="module")
def reference(tiny, prepared):
    data = datasets.load_from_disk(str(prepared))["train"]
    return plain_loop(AutoModelForCausalLM.from_pretrained(tiny).float(), data, GLOBAL_BATCH, 10, factor)


@pytest.mark.parametrize("run", ["1-full", "2-full", "4-full", "2-accumulated"])
def test_losses_and_gradient_norms_match_a_plain_pytorch_loop(runs, reference, run):
    for key, expected in zip(("train_loss", "gnorm"), reference, strict=True):
        found = column(runs / run, key)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_stop_and_a_resume_in_the_same_folder_change_no_bit(runs):
    assert_same(runs / "2-five-and-five", runs / "2-constant")


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_and_resume_exactly(flags, reference, tmp_path):
    common = ["train.py", *flags, *SCHEDULE, "--compile=on", "--deterministic"]
    one, other = tmp_path / "one", tmp_path / "other"
    torchrun(2, *common, "--save_every_n_train_steps=5", *outputs(one))
    assert column(one, "train_loss") == pytest.approx(reference[0], rel=1e-4)
    middle = next((one / "ckpt").glob("*-0005"))
    torchrun(2, *common, f"--resume_from={middle}", *outputs(other))
    assert column(other, "train_loss") == column(one, "train_loss")[5:]


@pytest.mark.parametrize("ranks", RANKS)
def test_learning_rate_follows_the_schedule_and_tokens_count_all_since_the_start(runs, ranks):
    rates = [1e-3 * factor(step) for step in range(10)]
    assert column(runs / f"{ranks}-full", "lr") == pytest.approx(rates, rel=1e-12)
    assert column(runs / f"{ranks}-full", "tokens") == [GLOBAL_BATCH * 32 * step for step in range(1, 11)]


@pytest.mark.parametrize("ranks", RANKS)
def test_validation_loss_equals_a_computation_from_the_saved_dataset(runs, tiny, prepared, ranks):
    model = AutoModelForCausalLM.from_pretrained(tiny).float()
    model.load_state_dict(dict(Checkpoint.open(runs / f"{ranks}-full" / "ckpt" / "last").parameters()))
    found = rows(runs / f"{ranks}-full" / "log", "val_loss")[10]
    with torch.no_grad():
        expected = mean_loss(model, datasets.load_from_disk(str(prepared))["validation"]).item()
    assert found["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == math.exp(found["val_loss"])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("how", ["half", "merged"])
def test_resuming_is_bit_exact_from_shards_and_from_a_merged_file(runs, ranks, how):
    whole, resumed = runs / f"{ranks}-full", runs / f"{ranks}-to-{ranks}-{how}"
    assert_same(resumed, whole, first_step=6)
    assert rows(whole / "log", "val_loss")[10] == rows(resumed / "log", "val_loss")[10]


@pytest.mark.parametrize("move", ["4-to-2", "2-to-1", "1-to-4"])
@pytest.mark.parametrize("file", ["half", "merged"])
def test_another_world_size_continues_the_same_run(runs, move, file):
    whole = rows(runs / f"{move[0]}-full" / "log", "train_loss")
    moved = rows(runs / f"{move}-{file}" / "log", "train_loss")
    assert sorted(moved) == [6, 7, 8, 9, 10]
    for step, row in moved.items():
        assert row["train_loss"] == pytest.approx(whole[step]["train_loss"], rel=1e-4)
        assert all(row[key] == whole[step][key] for key in ("lr", "tokens", "epoch"))


def test_a_schedule_whose_horizon_moves_is_said(runs, flags, tmp_path, caplog):
    shorter = [f"--resume_from={runs / '1-half'}", "--max_train_steps=6", *outputs(tmp_path)]
    assert train.main([*flags, *SCHEDULE, *shorter]) == 0
    assert "the cosine schedule now ends at step 6, it was 10" in caplog.text


def test_fresh_weights_are_the_same_on_every_world_size(runs):
    first = [column(runs / f"{ranks}-scratch", "train_loss")[0] for ranks in RANKS]
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)
    assert math.log(320) - 0.5 < first[0] < math.log(320) + 1.5


def test_merged_file_is_one_safetensors_file_with_hugging_face_names(runs, tiny):
    merged, shards = load_file(runs / "4-full" / "merged.ckpt"), Checkpoint.open(runs / "4-half")
    names = set(load_file(tiny / "model.safetensors"))
    moments = {f"optimizer.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq")}
    assert set(merged) == {f"model.{name}" for name in names} | moments
    assert all(torch.equal(tensor, shards.read(name)) for name, tensor in merged.items())


def test_export_loads_in_transformers_and_has_the_trainers_validation_loss(runs, flags, prepared, tmp_path):
    run = runs / "2-full"
    python("train.py", *flags, f"--export_hf={run / 'ckpt' / 'last'}", f"--output_path={tmp_path / 'hf'}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32
    with torch.no_grad():
        found = mean_loss(model, datasets.load_from_disk(str(prepared))["validation"]).item()
    assert found == pytest.approx(rows(run / "log", "val_loss")[10]["val_loss"], rel=1e-4)


def test_evaluate_prints_the_trainers_validation_loss(runs, tmp_path):
    source = f"--resume_from={runs / '2-full' / 'ckpt' / 'last'}"
    done = torchrun(2, "train.py", "--evaluate", source, *outputs(tmp_path / "out"))  # with the run's flags
    row = rows(runs / "2-full" / "log", "val_loss")[10]
    expected = f"val_loss={row['val_loss']:.6f} perplexity={row['perplexity']:.6f}"
    assert done.stdout.splitlines()[-1] == expected and not (tmp_path / "out").exists()


def test_generate_prints_the_prompt_and_its_continuation(runs, flags):
    arguments = ["train.py", *flags, "--generate=the people of", "--max_new_tokens=8"]
    done = python(*arguments, f"--resume_from={runs / '1-full' / 'ckpt' / 'last'}")
    assert done.stdout.startswith("the people of") and len(done.stdout) > len("the people of\n")
    assert python(*arguments).stdout.startswith("the people of")


def test_a_run_leaves_what_the_readme_promises(runs):
    log, last = runs / "4-full" / "log", runs / "4-full" / "ckpt" / "last"
    assert (log / "metrics.jsonl").is_file() and (log / "curves.png").is_file()
    assert any(log.glob("events.out.tfevents*"))
    assert last.is_symlink() and last.resolve().name.endswith("-0010")
    manifest = json.loads((last / "manifest.json").read_text())
    assert len(manifest["files"]) == 4 and manifest["state"]["step"] == 10
    row = rows(log, "train_loss")[10]
    keys = "step epoch train_loss lr gnorm tokens tokens_per_second step_seconds peak_memory_gib"
    assert set(keys.split()) <= set(row)
    # The step's own time and tokens; it cannot be shorter than what was measured inside it.
    assert row["tokens_per_second"] == pytest.approx(GLOBAL_BATCH * 32 / row["step_seconds"], rel=0.05)
    assert 0 < row["data_seconds"] < row["step_seconds"]


def test_plain_python_trains_and_a_fresh_run_sets_the_old_one_aside(flags, tmp_path):
    python("train.py", *flags, "--max_train_steps=1", *outputs(tmp_path))
    first = (tmp_path / "log" / "metrics.jsonl").read_text()
    again = python("train.py", *flags, "--max_train_steps=1", *outputs(tmp_path))
    assert (tmp_path / "log.1" / "metrics.jsonl").read_text() == first
    assert all((tmp_path / name / "last" / "manifest.json").is_file() for name in ("ckpt", "ckpt.1"))
    assert "set aside in" in again.stderr and again.stderr.startswith("engine: native (")


def test_a_resume_with_nothing_to_do_touches_no_file(runs, flags, tmp_path, caplog):
    caplog.set_level("INFO")
    run = shutil.copytree(runs / "1-full", tmp_path / "run", symlinks=True)
    times = lambda: {p: p.stat().st_mtime_ns for p in run.rglob("[!.]*") if p.is_file()}  # noqa: E731
    before = times()
    assert train.main([*flags, *SCHEDULE, "--resume_from=last", *outputs(run)]) == 0
    assert "nothing to do" in caplog.text
    assert times() == before
