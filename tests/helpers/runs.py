"""Starts train.py as a user would, reads and compares what it leaves, and makes a tiny model and text."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HELPERS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # what the scripts beside this file need
os.environ.setdefault("OMP_NUM_THREADS", "1")  # four ranks fit two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

WORDS = (
    "the state of the union is strong and the people of these states are at peace with all nations while "
    "commerce and labor prosper in every harbor and field under laws that the congress has made for the "
    "common good of this and later generations"
).split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXACT = ("epoch", "train_loss", "lr", "gnorm", "tokens")


def launcher(ranks: int) -> list[str]:
    """What python starts a script with on so many ranks; torchrun takes a free port."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


TWO_RANKS = launcher(2)


def environment(**extra: str) -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("TORCHELASTIC")}
    return {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def python(*argv, timeout=300, check=True, preexec_fn=None, **env) -> subprocess.CompletedProcess:
    """`python ARGV...` in the project's root, as a user would start it."""
    command = [sys.executable, *map(str, argv)]
    options = dict(cwd=ROOT, env=environment(**env), timeout=timeout, preexec_fn=preexec_fn)
    done = subprocess.run(command, capture_output=True, text=True, **options)
    said = f"{command} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert not check or done.returncode == 0, said
    return done


def torchrun(ranks: int, *argv, **options) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=RANKS ARGV...`"""
    return python(*launcher(ranks), *argv, **options)


def run_cases(folder: Path, ranks: int, cases: dict[str, list[str]], env: dict | None = None, **codes: int):
    """Starts the ranks once; they call main for each case, which must return 0, or the code given here."""
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {**HELPERS, **(env or {})}
    torchrun(ranks, "tests/helpers/ranks.py", folder / "cases.json", folder / "codes.json", **env)
    assert json.loads((folder / "codes.json").read_text()) == dict.fromkeys(cases, 0) | codes


def wait_for(condition, going_on, output: Path, seconds: float = 90) -> None:
    """Fails if the run ends before the condition holds, or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert going_on() and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.001)


class Run:
    """A run in the background, in a folder of its own."""

    def __init__(self, folder: Path, *argv):
        self.folder, self.output = folder, folder / "output.txt"
        with open(self.output, "w") as f:
            options = dict(cwd=ROOT, env=environment(), stdout=f, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen([sys.executable, *argv, *outputs(folder)], **options)

    def children(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def ranks(self) -> list[int]:
        """Process ids of the ranks that torchrun started, by rank."""
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in self.children()}
        ranks = {pid: re.search(rb"\0RANK=(\d+)", found) for pid, found in environments.items()}
        return sorted((pid for pid in ranks if ranks[pid]), key=lambda pid: int(ranks[pid][1]))

    def wait_for(self, condition) -> None:
        wait_for(condition, lambda: self.process.poll() is None, self.output)

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "log" / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'{{"step": {step},' in metrics.read_text())

    def end(self, code: int) -> str:
        """Waits for the end, which must have that code; returns what was said."""
        assert self.process.wait(timeout=120) == code, self.output.read_text()
        return self.output.read_text()


def outputs(run: Path) -> list[str]:
    """The flags with which a run writes to `ckpt` and `log` in that folder."""
    return [f"--save_dir={run / 'ckpt'}", f"--log_dir={run / 'log'}"]


def rows(log_dir: Path, key: str) -> dict[int, dict]:
    """The rows of metrics.jsonl that have the key, by step; a step that comes twice is a failure."""
    found = {}
    for row in map(json.loads, (log_dir / "metrics.jsonl").read_text().splitlines()):
        if key in row:
            assert row["step"] not in found, f"step {row['step']} comes twice"
            found[row["step"]] = row
    return found


def column(run: Path, key: str) -> list:
    return [row[key] for _, row in sorted(rows(run / "log", key).items())]


def assert_same(run: Path, whole: Path, first_step: int = 1) -> None:
    """From that step on both have the same metrics to the last bit, and both end with the same weights."""
    from trainer.checkpoint import Checkpoint

    one, other = (rows(folder / "log", "train_loss") for folder in (run, whole))
    assert one and one.keys() == {step for step in other if step >= first_step}
    assert all(row[key] == other[step][key] for step, row in one.items() for key in EXACT)
    one, other = (dict(Checkpoint.open(folder / "ckpt" / "last").parameters()) for folder in (run, whole))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def import_all() -> None:
    """Imports what a run needs, so that it costs a fork no time, and a measurement no memory."""
    modules = "llama3.data llama3.export llama3.model trainer.trainer datasets"
    for module in [*modules.split(), "transformers.models.llama.modeling_llama"]:
        importlib.import_module(module)


def make_text(path: Path, documents: int, seed: int = 0) -> Path:
    """Documents of different lengths, one a line of a .jsonl."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(5, 120))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(model: Path, text: Path, validation_fraction: float, max_seq_len: int = 32) -> Path:
    """What train.py itself prepares from the text, beside it."""
    source = [f"--model_id={model}", f"--dataset_id={text}", f"--max_seq_len={max_seq_len}"]
    split, folder = f"--validation_fraction={validation_fraction}", text.with_suffix(".prepared")
    python("train.py", "--prepare_data", *source, split, f"--dataset_path={folder}")
    return folder


def small_tokenizer(chat_template: str | None = CHATML, *control: str):
    """Byte-level BPE of 320 tokens; the first are `control`, by default of a document's end and of turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(special_tokens=list(control) or ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    options |= dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=320, **options))
    options = dict(chat_template=chat_template, clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", **options)


def make_model(folder: Path, **overrides) -> Path:
    """A Llama of a few thousand parameters with weights and a tokenizer, saved as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small_tokenizer(None, "<|endoftext|>", "<|im_end|>").save_pretrained(folder)
    values = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    values |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    values |= dict(initializer_range=0.1, bos_token_id=None, eos_token_id=1)
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**values | overrides)).save_pretrained(folder)
    return folder
