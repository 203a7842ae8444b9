"""The two stores in memory: they pass the contract tests of the real ones, and stand in where a server adds nothing."""

import re
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from job_runner.index import READ_AT_ONCE, STORED_FIELDS, Filters, Hit, Row, Stale, Stored


class _MemoryStore:
    def __init__(self, aliases: dict[str, "_MemoryStore"] | None = None) -> None:
        self.rows: dict[str, Row] = {}
        self.there = True
        self._aliases = {} if aliases is None else aliases

    async def ensure(self) -> None:
        self.there = True
        self._aliases.setdefault("alias", self)

    async def aclose(self) -> None:
        pass

    async def stored(self, document_id: str, version: int, *, first: int = 0, below: int | None = None) -> dict[str, str]:
        return {
            row.id: row.content_hash
            for row in self.rows.values()
            if (row.document_id, row.version) == (document_id, version)
            and first <= row.ordinal
            and (below is None or row.ordinal < below)
        }

    def _parts(self, document_id: str, version: int) -> list[list[Row]]:
        found = [row for row in self.rows.values() if (row.document_id, row.version) == (document_id, version)]
        found.sort(key=lambda row: row.ordinal)
        return [found[start : start + READ_AT_ONCE] for start in range(0, len(found), READ_AT_ONCE)]

    async def read(self, document_id: str, version: int) -> AsyncIterator[list[Row]]:
        for part in self._parts(document_id, version):
            yield part

    async def scan(self) -> AsyncIterator[list[Stored]]:
        rows = list(self.rows.values())
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            yield [Stored(id=row.id, **{name: getattr(row, name) for name in STORED_FIELDS}) for row in part]

    async def delete(self, ids: Collection[str]) -> None:
        for key in ids:
            self.rows.pop(key, None)

    async def exists(self) -> bool:
        return self.there

    def _of(self, stale: Sequence[Stale]) -> list[str]:
        doomed = {one.document_id: one for one in stale}
        return [
            row.id
            for row in self.rows.values()
            if (one := doomed.get(row.document_id)) and row.version <= one.up_to and row.version not in one.keep
        ]

    async def count(self, stale: Sequence[Stale]) -> int:
        return len(self._of(stale))

    async def remove(self, stale: Sequence[Stale]) -> int:
        ids = self._of(stale)
        await self.delete(ids)
        return len(ids)

    async def serves(self) -> bool:
        return self._aliases.get("alias") is self

    async def serve(self) -> None:
        self._aliases["alias"] = self

    async def drop(self) -> bool:
        there, self.there = self.there, False
        self.rows.clear()
        if await self.serves():
            del self._aliases["alias"]
        return there


def _ranked(scored: list[tuple[float, Row]], limit: int, offset: int) -> list[Hit]:
    best = sorted(scored, key=lambda pair: (-pair[0], pair[1].id))[offset : offset + limit]
    return [Hit.of(asdict(row), id=row.id, score=score) for score, row in best]


class MemoryVectorIndex(_MemoryStore):
    """Nearest by cosine over all rows."""

    def __init__(self, aliases: dict[str, _MemoryStore] | None = None) -> None:
        super().__init__(aliases)
        self.by_id: dict[str, npt.NDArray[np.float32]] = {}

    async def has_all_columns(self) -> bool:
        return True

    async def write(self, rows: Sequence[Row], vectors: npt.NDArray[np.float32]) -> None:
        self.there = True  # as Elasticsearch makes an index anew for a late writer
        for row, vector in zip(rows, vectors, strict=True):
            self.rows[row.id] = row
            self.by_id[row.id] = vector

    async def vectors(
        self, document_id: str, version: int, text_hashes: Collection[str]
    ) -> dict[str, npt.NDArray[np.float32]]:
        return {
            self.rows[key].text_hash: self.by_id[key]
            for key in await self.stored(document_id, version)
            if self.rows[key].text_hash in text_hashes
        }

    async def read_with_vectors(
        self, document_id: str, version: int
    ) -> AsyncIterator[tuple[list[Row], npt.NDArray[np.float32]]]:
        for part in self._parts(document_id, version):
            yield part, np.stack([self.by_id[row.id] for row in part])

    async def search(
        self, vector: npt.NDArray[np.float32], *, limit: int, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        fitting = [(key, row) for key, row in self.rows.items() if _fits(row, filters)]
        return _ranked([(float(self.by_id[key] @ vector), row) for key, row in fitting], limit, offset)


class MemoryTextIndex(_MemoryStore):
    """Counts the words, and the Chinese characters, that query and row share."""

    async def write(self, rows: Sequence[Row]) -> None:
        self.there = True
        self.rows |= {row.id: row for row in rows}

    async def search(self, query: str, *, limit: int, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        fitting = [row for row in self.rows.values() if _fits(row, filters)]
        scored = [(len(_terms(query) & _terms(f"{row.text} {row.heading_path}")), row) for row in fitting]
        return _ranked([(float(score), row) for score, row in scored if score], limit, offset)


def _fits(row: Row, filters: Filters | None) -> bool:
    if filters is None:
        return True
    depth = len(filters.headings)
    first, last = filters.pages or (row.page_start, row.page_end)
    return (
        (not filters.document_ids or row.document_id in filters.document_ids)
        and filters.language in {None, row.language}
        and all(row.metadata.get(key) == value for key, value in filters.metadata)
        and tuple(row.heading_path.split("\n")[:depth]) == filters.headings
        and row.page_start <= last
        and row.page_end >= first
        and {keyword.lower() for keyword in filters.keywords} <= set(row.keywords)
        and not (filters.without_duplicates and row.duplicate_of)
    )


def _terms(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+|[\u3400-\u9fff]", text.lower()))
