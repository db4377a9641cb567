"""Every error that Trivium raises on purpose, one exit code for each kind.

An error carries what a person needs to act: the cause, the thing it is about (a node, a value, a
file, a flag) and the nearest remedy. The command line prints it as one line and exits with
``exit_code``; a traceback is shown only with ``--verbose``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class TriviumError(Exception):
    """Base of the tree.

    Args:
        cause: What went wrong, as a clause without a full stop.
        about: The node, value, file or flag that is to blame.
        remedy: The nearest thing to try.
    """

    exit_code = 2

    def __init__(self, cause: str, *, about: str = "", remedy: str = "") -> None:
        self.cause = cause
        self.about = about
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.about}: {self.cause}" if self.about else self.cause
        return " ".join(f"{line}; {self.remedy}".split() if self.remedy else line.split())


class ConstraintUnmet(TriviumError):
    """No candidate meets what the user asked for (latency, memory, price, ...)."""

    exit_code = 1


class BadInput(TriviumError):
    """The model, the data or the command is wrong."""

    exit_code = 2


class Unsupported(TriviumError):
    """The model holds what the target cannot run.

    Args:
        refusals: One line for each refused node, all of them at once.
    """

    exit_code = 3

    def __init__(
        self, cause: str, *, about: str = "", remedy: str = "", refusals: Sequence[str] = ()
    ) -> None:
        self.refusals = tuple(refusals)
        super().__init__(cause, about=about, remedy=remedy)


class ToolchainMissing(TriviumError):
    """A backend's toolchain is not installed on this machine."""

    exit_code = 4


class BackendFailed(TriviumError):
    """A backend, or the machine under it (disk, memory, time), failed."""

    exit_code = 5


class AccuracyFailed(TriviumError):
    """The compiled artifact does not agree with the reference within the allowed error."""

    exit_code = 6


@contextmanager
def blaming(about: str) -> Iterator[None]:
    """Turn whatever else is raised inside into ``BackendFailed`` about a part: engines and passes
    raise a hundred kinds without a common base, and a caller of the API is promised one.
    """
    try:
        yield
    except (TriviumError, OSError, MemoryError):
        raise
    except Exception as error:
        raise BackendFailed(
            f"{type(error).__name__}: {error}",
            about=about,
            remedy="this is a bug: please report it with the model",
        ) from error
