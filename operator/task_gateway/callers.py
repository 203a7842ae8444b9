"""Who may: bearer tokens by TokenReview, then a SubjectAccessReview for the verb on ProcessingTasks in the namespace.

The gateway gives nobody more than Kubernetes gives: its own rights are used for what the caller may do by itself. Answers of
both reviews are believed for some seconds, so a right that is taken away works for so long.

A ticket stands for a caller once: browsers cannot give a WebSocket or an event stream a header. What it may is asked anew
when it is used.

Where the network is trusted everybody is the same caller and may do what the gateway may, in the namespaces it is told.
"""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeVar

import orjson

from task_contract.names import GROUP, PLURAL
from task_gateway.problems import Problem, is_namespace, refused

ALL: Final = "*"
"""In place of a namespace: all that the caller may list."""
TICKET_LIFE: Final = timedelta(seconds=30)

_TOKEN_LIMIT: Final = 16_384
_ENTRIES: Final = 10_000

Scope = tuple[str, ...] | None
"""Namespaces; None: every one there is."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody, as the cluster knows him."""

    name: str
    """Such as ``system:serviceaccount:agents:api``; empty where the network is trusted."""
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def dump(self) -> str:
        """Return it as JSON."""
        return orjson.dumps(self).decode()

    @classmethod
    def load(cls, data: str) -> "Caller":
        """Read what :meth:`dump` wrote."""
        values = orjson.loads(data)
        extra = tuple((str(key), tuple(map(str, items))) for key, items in values["extra"])
        return cls(name=values["name"], uid=values["uid"], groups=tuple(values["groups"]), extra=extra)


ANYBODY: Final = Caller(name="")
"""The caller where the network is trusted."""


class Reviews(Protocol):
    """The part of :class:`task_gateway.cluster.Cluster` that is used."""

    async def review_token(self, token: str, *, audiences: Sequence[str]) -> dict[str, Any]: ...  # noqa: D102 - see there
    async def review_access(self, spec: dict[str, Any]) -> bool: ...  # noqa: D102 - see there


class Tickets(Protocol):
    """The part of :class:`task_gateway.database.Database` that is used."""

    async def put_ticket(self, digest: bytes, caller: str, *, expires_at: datetime) -> None: ...  # noqa: D102 - see there
    async def take_ticket(self, digest: bytes) -> str | None: ...  # noqa: D102 - see there


