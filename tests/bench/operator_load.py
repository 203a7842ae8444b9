"""Load for an operator: tasks at a steady rate, a hand that plays Job controller and kubelet, and an eye on what happens.

All three are one process on one event loop. Times are those at which this process sees a watch event, so each holds the way
through the API server; that is the same for every operator.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from task_contract.names import TASK_NAME_ANNOTATION
from task_operator.cluster import Access, open_session
from tests.support.operator_lab import JOBS, TASKS, ended

WORK: Final = 0.3  # seconds for which a pod "runs"
_STRATEGIC: Final = "application/strategic-merge-patch+json"
OUTCOME: Final = AttemptOutcome(
    outcome=Outcome.SUCCEEDED,
    attempt=1,
    result=Result(documents=1, pages=10, chunks=42, embedded=42, milvus_count=42, elasticsearch_count=42, version=1),
)


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
        self._session = open_session(access)

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

    async def requests(self) -> Counter[tuple[str, str]]:
        """Return how many requests the API server has served, by verb and resource, of the kinds that matter here."""
        text = (await self.send("GET", "/metrics")).decode()
        wanted = "\n".join(line for line in text.splitlines() if line.startswith("apiserver_request_total{"))
        counts: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families(wanted + "\n"):
            for sample in family.samples:
                labels = sample.labels
                if labels["resource"] in {"processingtasks", "jobs", "pods", "events"} and labels["code"] != "0":
                    name = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                    counts[labels["verb"], name] += int(sample.value)
        return counts


@dataclass
class Load:
    """One round of load in a namespace."""

    server: Server
    namespace: str
    records: dict[str, Record] = field(default_factory=dict)
    _pods: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def finished(self) -> int:
        """How many tasks have completed."""
        return sum(record.completed is not None for record in self.records.values())

    async def run(self, *, name: str, rate: float, seconds: float, patience: float) -> None:
        """Create tasks at a rate for some seconds; then wait, at most so long, until all have completed."""
        began = time.monotonic()
        creating: set[asyncio.Task[None]] = set()
        for number in range(round(rate * seconds)):
            if (wait := began + number / rate - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            creating.add(one := asyncio.create_task(self._create(f"{name}-{number:05d}")))
            one.add_done_callback(creating.discard)
        deadline = began + seconds + patience
        while (creating or self.finished < len(self.records)) and time.monotonic() < deadline:  # noqa: ASYNC110 - see below
            await asyncio.sleep(0.02)  # a deadline and what others count: there is no one event to wait for

    async def follow(self) -> None:
        """Watch tasks and Jobs, and play the pods, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_tasks())
            group.create_task(self._follow_jobs(group))

    async def _create(self, name: str) -> None:
        self.records[name] = Record(posted=time.monotonic())
        spec = {"type": "document_processing", "kbId": "kb-42", "payload": {"filePath": f"/data/manuals/{name}.pdf"}}
        body = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": name}, "spec": spec}
        await self.server.send("POST", f"{TASKS}/namespaces/{self.namespace}/processingtasks", body)

    async def _follow_tasks(self) -> None:
        async for event in self.server.watch(f"{TASKS}/namespaces/{self.namespace}/processingtasks"):
            record = self.records.get(event["object"]["metadata"]["name"])
            if record is not None and record.completed is None and event["object"]["status"].get("phase") == "Completed":
                record.completed = time.monotonic()

    async def _follow_jobs(self, group: asyncio.TaskGroup) -> None:
        async for event in self.server.watch(f"{JOBS}/namespaces/{self.namespace}/jobs"):
            job = event["object"]
            record = self.records[job["metadata"]["annotations"][TASK_NAME_ANNOTATION]]
            if event["type"] == "ADDED":
                record.job_made = time.monotonic()
                group.create_task(self._play(job))
            elif record.job_done is None and job["status"].get("completionTime"):
                record.job_done = time.monotonic()

    async def _play(self, job: Mapping[str, Any]) -> None:
        """Do what Job controller and kubelet do that an operator can see: the Job runs, its pod ends, the Job is done."""
        name, template = job["metadata"]["name"], job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"], "controller": True}
        metadata = {"name": f"{name}-pod", "ownerReferences": [owner]}
        metadata |= {key: template["metadata"][key] for key in ("labels", "annotations")}
        job_path = f"{JOBS}/namespaces/{self.namespace}/jobs/{name}/status"
        pods = f"/api/v1/namespaces/{self.namespace}/pods"
        await self.server.send("POST", pods, {"metadata": metadata, "spec": template["spec"]})
        started = _now()
        await self._status(job_path, {"startTime": started, "active": 1, "ready": 1})
        await asyncio.sleep(WORK)
        await self._status(f"{pods}/{name}-pod/status", ended(OUTCOME))
        conditions = [
            {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": _now()}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        done = {"active": 0, "ready": 0, "succeeded": 1, "completionTime": _now(), "conditions": conditions}
        await self._status(job_path, done)

    async def _status(self, path: str, status: Mapping[str, Any]) -> None:
        await self.server.send("PATCH", path, {"status": status}, content_type=_STRATEGIC)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
