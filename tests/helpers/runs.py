"""Starts train.py as a user would, reads its metrics, and makes a tiny model and text."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # four ranks fit two cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

WORDS = (
    "the state of the union is strong and the people of these states are at peace with all nations while commerce and labor "
    "prosper in every harbor and field under laws that the congress has made for the common good of this and later generations"
).split()


def environment(**extra: str) -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ranks and not name.startswith("TORCHELASTIC")
    }
    return {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def python(*argv, timeout=300, check=True, **env) -> subprocess.CompletedProcess:
    """`python ARGV...` in the project's root, as a user would start it."""
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout
    )
    assert not check or done.returncode == 0, (
        f"{command} exited with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return done


def torchrun(ranks: int, *argv, **options) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=RANKS ARGV...`, with a port of its own."""
    return python(
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *argv, **options
    )


def run_cases(folder: Path, ranks: int, cases: dict[str, list[str]]) -> dict[str, int]:
    """Starts the ranks once and lets them call train.py's main for every case in turn; returns the exit codes."""
    (folder / "cases.json").write_text(
        json.dumps({name: list(map(str, argv)) for name, argv in cases.items()})
    )
    torchrun(ranks, ROOT / "tests" / "helpers" / "ranks.py", folder / "cases.json", folder / "codes.json")
    return json.loads((folder / "codes.json").read_text())


def rows(log_dir: Path, key: str) -> dict[int, dict]:
    """The rows of metrics.jsonl that have the key, by step; a step that comes twice is a failure."""
    found = {}
    for row in map(json.loads, (log_dir / "metrics.jsonl").read_text().splitlines()):
        if key in row:
            assert row["step"] not in found, f"step {row['step']} comes twice"
            found[row["step"]] = row
    return found


def make_text(path: Path, documents: int, seed: int = 0) -> None:
    """Documents of different lengths, one a line of a .jsonl."""
    import random

    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(5, 120))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_model(folder: Path, **overrides) -> Path:
    """A Llama of a few thousand parameters with weights and a tokenizer of its own, saved as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    values = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, rope_theta=10000.0, initializer_range=0.1, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(**values | overrides)).save_pretrained(folder)
    return folder
