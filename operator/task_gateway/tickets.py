"""POST /api/v1/tickets: what a browser gives a WebSocket or an event stream in place of a token."""

from collections.abc import Sequence

from aiohttp import web

from task_contract.views import timestamp
from task_gateway.callers import Callers
from task_gateway.models import TicketAnswer
from task_gateway.routes import Route, answer, caller_of


class Tickets:
    """Issues tickets."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "POST",
                "/api/v1/tickets",
                self._issue,
                "A ticket for a WebSocket or an event stream",
                {201: {"application/json": TicketAnswer}},
                tag="live",
                description="It is good for one connection within 30 seconds, as ?ticket=, and may what the caller may.",
            ),
        )

    async def _issue(self, request: web.Request) -> web.Response:
        ticket, expires_at = await self._callers.issue_ticket(caller_of(request))
        return answer({"ticket": ticket, "expires_at": timestamp(expires_at)}, status=201)
