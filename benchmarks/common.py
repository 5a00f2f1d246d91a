"""What benchmarks share: weights and rows; train.py and its peers, as their users start them."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
ENDLESS = 10**6  # steps: a measured run is ended from outside, before it would save
LIMIT_SECONDS = 600  # of a run


class RunFailed(Exception):
    """A run that ended by itself; the message is its last words."""


def make_tokenizer(vocab: int):
    """A tokenizer of so many words, w0, w1, ...; id 0 ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|endoftext|>": 0} | {f"w{index}": index for index in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_model(folder: Path, device: str = "cpu", **config) -> Path:
    """A Hugging Face folder of a Llama with fresh weights in bf16 and `make_tokenizer`'s tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder


def make_rows(folder: Path, vocab: int, seq_len: int, rows: int, document: int | None = None) -> Path:
    """Random tokens in so many samples, prepared by train.py's own code for `make_model`'s tokenizer.

    document: the mean of the documents' lengths; without it, every sample is one document. The path it
    returns is for --dataset_path; the peer reads `input_ids` of its split `train`.
    """
    from dataset import prepare

    folder.mkdir(parents=True, exist_ok=True)
    draw, left = random.Random(0), rows * seq_len
    text = folder / "text.jsonl"
    with open(text, "w") as file:
        while left > 0:
            length = max(2, min(left, int(draw.expovariate(1 / document)))) if document else seq_len
            words = [f"w{draw.randrange(1, vocab)}" for _ in range(length - 1)]  # and the document's end
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
            left -= length
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare.prepare(
            str(text), make_tokenizer(vocab), folder / "rows", seq_len, validation_fraction=0
        )


def start(
    script: str | Path, arguments: list, ranks: int, env: dict | None, output, python=sys.executable
) -> subprocess.Popen:
    """`python SCRIPT ...` for one rank, torchrun for more, in a process group of its own."""
    several = ["-m", "torch.distributed.run", "--local-addr=127.0.0.1", f"--nproc_per_node={ranks}"]
    command = [str(python), *(several if ranks > 1 else []), str(ROOT / script), *map(str, arguments)]
    options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT)
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}, **options)


def end(process: subprocess.Popen) -> None:
    """SIGKILL to the process and its children: torchrun's ranks have sessions of their own."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [*map(int, children), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def last_words(output: Path) -> str:
    """Our own sentence, else the last line that says something."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("train.py: ") or "OutOfMemoryError" in line]
    return (errors or lines or ["it said nothing"])[-1]


def first_rows(process: subprocess.Popen, output: Path, read: Callable, steps: int) -> list[dict]:
    """Ends the run once `read` finds a row for each of its first steps. Raises RunFailed.

    A row's `seen_seconds` is the time from the start of the process until the row was seen.
    """
    began, rows = time.perf_counter(), []
    try:
        while len(rows) < steps and process.poll() is None and time.perf_counter() < began + LIMIT_SECONDS:
            time.sleep(0.05)
            new, seen = read()[len(rows) :], time.perf_counter() - began
            rows += [dict(row, seen_seconds=seen) for row in new]
    finally:
        end(process)
    if len(rows) < steps:
        raise RunFailed(last_words(output))
    return rows[:steps]


def run_ours(flags: list, ranks: int = 1, env: dict | None = None, steps: int = 10) -> list[dict]:
    """The metrics of train.py's first steps, as metrics.jsonl has them. Raises RunFailed."""
    from tools.curves import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "output.txt"), Path(folder, "log")
        own = [f"--save_dir={folder}/ckpt", f"--log_dir={log}"]
        own += [f"--max_train_steps={ENDLESS}", f"--save_every_n_train_steps={ENDLESS}"]

        def read() -> list[dict]:
            found = read_metrics(log) if (log / "metrics.jsonl").exists() else []
            return [row for row in found if "train_loss" in row]

        with open(output, "w") as file:
            process = start("train.py", [*flags, *own], ranks, env, file)
        return first_rows(process, output, read, steps)


def run_transformers(
    model: Path, rows: Path, ranks: int = 1, settings: dict | None = None, env: dict | None = None, steps=10
) -> list[dict]:
    """The same of transformers' Trainer; settings: those of benchmarks/hf_trainer.py. Raises RunFailed."""
    with tempfile.TemporaryDirectory() as folder:
        output, result = Path(folder, "output.txt"), Path(folder, "rows.json")
        arguments = [model, rows, steps, result, json.dumps(settings or {})]
        with open(output, "w") as file:
            process = start("benchmarks/hf_trainer.py", arguments, ranks, env, file)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_SECONDS)
        finally:
            end(process)
        if process.returncode:
            raise RunFailed(last_words(output))
        return json.loads(result.read_text())


def convert_for_litgpt(python: Path, model: Path, folder: Path) -> Path:
    """A copy of SmolLM2's Hugging Face folder with LitGPT's own file of its weights, which it makes."""
    shutil.copytree(model, folder)
    command = [python, "-m", "litgpt", "convert_to_litgpt", folder, "--model_name=SmolLM2-135M-Instruct"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RunFailed(done.stdout.strip().splitlines()[-1])
    return folder


def run_litgpt(
    python: Path, model: Path, texts: list[str], seq_len: int, micro_batch: int, accumulation: int, steps=10
) -> list[dict]:
    """The same of `litgpt finetune_full`, read from what it prints; its rows are the texts, shuffled.

    model: of `convert_for_litgpt`. The peak memory is the resident memory of its process.
    """
    printed = re.compile(r"loss train: (\S+),.* iter time: (\S+) ms( \(step\))?")
    with tempfile.TemporaryDirectory() as folder:
        output, batch = Path(folder, "output.txt"), micro_batch * accumulation
        samples = [dict(instruction=text, output="") for text in texts]
        for name in ("train", "val"):
            Path(folder, f"{name}.json").write_text(json.dumps(samples))
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-5, "fused": True}}
        flags = [f"--out_dir={folder}/out", "--data=JSON", f"--data.json_path={folder}"]
        flags += ["--data.prompt_style.class_path=litgpt.prompts.Default", f"--optimizer={json.dumps(adamw)}"]
        flags += [f"--train.max_seq_length={seq_len}", "--train.lr_warmup_steps=1"]
        flags += [f"--train.micro_batch_size={micro_batch}", f"--train.global_batch_size={batch}"]

        def read() -> list[dict]:
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            rows, seconds = [], 0.0
            for loss, milliseconds, last in printed.findall(output.read_text()) if peak else []:
                seconds += float(milliseconds) / 1000
                if last:
                    row = dict(step_seconds=seconds, tokens_per_second=batch * seq_len / seconds)
                    rows.append(row | dict(train_loss=float(loss), peak_memory_gib=int(peak[1]) / 2**20))
                    seconds = 0.0
            return rows

        with open(output, "w") as file:
            arguments, env = ["finetune_full", model, *flags], {"PYTHONUNBUFFERED": "1"}
            process = start(Path(python).with_name("litgpt"), arguments, 1, env, file, python)
        return first_rows(process, output, read, steps)


def interleave(ways: dict[str, Callable], repeats: int) -> dict[str, list]:
    """Calls each way in turn, again and again; what each returned."""
    found = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def medians(rows: list[dict]) -> dict[str, float]:
    """The median of every number that all the rows have."""
    shared = set.intersection(*(set(row) for row in rows))
    numbers = [name for name in rows[0] if name in shared and type(rows[0][name]) in (int, float)]
    return {name: statistics.median(row[name] for row in rows) for name in numbers}
