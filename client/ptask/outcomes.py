"""How a command ends: exit codes, and errors as one sentence."""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """Exit codes; scripts read them, so they are part of the API."""

    DONE = 0
    """The command did what it was asked; with --wait: all tasks are Completed."""
    FAILED = 1
    """It could not be done; with --wait: a task has failed; of doctor: there is a problem."""
    USAGE = 2
    """The command line or a manifest is wrong; nothing was done."""
    CANCELED = 3
    """With --wait: a task was canceled or deleted, and none has failed."""
    TIMEOUT = 4
    """With --wait: a task had not ended after --timeout, and none has failed."""
    UNREACHABLE = 5
    """The cluster, or the gateway, gives no usable answer: try again."""
    INTERRUPTED = 130
    """Ended by Ctrl-C, as shells report it."""


class CommandError(Exception):
    """A command cannot be done. The message begins with what could not be done and ends with the remedy."""

    def __init__(self, message: str, *, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


_OF_PHASES: Final = {"Completed": Exit.DONE, "Failed": Exit.FAILED, "Canceled": Exit.CANCELED, "Deleted": Exit.CANCELED}


def of_phases(phases: Iterable[str]) -> Exit:
    """Return the exit code of a wait for tasks that are in these phases at its end.

    >>> of_phases(["Completed", "Processing", "Canceled"]) is Exit.TIMEOUT
    True
    """
    codes = {_OF_PHASES.get(phase, Exit.TIMEOUT) for phase in phases}
    return next((code for code in (Exit.FAILED, Exit.TIMEOUT, Exit.CANCELED) if code in codes), Exit.DONE)
