"""Compares prepared data with their checksums, with a training's tokenizer, and with its flags."""

import json
import os
from pathlib import Path

import datasets
import xxhash

from dataset import preparation
from errors import UserError
from tokens import document_separator


def verify(dataset_path: str | Path, part: int = 0, parts: int = 1) -> None:
    """Compares the files `part`, `part` + `parts`, ... with their checksums. Raises UserError."""
    path = Path(dataset_path)
    for name, digest in sorted(preparation.require(path)["files"].items())[part::parts]:
        found = file_digest(path / name) if (path / name).is_file() else "no file"
        if found != digest:
            raise UserError(
                f"{path / name} does not match its checksum {digest} (got {found})",
                f"Remove {path} and prepare it again",
            )


def fingerprint(dataset_path: str | Path) -> str:
    """Hash of what was prepared, the same on every machine and at any time. Raises UserError."""
    known = preparation.require(Path(dataset_path))
    # The source's hash has a large file's time, and the files of datasets that are not samples have paths.
    settings = {name: value for name, value in known["settings"].items() if name != "source"}
    return value_digest(
        [settings, {name: known["files"][name] for name in known["files"] if ".arrow" in name}]
    )


def check_prepared(dataset_path: str | Path, tokenizer, **given) -> None:
    """Compares data with a training's tokenizer, and with these flags as prepared. Raises UserError."""
    path, known = Path(dataset_path), preparation.require(Path(dataset_path))
    if known["vocabulary"] != vocabulary_digest(tokenizer):
        before, now = known["tokenizer_id"], tokenizer.name_or_path
        raise UserError(
            f"{path} was prepared with another tokenizer ({before}) than {now}",
            f"Train with --tokenizer_id={before}, or prepare the data with {now} at another --dataset_path",
        )
    for name, value in given.items():
        if _plain(value) != _plain(before := {**known, **known["settings"]}[name]):
            raise UserError(
                f"{path} was prepared with {name} {before}, and --{name} is {value}",
                f"Leave --{name} out, or prepare with it at another --dataset_path",
            )


def _plain(value):
    """A flag in one spelling: ./texts and texts/ are the same."""
    if not isinstance(value, str):
        return value
    return [os.path.abspath(part.strip()) for part in value.split(",")]


def holds_conversations(path: str | Path) -> bool:
    """Do the first samples have tokens that are not learned? Texts are learned whole."""
    return any(0 in row["loss_mask"] for row in datasets.load_from_disk(str(Path(path, "train"))).take(100))


def vocabulary_digest(tokenizer) -> str:
    """Hash of what decides a text's token ids, the same in every version of the libraries."""
    ids = tokenizer("Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>")["input_ids"]
    return value_digest([sorted(tokenizer.get_vocab().items()), ids, document_separator(tokenizer)])


def value_digest(value) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


def file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()
