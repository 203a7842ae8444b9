"""What the pipeline asks of the two stores, and what a row in them is.

Both stores hold the same rows; Milvus has the vector with it. Rows are addressed by chunk id, found by (document, version),
and written by upsert, so that a write may be repeated. No row of a published version is ever overwritten: a new version has
new ids.
"""

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Protocol

from job_runner.document import Chunk
from task_contract.errors import InvalidTask
from task_contract.names import chunk_id, digest, generation_name, knowledge_base_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

METADATA_BYTES: Final = 60_000
"""Milvus takes 65,536 bytes for a JSON field."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of a knowledge base: a collection in Milvus, an index in Elasticsearch."""

    namespace: str
    kb_id: str
    number: int

    @property
    def name(self) -> str:
        """Name of the collection and of the index."""
        return generation_name(namespace=self.namespace, kb_id=self.kb_id, generation=self.number)

    @property
    def alias(self) -> str:
        """Name that readers use, whatever the generation."""
        return knowledge_base_name(namespace=self.namespace, kb_id=self.kb_id)

    def chunk_id(self, document_id: str, version: int, ordinal: int) -> str:
        """Return the id of a row; it is the same in every generation."""
        return chunk_id(
            namespace=self.namespace, kb_id=self.kb_id, document_id=document_id, version=version, ordinal=ordinal
        )


@dataclass(frozen=True, slots=True)
class Label:
    """What a collection and an index say of themselves, so that the ledger can be rebuilt from them."""

    namespace: str
    kb_id: str
    generation: int
    model_fingerprint: str
    dimension: int

    @property
    def names(self) -> Generation:
        """The generation that is labelled."""
        return Generation(self.namespace, self.kb_id, self.generation)

    def written(self) -> str:
        """Return the label as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str, *, name: str) -> "Label | None":
        """Read what stands at a collection or index; ``None`` for nothing, as of release 0.1.0, and for another's label."""
        try:
            label = cls(**json.loads(text))
            return label if label.names.name == name else None
        except (ValueError, TypeError, AttributeError):
            return None


@dataclass(frozen=True, slots=True)
class Row:
    """One chunk of one version of a document, with where it comes from."""

    id: str
    document_id: str
    version: int
    ordinal: int
    text: str
    text_hash: str
    """Of the text alone: equal texts have equal vectors under one model."""
    page_start: int
    page_end: int
    heading_path: str
    char_start: int
    char_end: int
    language: str
    metadata: Mapping[str, str]
    source_sha256: str
    content_hash: str
    """Of source and pipeline: all rows of a version have the same, and equal ones have equal rows."""
    task_uid: str
    chunk_count: int
    """Rows of this version in all."""
    tokens: int
    """Tokens of the text as the embedding model counts them."""
    pipeline: str
    """Versions and settings of what made the row, for people and filters: parser, splitter, model."""
    keywords: tuple[str, ...] = ()
    """Of a semantic analysis (:mod:`job_runner.analysis`), as the three below: in small letters, the best first."""
    summary: str = ""
    """One line: where the chunk stands and what it begins with."""
    duplicate_of: str = ""
    """Id of the row of which this one says nearly the same; empty if there is none."""
    analysis: str = ""
    """Of what the analysis was made, and by which version of it; empty for a row that has not been analyzed."""

    @classmethod
    def of(cls, columns: Mapping[str, Any], *, id: str) -> "Row":  # noqa: A002 - the name of the column
        """Build a row from the columns of a store's answer; one that the collection lacks has its value of ADDED."""
        found = {name: columns.get(name, ADDED.get(name)) for name in FIELDS}
        return cls(id=id, **{**found, "keywords": tuple(found["keywords"])})


_COLUMNS: Final = tuple(Row.__dataclass_fields__)
_values_of: Final = attrgetter(*_COLUMNS)


def columns_of(row: Row) -> dict[str, Any]:
    """Return the columns of a row by name, the id with them: as ``dataclasses.asdict``, which copies all that is in it, at a
    tenth of the time. Metadata and keywords are those of the row.
    """
    return dict(zip(_COLUMNS, _values_of(row), strict=True))


