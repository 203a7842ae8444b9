"""Where output goes: tables in colours that fit a terminal, whole lines into a pipe, messages to standard error."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property

from rich.console import Console
from rich.text import Text

from ptask.outcomes import CommandError, Exit
from ptask.tables import (
    TASK_COLUMNS,
    Cell,
    Column,
    Manifest,
    Output,
    as_json,
    as_yaml,
    columns_for,
    document,
    resource_name,
    table,
)


class Screen:
    """Standard output and standard error. Colours are off when it is no terminal, and with NO_COLOR."""

    @cached_property
    def console(self) -> Console:
        """Return standard output."""
        return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    @property
    def terminal(self) -> bool:
        """Whether somebody looks at it."""
        return self.console.is_terminal

    @property
    def width(self) -> int | None:
        """Return cells of a line; None: no terminal, nothing has to fit."""
        return self.console.width if self.terminal else None

    def lines(self, lines: Sequence[Sequence[Cell]]) -> None:
        """Print a table."""
        for line in lines:
            self.console.print(text_of(line), no_wrap=True, overflow="ignore", crop=False)

    def rows(self, columns: Sequence[Column], things: Sequence[Manifest]) -> None:
        """Print things as a table."""
        self.lines(table(columns, things, now=datetime.now(UTC), width=self.width))

    def say(self, text: str, style: str = "") -> None:
        """Print a line; a terminal folds it at words."""
        self.console.print(Text(text, style=style), soft_wrap=not self.terminal)

    def raw(self, text: str) -> None:
        """Print as it is."""
        sys.stdout.write(text + "\n")

    @staticmethod
    def note(text: str) -> None:
        """Tell something that is no output: standard error."""
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - the command line's own output

    def tasks(self, tasks: Sequence[Manifest], output: Output, *, single: bool = False, namespaces: bool = False) -> None:
        """Print tasks as -o says."""
        match output:
            case Output.JSON:
                self.raw(as_json(document(tasks, single=single)))
            case Output.YAML:
                self.raw(as_yaml(document(tasks, single=single)))
            case Output.NAME:
                for task in tasks:
                    self.raw(resource_name(task))
            case Output.TABLE | Output.WIDE:
                self.rows(columns_for(TASK_COLUMNS, wide=output is Output.WIDE, namespaces=namespaces), tasks)

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something that cannot be undone. Raises :class:`CommandError` unless the answer is yes."""
        if yes:
            return
        if not sys.stdin.isatty():
            raise CommandError(f"cannot ask: {question} Nobody is at the terminal; give --yes", code=Exit.USAGE)
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise CommandError("nothing was done", code=Exit.FAILED)


def text_of(line: Sequence[Cell]) -> Text:
    """Return a line with its colours."""
    return Text.assemble(*((cell.text, cell.style) for cell in line), no_wrap=True)


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return bool(os.environ.get("PTASK_DEBUG"))
