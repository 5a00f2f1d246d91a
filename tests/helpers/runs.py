"""Starts train.py as a user would, reads and compares what it leaves, and makes a tiny model and text."""

import contextlib
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.forks import ROOT, Fork, Ranks, environment, start_process

HELPERS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # what the scripts beside this file need

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


def launcher(ranks: int, *options: str) -> list[str]:
    """Return the command with which torchrun starts so many ranks; without options, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, *(options or ["--standalone"]), f"--nproc_per_node={ranks}"]


def python(*argv, timeout=600, check=True, ranks=None, real=False, **options) -> subprocess.CompletedProcess:
    """Run `python ARGV...` in the project's root, or `torchrun ARGV...` on so many ranks; return its end.

    It is forked from a process that has imported everything. real: start an interpreter, or torchrun itself.
    Options are the text for its input (input), its folder (cwd), the largest file that it may write
    (file_size), and variables of its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (Path(folder, name) for name in ("stdout", "stderr"))
        process = start(argv, stdout, stderr, ranks=ranks, real=real, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = [path.read_text(errors="replace") for path in (stdout, stderr)]
    done = subprocess.CompletedProcess(process.args, code, *texts)
    ends = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert not check or done.returncode == 0, f"{done.args} exited with {done.returncode}:\n{ends}"
    return done


def torchrun(ranks: int, *argv, **options) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc_per_node=RANKS ARGV...`, as `python` does."""
    return python(*argv, ranks=ranks, **options)


def start(argv, stdout: Path, stderr: Path, ranks=None, real=False, input="", cwd=ROOT, file_size=0, **env):
    """Start what `python` runs: a subprocess.Popen, or a fork with its interface."""
    env = environment(**env)
    stdin = Path(os.devnull)
    if input:
        stdin = stdout.with_name("stdin")
        stdin.write_text(input)
    if not real and not env["CUDA_VISIBLE_DEVICES"]:  # CUDA itself is never forked
        options = dict(stdin=stdin, cwd=str(cwd), file_size=file_size)
        if ranks is None:
            return Fork(argv, env, stdout, stderr, **options)
        return Ranks(ranks, argv, env, stdout, stderr, **options)
    assert not file_size, "only a fork is limited"
    command = [*(launcher(ranks) if ranks else [sys.executable]), *argv]
    with open(stdin) as source, open(stdout, "a") as output, open(stderr, "a") as errors:
        return start_process(command, stdin=source, stdout=output, stderr=errors, cwd=cwd, env=env)


def run_cases(folder: Path, ranks: int, cases: dict[str, list[str]], env: dict | None = None, **codes: int):
    """Starts the ranks once; they call main for each case, which must return 0, or the code given here."""
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {**HELPERS, **(env or {})}
    torchrun(ranks, "tests/helpers/ranks.py", folder / "cases.json", folder / "codes.json", **env)
    assert json.loads((folder / "codes.json").read_text()) == dict.fromkeys(cases, 0) | codes


def wait_for(condition, going_on, output: Path, seconds: float = 240) -> None:
    """Fails if the run ends before the condition holds, or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert going_on() and time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.001)


class Run:
    """A run in the background, in a folder of its own."""

    def __init__(self, folder: Path, *argv, **options):
        self.folder, self.output = folder, folder / "output.txt"
        self.process = start([*argv, *outputs(folder)], self.output, self.output, **options)

    def children(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, by rank."""
        if isinstance(self.process, Ranks):
            return [rank.pid for rank in self.process.ranks]
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in self.children()}
        ranks = {pid: re.search(rb"\0RANK=(\d+)", text) for pid, text in environments.items()}
        return sorted((pid for pid in ranks if ranks[pid]), key=lambda pid: int(ranks[pid][1]))

    def stop(self) -> None:
        """Kill what still runs."""
        if self.process.poll() is None:
            for pid in [] if isinstance(self.process, Fork) else self.ranks():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()

    def wait_for(self, condition) -> None:
        wait_for(condition, lambda: self.process.poll() is None, self.output)

    def wait_for_step(self, step: int) -> None:
        metrics = self.folder / "log" / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'{{"step": {step},' in metrics.read_text())

    def end(self, code: int) -> str:
        """Waits for the end, which must have that code; returns what was said."""
        assert self.process.wait(timeout=300) == code, self.output.read_text()
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
    modules = "train llama3.adapters dataset.prepare dataset.batches llama3.export llama3.model "
    modules += "llama3.sample trainer.engine "
    modules += "trainer.trainer plan.planner plan.measure tools.curves datasets peft matplotlib.figure "
    modules += "torch.utils.tensorboard torch._inductor.compile_fx torch.distributed._tools.fsdp2_mem_tracker"
    for module in [*modules.split(), "transformers.models.llama.modeling_llama"]:
        with contextlib.suppress(ImportError):  # peft is missing where nnScaler is
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
