"""Reads preparation.json, the description of prepared data. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from errors import UserError

FORMAT = 4  # of the prepared folder; raised whenever it changes or the same input would give other samples
PREPARE = "python train.py --prepare_data"


def read(path: str | Path) -> dict[str, Any] | None:
    """Return the content of preparation.json in the folder; None if there is none of ours."""
    try:
        content = json.loads(Path(path, "preparation.json").read_text())
        is_ours = content["settings"]["max_seq_len"] and content["dataset_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if is_ours else None


def require(path: str | Path, command: str = PREPARE) -> dict[str, Any]:
    """Return the content of preparation.json in the folder.

    command: prepares the data. Raises UserError if the folder is not prepared, or by another version.
    """
    path = Path(path)
    content = read(path)
    if content is None:
        siblings = ", ".join(_prepared_siblings(path)) or "nothing"
        raise UserError(
            f"{path} is not prepared (prepared in the same folder: {siblings})", f"Run `{command}`"
        )
    version = content["settings"]["format"]
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version} of prepared data, and this version reads format {FORMAT}",
            f"Remove {path} and prepare it again",
        )
    return content


def check_length(path: str | Path, content: dict[str, Any], max_seq_len: int) -> None:
    """Raise UserError if the samples have another length than --max_seq_len."""
    length = content["settings"]["max_seq_len"]
    if length != max_seq_len:
        raise UserError(
            f"{path} holds samples of {length} tokens, and --max_seq_len is {max_seq_len}",
            f"Use --max_seq_len={length}, or prepare the data at another --dataset_path",
        )


def _prepared_siblings(path: Path) -> list[str]:
    """Return the prepared folders beside the path, with their source and their length."""
    siblings = []
    for folder in sorted(path.absolute().parent.glob("*")):
        content = read(folder)
        if content is not None:
            length = content["settings"]["max_seq_len"]
            siblings.append(f"{folder} ({content['dataset_id']}, {length} tokens)")
    return siblings
