"""nnScaler 0.8 itself under train.py, on a CPU: trains as our Trainer does, resumes, merges, and moves checkpoints between the two.

Where nnScaler is not installed these are skipped; what they need is in requirements-nnscaler.txt.
"""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.runs import ROOT, environment, make_model, python, rows

pytestmark = [
    pytest.mark.nnscaler,
    pytest.mark.skipif(
        importlib.util.find_spec("nnscaler") is None,
        reason="nnScaler is not installed (requirements-nnscaler.txt)",
    ),
]

ON_CPU = ROOT / "tests" / "helpers" / "nnscaler_cpu.py"
TEN_STEPS = ["--global_batch_size=8", "--lr_scheduler=cosine", "--warmup_steps=3", "--max_train_steps=10"]


class Runs:
    """Starts train.py on either engine, each run in a folder of its own."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, [*flags, *TEN_STEPS]

    def argv(self, name, *more):
        return [
            *self.flags,
            f"--save_dir={self.folder / name / 'ckpt'}",
            f"--log_dir={self.folder / name / 'log'}",
            *more,
        ]

    def start(self, ranks, *argv):
        """Under torchrun, in the folder: generated code and profiles stay there."""
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            *map(str, argv),
        ]
        home = environment(HOME=str(self.folder))
        done = subprocess.run(command, cwd=self.folder, env=home, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (
            f"{command} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )

    def nnscaler(self, name, ranks, *more):
        policy = [] if any("pas_policy" in flag for flag in more) else ["--pas_policy=dp"]
        nnscaler = ["--engine=nnscaler", *policy, *more]
        self.start(ranks, ON_CPU, ROOT / "train.py", *self.argv(name, *nnscaler))
        return self.losses(name)

    def native(self, name, ranks, *more):
        self.start(ranks, ROOT / "train.py", *self.argv(name, "--engine=native", *more))
        return self.losses(name)

    def losses(self, name):
        """Step -> training loss, and "val" -> the last validation loss."""
        log_dir = self.folder / name / "log"
        found = {step: row["train_loss"] for step, row in rows(log_dir, "train_loss").items()}
        return found | {"val": list(rows(log_dir, "val_loss").values())[-1]["val_loss"]}

    def generated(self):
        """The folders of generated code, and when each was written."""
        return {
            path.parts[-7]: path.stat().st_mtime_ns
            for path in self.folder.glob(".nnscaler/*/_parallel_modules/*/*/*/_/gencode0.py")
        }


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < tolerance, (found, expected)


def after(losses, step):
    return {key: loss for key, loss in losses.items() if key == "val" or key > step}


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("nnscaler"), flags)


@pytest.fixture(scope="module")
def whole(runs):
    """Ten steps on two ranks of nnScaler, saved after the fifth, and merged from there."""
    losses = runs.nnscaler("whole", 2, "--save_every_n_train_steps=5")
    half = runs.folder / "whole" / "ckpt" / "0000-0005"
    shutil.copytree(half, runs.folder / "half")
    done = python(
        "train.py",
        *runs.argv("whole", f"--merge_checkpoint={half}", f"--output_path={runs.folder / 'merged.ckpt'}"),
    )
    assert "merged" in done.stdout
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_engines_have_the_same_losses(runs, ranks):
    theirs, ours = runs.nnscaler(f"n{ranks}", ranks), runs.native(f"o{ranks}", ranks)
    for step in ours:  # the table of the README
        print(f"{ranks} ranks, step {step}: nnscaler {theirs[step]:.6f} native {ours[step]:.6f}")
    assert_close(theirs, ours)


@pytest.mark.slow
def test_autodist_with_recompute_has_the_same_losses(runs):
    theirs = runs.nnscaler("autodist", 2, "--pas_policy=autodist", "--recompute=full")
    assert_close(theirs, runs.native("plain", 2))


def test_tied_embeddings_have_the_same_losses_and_move_between_the_engines(runs, tmp_path):
    tied = f"--model_id={make_model(tmp_path / 'tied', tie_word_embeddings=True)}"
    theirs = runs.nnscaler("tied", 2, tied, "--save_every_n_train_steps=5")
    python(
        "train.py",
        *runs.argv("tied", tied, f"--merge_checkpoint={runs.folder / 'tied' / 'ckpt' / '0000-0005'}"),
    )
    merged = f"--resume_from={runs.folder / 'tied' / 'ckpt' / 'merged.ckpt'}"
    assert_close(runs.native("tied-native", 2, tied, merged), after(theirs, 5))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resuming_shards_continues_on_any_world_size(runs, whole, ranks):
    resumed = runs.nnscaler(f"shards-{ranks}", ranks, f"--resume_from={runs.folder / 'half'}")
    assert_close(resumed, after(whole, 5))
    assert ranks != 2 or resumed == after(whole, 5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resuming_the_merged_file_continues_on_any_world_size(runs, whole, ranks):
    assert_close(
        runs.nnscaler(f"merged-{ranks}", ranks, f"--resume_from={runs.folder / 'merged.ckpt'}"),
        after(whole, 5),
    )


def test_resume_from_last_continues_in_the_same_folder(runs, whole):
    log = runs.folder / "whole" / "log" / "metrics.jsonl"
    before = log.read_text()
    runs.nnscaler("whole", 2, "--resume_from=last", "--max_train_steps=12", "--lr_scheduler=constant")
    assert log.read_text().startswith(before)
    assert list(rows(log.parent, "train_loss")) == list(range(1, 13))


@pytest.mark.parametrize("ranks", [1, 2])
def test_our_trainer_continues_from_nnscalers_merged_file(runs, whole, ranks):
    assert_close(
        runs.native(f"ours-{ranks}", ranks, f"--resume_from={runs.folder / 'merged.ckpt'}"), after(whole, 5)
    )


def test_our_trainer_takes_over_a_folder_of_nnscalers_and_it_stays_ours(runs, whole):
    saves = runs.folder / "turns" / "ckpt"
    runs.nnscaler("turns", 1, "--max_train_steps=2")
    merged = [f"--resume_from={runs.folder / 'merged.ckpt'}", "--max_train_steps=6"]
    runs.native("turns", 1, *merged)
    assert (saves / "last" / "manifest.json").exists() and (saves / "0000-0002" / "0.ckpt").exists()
    done = python(ON_CPU, "train.py", *runs.argv("turns", "--engine=nnscaler", *merged), check=False)
    assert done.returncode == 2 and "give another --save_dir" in done.stderr
    runs.native("turns", 1, "--max_train_steps=1")  # a fresh run: all of it is set aside
    assert (saves.with_name("ckpt.1") / "0000-0002" / "0.ckpt").exists()


def test_exported_weights_move_both_ways(runs, whole):
    """nnScaler's weights, from its shards, evaluate the same in ours; an export starts nnScaler where it starts ours."""
    hf = runs.folder / "hf"
    python("train.py", *runs.argv("whole", f"--export_hf={runs.folder / 'half'}", f"--output_path={hf}"))
    said = python("train.py", *runs.argv("whole", "--evaluate", f"--model_id={hf}")).stdout.splitlines()[-1]
    saved = rows(runs.folder / "whole" / "log", "val_loss")[5]["val_loss"]
    assert abs(float(said.split("=")[1].split()[0]) - saved) < 1e-4
    start = [f"--model_id={hf}", "--max_train_steps=2"]
    assert_close(runs.nnscaler("from-hf", 1, *start), runs.native("from-hf-native", 1, *start))


