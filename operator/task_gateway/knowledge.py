"""The state of knowledge bases, as the ledger in PostgreSQL has it."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from task_contract.models import Timestamp
from task_contract.views import timestamp
from task_gateway.callers import Callers
from task_gateway.database import Database
from task_gateway.models import Answer
from task_gateway.problems import Problem
from task_gateway.routes import (
    NAMESPACE,
    Parameter,
    Route,
    answer,
    answer_page,
    asked_namespace,
    caller_of,
    query_parameters,
    read_query,
)

_JSON: Final = "application/json"
_KB: Final = Parameter("kb_id", "path", {"type": "string", "minLength": 1, "maxLength": 63}, "The knowledge base.")


class Consistency(Answer):
    """What the last checks of the stores have found."""

    missing: int
    """Chunks that a store lacks, summed over both."""
    extra: int
    """Rows that belong to no version, summed over both."""
    checked_at: Timestamp | None
    """When the document was read back that was so longest ago."""


class Retained(Answer):
    """The generation that served before, kept for a rollback."""

    generation: int
    model: str
    """Fingerprint."""
    until: Timestamp


class Rebuild(Answer):
    """A generation that is being filled beside the one that serves."""

    generation: int
    model: str
    """Fingerprint."""
    task_uid: str | None
    """Of the task that fills it."""


class KnowledgeBase(Answer):
    """The state of a knowledge base."""

    kb_id: str
    namespace: str
    state: Literal["ready", "indexing", "degraded"]
    """degraded: chunks are missing that readers should see; indexing: a task writes to it."""
    generation: int
    model: str
    """Fingerprint of the embedding model that filled it."""
    embedding_model: str | None
    """Its name; null before the first rebuild."""
    dimension: int
    documents: int
    chunks: int
    intents: int
    """Versions of documents that are being written."""
    retained: Retained | None
    rebuild: Rebuild | None
    consistency: Consistency
    updated_at: Timestamp


class KnowledgeBasePage(Answer):
    """Part of the knowledge bases of a namespace, by their ids."""

    items: list[KnowledgeBase]
    next_cursor: str | None


class Document(Answer):
    """A document that readers see."""

    document_id: str
    version: int
    chunks: int
    content_hash: str | None
    task_uid: str | None
    """Of the task that published it."""
    consistency: Consistency
    updated_at: Timestamp


class DocumentPage(Answer):
    """Part of the documents of a knowledge base, by their ids."""

    items: list[Document]
    next_cursor: str | None


def _cursor(text: str) -> str:
    """Return the id at which a page ended."""
    try:
        document_id = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        document_id = "\0"
    if "\0" in document_id:
        raise ValueError("is no cursor; take next_cursor of the page before as it is")
    return document_id


class PageQuery(BaseModel):
    """Parameters of GET /api/v1/knowledge and of /api/v1/knowledge/{kb_id}/documents."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    limit: Annotated[int, Field(ge=1, le=200)] = 50
    """Entries of a page."""
    cursor: Annotated[str, Field(max_length=4096), AfterValidator(_cursor)] | None = None
    """next_cursor of the page before."""


class Knowledge:
    """What is known of knowledge bases."""

    def __init__(self, *, database: Database, callers: Callers) -> None:
        self._database = database
        self._callers = callers

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/knowledge",
                self._list,
                "Knowledge bases",
                {200: {_JSON: KnowledgeBasePage}},
                problems=(422,),
                parameters=(*query_parameters(PageQuery), *NAMESPACE),
                tag="knowledge",
                description="Those of a namespace in which something was published, in the order of their ids.",
            ),
            Route(
                "GET",
                "/api/v1/knowledge/{kb_id}",
                self._state,
                "State of a knowledge base",
                {200: {_JSON: KnowledgeBase}},
                problems=(404, 422),
                parameters=(_KB, *NAMESPACE),
                tag="knowledge",
            ),
            Route(
                "GET",
                "/api/v1/knowledge/{kb_id}/documents",
                self._documents,
                "Documents of a knowledge base",
                {200: {_JSON: DocumentPage}},
                problems=(404, 422),
                parameters=(_KB, *query_parameters(PageQuery), *NAMESPACE),
                tag="knowledge",
                description="Those that readers see, in the order of their ids.",
            ),
        )

    async def _state(self, request: web.Request) -> web.Response:
        kb_id, namespace = await self._named(request)
        return answer(await self._base(kb_id, namespace))

    async def _list(self, request: web.Request) -> web.Response:
        namespace = await self._allowed(request)
        query = read_query(request, PageQuery)
        rows = await self._database.knowledge_bases(namespace, after=query.cursor, limit=query.limit + 1)
        return answer_page(
            rows,
            limit=query.limit,
            view=lambda row: _base(row, row["kb_id"], namespace),
            end=lambda row: _cursor_after(row["kb_id"]),
        )

    async def _documents(self, request: web.Request) -> web.Response:
        kb_id, namespace = await self._named(request)
        query = read_query(request, PageQuery)
        rows = await self._database.documents(namespace, kb_id, after=query.cursor, limit=query.limit + 1)
        if not rows and query.cursor is None:
            await self._base(kb_id, namespace)  # one without documents, or none at all
        return answer_page(rows, limit=query.limit, view=_document, end=lambda row: _cursor_after(row["document_id"]))

    async def _base(self, kb_id: str, namespace: str) -> dict[str, Any]:
        row = await self._database.knowledge_base(namespace, kb_id)
        if row is None:
            raise Problem(
                404,
                "not-found",
                f"cannot find knowledge base {kb_id[:63]!r} in namespace {namespace}: no document was published in it yet",
            )
        return _base(row, kb_id, namespace)

    async def _named(self, request: web.Request) -> tuple[str, str]:
        return request.match_info["kb_id"].replace("\0", "\ufffd"), await self._allowed(request)

    async def _allowed(self, request: web.Request) -> str:
        namespace = self._callers.namespace(*asked_namespace(request))
        await self._callers.check(caller_of(request), "list", namespace)
        return namespace


def _cursor_after(identity: str) -> str:
    """Return what :func:`_cursor` reads."""
    return base64.urlsafe_b64encode(identity.encode()).decode().rstrip("=")


def _document(row: Any) -> dict[str, Any]:
    return {
        "document_id": row["document_id"],
        "version": row["published_version"],
        "chunks": row["chunk_count"],
        "content_hash": row["content_hash"],
        "task_uid": row["task_uid"],
        "consistency": _consistency(row),
        "updated_at": timestamp(row["updated_at"]),
    }


def _base(row: Any, kb_id: str, namespace: str) -> dict[str, Any]:
    return {
        "kb_id": kb_id,
        "namespace": namespace,
        "state": row["state"],
        "generation": row["generation"],
        "model": row["model_fingerprint"],
        "embedding_model": row["embedding_model"],
        "dimension": row["dimension"],
        "documents": row["documents"],
        "chunks": row["chunks"],
        "intents": row["intents"],
        "retained": None
        if row["retained_generation"] is None
        else {
            "generation": row["retained_generation"],
            "model": row["retained_model"],
            "until": timestamp(row["keep_until"]),
        },
        "rebuild": None
        if row["filling_generation"] is None
        else {
            "generation": row["filling_generation"],
            "model": row["filling_model"],
            "task_uid": row["filling_task_uid"],
        },
        "consistency": _consistency(row),
        "updated_at": timestamp(row["updated_at"]),
    }


def _consistency(row: Any) -> dict[str, Any]:
    checked_at = row["checked_at"]
    return {
        "missing": row["missing"],
        "extra": row["extra"],
        "checked_at": None if checked_at is None else timestamp(checked_at),
    }
