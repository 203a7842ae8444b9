"""What tasks and knowledge bases have cost: processor, memory, tokens, as their pods have measured it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Protocol

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from task_contract.models import Timestamp
from task_contract.views import timestamp
from task_gateway.callers import Callers, Scope
from task_gateway.following import NAME_PATTERN
from task_gateway.models import Answer, Moment, Row
from task_gateway.routes import (
    LIST_NAMESPACE,
    Route,
    answer,
    asked_namespace,
    caller_of,
    query_parameters,
    read_query,
)

_JSON: Final = "application/json"
_SINCE: Final = timedelta(days=30)
_FIGURES: Final = ("seconds", "cpu_seconds", "memory_byte_seconds", "tokens", "texts")


class Accounts(Protocol):
    """The part of :class:`task_gateway.database.Database` that is used."""

    async def costs(  # noqa: D102 - see there
        self, scope: Scope, *, kb_id: str | None, task_id: str | None, since: datetime, limit: int
    ) -> Sequence[Row]: ...


class Cost(Answer):
    """What was used, over all attempts and pods. A pod that was killed could not say what it used, and is not in it."""

    tasks: int
    processes: int
    """Pods, and attempts of warm workers; those that failed or were given back are among them."""
    seconds: float
    """Sum of how long they ran."""
    cpu_seconds: float
    memory_byte_seconds: float
    """Memory times time: 1 GiB for a minute is 6.4e10."""
    tokens: int
    """That were embedded."""
    texts: int
    """That were embedded."""


class KnowledgeBaseCost(Cost):
    """What a knowledge base has cost."""

    namespace: str
    kb_id: str | None
    """null: tasks of no knowledge base."""


class CostStats(Answer):
    """What was used since a moment."""

    since: Timestamp
    namespaces: list[str] | None
    """null: all of the cluster."""
    total: Cost
    """Of all knowledge bases, or of the one that was asked for."""
    by_knowledge_base: list[KnowledgeBaseCost]
    """Those that used the processor most, at most as many as were asked for."""


class CostsQuery(BaseModel):
    """Parameters of GET /api/v1/stats/costs."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kb_id: Annotated[str, Field(pattern=r"^[!-~]{1,63}$")] | None = None
    """Of this knowledge base only."""
    task_id: Annotated[str, Field(max_length=253, pattern=NAME_PATTERN)] | None = None
    """Of tasks of this name only."""
    since: Moment | None = None
    """Attempts that ended since then; by default in the last 30 days."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Knowledge bases."""


class Costs:
    """GET /api/v1/stats/costs."""

    def __init__(self, *, accounts: Accounts, callers: Callers) -> None:
        self._accounts = accounts
        self._callers = callers

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/stats/costs",
                self._costs,
                "What tasks and knowledge bases cost",
                {200: {_JSON: CostStats}},
                problems=(422,),
                parameters=(*query_parameters(CostsQuery), *LIST_NAMESPACE),
                tag="service",
                description="Processor, memory and tokens as the pods have measured them, from PostgreSQL.",
            ),
        )

    async def _costs(self, request: web.Request) -> web.Response:
        query = read_query(request, CostsQuery)
        scope = await self._callers.scope(caller_of(request), self._callers.namespace(*asked_namespace(request)))
        since = query.since or datetime.now(UTC) - _SINCE
        rows = await self._accounts.costs(scope, kb_id=query.kb_id, task_id=query.task_id, since=since, limit=query.limit)
        return answer(
            {
                "since": timestamp(since),
                "namespaces": None if scope is None else list(scope),
                "total": _cost(rows[0]),
                "by_knowledge_base": [
                    {"namespace": row["namespace"], "kb_id": row["kb_id"]} | _cost(row) for row in rows[1:]
                ],
            }
        )


def _cost(row: Row) -> dict[str, Any]:
    return {"tasks": row["tasks"], "processes": row["processes"]} | {name: row[name] for name in _FIGURES}