@pytest.mark.slow
def test_generated_code_is_reused_for_the_same_flags_and_never_for_others(runs):
    few = ["--max_train_steps=1"]
    runs.nnscaler("first", 1, *few)
    before = runs.generated()
    runs.nnscaler("again", 1, *few, "--learning_rate=5e-4")
    assert runs.generated() == before
    changes = [
        ["--precision=bf16"],
        ["--from_scratch"],
        ["--num_hidden_layers=2"],
        ["--from_scratch", "--seed=1"],
        ["--micro_batch_size=2"],
    ]
    for index, change in enumerate(changes):
        runs.nnscaler(f"change-{index}", 1, *few, *change)
        assert len(runs.generated()) == len(before) + index + 1, change


def test_rope_frequencies_stay_in_fp32_under_bf16(runs):
    runs.nnscaler("bf16", 2, "--precision=bf16", "--max_train_steps=2")
    code = [
        path.read_text() for path in runs.folder.glob(".nnscaler/*/_parallel_modules/*/*/*/_/gencode0.py")
    ]
    half = [text for text in code if "dtype=torch.bfloat16" in text]
    assert half
    for text in half:
        assert "float32" in next(
            line for line in text.splitlines() if "register_buffer" in line and "inv_freq" in line
        )


def test_a_fresh_run_sets_the_old_one_aside_and_an_epochs_end_is_saved(runs):
    for _ in range(2):
        losses = runs.nnscaler(
            "aside", 2, "--micro_batch_size=4", "--global_batch_size=64", "--max_train_steps=5"
        )
    assert list(losses)[:5] == [1, 2, 3, 4, 5]
    assert (runs.folder / "aside" / "ckpt.1" / "last" / "0.ckpt").exists()
    saved = {path.name for path in (runs.folder / "aside" / "ckpt").glob("*-*")}
    assert (
        len(saved) == 2 and "0000-0005" in saved
    )  # 218 samples: the fourth batch of 64 ends the first epoch
    assert "0000-0004" in saved


def test_sigterm_saves_and_leaves(runs):
    argv = runs.argv(
        "killed",
        "--engine=nnscaler",
        "--pas_policy=dp",
        "--max_train_steps=100000",
        "--lr_scheduler=constant",
    )
    command = [sys.executable, str(ON_CPU), str(ROOT / "train.py"), *argv]  # without torchrun, too
    process = subprocess.Popen(command, cwd=runs.folder, env=environment(), stderr=subprocess.PIPE, text=True)
    log = runs.folder / "killed" / "log" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said[-3000:]
    state = json.loads(next((runs.folder / "killed" / "ckpt").glob("*-*/state.json")).read_text())
    assert state["step"] == max(rows(log.parent, "train_loss"))


def test_what_nnscaler_cannot_do_is_refused_in_a_sentence(runs, whole):
    ours = runs.folder / "o2" / "ckpt" / "last"
    if not ours.exists():
        runs.native("o2", 2)
    cases = {
        "--compile=on": "does not support compile",
        "--recompute=1": "does not support recompute of some layers",
        f"--resume_from={ours}": "which our Trainer wrote",
    }
    for flag, sentence in cases.items():
        done = python(ON_CPU, "train.py", *runs.argv("refused", "--engine=nnscaler", flag), check=False)
        assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
    done = python("train.py", *runs.argv("refused", f"--resume_from={runs.folder / 'half'}"), check=False)
    assert done.returncode == 2 and "--merge_checkpoint" in done.stderr
