"""Load for an operator: tasks at a rate or at once, hands that play what an operator does not do, and an eye on all of it.

All of it is one process on one event loop, whose own CPU time is measured too. Times are those at which this process sees a
watch event, so each holds the way through the API server; that is the same for every operator.
"""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import aiohttp
import asyncpg
import orjson
from prometheus_client.parser import text_string_to_metric_families

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from task_contract.names import TASK_NAME_ANNOTATION, TASK_UID_LABEL
from task_platform.kubernetes import Access, open_session
from tests.support.operator_lab import JOBS, MERGE, TASKS, ended, running

OUTCOME: Final = AttemptOutcome(
    outcome=Outcome.SUCCEEDED,
    attempt=1,
    result=Result(documents=1, pages=10, chunks=42, embedded=42, milvus_count=42, elasticsearch_count=42, version=1),
)
_STRATEGIC: Final = "application/strategic-merge-patch+json"
_AT_ONCE: Final = 32  # requests that create tasks, of a burst
_KINDS: Final = frozenset({"processingtasks", "jobs", "pods", "events"})


@dataclass(slots=True)
class Record:
    """When what happened to one task, by the monotonic clock; None: not yet."""

    posted: float
    job_made: float | None = None
    job_done: float | None = None
    completed: float | None = None


class Server:
    """The API server as an administrator uses it."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._session = open_session(access, user_agent="tests")

    async def aclose(self) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> bytes:
        """Send a request that must succeed; return the answer, not parsed."""
        async with self._session.request(
            method,
            self._access.server + path,
            data=None if body is None else orjson.dumps(body),
            headers={"Content-Type": content_type},
        ) as response:
            data = await response.read()
            if response.status >= 300:
                raise RuntimeError(f"cannot {method} {path}: {response.status} {data[:500].decode()}")
            return data

    async def watch(self, path: str) -> AsyncIterator[dict[str, Any]]:
        """Hand out the events of a collection from now on; a watch that the server ends is taken up again."""
        version = orjson.loads(await self.send("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        while True:
            async with self._session.get(
                f"{self._access.server}{path}?watch=1&resourceVersion={version}", timeout=aiohttp.ClientTimeout(total=None)
            ) as response:
                async for line in response.content:
                    event = orjson.loads(line)
                    if event["type"] == "ERROR":
                        raise RuntimeError(f"cannot go on watching {path}: {event['object']}")
                    version = event["object"]["metadata"]["resourceVersion"]
                    yield event

    async def requests(self) -> "Counter[tuple[str, str, str]]":
        """Return how many requests were answered, by verb, resource and status code, of the kinds that matter."""
        text = (await self.send("GET", "/metrics")).decode()
        wanted = "\n".join(line for line in text.splitlines() if line.startswith("apiserver_request_total{"))
        counts: Counter[tuple[str, str, str]] = Counter()
        for family in text_string_to_metric_families(wanted + "\n"):
            for sample in family.samples:
                labels = sample.labels
                if labels["resource"] in _KINDS and labels["code"] != "0":
                    name = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                    counts[labels["verb"], name, labels["code"]] += int(sample.value)
        return counts


class Hand(Protocol):
    """Plays what ends a Job: the Job controller with the pods of its own, or the pods alone."""

    async def run(self) -> None:
        """Be at it until cancelled."""

    def made(self, job: Mapping[str, Any]) -> None:
        """Take note of a Job that has appeared."""


class Results:
    """Stores outcomes as runners do before they exit: a row of ``task_results``, many in one statement."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record] | None") -> None:
        self._pool = pool

    async def store(self, uids: Sequence[str]) -> None:
        """Store that the first attempts of tasks have succeeded; nothing without a database."""
        if self._pool is not None:
            await self._pool.execute(
                "INSERT INTO task_results (task_uid, attempt, holder, outcome) "
                "SELECT uid, 1, 'load', $2::jsonb FROM unnest($1::uuid[]) AS uid ON CONFLICT DO NOTHING",
                list(uids),
                OUTCOME.termination_message(),
            )


class StatusHand:
    """The cheapest end of a Job: its outcome is stored, and one patch says that it is complete. There is no pod.

    Job controller, scheduler and kubelet are away, so what is measured is an operator and what it asks of the API server.
    """

    def __init__(self, server: Server, namespace: str, results: Results) -> None:
        self._server = server
        self._namespace = namespace
        self._results = results
        self._waiting: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    def made(self, job: Mapping[str, Any]) -> None:
        self._waiting.put_nowait((job["metadata"]["name"], job["metadata"]["labels"][TASK_UID_LABEL]))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                due = [await self._waiting.get()]
                while not self._waiting.empty():
                    due.append(self._waiting.get_nowait())
                await self._results.store([uid for _, uid in due])
                for name, _ in due:
                    group.create_task(self._end(name))

    async def _end(self, name: str) -> None:
        path = f"{JOBS}/namespaces/{self._namespace}/jobs/{name}/status"
        await self._server.send("PATCH", path, complete(), content_type=MERGE)


