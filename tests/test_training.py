"""train.py on 1, 2 and 4 ranks: its numbers against a plain PyTorch loop, resuming, other world sizes, merging, export."""

import json
import math
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import python, rows, run_cases, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from trainer.checkpoint import Checkpoint
from trainer.sampler import GlobalBatchSampler

RANKS = (1, 2, 4)
GLOBAL_BATCH = 8
SCHEDULE = ["--lr_scheduler=cosine", "--warmup_steps=3", f"--global_batch_size={GLOBAL_BATCH}"]


@pytest.fixture(scope="module")
def runs(flags, prepared, tmp_path_factory):
    """Every run of this module, started with one torchrun for each number of ranks (4 twice: it also resumes what 1 left)."""
    out = tmp_path_factory.mktemp("runs")

    def case(name, *more):
        return [
            *flags,
            *SCHEDULE,
            f"--save_dir={out / name / 'ckpt'}",
            f"--log_dir={out / name / 'log'}",
            *more,
        ]

    middle = f"{4 * GLOBAL_BATCH // len(datasets.load_from_disk(str(prepared))['train']):04d}-0005"

    def here(ranks):  # 10 steps at once; and from what was saved after the 5th, as shards and merged
        name, saved = f"{ranks}-full", out / f"{ranks}-full" / "ckpt"
        (out / f"{ranks}-half").symlink_to(saved / middle)
        return {
            name: case(name, "--max_train_steps=10", "--save_every_n_train_steps=5"),
            f"{ranks}-resumed": case(
                f"{ranks}-resumed", f"--resume_from={out / f'{ranks}-half'}", "--max_train_steps=10"
            ),
            f"{ranks}-merge": case(
                name, f"--merge_checkpoint={out / f'{ranks}-half'}", f"--output_path={saved / 'merged.ckpt'}"
            ),
            f"{ranks}-merged": case(
                f"{ranks}-merged", f"--resume_from={saved / 'merged.ckpt'}", "--max_train_steps=10"
            ),
        }

    def onto(ranks, saved):
        shards, merged = f"{saved}-to-{ranks}-shards", f"{saved}-to-{ranks}-merged"
        return {
            shards: case(shards, f"--resume_from={out / f'{saved}-half'}", "--max_train_steps=10"),
            merged: case(
                merged,
                f"--resume_from={out / f'{saved}-full' / 'ckpt' / 'merged.ckpt'}",
                "--max_train_steps=10",
            ),
        }

    scratch = {
        n: {f"{n}-scratch": case(f"{n}-scratch", "--from_scratch", "--max_train_steps=1")} for n in RANKS
    }
    more = {
        "2-accumulated": case("2-accumulated", "--micro_batch_size=2", "--max_train_steps=10"),
        "2-recomputed": case("2-recomputed", "--recompute=full", "--max_train_steps=10"),
        "2-one-layer": case("2-one-layer", "--recompute=1", "--max_train_steps=10"),
        "2-constant": case("2-constant", "--lr_scheduler=constant", "--max_train_steps=10"),
        "2-five": case("2-five-and-five", "--lr_scheduler=constant", "--max_train_steps=5"),
        "2-and-five": case(
            "2-five-and-five", "--lr_scheduler=constant", "--max_train_steps=10", "--resume_from=last"
        ),
    }
    codes = run_cases(out, 4, here(4) | scratch[4])
    codes |= run_cases(out, 2, here(2) | scratch[2] | onto(2, 4) | more)
    codes |= run_cases(out, 1, here(1) | scratch[1] | onto(1, 2))
    codes |= run_cases(out, 4, onto(4, 1))
    assert set(codes.values()) == {0}, codes
    return out


