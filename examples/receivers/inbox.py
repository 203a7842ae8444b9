"""Does what a callback asks for once, however often it comes: its id is kept in the transaction that does it."""

import sqlite3
from collections.abc import Callable

from service_client import CallbackEvent

Act = Callable[[sqlite3.Connection, CallbackEvent], None]


class Inbox:
    """In a service of yours this is a table of its own database, beside what the callback changes there."""

    def __init__(self, path: str = ":memory:") -> None:
        self._database = sqlite3.connect(path)
        self._database.execute("CREATE TABLE IF NOT EXISTS callbacks (id TEXT PRIMARY KEY)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS documents (task_id TEXT PRIMARY KEY, status TEXT, chunks INTEGER)"
        )

    def once(self, event: CallbackEvent, act: Act) -> bool:
        """Act on an event that was not seen before; if that fails, nothing is kept and the next delivery tries again."""
        with self._database:  # a transaction: commits at the end, rolls back when something is raised
            known = self._database.execute("INSERT OR IGNORE INTO callbacks VALUES (?)", [event.id]).rowcount == 0
            if not known:
                act(self._database, event)
        return not known

    def documents(self) -> list[tuple[str, str, int | None]]:
        """Return what has been done: task, status and number of chunks."""
        return self._database.execute("SELECT task_id, status, chunks FROM documents ORDER BY 1").fetchall()


def keep_document(database: sqlite3.Connection, event: CallbackEvent) -> None:
    """Note how a document has ended. Put your own work here."""
    chunks = event.result.chunks if event.result is not None else None
    database.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", [event.task_id, event.status, chunks])