def rows_of_chunks(
    chunks: Sequence[Chunk],
    *,
    generation: Generation,
    document_id: str,
    version: int,
    paged: bool,
    metadata: Mapping[str, str],
    source_sha256: str,
    content_hash: str,
    task_uid: str,
    pipeline: str,
) -> list[Row]:
    """Return the rows of all chunks of a version, in their order; ``paged``: whether page numbers mean anything."""
    return [
        Row(
            id=generation.chunk_id(document_id, version, chunk.ordinal),
            document_id=document_id,
            version=version,
            ordinal=chunk.ordinal,
            text=chunk.text,
            text_hash=digest(chunk.text),
            page_start=chunk.page_start if paged else 0,
            page_end=chunk.page_end if paged else 0,
            heading_path="\n".join(chunk.heading_path),
            char_start=chunk.start,
            char_end=chunk.end,
            language=chunk.language,
            metadata=metadata,
            source_sha256=source_sha256,
            content_hash=content_hash,
            task_uid=task_uid,
            chunk_count=len(chunks),
            tokens=chunk.tokens,
            pipeline=pipeline,
        )
        for chunk in chunks
    ]


@dataclass(frozen=True, slots=True)
class Stored:
    """What tells whether a row belongs where it is, without its text."""

    id: str
    document_id: str
    version: int
    ordinal: int
    content_hash: str
    task_uid: str
    chunk_count: int
    """Rows of its version in all; 0 for a row of release 0.1.0, which did not say."""