class PodHand:
    """The kubelet of pods without work: each runs, stores its outcome, and ends with a termination message."""

    def __init__(self, server: Server, namespace: str, results: Results) -> None:
        self._server = server
        self._namespace = namespace
        self._results = results

    def made(self, job: Mapping[str, Any]) -> None:
        """Nothing: the Job controller makes its pod."""

    async def run(self) -> None:
        pods = f"/api/v1/namespaces/{self._namespace}/pods"
        async with asyncio.TaskGroup() as group:
            async for event in self._server.watch(pods):
                if event["type"] == "ADDED":
                    group.create_task(self._live(f"{pods}/{event['object']['metadata']['name']}/status", event["object"]))

    async def _live(self, path: str, pod: Mapping[str, Any]) -> None:
        await self._server.send("PATCH", path, {"status": running()}, content_type=_STRATEGIC)
        await self._results.store([pod["metadata"]["labels"][TASK_UID_LABEL]])
        await self._server.send("PATCH", path, {"status": ended(OUTCOME)}, content_type=_STRATEGIC)


@dataclass
class Load:
    """Tasks of one namespace, and what becomes of them."""

    server: Server
    namespace: str
    hand: Hand
    type: str = "document_processing"
    spec: Mapping[str, Any] = field(default_factory=dict)
    """What the specification of each task has besides."""
    payloads: Sequence[str] = ()
    """Texts, one for each task in order; for embedding_generation."""
    records: dict[str, Record] = field(default_factory=dict)
    completed: int = 0

    async def run(self, *, name: str, count: int, rate: float | None, patience: float) -> None:
        """Create tasks at a rate, or all at once; then wait, at most so many seconds, until all have completed."""
        began = time.monotonic()
        slots = asyncio.Semaphore(_AT_ONCE)
        creating: set[asyncio.Task[None]] = set()
        for number in range(count):
            if rate is not None and (wait := began + number / rate - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            await slots.acquire()
            creating.add(one := asyncio.create_task(self.create(f"{name}-{number:05d}", number)))
            one.add_done_callback(creating.discard)
            one.add_done_callback(lambda _: slots.release())
        deadline = time.monotonic() + patience
        while (creating or self.completed < len(self.records)) and time.monotonic() < deadline:  # noqa: ASYNC110 - see below
            await asyncio.sleep(0.02)  # a deadline and what others count: there is no one event to wait for

    def forget(self) -> None:
        """Begin anew, with other tasks."""
        self.records.clear()
        self.completed = 0

    async def follow(self) -> None:
        """Watch tasks and Jobs, and end the Jobs, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follow_tasks())
            group.create_task(self._follow_jobs())
            group.create_task(self.hand.run())

    async def create(self, name: str, number: int) -> None:
        """Create one task."""
        made = task(name, self.type)
        made["spec"] |= self.spec
        if self.payloads:
            made["spec"]["payload"] = {"texts": [self.payloads[number]]}
        self.records[name] = Record(posted=time.monotonic())
        await self.server.send("POST", f"{TASKS}/namespaces/{self.namespace}/processingtasks", made)

    async def follow_tasks(self) -> None:
        """Watch tasks, until cancelled."""
        async for event in self.server.watch(f"{TASKS}/namespaces/{self.namespace}/processingtasks"):
            record = self.records.get(event["object"]["metadata"]["name"])
            if record is not None and record.completed is None and event["object"]["status"].get("phase") == "Completed":
                record.completed = time.monotonic()
                self.completed += 1

    async def _follow_jobs(self) -> None:
        async for event in self.server.watch(f"{JOBS}/namespaces/{self.namespace}/jobs"):
            job = event["object"]
            record = self.records.get(job["metadata"]["annotations"][TASK_NAME_ANNOTATION])
            if record is None:
                continue
            if event["type"] == "ADDED":
                record.job_made = time.monotonic()
                self.hand.made(job)
            elif record.job_done is None and job["status"].get("completionTime"):
                record.job_done = time.monotonic()


def task(name: str, kind: str = "document_processing") -> dict[str, Any]:
    """Return a task as the load creates it."""
    spec: dict[str, Any] = {"type": kind}
    if kind == "document_processing":
        spec |= {"kbId": "kb-42", "payload": {"filePath": f"/data/manuals/{name}.pdf"}}
    return {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": name}, "spec": spec}


def complete() -> dict[str, Any]:
    """Return the patch that says of a Job that it is complete."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = [
        {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now, "lastProbeTime": now}
        for kind in ("SuccessCriteriaMet", "Complete")
    ]
    status = {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
    return {"status": status}


def own_cpu() -> float:
    """Return the CPU seconds of this process: the load's."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
