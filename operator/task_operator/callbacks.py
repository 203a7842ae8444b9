"""Tells services that a task has ended: takes callbacks from the outbox, signs and sends them, and says what became of them.

A callback is sent at least once: what becomes of a delivery is written after it, and whoever dies in between leaves the
callback to be sent again, with the same id. It is tried for a day with growing waits, then it is dead and waits for somebody
to send it again (the dead letters). Any number of operators may send from one outbox.

A receiver cannot hold up the others: so many deliveries at once go to one host, and each ends in so many seconds. Nothing of
its answer is read but the status and Retry-After, redirects are not followed, and nothing that it says gets into a message.
"""

import asyncio
import contextlib
import email.utils
import os
import random as random_module
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import aiohttp
import structlog

from task_contract.models import CallbackState
from task_contract.views import timestamp
from task_contract.webhooks import parse_secrets, sign
from task_operator.metrics import Metrics
from task_operator.outbox import Callback, Outbox, Settlement, Told
from task_operator.projection import DatabaseUnavailable
from task_operator.spans import Sampler, traceparent_of
from task_operator.statuses import clip
from task_operator.targets import Target, TargetRefused, Targets, TargetUnknown
from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Invalid, NotFound

_log = structlog.get_logger(__name__)

GIVE_UP: Final = timedelta(hours=24)
"""After the first attempt a callback is tried for so long."""
_FIRST_DELAY: Final = 5.0  # seconds
_FACTOR: Final = 3.0
_MAX_DELAY: Final = 4 * 3600.0  # seconds
_JITTER: Final = 0.2
_PER_HOST: Final = 8
_AT_ONCE: Final = 64
_DNS_SECONDS: Final = 5.0
_LOOK: Final = 2.0  # seconds between two looks at the outbox when nobody calls
_COUNT: Final = 15.0  # seconds between two counts for the metrics
_TELL: Final = 50  # statuses a round
_SECRET_AGE: Final = 15.0  # seconds that a Secret is taken for what it was
_SECRETS: Final = 256
_MAX_BACKOFF: Final = 30.0  # seconds
_TEXT: Final = 1024  # characters of a message, the bound of a status


class SecretUnusable(Exception):
    """A callback cannot be signed now; the message says why, and nothing of the secret."""


class Api(Protocol):
    """The part of :class:`task_operator.cluster.Cluster` that is used."""

    async def get_secret(self, namespace: str, name: str) -> Mapping[str, bytes]: ...  # noqa: D102 - see Cluster
    async def patch_callback(  # noqa: D102
        self, namespace: str, name: str, *, uid: str, callback: Mapping[str, Any]
    ) -> None: ...


# ------------------------------------------------------------------------------------------------------------ decisions


def delay(attempts: int, *, random: float) -> timedelta:
    """Return the wait after so many attempts (at least 1): 5 s, 15 s, 45 s … 4 h, each ±20 % by ``random`` in [0, 1)."""
    seconds = min(_MAX_DELAY, _FIRST_DELAY * _FACTOR ** min(attempts - 1, 20))
    return timedelta(seconds=seconds * (1 + _JITTER * (2 * random - 1)))


def retry_after(value: str | None, *, now: datetime) -> timedelta:
    """Read the header Retry-After, seconds or a date; zero for none, and for one that makes no sense."""
    if value is None:
        return timedelta()
    text = value.strip()
    if text.isascii() and text.isdecimal():
        return timedelta(seconds=min(int(text[:9]), GIVE_UP.total_seconds()))
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return timedelta()
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return min(max(at - now, timedelta()), GIVE_UP)


def judge(status: int, *, wait: timedelta, callback: Callback, now: datetime, random: float) -> Settlement:
    """Return what an answer means; ``wait``: its Retry-After."""
    if 200 <= status < 300:
        return Settlement("delivered", status_code=status)
    if status == 410:
        return Settlement("dead", "the receiver answered 410: it wants no more of it", status_code=status)
    why = f"the receiver answered {status}"
    if 300 <= status < 400:
        why += ", a redirect, which is not followed: correct spec.callback.url"
    after = wait if status in {429, 503} else timedelta()
    return again(why, callback=callback, now=now, random=random, at_least=after, status_code=status)


