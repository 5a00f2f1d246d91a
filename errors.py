"""The exceptions that end the program with one sentence instead of a traceback."""

import contextlib
import errno
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend: wrong flags, paths, data or checkpoints. Exit code 2.

    problem: a clause that says what came and what is needed, without a final full stop.
    fix: an imperative that mends it, without a final full stop.
    """

    def __init__(self, problem: str, fix: str):
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}."


class UserErrors(UserError):
    """Several UserErrors, reported together, a line each."""

    def __init__(self, *errors: UserError):
        Exception.__init__(self, *errors)
        self.errors = errors
        self.problem = "; ".join(error.problem for error in errors)
        self.fix = "; ".join(error.fix for error in errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class TrainingFailed(Exception):
    """The run cannot go on. The message gives the reason and the checkpoint to continue from. Exit code 1."""


def raise_together(errors: list[UserError]) -> None:
    """Raise the errors, several as one UserErrors; do nothing without any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(*errors)


@contextlib.contextmanager
def naming(path: Path):
    """Gives an error of the disk that names no file the name of what was written."""
    try:
        yield
    except Exception as error:
        nameless = isinstance(error, OSError) and not error.filename
        if not nameless and type(error) is not Exception:  # the tokenizers library raises no narrower class
            raise
        number, words = getattr(error, "errno", None), getattr(error, "strerror", None)
        raise OSError(number or errno.EIO, words or str(error), str(path)) from error
