"""Opens prepared data as rows, and collates rows into batches."""

import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel

from dataset import preparation
from dataset.preparation import PREPARE
from errors import UserError
from tokens import IGNORED


def open_split(
    dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples=None, command=PREPARE
) -> Dataset:
    """Opens a split as rows in numpy, of more than `max_samples` always the same ones. Raises UserError."""
    path, known = Path(dataset_path), preparation.require(Path(dataset_path), command)
    preparation.check_length(path, known, max_seq_len)
    if known["max_token_id"] >= vocab_size:
        raise UserError(
            f"{path} has token id {known['max_token_id']}, and the model's vocabulary has {vocab_size}",
            "Prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)",
        )
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises many kinds for a damaged or newer folder
        raise UserError(
            f"{path}/{split}, saved by datasets {known['datasets']}, cannot be read: {error}",
            f"Remove {path} and prepare it again",
        ) from error
    if max_samples is not None and len(dataset) > max_samples:
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int))
    return dataset.with_format("numpy")


@dataclass
class Collator:
    """Rows -> a batch that is always (micro_batch_size, max_seq_len); a missing row has no targets."""

    max_seq_len: int
    micro_batch_size: int

    def __call__(self, rows: list[dict]) -> dict:
        """Batch of B = micro_batch_size rows of T = max_seq_len tokens.

        input_ids, labels, position_ids: (B, T) int64; labels are shifted, IGNORED where there is no target.
        cu_seqlens: int32 bounds of the document pieces in the B * T tokens laid end to end.
        longest_document: int, the tokens of the longest piece.
        num_tokens: int, without the rows that were missing.
        """
        B, T = self.micro_batch_size, self.max_seq_len
        assert len(rows) <= B, f"{len(rows)} rows for a micro-batch of {B}"
        input_ids = np.zeros((B, T), dtype=np.int64)
        target = np.zeros((B, T), dtype=bool)  # may token t be predicted?
        starts = np.zeros((B, T), dtype=bool)  # does a document begin with token t?
        for b, row in enumerate(rows):
            input_ids[b] = row["input_ids"]
            target[b] = row.get("loss_mask", True)
            starts[b, row["document_starts"]] = True
        starts[:, 0] = True
        labels = np.full((B, T), IGNORED, dtype=np.int64)
        labels[:, :-1] = np.where((target & ~starts)[:, 1:], input_ids[:, 1:], IGNORED)
        bounds = np.flatnonzero(starts)  # row starts included
        cu_seqlens = np.append(bounds, B * T)
        lengths = np.diff(cu_seqlens)
        position_ids = np.arange(B * T) - np.repeat(bounds, lengths)
        batch = dict(input_ids=input_ids, labels=labels, position_ids=position_ids.reshape(B, T))
        batch["cu_seqlens"] = cu_seqlens.astype(np.int32)
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        return dict(tensors, longest_document=int(lengths.max()), num_tokens=len(rows) * T)


def bits_per_byte(rows, tokenizer, loss: float) -> float:
    """The loss, in nats per target, as bits per byte of the targets' text; control tokens are no text.

    Raises UserError if the tokenizer's tokens are not bytes, or the targets have no text.
    """
    backend, alphabet = tokenizer.backend_tokenizer, {*ByteLevel.alphabet()}
    added = tokenizer.added_tokens_decoder
    sizes = np.zeros(1 + max(tokenizer.get_vocab().values()), np.int64)  # bytes of each token
    for text, index in backend.get_vocab(with_added_tokens=False).items():
        if not alphabet.issuperset(text) and index not in added:
            raise UserError(
                f"{tokenizer.name_or_path} has token {text!r}, which does not stand for bytes",
                "Use a byte-level tokenizer",
            )
        sizes[index] = len(text)  # each character stands for a byte
    for index, token in added.items():
        sizes[index] = 0 if token.special else len(token.content.encode())
    collate, targets, size = Collator(len(rows[0]["input_ids"]), 1), 0, 0
    for row in rows:
        labels = collate([row])["labels"].numpy()
        learned = labels[labels != IGNORED]
        targets, size = targets + len(learned), size + int(sizes[learned].sum())
    if not size:
        raise UserError("the validation samples have no text to predict", "Prepare other data")
    return loss * targets / (math.log(2) * size)
