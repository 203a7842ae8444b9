"""Calls of other services over HTTP: found by name, tried again only where that is safe, bounded in time.

>>> result = await call_service(                                                       # doctest: +SKIP
...     service_name="task-manager-service",
...     method=CallMethod.POST,
...     path="/api/v1/tasks",
...     json={"task_type": "health_check"},
...     config=CallConfig(timeout=10, retry_times=2),
... )

What is tried again:

=====================================================  ================================  ======================
what happened                                          GET, HEAD, OPTIONS, PUT, DELETE   POST, PATCH
=====================================================  ================================  ======================
nothing was sent (refused, no such host, TLS)          yes                               yes
no answer, or half of one                              yes                               with an idempotency key
429, 502, 503, 504                                     yes                               with an idempotency key
any other answer                                       no                                no
=====================================================  ================================  ======================

Between tries there is a pause with jitter that doubles, or what the service asks for in Retry-After; nothing is tried, nor
waited for, that would end after the time of the whole call.
"""

import json as json_module
import random
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import lru_cache
from importlib import metadata
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

import httpx

from service_client.breaker import SHARED, Breakers
from service_client.discovery import base_url, service_url
from service_client.errors import (
    CircuitOpen,
    Problem,
    ServiceError,
    ServiceRefused,
    ServiceTimeout,
    ServiceUnavailable,
    TooManyRequests,
)
from service_client.programs import Answer, Blocking, NoAnswer, NotSent, Program, Request, TooLate, Waiting, ask, pause

FIRST_PAUSE: Final = 0.2
"""Seconds before the second try, with jitter; each later pause is twice as long."""
LONGEST_PAUSE: Final = 5.0
"""Seconds, unless the service asks for more."""

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
_DOWN: Final = frozenset({502, 503, 504})
_BUSY: Final = _DOWN | {429}


class CallMethod(StrEnum):
    """How a service is called."""

    GET = "GET"
    POST = "POST"
    PUT = "PUT"
    PATCH = "PATCH"
    DELETE = "DELETE"
    HEAD = "HEAD"
    OPTIONS = "OPTIONS"


