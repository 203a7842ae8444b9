"""Rows on their way to PostgreSQL: of each task the latest version, in bounded memory. No I/O; the time is an argument.

PostgreSQL may be away for as long as it likes. What waits for it is one row a task, and no more than
:data:`LIMIT` bytes of rows in all; what goes over that is dropped and remembered as :attr:`Backlog.incomplete`, and
the tasks are listed anew once PostgreSQL is back. Rows of tasks that are gone can not be listed again: the others make
room for them.

Versions are resourceVersions, compared as numbers. A higher one replaces a lower one, never the other way round, with one
exception: an API server whose etcd was restored from a backup counts from an earlier number again. A list then brings
a version below one that was known *before the list was asked for* (``lost``), which cannot be otherwise. The known one is of
a history that is lost, and gives way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

LIMIT: Final = 32 * 1024 * 1024
"""Bytes of rows that may wait, by :attr:`Row.size`: some 15,000 ordinary tasks."""
_OVERHEAD: Final = 1600  # bytes of a row beside its texts: measured, see the test of the bound


def supersedes(version: int, known: int, *, lost: int) -> bool:
    """Whether a version is to replace a known one, where versions up to ``lost`` were known before it was asked for.

    >>> supersedes(10, 9, lost=-1), supersedes(9, 9, lost=-1), supersedes(9, 10, lost=-1), supersedes(9, 10, lost=10)
    (True, False, False, True)
    """
    return version > known or version < known <= lost


@dataclass(frozen=True, slots=True)
class Row:
    """A task as a row of ``tasks``."""

    uid: str
    version: int
    values: tuple[Any, ...]
    """In the order of the table's columns."""
    deleted: bool = False
    """The task is gone: this is the last there is to know of it."""
    lost: int = -1
    """Versions in the table up to this one that are higher than the row's are of a history that was lost; -1: none is."""
    listed: bool = False
    """From a list of what exists: a row that calls the task deleted is wrong."""

    @property
    def size(self) -> int:
        """Bytes that it takes, about: characters beyond ASCII may take up to four times as much."""
        return _OVERHEAD + sum(len(value) for value in self.values if isinstance(value, str))


class Backlog:
    """Rows that wait, by uid, and the versions that are known to be in the table."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rows: dict[str, Row] = {}
        self._since: dict[str, float] = {}
        self._stored: dict[str, int] = {}
        self._newest = -1
        self.size = 0
        """Bytes of the rows that wait."""
        self.incomplete = False
        """Whether rows were dropped that a list would bring again."""
        self.forgotten = 0
        """How many rows of deleted tasks were dropped, which nothing brings again."""

    def __len__(self) -> int:
        return len(self._rows)

    def stored(self, uid: str) -> int | None:
        """Return the version up to which a task is known to be in the table."""
        return self._stored.get(uid)

    def newest(self) -> int:
        """Return the highest version of all; -1 without any."""
        waiting = max((row.version for row in self._rows.values()), default=-1)
        return max(waiting, max(self._stored.values(), default=-1), self._newest)

    def wants(self, uid: str, version: int, *, lost: int = -1) -> bool:
        """Whether a version of a task is news. Cheap: to be asked before its row is made."""
        waiting = self._rows.get(uid)
        known = waiting.version if waiting is not None else self._stored.get(uid, -1)
        return supersedes(version, known, lost=lost)

    def confirm(self, uid: str, *, lost: int) -> None:
        """Note that a list has the task of a row that waits: the table is to believe that row, whatever it says itself."""
        if (row := self._rows.get(uid)) is not None:
            self._rows[uid] = replace(row, lost=max(row.lost, lost), listed=True)

    def put(self, row: Row, *, now: float) -> None:
        """Have a row wait in place of an older one of its task, if it is news and if there is room."""
        if not self.wants(row.uid, row.version, lost=row.lost):
            return
        before = self._rows.get(row.uid)
        if before is not None:  # what the older one has to say about the table has not been done yet
            row = replace(row, lost=max(row.lost, before.lost), listed=row.listed or before.listed)
        more = row.size - (0 if before is None else before.size)
        if self.size + more > self._limit and row.deleted:
            self._make_room(more, sparing=row.uid)
        if self.size + more > self._limit:
            if row.deleted:
                self.forgotten += 1
            else:
                self.incomplete = True
            return
        self._rows[row.uid] = row
        self._since.setdefault(row.uid, now)
        self.size += more

    def _make_room(self, size: int, *, sparing: str) -> None:
        for uid, row in list(self._rows.items()):
            if self.size + size <= self._limit:
                return
            if not row.deleted and uid != sparing:
                self._drop(uid)
                self.incomplete = True

    def batch(self, most: int) -> list[Row]:
        """Return the rows that have waited longest; they wait on until they are settled."""
        rows = []
        for row in self._rows.values():
            rows.append(row)
            if len(rows) == most:
                break
        return rows

    def settle(self, row: Row, *, written: bool = True) -> None:
        """Note that a row was taken to the table: it is there, or (not ``written``) the table has a higher version.

        Of the latter nothing is known but that; the next list tells.
        """
        if written and not row.deleted:
            self._stored[row.uid] = row.version
        else:
            self._stored.pop(row.uid, None)
        if self._rows.get(row.uid) is row:
            self._drop(row.uid)

    def restart(self, stored: Mapping[str, int], *, newest: int = -1) -> None:
        """Take what the table holds for all that is known to be stored. What was dropped is to be listed now.

        ``newest`` is the highest version in the table, those included that are not to be taken for stored.
        """
        for uid in self._stored.keys() - stored.keys():
            del self._stored[uid]
        self._stored.update(stored)
        self._newest = newest
        self.incomplete = False

    def clear(self) -> None:
        """Forget what waits, and what is known of the table."""
        self._rows.clear()
        self._since.clear()
        self._stored.clear()
        self._newest = -1
        self.size = 0
        self.incomplete = False
        self.forgotten = 0

    def forget(self, uid: str) -> None:
        """Forget that a task is in the table: its row says now that it is gone."""
        self._stored.pop(uid, None)

    @property
    def half_full(self) -> bool:
        """Whether who could wait with more rows should."""
        return self.size > self._limit // 2

    def oldest(self) -> float | None:
        """Return since when the row has waited that waits longest; None when none does."""
        return min(self._since.values(), default=None)

    def _drop(self, uid: str) -> None:
        self.size -= self._rows.pop(uid).size
        del self._since[uid]
