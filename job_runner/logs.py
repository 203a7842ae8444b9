"""Logs on standard error: JSON, one object a line, and readable text on a terminal. Their end is kept for the outcome."""

import logging
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final, TextIO, cast

import structlog

from task_contract.messages import LOG_LIMIT, last_lines

_KEPT: Final = 4 * LOG_LIMIT
"""Characters, so that there is something left when secrets and colours are taken out."""


class _End:
    """The end of a log."""

    def __init__(self) -> None:
        self.text = ""


_end: ContextVar[_End] = ContextVar("end", default=_End())  # noqa: B039 - that of the process, which all share by intent


class _Kept:
    """Standard error, whose end is kept."""

    def write(self, text: str) -> int:
        end = _end.get()
        end.text = (end.text + text)[-_KEPT:]
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


_kept = _Kept()


def keep_apart() -> None:
    """Keep the end of what this task logs, with its threads and tasks, apart from that of others in the process."""
    _end.set(_End())


def tail(*, secrets: Iterable[str] = ()) -> str | None:
    """Return the last lines that were logged by this process or task, without the secrets; None when there are none."""
    text = _end.get().text
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return last_lines(text) or None


def configure(level: str) -> None:
    """Send our events and those of libraries to standard error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if not sys.stderr.isatty():
        # Without local variables: among them are passwords of stores and texts of documents.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        shared.append(structlog.processors.ExceptionRenderer(tracebacks))
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _kept)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_kept)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    # Clients of stores repeat calls by themselves and say so; what matters of it comes as an error of ours.
    logging.basicConfig(level=max(number, logging.ERROR), handlers=[handler], force=True)
