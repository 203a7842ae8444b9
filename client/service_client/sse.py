"""Server-sent events, parsed from bytes as they come (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_LINE_END: Final = re.compile(rb"\r\n|\n|\r(?=[^\n])")
_LARGEST: Final = 2**20


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event."""

    data: str
    kind: str = "message"
    id: str | None = None
    """What the stream goes on from, by the header Last-Event-ID; None before the first."""


class EventParser:
    """Parses one stream. Lines end only where the specification says: str.splitlines also ends them within JSON."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[str] = []
        self._kind = ""
        self._id: str | None = None

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """Yield the events that are complete with these bytes. Raises ``ValueError`` for a line of more than 1 MiB."""
        self._buffer += chunk
        *lines, self._buffer = _LINE_END.split(self._buffer)
        if len(self._buffer) > _LARGEST:
            raise ValueError("a line of the event stream has no end")
        for line in lines:
            if (event := self._line(line.decode(errors="replace"))) is not None:
                yield event

    def _line(self, line: str) -> ServerEvent | None:
        if not line:
            event = ServerEvent("\n".join(self._data), self._kind or "message", self._id) if self._data else None
            self._data, self._kind = [], ""
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._kind = value
            case "id" if "\0" not in value:
                self._id = value
        return None  # a comment, retry, or a field that nobody knows
