"""What benchmarks share: weights and rows; train.py and transformers' Trainer, as their users start them."""

import contextlib
import io
import json
import os
import random
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
ENDLESS = 10**6  # steps: a measured run is ended from outside, before it would save


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
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder


def make_rows(folder: Path, vocab: int, seq_len: int, rows: int, document: int | None = None) -> Path:
    """Random tokens in so many samples, prepared by train.py's own code for `make_model`'s tokenizer.

    document: the mean of the documents' lengths; without it, every sample is one document. The path it
    returns is for --dataset_path; the peer reads `input_ids` of its split `train`.
    """
    from llama3 import data

    folder.mkdir(parents=True, exist_ok=True)
    draw, left = random.Random(0), rows * seq_len
    text = folder / "text.jsonl"
    with open(text, "w") as file:
        while left > 0:
            length = max(2, min(left, int(draw.expovariate(1 / document)))) if document else seq_len
            words = [f"w{draw.randrange(1, vocab)}" for _ in range(length - 1)]  # and the document's end
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
            left -= length
    with contextlib.redirect_stdout(io.StringIO()):
        return data.prepare(str(text), make_tokenizer(vocab), folder / "rows", seq_len, validation_fraction=0)


def start(script: str, arguments: list, ranks: int, env: dict | None, output) -> subprocess.Popen:
    """`python SCRIPT ...` for one rank, torchrun for more, in a process group of its own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(several if ranks > 1 else []), str(ROOT / script), *map(str, arguments)]
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


def run_ours(flags: list, ranks: int = 1, env: dict | None = None, steps: int = 10) -> list[dict]:
    """The metrics of train.py's first steps, as metrics.jsonl has them. Raises RunFailed."""
    from tools.curves import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "output.txt"), Path(folder, "log")
        own = [f"--save_dir={folder}/ckpt", f"--log_dir={log}"]
        own += [f"--max_train_steps={ENDLESS}", f"--save_every_n_train_steps={ENDLESS}"]
        with open(output, "w") as file:
            process = start("train.py", [*flags, *own], ranks, env, file)
        rows = []
        try:
            while len(rows) < steps and process.poll() is None:
                time.sleep(0.05)
                if (log / "metrics.jsonl").exists():
                    rows = [row for row in read_metrics(log) if "train_loss" in row]
        finally:
            end(process)
        if len(rows) < steps:
            raise RunFailed(last_words(output))
        return rows[:steps]


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
            failed = process.wait()
        finally:
            end(process)
        if failed:
            raise RunFailed(last_words(output))
        return json.loads(result.read_text())


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
    numbers = [name for name in rows[0] if name in shared and isinstance(rows[0][name], int | float)]
    return {name: statistics.median(row[name] for row in rows) for name in numbers}
