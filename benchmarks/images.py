"""Draws images/ from runs that it makes: python benchmarks/images.py [--runs=FOLDER].

A run whose metrics are there is not made again. images/README.rst, which this writes, names each picture's
commands. `peers` needs an idle machine.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from common import ROOT

from plan.devices import DEVICES
from plan.planner import usable_gib
from tools import curves

IMAGES = ROOT / "images"
TWO_RANKS = "torchrun --local-addr=127.0.0.1 --nproc_per_node=2 train.py"
DEMO = "--demo --dataset_path=sotu-512 --val_every_n_train_steps=10"
# A Llama of 42 million parameters, 33 of them in the embedding of Llama 3's vocabulary.
SMALL = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
SMALL |= dict(num_key_value_heads=4, vocab_size=128256, max_position_embeddings=512, model_type="llama")
SMALL |= dict(tie_word_embeddings=True, rope_theta=500000.0)
SCRATCH = "--model_id=small --tokenizer_id=llama3 --from_scratch --dataset_id=sotu --max_seq_len=512"
SCRATCH += " --dataset_path=sotu-llama3 --validation_fraction=0.02"
LEARN = "--micro_batch_size=4 --global_batch_size=16 --learning_rate=1e-3 --lr_scheduler=cosine"
RESUMED = "--save_dir=resume/ckpt --log_dir=resume/log"
# Picture -> the commands that made it; each runs in the folder of runs.
RUNS = {
    "demo": [
        f"python train.py {DEMO} --prepare_data",
        f"{TWO_RANKS} {DEMO} --max_train_steps=40 --save_dir=demo/ckpt --log_dir=demo/log",
    ],
    "resume": [
        f"{TWO_RANKS} {DEMO} --max_train_steps=20 {RESUMED}",
        f"{TWO_RANKS} {DEMO} --max_train_steps=40 {RESUMED} --resume_from=last",
    ],
    "scratch": [
        f"python train.py {SCRATCH} --prepare_data",
        f"{TWO_RANKS} {SCRATCH} {LEARN} --warmup_steps=10 --max_train_steps=120"
        " --val_every_n_train_steps=20 --compile=on --save_dir=scratch/ckpt --log_dir=scratch/log",
    ],
    "plan": [
        "python train.py --plan --world_size=8 --device_type=h100-80g --output_path=plan/8-h100.json",
        "python train.py --plan --world_size=8 --device_type=a100-40g --output_path=plan/8-a100.json",
    ],
    "peers": ["python benchmarks/peers.py smollm2-1 smollm2-2 vocabulary --output_path=peers/peers.json"],
}
DONE = {"demo": "log/metrics.jsonl", "resume": "log/metrics.jsonl", "scratch": "log/metrics.jsonl"}
DONE |= {"plan": "8-a100.json", "peers": "peers.json"}


def run(command: str, folder: Path) -> None:
    words = shlex.split(command)
    launcher = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words[1:]]
    print(command, flush=True)
    subprocess.run([*launcher, *words], cwd=folder, check=True, stdout=sys.stderr)


# ---------------------------------------------------------------- pictures


def loss_picture(log_dirs: dict[str, Path], title: str):
    """Training loss, raw and smoothed, and validation loss over the optimizer steps, for each run."""
    found, axis = canvas(title)
    for (name, log_dir), color in zip(log_dirs.items(), (curves.BLUE, curves.RED), strict=False):
        rows = curves.read_metrics(log_dir)
        curves.curve(axis, curves.points(rows, "train_loss"), color, f"training{name}")
        validated = curves.points(rows, "val_loss")
        axis.plot(
            *zip(*validated, strict=True), "o--", ms=6, lw=1, color=curves.ORANGE, label=f"validation{name}"
        )
    axis.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axis.legend()
    return found


def demo(runs: Path):
    return loss_picture(
        {"": runs / "demo/log"}, "make demo, for 40 steps: SmolLM2-135M reads State of the Union messages"
    )


def scratch(runs: Path):
    return loss_picture(
        {"": runs / "scratch/log"}, "From scratch: 41 million parameters, Llama 3's tokenizer"
    )


def resume(runs: Path):
    """An undisturbed run beneath one that two launches made: the same points."""
    found, axis = canvas("Resumed after step 20: every loss equals the undisturbed run's to the last bit")
    whole, again = (
        dict(curves.points(curves.read_metrics(runs / name / "log"), "train_loss"))
        for name in ("demo", "resume")
    )
    assert all(whole[step] == loss for step, loss in again.items()), "the resumed run differs"
    axis.plot(
        [*again], [whole[step] for step in again], lw=5, color=curves.BLUE, alpha=0.35, label="undisturbed"
    )
    for part, color in ((range(1, 21), curves.BLUE), (range(21, 41), curves.RED)):
        label = "first launch, 20 steps" if 1 in part else "resumed"
        axis.plot(part, [again[step] for step in part], "o-", ms=3, lw=1, color=color, label=label)
    axis.axvline(20.5, color=curves.GREY, ls=":")
    axis.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    axis.legend()
    return found


def plan(runs: Path):
    """Memory by part of each recompute's fastest plan, beside what a device has."""
    found, axis = canvas("--plan: Llama 3 8B on 8 GPUs, 8,192 tokens a sample: predicted memory of a GPU")
    bars = []
    for name, file, device in (("H100 80 GB", "8-h100", "h100-80g"), ("A100 40 GB", "8-a100", "a100-40g")):
        rows = json.loads((runs / "plan" / f"{file}.json").read_text())["candidates"]
        limit = usable_gib(DEVICES[device])
        for kind in ("none", "selective", "some", "full"):
            of = [r for r in rows if kind == ("some" if isinstance(r["recompute"], int) else r["recompute"])]
            if of:
                best = max(
                    of,
                    key=lambda r: r["predicted_tokens_per_second"] if r["fits"] else -r["predicted_peak_gib"],
                )
                bars.append((f"{name}, recompute {best['recompute']}", best, limit))
    for place, (_, row, limit) in enumerate(bars):
        left = 0.0
        parts = (
            ("state_gib", "weights, gradients, AdamW", curves.BLUE),
            ("activations_gib", "activations", curves.ORANGE),
        )
        for key, label, color in (*parts, ("work_gib", "a layer at work, loss, gathering", curves.GREEN)):
            axis.barh(place, row[key], left=left, color=color, label=label if not place else None)
            left += row[key]
        axis.plot(
            [limit] * 2,
            [place - 0.45, place + 0.45],
            color="black",
            label=None if place else "what tensors may take",
        )
        speed = f"{row['predicted_tokens_per_second']:,.0f} tokens/s" if row["fits"] else "does not fit"
        axis.text(max(left, limit) + 1, place, speed, va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [label for label, *_ in bars])
    axis.set(xlabel="GiB")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    found.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return found