@pytest.fixture(scope="module")
def reference(tiny, prepared):
    """Loss and gradient norm of ten steps of a plain loop over transformers' own model, document piece by document piece."""
    model = AutoModelForCausalLM.from_pretrained(tiny).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    data = datasets.load_from_disk(str(prepared))["train"]
    order = iter(GlobalBatchSampler(len(data), GLOBAL_BATCH, seed=0))
    losses, norms = [], []
    for step in range(10):
        for group in optimizer.param_groups:  # three steps of warmup, then half a cosine down to 0 at step 10
            group["lr"] = 1e-3 * (
                (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 7))
            )
        optimizer.zero_grad()
        loss_sum, count = 0.0, 0
        for index in next(order):
            part, number = piecewise_loss(model, data[index])
            loss_sum, count = loss_sum + part, count + number
        (loss_sum / count).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append((loss_sum / count).item())
        optimizer.step()
    return losses, norms


def piecewise_loss(model, row):
    """Summed cross entropy of a packed row and its number of targets, each document piece run through the model alone."""
    starts = [t for t, begins in enumerate(row["document_starts"]) if begins and t > 0]
    ids, bounds = torch.tensor(row["input_ids"]), [0, *starts, len(row["input_ids"])]
    total, count = 0.0, 0
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = ids[start:stop]
        if len(piece) > 1:
            logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1]
            total, count = total + F.cross_entropy(logits, piece[1:], reduction="sum"), count + len(piece) - 1
    return total, count


def column(run, key, log="log"):
    return [row[key] for _, row in sorted(rows(run / log, key).items())]


@pytest.mark.parametrize("ranks", RANKS)
def test_losses_and_gradient_norms_match_a_plain_pytorch_loop(runs, reference, ranks):
    losses, norms = reference
    for key, expected in (("train_loss", losses), ("gnorm", norms)):
        found = column(runs / f"{ranks}-full", key)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found == pytest.approx(expected, rel=1e-4)


def test_accumulation_and_micro_batch_change_nothing(runs, reference):
    assert column(runs / "2-accumulated", "train_loss") == pytest.approx(reference[0], rel=1e-4)


@pytest.mark.parametrize("how", ["recomputed", "one-layer"])
def test_recomputing_activations_changes_no_bit(runs, how):
    assert column(runs / f"2-{how}", "train_loss") == column(runs / "2-full", "train_loss")


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses_and_resume_exactly(flags, reference, tmp_path):
    common = [*flags, *SCHEDULE, "--compile=on", "--deterministic", "--max_train_steps=10"]
    torchrun(
        2,
        "train.py",
        *common,
        "--save_every_n_train_steps=5",
        f"--save_dir={tmp_path / 'c'}",
        f"--log_dir={tmp_path / 'l'}",
    )
    assert column(tmp_path, "train_loss", "l") == pytest.approx(reference[0], rel=1e-4)
    middle = next((tmp_path / "c").glob("*-0005"))
    torchrun(
        2,
        "train.py",
        *common,
        f"--resume_from={middle}",
        f"--save_dir={tmp_path / 'c2'}",
        f"--log_dir={tmp_path / 'l2'}",
    )
    assert column(tmp_path, "train_loss", "l2") == column(tmp_path, "train_loss", "l")[5:]


def test_learning_rate_follows_warmup_and_cosine(runs):
    expected = [1e-3 * (n + 1) / 3 for n in range(3)] + [
        5e-4 * (1 + math.cos(math.pi * n / 7)) for n in range(7)
    ]
    assert column(runs / "1-full", "lr") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
def test_tokens_count_every_token_since_the_runs_start(runs, ranks):
    assert column(runs / f"{ranks}-full", "tokens") == [GLOBAL_BATCH * 32 * step for step in range(1, 11)]
    assert column(runs / f"{ranks}-resumed", "tokens") == [GLOBAL_BATCH * 32 * step for step in range(6, 11)]