@dataclass(frozen=True, slots=True)
class CallConfig:
    """How long and how often."""

    timeout: float = 30.0
    """Seconds for the whole call, all tries and pauses together."""
    retry_times: int = 2
    """Tries after the first one, where they are safe."""
    connect_timeout: float = 3.0
    """Seconds until there is a connection: a pod that has gone is left sooner than one that works on the answer."""

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and self.connect_timeout > 0 and self.retry_times >= 0):
            raise ValueError(f"cannot call a service with {self}: timeouts are above 0 and retry_times is not below 0")


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as it is to be made."""

    service: str
    base: str
    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    config: CallConfig = CallConfig()
    repeatable: bool = False
    """Whether making it twice is the same as making it once, whatever the method."""

    def error(self, kind: type[ServiceError], why: str, **details: Any) -> ServiceError:
        """Return an error that names the call."""
        return kind(why, service=self.service, method=self.method, path=self.path, **details)


# ----------------------------------------------------------------------------------------------------------- decisions


def may_repeat(call: Call, outcome: Answer | NotSent | NoAnswer) -> bool:
    """Whether a call that ended so may be made again: see the table at the head of this module."""
    if isinstance(outcome, NotSent):
        return True
    if isinstance(outcome, Answer) and outcome.status not in _BUSY:
        return False
    return call.repeatable or call.method in _SAFE


def pause_before(number: int, asked: float | None, *, chance: Callable[[], float]) -> float:
    """Return the seconds before try ``number`` (2, 3, …); ``asked`` is what the service wants, ``chance`` gives 0 to 1.

    >>> [pause_before(number, None, chance=lambda: 1.0) for number in (2, 3, 9)], pause_before(2, 7.0, chance=lambda: 0.0)
    ([0.2, 0.4, 5.0], 7.1)
    """
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(number - 2, 10))
    # Later than asked for, by chance: else all callers that were sent away come back in the same moment.
    return (asked or 0.0) + longest / 2 * (1 + chance())


def retry_after(answer: Answer, *, now: datetime) -> float | None:
    """Return the seconds of the header Retry-After, which has a number or a date."""
    text = answer.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds())


# ------------------------------------------------------------------------------------------------------------- program


def exchange(
    call: Call,
    *,
    breakers: Breakers = SHARED,
    clock: Callable[[], float] = time.monotonic,
    chance: Callable[[], float] = random.random,
) -> Program[Answer]:
    """Make a call until it succeeds, fails for good, or its time is over. Raises a :class:`ServiceError`."""
    until = clock() + call.config.timeout
    breaker = breakers.of(call.base)
    number = 0
    while True:
        number += 1
        if wait := breaker.enter():
            why = f"the calls before have failed, so it is not tried for {wait:.1f} s; is the service running?"
            raise call.error(CircuitOpen, why, retry_after=wait)
        outcome: Answer | NotSent | NoAnswer | None = None
        try:
            request = Request(
                method=call.method,
                url=call.base + call.path,
                headers=call.headers,
                body=call.body,
                seconds=max(0.001, until - clock()),
                connect_seconds=call.config.connect_timeout,
            )
            outcome = yield from ask(request)
        except (NotSent, NoAnswer) as error:
            outcome = error
        finally:
            match outcome:
                case None:
                    breaker.abandoned()
                case Answer(status=status) if status not in _DOWN:
                    breaker.succeeded()  # 500 too: one fault in a service must not shut its other paths
                case _:
                    breaker.failed()
        if isinstance(outcome, Answer) and outcome.status < 300:
            return outcome
        asked = retry_after(outcome, now=datetime.now(UTC)) if isinstance(outcome, Answer) else None
        wait = pause_before(number + 1, asked, chance=chance)
        if number > call.config.retry_times or not may_repeat(call, outcome) or clock() + wait >= until:
            raise _failure(call, outcome, tries=number, asked=asked)
        yield from pause(wait)


def _failure(call: Call, outcome: Answer | NotSent | NoAnswer, *, tries: int, asked: float | None) -> ServiceError:
    times = "" if tries == 1 else f", {tries} times"
    match outcome:
        case NotSent():
            why = f"there is no connection to {call.base} ({outcome}){times}; nothing was sent. Is the service running?"
            return call.error(ServiceUnavailable, why)
        case TooLate():
            why = f"no answer in {call.config.timeout:g} s{times}; it may have been done. Allow more time, or ask for less"
            return call.error(ServiceTimeout, why)
        case NoAnswer():
            why = f"there is no whole answer ({outcome}){times}; it may have been done"
            return call.error(ServiceUnavailable, why)
    problem = Problem.parse(outcome.headers.get("content-type", ""), outcome.body)
    why = f"{outcome.status} {problem.detail or problem.title}".strip() + times
    kind: type[ServiceError] = ServiceRefused
    if outcome.status == 429:
        kind = TooManyRequests
    elif outcome.status >= 500:
        kind = ServiceUnavailable
    elif outcome.status < 400:
        why += f"; it points to {outcome.headers.get('location', 'nowhere')}, which is not followed: correct the URL"
    return call.error(kind, why, status=outcome.status, problem=problem, retry_after=asked)


# ------------------------------------------------------------------------------------------------------------- clients


@lru_cache(maxsize=1)
def _user_agent() -> str:
    try:
        return f"processing-tasks-client/{metadata.version('processing-tasks')}"
    except metadata.PackageNotFoundError:
        return "processing-tasks-client"


def make_call(
    service_name: str,
    method: CallMethod | str,
    path: str,
    *,
    json: Any = None,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    config: CallConfig | None = None,
    idempotency_key: str | None = None,
    url: str | None = None,
    repeatable: bool = False,
) -> Call:
    """Return the call that the arguments describe; ``url`` stands for looking the service up.

    ``repeatable`` says that the call may be made twice, for what is known besides method and key.

    Raises ``ValueError`` for a path without a slash at its beginning and for a service that cannot be found.
    """
    if not path.startswith("/") or "#" in path:
        raise ValueError(f"cannot call {path!r}: a path begins with a slash and has no fragment")
    given = {"Accept": "application/json", "Accept-Encoding": "gzip", "User-Agent": _user_agent()}
    body = None
    if json is not None:
        given["Content-Type"] = "application/json"
        body = json_module.dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    if idempotency_key is not None:
        given["Idempotency-Key"] = idempotency_key
    if params and (query := urlencode({key: value for key, value in params.items() if value is not None}, doseq=True)):
        path += ("&" if "?" in path else "?") + query
    return Call(
        service=service_name,
        base=service_url(service_name) if url is None else base_url(url, said_by="url"),
        method=CallMethod(str(method).upper()).value,
        path=path,
        headers=given | dict(headers or {}),
        body=body,
        config=config or CallConfig(),
        repeatable=repeatable or idempotency_key is not None,
    )


def decoded(call: Call, answer: Answer) -> Any:
    """Return the JSON of an answer; None of an empty one. Raises :class:`ServiceUnavailable` for anything else."""
    if not answer.body:
        return None
    try:
        return json_module.loads(answer.body)
    except (ValueError, RecursionError) as error:
        kind = answer.headers.get("content-type", "no type")
        why = f"the answer is no JSON but {kind}: {answer.body[:100]!r}; is this the service?"
        raise call.error(ServiceUnavailable, why, status=answer.status) from error


def _program(call: Call, breakers: Breakers) -> Program[Any]:
    answer = yield from exchange(call, breakers=breakers)
    return decoded(call, answer)


class ServiceClient:
    """Calls services and keeps the connections; safe in several threads. Close it, or use it in a ``with`` block.

    ``http`` is an ``httpx.Client`` of yours with proxies or certificates; it stays yours to close.
    """

    def __init__(self, http: httpx.Client | None = None, *, breakers: Breakers = SHARED) -> None:
        self._driver = Blocking(http)
        self._breakers = breakers

    def call(self, service_name: str, method: CallMethod | str = CallMethod.POST, path: str = "/", **options: Any) -> Any:
        """Call a service and return the JSON of its answer; options as of :func:`call_service`."""
        return self._driver.run(_program(make_call(service_name, method, path, **options), self._breakers))

    def close(self) -> None:
        """Close the connections."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncServiceClient:
    """Calls services and keeps the connections, in one event loop. Close it, or use it in an ``async with`` block."""

    def __init__(self, http: httpx.AsyncClient | None = None, *, breakers: Breakers = SHARED) -> None:
        self._driver = Waiting(http)
        self._breakers = breakers

    async def call(
        self, service_name: str, method: CallMethod | str = CallMethod.POST, path: str = "/", **options: Any
    ) -> Any:
        """Call a service and return the JSON of its answer; options as of :func:`call_service`."""
        return await self._driver.run(_program(make_call(service_name, method, path, **options), self._breakers))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def call_service(
    service_name: str,
    method: CallMethod | str = CallMethod.POST,
    path: str = "/",
    *,
    json: Any = None,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    config: CallConfig | None = None,
    idempotency_key: str | None = None,
    url: str | None = None,
) -> Any:
    """Call a service once and return the JSON of its answer, None if that is empty.

    ``json`` is the body, ``params`` the query (None is left out, lists are repeated). ``idempotency_key`` goes into the
    header Idempotency-Key and says that the service does the same thing once, so that a POST may be tried again. ``url``
    stands for looking the service up (:mod:`service_client.discovery`).

    Each call has a connection of its own; for many, use :class:`AsyncServiceClient`. Raises a
    :class:`~service_client.errors.ServiceError`.
    """
    async with AsyncServiceClient() as client:
        return await client.call(
            service_name,
            method,
            path,
            json=json,
            params=params,
            headers=headers,
            config=config,
            idempotency_key=idempotency_key,
            url=url,
        )


def call_service_sync(
    service_name: str,
    method: CallMethod | str = CallMethod.POST,
    path: str = "/",
    *,
    json: Any = None,
    params: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    config: CallConfig | None = None,
    idempotency_key: str | None = None,
    url: str | None = None,
) -> Any:
    """Do as :func:`call_service`, for code without an event loop."""
    with ServiceClient() as client:
        return client.call(
            service_name,
            method,
            path,
            json=json,
            params=params,
            headers=headers,
            config=config,
            idempotency_key=idempotency_key,
            url=url,
        )


def new_key() -> str:
    """Return an idempotency key that nobody else has."""
    return uuid.uuid4().hex