class Callers:
    """Says who asks, and what he may."""

    def __init__(
        self,
        *,
        reviews: Reviews,
        tickets: Tickets,
        trusting: bool,
        namespaces: Sequence[str],
        default_namespace: str,
        audiences: Sequence[str] = (),
        believe: float = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``namespaces``: those that the gateway serves, none: all; ``believe``: seconds that a review holds."""
        self._reviews = reviews
        self._tickets = tickets
        self.trusting = trusting
        self._namespaces = tuple(namespaces)
        self._default = default_namespace
        self._audiences = tuple(audiences)
        self._tokens: _Believed[Caller | None] = _Believed(seconds=believe, clock=clock)
        self._rights: _Believed[bool] = _Believed(seconds=believe, clock=clock)

    # -------------------------------------------------------------------------------------------------------- who asks

    def knows(self, token: str) -> bool:
        """Whether this token was a valid one not long ago: a question about it is none of somebody who guesses."""
        return self.trusting or self._tokens.last(_digest(token)) is not None

    async def of_token(self, token: str | None) -> Caller:
        """Return whose token this is. Raises :class:`Problem` 401 for none and for a bad one."""
        if self.trusting:
            return ANYBODY
        if not token:
            raise _unknown("cannot tell who asks: send the header Authorization: Bearer TOKEN")
        if len(token) > _TOKEN_LIMIT or not token.isascii() or not token.isprintable() or " " in token:
            raise _unknown("cannot accept the token: it is none of this cluster")
        with refused("cannot check the token"):
            caller = await self._tokens.get(_digest(token), lambda: self._review(token))
        if caller is None:
            raise _unknown("cannot accept the token: it has expired, or is none of this cluster")
        return caller

    async def of_ticket(self, ticket: str) -> Caller:
        """Return whose ticket this is; it is used up by that. Raises :class:`Problem` 401 for one that is not valid."""
        data = await self._tickets.take_ticket(_digest(ticket))
        if data is None:
            raise _unknown("cannot accept the ticket: it was used, or is older than 30 s; get another one")
        return Caller.load(data)

    async def issue_ticket(self, caller: Caller) -> tuple[str, datetime]:
        """Return a ticket for the caller, and until when it can be used."""
        ticket, expires_at = secrets.token_urlsafe(32), datetime.now(UTC) + TICKET_LIFE
        await self._tickets.put_ticket(_digest(ticket), caller.dump(), expires_at=expires_at)
        return ticket, expires_at

    async def _review(self, token: str) -> Caller | None:
        status = await self._reviews.review_token(token, audiences=self._audiences)
        user = status.get("user") or {}
        if not status.get("authenticated") or not user.get("username"):
            return None
        if self._audiences and not set(self._audiences) & set(status.get("audiences") or ()):
            return None  # an authenticator that knows no audiences has looked at the token
        extra = tuple(sorted((key, tuple(items)) for key, items in (user.get("extra") or {}).items()))
        return Caller(name=user["username"], uid=user.get("uid") or "", groups=tuple(user.get("groups") or ()), extra=extra)

    # ------------------------------------------------------------------------------------------------- what he may

    def namespace(self, *wanted: str | None) -> str:
        """Return the first namespace that is named, or the default; it is one that the gateway serves, or :data:`ALL`.

        Raises :class:`Problem`.
        """
        name = next((one for one in wanted if one), self._default)
        if name == ALL:
            return name
        if not is_namespace(name):
            raise Problem(422, "invalid-parameter", f"cannot use namespace {name[:80]!a}: it is no name of a namespace")
        if self._namespaces and name not in self._namespaces:
            served = ", ".join(self._namespaces)
            raise Problem(403, "namespace-not-served", f"cannot use namespace {name}: this gateway serves {served}")
        return name

    async def check(
        self, caller: Caller, verb: str, namespace: str, *, group: str = GROUP, resource: str = PLURAL, subresource: str = ""
    ) -> None:
        """Raise :class:`Problem` 403 unless the caller may do this, by default with ProcessingTasks, in the namespace."""
        if namespace == ALL:
            raise Problem(422, "invalid-parameter", "cannot use namespace *: only lists and live updates take it")
        if not await self.may(caller, verb, namespace, group=group, resource=resource, subresource=subresource):
            what = f"{resource}/{subresource}" if subresource else resource
            raise Problem(
                403,
                "not-allowed",
                f"cannot {verb} {what} in namespace {namespace}: {caller.name} lacks the right; grant it with a RoleBinding",
            )

    async def scope(self, caller: Caller, namespace: str, *, verb: str = "list") -> Scope:
        """Return which namespaces a request for ``namespace``, or for all of them, may see. Raises :class:`Problem` 403."""
        if namespace != ALL:
            await self.check(caller, verb, namespace)
            return (namespace,)
        if not self._namespaces:
            if not await self.may(caller, verb, ""):
                raise Problem(
                    403,
                    "not-allowed",
                    f"cannot {verb} {PLURAL} in all namespaces: {caller.name} lacks the right; name one namespace",
                )
            return None
        allowed = await asyncio.gather(*(self.may(caller, verb, one) for one in self._namespaces))
        return tuple(one for one, may in zip(self._namespaces, allowed, strict=True) if may)

    async def may(
        self, caller: Caller, verb: str, namespace: str, *, group: str = GROUP, resource: str = PLURAL, subresource: str = ""
    ) -> bool:
        """Return whether the caller may do this; namespace "": in all of them."""
        if self.trusting:
            return True
        attributes = {"verb": verb, "namespace": namespace, "group": group, "resource": resource, "subresource": subresource}
        spec = {
            "user": caller.name,
            "uid": caller.uid,
            "groups": list(caller.groups),
            "extra": {key: list(items) for key, items in caller.extra},
            "resourceAttributes": {key: value for key, value in attributes.items() if value},
        }
        with refused(f"cannot check the rights of {caller.name}"):
            return await self._rights.get((caller, *attributes.values()), lambda: self._reviews.review_access(spec))


def _unknown(detail: str) -> Problem:
    return Problem(401, "not-authenticated", detail, headers={"WWW-Authenticate": 'Bearer realm="processing-tasks"'})


def _digest(secret: str) -> bytes:
    """A digest stands for the secret in caches and tables: neither gives it away."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


T = TypeVar("T")


class _Believed(Generic[T]):
    """Answers that hold for some seconds; of those who ask the same at the same time one asks for all."""

    def __init__(self, *, seconds: float, clock: Callable[[], float], most: int = _ENTRIES) -> None:
        self._seconds = seconds
        self._clock = clock
        self._most = most
        self._answers: OrderedDict[Hashable, tuple[float, T]] = OrderedDict()
        self._asked: dict[Hashable, asyncio.Task[T]] = {}

    def has(self, key: Hashable) -> bool:
        found = self._answers.get(key)
        return found is not None and self._clock() - found[0] < self._seconds

    def last(self, key: Hashable) -> T | None:
        found = self._answers.get(key)
        return None if found is None else found[1]

    async def get(self, key: Hashable, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self.has(key):
            return self._answers[key][1]
        if (asked := self._asked.get(key)) is None:
            asked = self._asked[key] = asyncio.create_task(self._ask(key, ask))
            asked.add_done_callback(lambda done: self._settle(key, done))
        # A client that goes away takes the question from nobody else.
        return await asyncio.shield(asked)

    def _settle(self, key: Hashable, done: asyncio.Task[T]) -> None:
        self._asked.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen, though everybody who waited may be gone

    async def _ask(self, key: Hashable, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        at = self._clock()
        answer = await ask()
        self._answers[key] = at, answer
        self._answers.move_to_end(key)
        if len(self._answers) > self._most:
            self._answers.popitem(last=False)
        return answer