@pytest.mark.parametrize("ranks", RANKS)
def test_validation_loss_equals_a_computation_from_the_saved_dataset(runs, tiny, prepared, ranks):
    source = Checkpoint.open(runs / f"{ranks}-full" / "ckpt" / "last")
    model = AutoModelForCausalLM.from_pretrained(tiny).float()
    model.load_state_dict(dict(source.parameters()))
    with torch.no_grad():
        parts = [piecewise_loss(model, row) for row in datasets.load_from_disk(str(prepared))["validation"]]
    expected = (sum(loss for loss, _ in parts) / sum(count for _, count in parts)).item()
    found = rows(runs / f"{ranks}-full" / "log", "val_loss")[10]
    assert found["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == math.exp(found["val_loss"])


def weights(run):
    return {name: tensor for name, tensor in Checkpoint.open(run / "ckpt" / "last").parameters()}


EXACT = ("step", "epoch", "train_loss", "lr", "gnorm", "tokens")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("how", ["resumed", "merged"])
def test_resuming_is_bit_exact_from_shards_and_from_a_merged_file(runs, ranks, how):
    whole, resumed = (
        rows(runs / f"{ranks}-full" / "log", "train_loss"),
        rows(runs / f"{ranks}-{how}" / "log", "train_loss"),
    )
    for step in range(6, 11):
        assert {key: resumed[step][key] for key in EXACT} == {key: whole[step][key] for key in EXACT}
    assert (
        rows(runs / f"{ranks}-full" / "log", "val_loss")[10]
        == rows(runs / f"{ranks}-{how}" / "log", "val_loss")[10]
    )
    expected = weights(runs / f"{ranks}-full")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in weights(runs / f"{ranks}-{how}").items()
    )


def test_five_steps_and_five_more_in_the_same_folder_are_ten_steps(runs):
    assert column(runs / "2-five-and-five", "train_loss") == column(runs / "2-constant", "train_loss")
    expected = weights(runs / "2-constant")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in weights(runs / "2-five-and-five").items()
    )


@pytest.mark.parametrize("move", ["4-to-2", "2-to-1", "1-to-4"])
@pytest.mark.parametrize("file", ["shards", "merged"])
def test_another_world_size_continues_the_same_run(runs, move, file):
    moved, whole = (
        rows(runs / f"{move}-{file}" / "log", "train_loss"),
        rows(runs / f"{move[0]}-full" / "log", "train_loss"),
    )
    assert sorted(moved) == [6, 7, 8, 9, 10]
    for step, row in moved.items():
        assert row["train_loss"] == pytest.approx(whole[step]["train_loss"], rel=1e-4)
        assert (row["lr"], row["tokens"], row["epoch"]) == (
            whole[step]["lr"],
            whole[step]["tokens"],
            whole[step]["epoch"],
        )


def test_a_schedule_whose_horizon_moves_is_said(runs, flags, tmp_path):
    done = python("train.py", *flags, *SCHEDULE, f"--resume_from={runs / '1-half'}", "--max_train_steps=6",
                  f"--save_dir={tmp_path / 'c'}", f"--log_dir={tmp_path / 'l'}")  # fmt: skip
    assert "the cosine schedule now ends at step 6, it was 10" in done.stderr


def test_fresh_weights_are_the_same_on_every_world_size(runs):
    first = [column(runs / f"{ranks}-scratch", "train_loss")[0] for ranks in RANKS]
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)
    assert math.log(320) - 0.5 < first[0] < math.log(320) + 1.5


def test_merged_file_is_one_safetensors_file_with_hugging_face_names(runs, tiny):
    merged = load_file(runs / "4-full" / "ckpt" / "merged.ckpt")
    names = set(load_file(tiny / "model.safetensors"))
    expected = {f"model.{n}" for n in names} | {
        f"optimizer.{n}.{k}" for n in names for k in ("exp_avg", "exp_avg_sq")
    }
    assert set(merged) == expected
    shards = Checkpoint.open(runs / "4-half")
    assert all(torch.equal(tensor, shards.read(name)) for name, tensor in merged.items())