def again(
    why: str,
    *,
    callback: Callback,
    now: datetime,
    random: float,
    at_least: timedelta = timedelta(),
    status_code: int | None = None,
) -> Settlement:
    """Return that a delivery failed: tried again after a wait, or given up when its day is over.

    The last attempt is made when the day ends, whatever the wait would have been.
    """
    end = (callback.first_attempt_at or now) + GIVE_UP
    if now >= end:
        return Settlement("dead", f"{why}; given up after {callback.attempts + 1} attempts", status_code=status_code)
    after = min(max(delay(callback.attempts + 1, random=random), at_least), end - now)
    return Settlement("pending", why, status_code=status_code, after=after)


# ------------------------------------------------------------------------------------------------------------- secrets


class Secrets:
    """The keys that sign, from the Secrets that the operator may read."""

    def __init__(
        self,
        read: Callable[[str, str], Awaitable[Mapping[str, bytes]]],
        *,
        allowed: frozenset[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._allowed = allowed
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[float, Mapping[str, bytes]]] = {}

    async def keys(self, callback: Callback) -> tuple[bytes, ...]:
        """Return the keys for a callback; none for one that is not signed. Raises :class:`SecretUnusable`."""
        name, key = callback.secret_name, callback.secret_key
        if name is None or key is None:
            return ()
        if name not in self._allowed:
            raise SecretUnusable(
                f"cannot sign: the operator may not read Secret {name}, only {', '.join(sorted(self._allowed)) or 'none'}; "
                "use that, or name yours in OPERATOR_CALLBACKS_SECRETS (callbacks.secrets of the chart)"
            )
        data = await self._data(callback.namespace, name)
        if key not in data:
            raise SecretUnusable(f"cannot sign: Secret {name} in {callback.namespace} has no key {key}; add it")
        try:
            return parse_secrets(data[key].decode())
        except ValueError as error:
            told = "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise SecretUnusable(f"cannot sign with key {key} of Secret {name}: {told}") from None

    async def _data(self, namespace: str, name: str) -> Mapping[str, bytes]:
        known = self._known.get((namespace, name))
        if known is not None and self._clock() - known[0] < _SECRET_AGE:
            return known[1]
        try:
            data = await self._read(namespace, name)
        except NotFound:
            raise SecretUnusable(f"cannot sign: there is no Secret {name} in {namespace}; create it") from None
        except ClusterError as error:
            raise SecretUnusable(f"cannot sign: cannot read Secret {name} in {namespace}: {error.message}") from error
        self._known.pop((namespace, name), None)
        while len(self._known) >= _SECRETS:
            del self._known[next(iter(self._known))]
        self._known[namespace, name] = (self._clock(), data)
        return data


# -------------------------------------------------------------------------------------------------------------- sender


class Sender:
    """Sends callbacks until cancelled."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        targets: Targets,
        api: Api,
        secrets: frozenset[str],
        metrics: Metrics,
        announce: Callable[[Told], None] = lambda _: None,
        timeout: timedelta = timedelta(seconds=10),
        authorities: str = "",
        sampler: Sampler | None = None,
        per_host: int = _PER_HOST,
        at_once: int = _AT_ONCE,
        user_agent: str = "processing-tasks",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        random: Callable[[], float] = random_module.random,
    ) -> None:
        """``announce`` is called for callbacks that have died; ``authorities``: more certificates to trust, in PEM form;
        ``sampler``: of the spans that are sent; None: none are.
        """
        self._outbox = outbox
        self._targets = targets
        self._api = api
        self._secrets = Secrets(api.get_secret, allowed=secrets)
        self._metrics = metrics
        self._announce = announce
        self._timeout = timeout
        self._authorities = authorities
        self._sampler = sampler
        self._per_host = per_host
        self._at_once = at_once
        self._user_agent = user_agent
        self._clock = clock
        self._random = random
        self._session: aiohttp.ClientSession | None = None
        self._wake = asyncio.Event()
        self._tell = asyncio.Event()
        self._sending: dict[asyncio.Task[None], Callback] = {}
        self._left: list[Callback] = []  # deliveries that were cut off

    async def warm_up(self) -> None:
        """Open the session; nothing is connected."""
        trusted: ssl.SSLContext | bool = True  # aiohttp's own: the system's certificates are a megabyte for each context
        if self._authorities:
            trusted = ssl.create_default_context()
            trusted.load_verify_locations(cadata=self._authorities)
        self._session = aiohttp.ClientSession(
            # A connection for each delivery: the next one goes to an address that is checked anew.
            connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=trusted),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self._user_agent},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=self._timeout.total_seconds()),
        )

    def wake(self) -> None:
        """Have the outbox looked at now."""
        self._wake.set()

    async def run(self) -> None:
        """Send what is due, and tell tasks what became of it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forever(self._send_due, self._wake, _LOOK), name="callbacks: sending")
            group.create_task(self._forever(self._tell_all, self._tell, _LOOK), name="callbacks: telling")
            group.create_task(self._forever(self._count, asyncio.Event(), _COUNT), name="callbacks: counting")

    async def aclose(self) -> None:
        """Stop sending; what was not sent to the end is given back."""
        sending = list(self._sending)
        for task in sending:
            task.cancel()
        if sending:
            await asyncio.wait(sending)
            await asyncio.sleep(0)  # for _sent to be called
        if self._left:
            with contextlib.suppress(DatabaseUnavailable, TimeoutError):
                async with asyncio.timeout(2):
                    await self._outbox.release(self._left)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _forever(self, look: Callable[[], Awaitable[None]], wake: asyncio.Event, interval: float) -> None:
        wait = 1.0
        while True:
            wake.clear()
            try:
                await look()
                wait = 1.0
            except DatabaseUnavailable as error:
                _log.warning("cannot look at the outbox; trying again", error=str(error), wait=wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await wake.wait()

    async def _send_due(self) -> None:
        while (room := self._at_once - len(self._sending)) > 0:
            busy = Counter(callback.host for callback in self._sending.values())
            callbacks = await self._outbox.claim(most=room, per_host=self._per_host, busy=busy)
            for callback in callbacks:
                task = asyncio.create_task(self._deliver(callback), name=callback.id)
                self._sending[task] = callback
                task.add_done_callback(self._sent)
            if len(callbacks) < room:
                return  # what is due beyond that is of hosts that have enough, and waits for one of them to end

    def _sent(self, task: asyncio.Task[None]) -> None:
        callback = self._sending.pop(task)
        self._wake.set()
        if task.cancelled():
            self._left.append(callback)
        elif (error := task.exception()) is not None:
            # Its lease ends, and it is sent again.
            _log.error("cannot settle a callback", id=callback.id, error=repr(error))

    async def _deliver(self, callback: Callback) -> None:
        started = time.monotonic()
        try:
            settlement = await self.attempt(callback)
        finally:
            self._metrics.callback_seconds.observe(time.monotonic() - started)
        if not await self._outbox.settle(callback, settlement):
            _log.info("a callback was taken over by another operator", id=callback.id)
            return
        result = {"pending": "failed"}.get(settlement.state, settlement.state)
        self._metrics.callbacks_sent.labels(result).inc()
        self._tell.set()
        if settlement.state != "delivered":
            _log.warning(
                "a callback was not delivered",
                namespace=callback.namespace,
                task=callback.name,
                host=callback.host,
                attempt=callback.attempts + 1,
                state=settlement.state,
                error=settlement.error,
            )

    async def attempt(self, callback: Callback) -> Settlement:
        """Try one delivery; return what becomes of the callback."""
        try:
            target = await self._target(callback)
            async with asyncio.timeout(self._timeout.total_seconds()):
                keys = await self._secrets.keys(callback)
                status, wait = await self._post(callback, target, keys)
        except TargetRefused as error:
            return Settlement("dead", str(error)[:_TEXT])
        except (TargetUnknown, SecretUnusable) as error:
            return self._again(str(error), callback)
        except TimeoutError:
            return self._again(f"no answer of {callback.host} within {self._timeout.total_seconds():g} s", callback)
        except aiohttp.ClientConnectorCertificateError:
            return self._again(f"the certificate of {callback.host} is not trusted; callbacks.ca adds authorities", callback)
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            return self._again(f"cannot connect to {callback.host}: {reason}", callback)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return self._again(f"no proper answer of {callback.host}: {type(error).__name__}", callback)
        now = self._clock()
        return judge(status, wait=wait, callback=callback, now=now, random=self._random())

    async def _target(self, callback: Callback) -> Target:
        try:
            async with asyncio.timeout(_DNS_SECONDS):
                return await self._targets.check(callback.url, namespace=callback.namespace)
        except TimeoutError:
            raise TargetUnknown(f"cannot find {callback.host}: the DNS does not answer") from None

    def _again(self, why: str, callback: Callback) -> Settlement:
        return again(why[:_TEXT], callback=callback, now=self._clock(), random=self._random())

    async def _post(self, callback: Callback, target: Target, keys: tuple[bytes, ...]) -> tuple[int, timedelta]:
        """Send to the first address that takes a connection; return the answer's status and its Retry-After."""
        if self._session is None:
            raise RuntimeError("Sender is used before warm_up()")
        body = callback.body.encode()
        now = self._clock()
        headers = sign(body, message_id=callback.id, timestamp=int(now.timestamp()), secrets=keys)
        headers |= {"Content-Type": "application/json", "Host": target.url.raw_authority}
        if (trace := traceparent_of(callback.traceparent, uid=callback.task_uid, sampler=self._sampler)) is not None:
            headers["traceparent"] = trace
        for address in target.addresses:
            try:
                async with self._session.post(
                    target.url.with_host(str(address)),
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    server_hostname=target.url.raw_host,
                ) as answer:
                    # The body is left where it is: the connection is closed.
                    return answer.status, retry_after(answer.headers.get("Retry-After"), now=now)
            except aiohttp.ClientConnectorCertificateError:
                raise
            except aiohttp.ClientConnectorError:
                if address == target.addresses[-1]:
                    raise
        raise TargetUnknown(f"cannot find {callback.host}: it has no address")

    # ------------------------------------------------------------------------------------------------------- telling

    async def _tell_all(self) -> None:
        while untold := await self._outbox.untold(most=_TELL):
            again = len(untold) < _TELL
            for one in untold:
                try:
                    await self._api.patch_callback(one.namespace, one.name, uid=one.task_uid, callback=status_of(one))
                except NotFound:
                    pass  # the task is gone: the outbox alone knows
                except Conflict:
                    again = True  # somebody has written it, perhaps another sender: to be read again, from the outbox too
                    continue
                except (Forbidden, Invalid) as error:
                    _log.warning("cannot tell a task of its callback", task=one.name, error=error.message)
                except ClusterError as error:
                    _log.warning("cannot tell tasks of their callbacks; trying again", error=error.message)
                    return
                await self._outbox.told(one)
                if one.state == "dead":
                    self._announce(one)
            if again:
                return

    async def _count(self) -> None:
        counts = await self._outbox.counts(now=self._clock())
        for state in ("pending", "dead"):
            number, age = counts.get(state, (0, 0.0))
            self._metrics.callbacks.labels(state).set(number)
            if state == "pending":
                self._metrics.callbacks_oldest.set(age)


def status_of(callback: Told) -> dict[str, Any]:
    """Return ``status.callback`` as a merge patch: what is unknown is removed."""
    return {
        "state": str(CallbackState(callback.state.title())),
        "attempts": callback.attempts,
        "lastAttemptAt": None if callback.last_attempt_at is None else timestamp(callback.last_attempt_at),
        "statusCode": callback.status_code,
        "message": None if callback.error is None else clip(callback.error),
    }
