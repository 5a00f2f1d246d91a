"""Texts, a small tokenizer and byte-for-byte comparison, for the tests of the data."""

import functools
import hashlib
import json
import random
from pathlib import Path

from helpers.runs import WORDS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_tokenizer(chat_template: str | None = CHATML):
    """Byte-level BPE of 320 tokens; 0 ends a document, 1 begins and 2 ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def real_tokenizer(name: str):
    from llama3.assets import load_tokenizer

    return small_tokenizer() if name == "small" else load_tokenizer(name)


@functools.cache
def encoder_of(tokenizer):
    from llama3.tokenizing import Encoder

    return Encoder(tokenizer)


def make_texts(count: int, seed: int = 0, most: int = 120) -> list[str]:
    draw = random.Random(seed)
    return [
        f"Number {number}. " + " ".join(draw.choices(WORDS, k=draw.randint(5, most)))
        for number in range(count)
    ]


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text(
        "".join((json.dumps(r) if isinstance(r, dict) else json.dumps({"text": r})) + "\n" for r in records)
    )
    return path


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> hash, of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(folder: Path, split: str) -> list[dict]:
    """Rows of a prepared split as lists."""
    import datasets

    return list(datasets.load_from_disk(str(folder / split)))


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """The token ids of each document of a split, put together again from its rows."""
    found: list[list[int]] = []
    for row in rows(folder, split):
        bounds = [*row["document_starts"], len(row["input_ids"])]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            piece = row["input_ids"][begin:end]
            if begin == 0 and found and found[-1][-1] != 0:  # it goes on from the row before
                found[-1] += piece
            else:
                found.append(list(piece))
    return found


def facts(folder: Path) -> dict:
    return json.loads((folder / "preparation.json").read_text())