def test_export_loads_in_transformers_and_has_the_trainers_validation_loss(runs, flags, prepared, tmp_path):
    run = runs / "2-full"
    python("train.py", *flags, f"--export_hf={run / 'ckpt' / 'last'}", f"--output_path={tmp_path / 'hf'}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32
    with torch.no_grad():
        parts = [piecewise_loss(model, row) for row in datasets.load_from_disk(str(prepared))["validation"]]
    expected = rows(run / "log", "val_loss")[10]["val_loss"]
    assert (sum(p for p, _ in parts) / sum(n for _, n in parts)).item() == pytest.approx(expected, rel=1e-4)


def test_an_export_replaces_an_export_and_nothing_else(runs, flags, tiny, tmp_path, capsys):
    export = [*flags, f"--export_hf={runs / '1-full' / 'ckpt' / 'last'}"]
    mine = shutil.copytree(tiny, tmp_path / "mine")
    assert train.main([*export, f"--output_path={mine}"]) == 2
    assert "something other than an exported model" in capsys.readouterr().err
    assert (mine / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    for _ in range(2):
        assert train.main([*export, f"--output_path={tmp_path / 'hf'}"]) == 0


def test_evaluate_prints_the_trainers_validation_loss(runs, flags, tmp_path):
    done = torchrun(2, "train.py", *flags, "--evaluate", f"--resume_from={runs / '2-full' / 'ckpt' / 'last'}",
                    f"--log_dir={tmp_path / 'log'}")  # fmt: skip
    expected = rows(runs / "2-full" / "log", "val_loss")[10]
    assert (
        done.stdout.splitlines()[-1]
        == f"val_loss={expected['val_loss']:.6f} perplexity={expected['perplexity']:.6f}"
    )
    assert not (tmp_path / "log").exists()


def test_generate_prints_the_prompt_and_its_continuation(runs, flags):
    arguments = ["train.py", *flags, "--generate=the people of", "--max_new_tokens=8"]
    done = python(*arguments, f"--resume_from={runs / '1-full' / 'ckpt' / 'last'}")
    assert done.stdout.startswith("the people of") and len(done.stdout) > len("the people of\n")
    assert python(*arguments).stdout.startswith("the people of")


def test_a_run_leaves_what_the_readme_promises(runs):
    run = runs / "4-full"
    assert {"metrics.jsonl", "curves.png"} < {path.name for path in (run / "log").iterdir()}
    assert any(path.name.startswith("events.out.tfevents") for path in (run / "log").iterdir())
    last = run / "ckpt" / "last"
    assert last.is_symlink() and last.resolve().name.endswith("-0010")
    manifest = json.loads((last / "manifest.json").read_text())
    assert len(manifest["files"]) == 4 and manifest["state"]["step"] == 10
    row = rows(run / "log", "train_loss")[10]
    keys = {
        "step",
        "epoch",
        "train_loss",
        "lr",
        "gnorm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "peak_memory_gib",
    }
    assert keys <= set(row)
    # The step's own time and tokens; it cannot be shorter than what was measured inside it.
    assert row["tokens_per_second"] == pytest.approx(GLOBAL_BATCH * 32 / row["step_seconds"], rel=0.05)
    assert 0 < row["data_seconds"] < row["step_seconds"]


def test_plain_python_trains_and_a_fresh_run_sets_the_old_one_aside(flags, tmp_path):
    common = [
        *flags,
        "--max_train_steps=1",
        "--global_batch_size=8",
        f"--save_dir={tmp_path / 'ckpt'}",
        f"--log_dir={tmp_path / 'log'}",
    ]
    python("train.py", *common)
    first = (tmp_path / "log" / "metrics.jsonl").read_text()
    again = python("train.py", *common)
    assert (tmp_path / "log.1" / "metrics.jsonl").read_text() == first
    assert (tmp_path / "ckpt.1" / "last" / "manifest.json").is_file() and (
        tmp_path / "ckpt" / "last" / "manifest.json"
    ).is_file()
    assert "set aside as" in again.stderr


def test_a_resume_with_nothing_to_do_touches_no_file(runs, flags, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "1-full", run, symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = python("train.py", *flags, *SCHEDULE, "--resume_from=last", "--max_train_steps=10",
                  f"--save_dir={run / 'ckpt'}", f"--log_dir={run / 'log'}")  # fmt: skip
    assert "nothing to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