def peers(runs: Path):
    """Our speed and memory as ratios to transformers' Trainer."""
    cases = json.loads((runs / "peers/peers.json").read_text())
    names = {
        "smollm2-1": "SmolLM2-135M\n1 rank",
        "smollm2-2": "SmolLM2-135M\n2 ranks",
        "vocabulary": "Llama 3's\nvocabulary",
    }
    found, axis = canvas("On a CPU, beside transformers' Trainer (= 1)")
    keys = (
        ("tokens_per_second", "tokens per second: more is better", curves.BLUE),
        ("peak_memory_gib", "peak memory: less is better", curves.ORANGE),
    )
    for shift, (key, label, color) in zip((-0.2, 0.2), keys, strict=True):
        ratios = [cases[case]["ours"][key] / cases[case]["theirs"][key] for case in names]
        bars = axis.bar(
            [place + shift for place in range(len(names))], ratios, 0.38, color=color, label=label
        )
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios])
    axis.axhline(1, color=curves.GREY, lw=1)
    axis.set_xticks(range(len(names)), names.values())
    axis.set(ylabel="train.py / transformers' Trainer")
    axis.grid(axis="x", visible=False)
    axis.legend()
    return found


def canvas(title: str):
    from matplotlib.figure import Figure

    found = Figure(figsize=(9, 4.5), layout="constrained")
    axis = found.subplots()
    axis.set_title(title, loc="left", fontweight="bold")
    return found, axis


def main(runs: Path) -> None:
    import matplotlib

    (runs / "small").mkdir(parents=True, exist_ok=True)
    (runs / "small" / "config.json").write_text(json.dumps(SMALL))
    for name in RUNS:
        (runs / name).mkdir(exist_ok=True)
        for command in RUNS[name] if not (runs / name / DONE[name]).exists() else ():
            run(command, runs)
        with matplotlib.rc_context(curves.STYLE):
            globals()[name](runs).savefig(IMAGES / f"{name}.png", dpi=100)
    describe()


def describe() -> None:
    """Writes images/README.rst: the commands of each picture."""
    text = ["How the pictures were made", "=" * 26, ""]
    text += ["``make images`` runs these commands and draws the pictures from what they wrote.", ""]
    for name, lines in RUNS.items():
        text += [f"{name}.png::", "", *(f"    {line}" for line in lines), ""]
    small = json.dumps(SMALL)
    text += [f"``small/config.json`` is ``{small}``."]
    (IMAGES / "README.rst").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "images-runs", help="default: ./images-runs")
    main(parser.parse_args().runs.resolve())