@dataclass(frozen=True, slots=True)
class Stale:
    """Versions of a document that nobody reads and nobody will publish: all up to a number, but for those kept."""

    document_id: str
    up_to: int
    keep: tuple[int, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether there is any such number."""
        return sum(1 <= version <= self.up_to for version in set(self.keep)) < self.up_to


def alike(stale: "Sequence[Stale]") -> "dict[tuple[int, tuple[int, ...]], list[str]]":
    """Return (up to, keep) → documents: one clause each, since Milvus compares every row with each clause."""
    found: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for one in stale:
        found.setdefault((one.up_to, one.keep), []).append(one.document_id)
    return found


STALE_AT_ONCE: Final = 200
"""Documents of one question about stale versions: 200 identities of 512 characters each fit into a message of any store."""

STORED_FIELDS: Final = tuple(field for field in Stored.__dataclass_fields__ if field != "id")

FIELDS: Final = tuple(field for field in Row.__dataclass_fields__ if field != "id")
"""Names of the columns beside the id, the same in both stores."""

ADDED: Final[Mapping[str, Any]] = {
    "chunk_count": 0,
    "tokens": 0,
    "pipeline": "",
    "keywords": (),
    "summary": "",
    "duplicate_of": "",
    "analysis": "",
}
"""Columns that collections and indices of release 0.1.0 lack, and what a row has that was written without them.

Its pods go on writing for a while after an upgrade, also into what this release has created.
"""


@dataclass(frozen=True, slots=True)
class Hit:
    """One row that a search found; a larger score is better, scores of the two stores cannot be compared."""

    score: float
    id: str
    document_id: str
    version: int
    ordinal: int
    text: str
    page_start: int
    page_end: int
    heading_path: str

    @classmethod
    def of(cls, row: Mapping[str, Any], *, id: str, score: float) -> "Hit":  # noqa: A002 - the name of the column
        """Build a hit from the columns of a store's answer."""
        return cls(id=id, score=score, **{name: row[name] for name in HIT_FIELDS})

    def scored(self, score: float) -> "Hit":
        """Return the same row with another score."""
        return replace(self, score=score)


READ_AT_ONCE: Final = 256
"""Rows of one answer of :meth:`ChunkStore.read`: 8 MB of the longest texts, and half a megabyte of vectors."""

HIT_FIELDS: Final = tuple(field for field in Hit.__dataclass_fields__ if field not in {"id", "score"})


@dataclass(frozen=True, slots=True)
class Filters:
    """Which rows a search looks at: those that fit everything that is given."""

    document_ids: tuple[str, ...] = ()
    """Rows of any of these documents."""
    language: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    """(key, value): rows that have all of them."""
    headings: tuple[str, ...] = ()
    """Whole titles from the top down: rows below them."""
    pages: tuple[int, int] | None = None
    """First and last: rows that touch any page between, these included. Rows without pages have page 0."""
    keywords: tuple[str, ...] = ()
    """Rows to which a semantic analysis gave all of them; case does not count."""
    without_duplicates: bool = False
    """Without rows that say nearly the same as another one."""


class ChunkStore(Protocol):
    """One generation of a knowledge base in one store. Every answer shows what was written before.

    Errors: StoreUnavailable when waiting may help, StoreCapacity at a limit of the store, StoresDisagree when a deletion
    does not take effect.
    """

    async def ensure(self) -> None:
        """Create what is missing: collection or index, and the alias. Two processes may do it at once."""

    async def aclose(self) -> None:
        """Close the connections."""

    async def stored(self, document_id: str, version: int, *, first: int = 0, below: int | None = None) -> dict[str, str]:
        """Return chunk id → content hash of the rows of a version with ordinals from ``first`` on and below ``below``."""

    def read(self, document_id: str, version: int) -> AsyncIterator[list[Row]]:
        """Yield the rows of a version whole, in the order of their ordinals, :data:`READ_AT_ONCE` at a time."""

    def scan(self) -> AsyncIterator[list[Stored]]:
        """Yield every row of every version once, some thousands at a time; nothing where the generation is not there.

        Rows that are written or deleted meanwhile may or may not be among them.
        """

    async def delete(self, ids: Collection[str]) -> None:
        """Remove rows by chunk id; those that are not there are no error."""

    async def exists(self) -> bool:
        """Tell whether the collection or index of this generation is there."""

    async def count(self, stale: Sequence[Stale]) -> int:
        """Return how many rows there are of stale versions: at most :data:`STALE_AT_ONCE` documents, 0 where nothing is."""

    async def remove(self, stale: Sequence[Stale]) -> int:
        """Remove all rows of stale versions, and return how many there were when a reader sees none of them.

        At most :data:`STALE_AT_ONCE` documents. A generation that is not there has none.
        """

    async def serves(self) -> bool:
        """Tell whether the alias of the knowledge base leads to this generation."""

    async def serve(self) -> None:
        """Make the alias lead here, in one step wherever it led before. The generation is there, see :meth:`ensure`."""

    async def drop(self) -> bool:
        """Remove collection or index of this generation with its alias, and return whether there was one.

        When it returns a reader finds neither. An alias that serves another generation stays.
        """


class VectorIndex(ChunkStore, Protocol):
    """The store that finds by meaning."""

    async def has_all_columns(self) -> bool:
        """Tell whether rows of this collection hold every field; one of an earlier release lacks those of an analysis."""

    async def write(self, rows: Sequence[Row], vectors: "npt.NDArray[np.float32]") -> None:
        """Upsert rows with their vectors, of shape (len(rows), dimension)."""

    async def vectors(
        self, document_id: str, version: int, text_hashes: Collection[str]
    ) -> "dict[str, npt.NDArray[np.float32]]":
        """Return text hash → vector for those texts that a version has."""

    def read_with_vectors(
        self, document_id: str, version: int
    ) -> "AsyncIterator[tuple[list[Row], npt.NDArray[np.float32]]]":
        """As :meth:`read`, each part with its vectors, of shape (len(rows), dimension)."""

    async def search(
        self, vector: "npt.NDArray[np.float32]", *, limit: int, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        """Return the nearest rows of any version of this generation, the best first."""


class TextIndex(ChunkStore, Protocol):
    """The store that finds by words."""

    async def write(self, rows: Sequence[Row]) -> None:
        """Upsert rows."""

    async def search(self, query: str, *, limit: int, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """Return the best matching rows of any version of this generation, the best first."""


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise InvalidTask if metadata is larger than the stores take."""
    if (size := len(json.dumps(metadata, ensure_ascii=False).encode(errors="replace"))) > METADATA_BYTES:
        raise InvalidTask(
            f"cannot store payload.metadata: it has {size} bytes and each chunk carries it; keep it below {METADATA_BYTES}"
        )
