"""Where a process may be killed: every call that leaves something behind outside of it, counted at the clients' seams.

Nothing here names a write of the operator or the runner. The seams are the libraries through which all of them go (aiohttp,
asyncpg, the clients of Milvus and Elasticsearch, the termination message), so a write that is new is a point without anyone
having to think of it. A point is named by what it does, which one of its kind it is in the life, and the side of the call:
``API PUT status #2 after``. Numbers go on over restarts: they are counted in the record, a file that outlives the process.
"""

import functools
import inspect
import json
import os
import re
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

RECORD, PLAN = "CRASH_RECORD", "CRASH_PLAN"
"""Variables of the environment in which :mod:`tests.crash.process` finds the record and the plan."""


class Kind(StrEnum):
    """What a point is about: the first word of its name."""

    API = "API"
    SQL = "SQL"
    MILVUS = "Milvus"
    ELASTICSEARCH = "Elasticsearch"
    MESSAGE = "message"


class Action(StrEnum):
    """What happens to the process at a point, once in a life."""

    KILL = "kill"
    STOP = "stop"
    """It stands still, as on a node that is lost, until somebody lets it go on."""


_SIGNALS = {Action.KILL: signal.SIGKILL, Action.STOP: signal.SIGSTOP}


class Record:
    """The points that the processes of one role have reached in one life, in order, and what happened there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: str) -> None:
        """Append a line with one system call: it is there even if the process is killed right after."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    @property
    def points(self) -> list[str]:
        """Names of all points reached."""
        return [line for line in self._lines() if line[:2] not in {"! ", "= "}]

    @property
    def statements(self) -> set[str]:
        """Every statement that was sent to PostgreSQL."""
        return {json.loads(line[2:]) for line in self._lines() if line[:2] == "= "}

    @property
    def done(self) -> dict[str, str]:
        """Point → what happened there."""
        return {point: action for action, point in (line[2:].split(" ", 1) for line in self._lines() if line[:2] == "! ")}


