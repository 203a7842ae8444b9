"""Why a file cannot be read, and how far reading it has come."""

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (pages done, pages in all)."""


class ReadingFailed(Exception):
    """A file cannot be read. ``reason`` is DocumentUnreadable, DocumentEmpty or DocumentRefused."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
