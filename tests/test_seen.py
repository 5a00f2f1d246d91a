"""What a person sees: the banner, the progress, the summary, and commands that work as they are printed."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios

import datasets
import pytest
from helpers.runs import ROOT, environment, make_text, outputs, rows, start

import train
from cli import report, settings
from cli.config import parse
from trainer.loggers import Progress, duration


def told(text: str, name: str) -> str:
    """What the aligned lines of a banner or a summary say under that name."""
    return re.search(rf"^  {name} +(.*)$", text, re.M)[1]


def following(text: str) -> str:
    """The command after `next:`."""
    return re.search("^next: (.*)$", text, re.M)[1]


def run_printed(command: str) -> subprocess.CompletedProcess:
    """Runs a command as a shell would that has this Python on its PATH."""
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    options = dict(cwd=ROOT, env=environment(PATH=path), shell=True, capture_output=True, text=True)
    done = subprocess.run(command, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done


def run_here(command: str) -> str:
    """Runs a printed command in this process, and returns what it logs and prints."""
    said, words = io.StringIO(), shlex.split(command)
    handler, root = logging.StreamHandler(said), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(said):
            assert train.main(words[words.index("train.py") + 1 :]) == 0
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    return said.getvalue()


@pytest.fixture(scope="module")
def chain(tiny, tmp_path_factory):
    """What each command said, from preparation to generated text; each is what the one before it printed."""
    out = tmp_path_factory.mktemp("a chain")  # with a space, which the commands must quote
    text = make_text(out / "text.jsonl", documents=60)
    flags = [f"--model_id={tiny}", f"--dataset_id={text}", f"--dataset_path={out / 'data'}", *outputs(out)]
    flags += ["--max_seq_len=32", "--validation_fraction=0.2", "--global_batch_size=4", "--max_train_steps=3"]
    flags += ["--precision=fp32", "--learning_rate=1e-3", "--val_every_n_train_steps=2"]
    said = {"prepare": run_here(shlex.join(["train.py", "--prepare_data", *flags]))}
    said["train"] = run_printed(following(said["prepare"])).stderr
    said["longer"] = run_here(told(said["train"], "or longer"))
    said["export"] = run_here(told(said["train"], "next"))
    said["generate"] = run_here(following(said["export"]))
    said["merge"] = run_here(f"train.py --merge_checkpoint '--save_dir={out / 'ckpt'}'")
    said["export merged"] = run_here(following(said["merge"]))
    return out, said


def test_each_printed_command_leads_to_the_next(chain):
    out, said = chain
    assert sorted(rows(out / "log", "train_loss")) == [1, 2, 3, 4, 5, 6]  # three steps, then three more
    assert "resumed from" in said["longer"] and (out / "ckpt" / "hf" / "config.json").exists()
    assert "Once upon a time" in said["generate"]
    assert f"exported {out / 'ckpt' / 'merged.ckpt'} to" in said["export merged"]


def test_the_banner_says_what_runs(chain, tiny):
    from transformers import AutoModelForCausalLM

    out, said = chain
    banner, count = said["train"], AutoModelForCausalLM.from_pretrained(tiny).num_parameters()
    data = datasets.load_from_disk(out / "data")
    samples, held_out = len(data["train"]), len(data["validation"])
    assert told(banner, "devices") == "1 x CPU, gloo"
    assert told(banner, "model") == f"{tiny}, {count:,} parameters"
    expected = f"{out / 'data'}: {samples:,} samples of 32 tokens ({samples * 32:,} tokens)"
    assert told(banner, "data") == f"{expected}, {held_out} samples for validation"
    assert told(banner, "batch") == "4 samples, 128 tokens"
    assert told(banner, "steps") == f"3: {samples / 4:,.1f} steps an epoch, {12 / samples:.2f} epochs"
    assert told(banner, "precision") == "fp32 (--precision), layers not compiled"
    assert told(banner, "layout").endswith("1 shards x 1 replicas, micro-batch 1 x 4 accumulated")
    assert banner.index("devices") < banner.index("train_loss")


def test_the_banner_counts_what_an_adapter_trains(tiny):
    import peft
    from transformers import AutoModelForCausalLM

    ours = parse([f"--model_id={tiny}", "--lora_rank=2", "--lora_targets=q_proj,v_proj"]).config
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    trained, total = model.get_nb_trainable_parameters()
    expected = f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%}): LoRA of rank 2 on"
    assert expected in report.model(settings.model_arguments(ours), 32, "fp32")


def test_the_lines_and_the_summary_say_what_the_metrics_hold(chain):
    out, said = chain
    logged, validated = rows(out / "log", "train_loss"), rows(out / "log", "val_loss")
    lines = [line for line in said["train"].splitlines() if line.startswith("Epoch ")]
    seconds = [logged[step]["step_seconds"] for step in (2, 3)]  # the first may compile
    left = {1: "", 2: f", {duration(seconds[0])} left", 3: ""}
    for step, line in enumerate(lines, 1):
        row = logged[step]
        numbers = f"lr {row['lr']:.3g}, gnorm {row['gnorm']:.3g}, {row['tokens_per_second']:,.0f} tokens/s"
        start = f"Epoch {row['epoch']}: {step}/3 train_loss={row['train_loss']:.4f}, {numbers}"
        assert line == f"{start}, {row['peak_memory_gib']:.1f} GiB{left[step]}"
    assert len(lines) == 3
    summary, total = said["train"], sum(logged[step]["step_seconds"] for step in (1, 2, 3))
    losses = f"loss {logged[1]['train_loss']:.4f} at step 1, loss {logged[3]['train_loss']:.4f} at step 3"
    assert told(summary, "training") == losses
    first, last = (f"{validated[step]['val_loss']:.4f} at step {step}" for step in (2, 3))
    assert told(summary, "validation").startswith(f"loss {first}, {last}")
    speed = f": {logged[3]['tokens']:,} tokens, {logged[3]['tokens'] / total:,.0f} tokens/s"
    assert re.fullmatch(f"3 steps in [0-9]+ s{re.escape(speed)}", told(summary, "trained"))
    assert told(summary, "memory") == f"peak of a rank {logged[3]['peak_memory_gib']:.2f} GiB"
    assert told(summary, "curves") == str(out / "log" / "curves.png")
    again = sum(logged[step]["step_seconds"] * logged[step]["tokens_per_second"] for step in (4, 5, 6))
    assert "3 steps in" in told(said["longer"], "trained") and f": {again:,.0f} tokens" in said["longer"]


def test_a_save_is_one_line_and_comes_before_its_validation(chain):
    out, said = chain
    lines = [line for line in said["train"].splitlines() if re.search("^saved|val_loss=", line)]
    assert [line.split(" in ")[0].split(":")[0] for line in lines] == [
        "step 2",
        f"saved {out / 'ckpt' / '0000-0003'}",
        "step 3",
    ]
    assert re.fullmatch(r"saved .* in \d+\.\d s", lines[1])


def test_the_time_left_is_the_median_steps_without_the_first(caplog):
    caplog.set_level("INFO")
    seen, row = Progress(last_step=100), dict(epoch=0, train_loss=1.0, lr=1e-3, gnorm=1.0)
    for step, seconds in enumerate((900, 60, 70, 500), 1):
        speed = dict(step_seconds=seconds, tokens_per_second=11150.4, peak_memory_gib=3.25, mfu=0.416)
        seen.log_metrics(row | speed, step, "train")
    ends = [message.split("11,150 tokens/s, MFU 42%, 3.2 GiB")[1] for message in caplog.messages]
    assert ends == ["", f", {60 * 98 / 60:.0f} min left", ", 1.8 h left", f", {70 * 96 / 3600:.1f} h left"]


def test_durations_are_as_people_say_them():
    seconds = (7, 99, 100, 5999, 6000, 86400, 86400 * 10)
    assert [*map(duration, seconds)] == ["7 s", "99 s", "2 min", "100 min", "1.7 h", "24.0 h", "10.0 days"]


def screen(output: str) -> list[str]:
    """The lines of a terminal after that output, of which it knows carriage returns and line feeds."""
    lines, place = [""], 0
    for part in re.split("([\r\n])", output):
        if part == "\r":
            place = 0
        elif part == "\n":
            lines.append("")
        else:
            lines[-1] = (lines[-1][:place].ljust(place) + part + lines[-1][place + len(part) :]).rstrip()
            place += len(part)
    return lines


def test_on_a_terminal_a_bar_shows_progress_and_nothing_tears_it(flags, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    more = ["--max_train_steps=30", "--save_every_n_train_steps=10", "--async_save=on", *outputs(tmp_path)]
    process = start(["train.py", *flags, *more], tmp_path / "stdout", os.ttyname(theirs))
    seen = os.read(ours, 65536)  # from now on, the process has the terminal open
    os.close(theirs)
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(60) == 0, seen.decode()
    lines, logged = screen(seen.decode()), rows(tmp_path / "log", "train_loss")
    bars = [line for line in lines if "█" in line]
    assert len(bars) == 1, lines
    assert bars[0].startswith(f"step 30/30 |{'█' * 12}| loss {logged[30]['train_loss']:.4f}, lr 0.001, gnorm")
    assert len(bars[0]) <= 100 and " tokens/s, " in bars[0] and max(map(len, seen.decode().split("\r"))) < 400
    assert any(" left, loss " in part for part in seen.decode().split("\r"))
    saves = [line for line in lines if "saved" in line]
    assert len(saves) == 3 and all(
        re.fullmatch(r"saved \S+ in \d+\.\d s( in the background.*)?", s) for s in saves
    )
    assert (
        sum(bool(re.fullmatch(r"step \d+: val_loss=\d\.\d{6} perplexity=\d+\.\d{4}", s)) for s in lines) == 3
    )
    assert not any("Epoch" in line for line in lines) and lines.index(bars[0]) < len(lines) - 5


def test_the_command_after_an_interruption_continues_on_as_many_ranks(launch, flags, tmp_path):
    run = launch("train.py", *flags, "--max_train_steps=4000", ranks=2)
    run.wait_for_step(1)
    run.process.send_signal(signal.SIGTERM)
    said, stopped = run.end(code=1), max(rows(tmp_path / "log", "train_loss"))
    command = following(said)
    assert "--nproc_per_node=2" in command and said.count("next: ") == 1
    again = run_printed(f"{command} --max_train_steps={stopped + 2}")
    assert f"step {stopped}, {4 * stopped} samples seen" in again.stderr
    assert max(rows(tmp_path / "log", "train_loss")) == stopped + 2
    lines = [line for line in again.stderr.splitlines() if "OMP_NUM_THREADS" not in line and line.strip("* ")]
    assert len(lines) == len({*lines}) and told(again.stderr, "devices") == "2 x CPU, gloo"


WRONG = {
    "wandb": "--report_to=wandb needs wandb, which is not installed. Install it with `pip install wandb`",
    "tensorboard,trackio": "needs trackio, which is not installed. Install it with `pip install trackio`",
    "neptune": "--report_to names neptune, which is not a reporter. Give some of tensorboard, wandb, trackio",
}


@pytest.mark.parametrize("where", WRONG)
def test_where_it_cannot_report_is_a_sentence_before_training(flags, tmp_path, monkeypatch, capsys, where):
    for library in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    assert train.main([*flags, f"--report_to={where}", *outputs(tmp_path)]) == 2
    assert WRONG[where] in capsys.readouterr().err and not (tmp_path / "log").exists()


def test_reporting_to_none_leaves_the_metrics_alone(flags, tmp_path):
    argv = [*flags, "--report_to=none", "--max_train_steps=1", *outputs(tmp_path)]
    assert train.main(argv) == 0
    names = {path.name for path in (tmp_path / "log").iterdir()}
    assert "metrics.jsonl" in names and not any("tfevents" in name for name in names)