class Faults:
    """Counts the calls of this process and carries out what is planned at them."""

    def __init__(self, record: Path, plan: Mapping[str, str]) -> None:
        self._record = Record(record)
        self._plan = {point: Action(action) for point, action in plan.items() if point not in self._record.done}
        self._counts = Counter(point.rsplit(" #", 1)[0] for point in self._record.points if point.endswith(" before"))
        self._statements: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> "Faults":
        """Take both variables out of the environment: children are not meant."""
        return cls(Path(os.environ.pop(RECORD)), json.loads(os.environ.pop(PLAN)))

    def before(self, label: str) -> str:
        """Note that a call begins; return its name."""
        with self._lock:
            self._counts[label] += 1
            call = f"{label} #{self._counts[label]}"
        self._reach(f"{call} before")
        return call

    def after(self, call: str) -> None:
        """Note that a call was answered, before anything in the process has learned of it."""
        self._reach(f"{call} after")

    def sent(self, statement: str) -> None:
        """Note a statement to PostgreSQL: what the release after this one must go on understanding."""
        if statement not in self._statements:
            self._statements.add(statement)
            self._record.write(f"= {json.dumps(statement)}")

    def _reach(self, point: str) -> None:
        with self._lock:
            self._record.write(point)
            action = self._plan.pop(point, None)
            if action is not None:
                self._record.write(f"! {action} {point}")
                os.kill(os.getpid(), _SIGNALS[action])

    def around(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function or coroutine function that is a point on both sides."""

        @functools.wraps(call)
        async def watched_later(*arguments: Any, **options: Any) -> Any:
            name = self.before(label)
            answer = await call(*arguments, **options)
            self.after(name)
            return answer

        @functools.wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            name = self.before(label)
            answer = call(*arguments, **options)
            self.after(name)
            return answer

        return watched_later if inspect.iscoroutinefunction(call) else watched


# --------------------------------------------------------------------------------------------------------------- seams


def watch_api(faults: Faults) -> None:
    """Every request of every aiohttp session of this process that is none for reading."""
    import aiohttp

    async def starts(_session: Any, context: Any, request: aiohttp.TraceRequestStartParams) -> None:
        reads = request.method in {"GET", "HEAD"}
        context.call = None if reads else faults.before(f"{Kind.API} {request.method} {_resource(request.url.path)}")

    async def ends(_session: Any, context: Any, _answer: object) -> None:
        if context.call is not None:
            faults.after(context.call)

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(starts)
    trace.on_request_end.append(ends)
    construct = aiohttp.ClientSession.__init__

    def constructed(self: aiohttp.ClientSession, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **{**options, "trace_configs": [*(options.get("trace_configs") or ()), trace]})

    aiohttp.ClientSession.__init__ = constructed  # type: ignore[method-assign]  # the seam


def _resource(path: str) -> str:
    """Return the collection, or the subresource, that a path of the Kubernetes API names."""
    _, inside, rest = path.partition("/namespaces/")
    parts = rest.split("/")[1:] if inside else path.strip("/").split("/")[-1:]
    return parts[2] if len(parts) > 2 else parts[0]


_WRITES = re.compile(r"(?<!FOR )(?<!DO )\b(INSERT INTO|UPDATE|DELETE FROM|TRUNCATE)\s+(\w+)", re.IGNORECASE)


def watch_sql(faults: Faults) -> None:
    """Every statement that PostgreSQL commits: one by itself that writes, and the COMMIT of a transaction that wrote."""
    from asyncpg.connection import Connection

    written: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def label(connection: Any, query: str) -> str | None:
        found = _WRITES.search(query)
        if connection.is_in_transaction():
            tables = written.setdefault(connection, [])
            if found and found.group(2) not in tables:
                tables.append(found.group(2))
            if query.startswith("COMMIT") and tables:
                return f"{Kind.SQL} COMMIT {','.join(tables)}"
            return None
        written.pop(connection, None)
        return f"{Kind.SQL} {found.group(1).split()[0]} {found.group(2)}" if found else None

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        async def watch(self: Any, query: str, *arguments: Any, **options: Any) -> Any:
            faults.sent(query)
            name = label(self, query)
            if name is None:
                return await call(self, query, *arguments, **options)
            name = faults.before(name)
            answer = await call(self, query, *arguments, **options)
            faults.after(name)
            return answer

        return watch

    for method in ("execute", "executemany", "fetch", "fetchval", "fetchrow", "fetchmany"):
        setattr(Connection, method, watched(getattr(Connection, method)))


def watch_elasticsearch(faults: Faults) -> None:
    """Every request to Elasticsearch."""
    from elastic_transport import AsyncTransport

    perform = AsyncTransport.perform_request

    async def performed(self: AsyncTransport, method: str, target: str, **options: Any) -> Any:
        endpoint = next((part for part in target.split("?")[0].split("/") if part.startswith("_")), "index")
        name = faults.before(f"{Kind.ELASTICSEARCH} {method} {endpoint}")
        answer = await perform(self, method, target, **options)
        faults.after(name)
        return answer

    AsyncTransport.perform_request = performed  # type: ignore[method-assign]  # the seam


def watch_milvus(faults: Faults) -> None:
    """Every call of Milvus' client, but not the calls that it makes of itself."""
    from pymilvus import MilvusClient

    inside = threading.local()

    def watched(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        outer = faults.around(f"{Kind.MILVUS} {method}", call)

        @functools.wraps(call)
        def watch(*arguments: Any, **options: Any) -> Any:
            if getattr(inside, "call", False):
                return call(*arguments, **options)
            inside.call = True
            try:
                return outer(*arguments, **options)
            finally:
                inside.call = False

        return watch

    for method, call in list(vars(MilvusClient).items()):
        if inspect.isfunction(call) and not method.startswith("_") and method != "close":
            setattr(MilvusClient, method, watched(method, call))


def watch_message(faults: Faults) -> None:
    """The termination message: what the runner says last."""
    from job_runner import attempt

    attempt.write_termination_message = faults.around(f"{Kind.MESSAGE} written", attempt.write_termination_message)
