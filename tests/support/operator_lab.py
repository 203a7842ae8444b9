"""A place to try the operator as a process: a proxy that sees what it writes, a hand that plays kubelet, and the process.

The API server and the Job controller are real. Pods are made and never run: a selector that no node has keeps the scheduler
away, and :class:`Kubelet` writes into their status what a kubelet would.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yaml
from aiohttp import web

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.names import ATTEMPT_LABEL
from task_platform.kubernetes import Access, open_session
from tests.support.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
NOWHERE = {"tests.tasks.zzdsj.io/node": "none"}
TASKS = "/apis/tasks.zzdsj.io/v1"
JOBS = "/apis/batch/v1"
MERGE = "application/merge-patch+json"


async def end(*work: "asyncio.Task[Any]") -> None:
    """Cancel, again each second, and wait: a client may swallow a cancellation that meets a timeout of its own."""
    while pending := [one for one in work if not one.done()]:
        for one in pending:
            one.cancel()
        await asyncio.wait(pending, timeout=1)


async def until(what: str, look: Callable[[], Awaitable[Any]], *, seconds: float = 60, interval: float = 0.1) -> Any:
    """Look again and again until there is something, and return it; AssertionError after a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := await look():
            return found
        await asyncio.sleep(interval)
    raise AssertionError(f"{what}: not within {seconds} s")


class Kube:
    """The API server, spoken to as an administrator, apart from the client that is under test."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._session = open_session(access, user_agent="tests")

    async def aclose(self) -> None:
        await self._session.close()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        **params: str,
    ) -> tuple[int, dict[str, Any]]:
        """Return status code and answer. What the API server has not taken is asked again, as it says itself.

        For some seconds after a CRD was changed it answers 429 "storage is (re)initializing".
        """
        deadline = time.monotonic() + 20
        while True:
            async with self._session.request(
                method,
                self.access.server + path,
                data=None if body is None else orjson.dumps(body),
                headers={"Content-Type": content_type, "Accept": accept},
                params=params,
            ) as response:
                if response.status != 429 or time.monotonic() > deadline:
                    return response.status, orjson.loads(await response.read())
            await asyncio.sleep(0.2)

    async def do(self, method: str, path: str, body: Any = None, **options: str) -> dict[str, Any]:
        """Return the answer to a request that must succeed."""
        status, answer = await self.ask(method, path, body, **options)
        assert status < 300, f"{method} {path}: {status} {answer.get('message')}"
        return answer


@dataclass
class Place:
    """One namespace and what is done in it."""

    kube: Kube
    namespace: str

    @classmethod
    @contextlib.asynccontextmanager
    async def fresh(cls, kube: Kube) -> AsyncIterator["Place"]:
        """Make a namespace under Pod Security `restricted`, with the account that pods need; it goes away after."""
        name = f"test-{uuid.uuid4().hex[:10]}"
        await kube.do("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": RESTRICTED}})
        try:
            account = {"metadata": {"name": "processing-task-runner"}}
            await kube.do("POST", f"/api/v1/namespaces/{name}/serviceaccounts", account)
            yield cls(kube, name)
        finally:
            await kube.ask("DELETE", f"/api/v1/namespaces/{name}")

    def path(self, plural: str, name: str = "") -> str:
        group = {"processingtasks": TASKS, "workerpools": TASKS, "processingschedules": TASKS, "jobs": JOBS}.get(
            plural, "/api/v1"
        )
        return f"{group}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    async def create(
        self, name: str = "handbook", *, labels: Mapping[str, str] | None = None, **spec: Any
    ) -> dict[str, Any]:
        retry = {"limit": 2, "initialDelay": "1s", "maxDelay": "2s", "jitter": 0}
        body = {
            "apiVersion": "tasks.zzdsj.io/v1",
            "kind": "ProcessingTask",
            "metadata": {"name": name, "labels": dict(labels or {})},
            "spec": {
                "type": "document_processing",
                "kbId": "kb-42",
                "payload": {"filePath": "/data/handbook.pdf"},
                "retry": retry,
                **spec,
            },
        }
        return await self.kube.do("POST", self.path("processingtasks"), body)

    async def edit(self, name: str = "handbook", **spec: Any) -> None:
        await self.kube.do("PATCH", self.path("processingtasks", name), {"spec": spec}, content_type=MERGE)

    async def task(self, name: str = "handbook") -> dict[str, Any] | None:
        status, answer = await self.kube.ask("GET", self.path("processingtasks", name))
        return answer if status == 200 else None

    async def status(self, name: str = "handbook") -> dict[str, Any]:
        found = await self.task(name)
        assert found is not None
        status: dict[str, Any] = found["status"]
        return status

    async def wait_for(self, *phases: str, name: str = "handbook", seconds: float = 60, reason: str = "") -> dict[str, Any]:
        """Return the status once the task is in one of the phases (and its Ready condition has the reason)."""
        seen: dict[str, Any] = {}

        async def look() -> dict[str, Any] | None:
            seen.update(await self.status(name))
            ready = next(one for one in seen["conditions"] if one["type"] == "Ready")
            return dict(seen) if seen["phase"] in phases and reason in {"", ready["reason"]} else None

        try:
            found: dict[str, Any] = await until(f"{name} is {phases} {reason}", look, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {seen}") from None
        return found

    async def objects(self, plural: str) -> list[dict[str, Any]]:
        answer = await self.kube.do("GET", self.path(plural))
        return list(answer["items"])


@dataclass
class Kubelet:
    """Plays the kubelet for the pods of a namespace: each attempt runs and ends as it is told to."""

    place: Place
    outcomes: Mapping[int, AttemptOutcome | None] = field(default_factory=dict)
    """How each attempt ends; None: it goes on running. Attempts that are not named succeed."""
    ends: Callable[[Mapping[str, Any]], Awaitable[AttemptOutcome | None]] | None = None
    """How a pod ends, in place of :attr:`outcomes`: for Jobs with several."""
    starts: bool = True
    """Whether pods start at all."""
    messages: bool = True
    """Whether the termination message arrives."""
    pods: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)
    """Uids of all that were ever seen."""

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator["Kubelet"]:
        work = asyncio.create_task(self._work())
        try:
            yield self
            if work.done():
                work.result()
        finally:
            work.cancel()
            await asyncio.wait([work])

    async def _work(self) -> None:
        while True:
            self.jobs |= {job["metadata"]["uid"] for job in await self.place.objects("jobs")}
            for pod in await self.place.objects("pods"):
                self.pods.add(pod["metadata"]["uid"])
                await self._advance(pod)
            await asyncio.sleep(0.05)

    async def _advance(self, pod: Mapping[str, Any]) -> None:
        phase = pod["status"].get("phase", "Pending")
        attempt = int(pod["metadata"]["labels"].get(ATTEMPT_LABEL, "1"))  # none: a sweep
        if not self.starts or pod["metadata"].get("deletionTimestamp"):
            return
        if phase == "Pending":
            await self.write(pod, running())
        elif phase == "Running":
            outcome = self.outcomes.get(attempt, AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=attempt))
            # The Job has to be seen to run first: that is what the operator sees.
            code, job = await self.place.kube.ask("GET", self.place.path("jobs", pod["metadata"]["labels"]["job-name"]))
            # Not found: the Job went between the list of pods and this look.
            if self.ends is not None and code == 200 and job.get("status", {}).get("ready"):
                outcome = await self.ends(pod)
            if outcome is not None and code == 200 and job.get("status", {}).get("ready"):
                await self.write(pod, ended(outcome, message=self.messages))

    async def write(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Write a pod's status; a pod that is gone meanwhile is nobody's concern."""
        path = self.place.path("pods", pod["metadata"]["name"]) + "/status"
        # Conditions are merged by type: one that the API server has set, such as DisruptionTarget, stays.
        await self.place.kube.ask("PATCH", path, {"status": status}, content_type="application/strategic-merge-patch+json")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _container(state: Mapping[str, Any], *, ready: bool) -> dict[str, Any]:
    return {"name": "runner", "image": "runner", "imageID": "runner", "restartCount": 0, "ready": ready, "state": state}


def running() -> dict[str, Any]:
    """Return the status of a pod whose container runs."""
    return {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": _now()}],
        "containerStatuses": [_container({"running": {"startedAt": _now()}}, ready=True)],
    }


def ended(outcome: AttemptOutcome, *, message: bool = True, **terminated: Any) -> dict[str, Any]:
    """Return the status of a pod whose runner has ended so."""
    good = outcome.outcome is Outcome.SUCCEEDED
    permanent = outcome.error is not None and not outcome.error.retryable
    code = 0 if good else 65 if permanent else 75
    return exited(code, message=outcome.termination_message() if message else "", **terminated)


def exited(code: int, *, message: str = "", **terminated: Any) -> dict[str, Any]:
    """Return the status of a pod whose container has ended with an exit code and a termination message."""
    good = code == 0
    state = {
        "exitCode": code,
        "reason": "Completed" if good else "Error",
        "startedAt": _now(),
        "finishedAt": _now(),
        **({"message": message} if message else {}),
        **terminated,
    }
    return {
        "phase": "Succeeded" if good else "Failed",
        "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": _now()}],
        "containerStatuses": [_container({"terminated": state}, ready=False)],
    }


# ------------------------------------------------------------------------------------------------------------ processes


class OperatorProcess:
    """The operator as it is deployed: a process of its own, told by environment variables."""

    def __init__(
        self,
        *,
        kubeconfig: Path,
        namespaces: Sequence[str],
        folder: Path,
        command: Sequence[str] = ("task_operator", "run"),
        python: str = sys.executable,
        **environment: str,
    ) -> None:
        """``python``: an interpreter of another environment than this one's."""
        self.port = free_port()
        self._command = [python, "-m", *command]
        self.log = folder / f"operator-{uuid.uuid4().hex[:8]}.log"
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("OPERATOR_", "TASKS_"))},
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator")),
            "OPERATOR_NAMESPACES": ",".join(namespaces),
            "OPERATOR_RUNNER_IMAGE": "localhost/processing-tasks/runner:test",
            "OPERATOR_RUNNER_NODE_SELECTOR": orjson.dumps(NOWHERE).decode(),
            "OPERATOR_LISTEN": f"127.0.0.1:{self.port}",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill it at once; it gets no chance to do anything."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self, *, seconds: float = 10) -> int:
        """Ask it to stop, as a kubelet does; return the exit code."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the operator did not stop within {seconds} s:\n{self.log.read_text()}") from None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    async def get(self, path: str) -> tuple[int, str]:
        """Ask its own HTTP side; (0, "") when it does not answer."""
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                return response.status, await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, ""

    async def ready(self, *, interval: float = 0.1) -> None:
        """Wait until it has listed everything; asked each so many seconds."""

        async def look() -> bool:
            assert self.exit_code() is None, f"the operator has ended:\n{self.log.read_text()}"
            return (await self.get("/readyz"))[0] == 200

        await until("the operator is ready", look, seconds=30, interval=interval)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator["OperatorProcess"]:
        self.start()
        try:
            await self.ready()
            yield self
        finally:
            self.kill()


@dataclass
class Write:
    """A request that changes something, by what it does: ``POST jobs``, ``PATCH Completed``, ``DELETE jobs``."""

    method: str
    what: str

    @property
    def label(self) -> str:
        return f"{self.method} {self.what}"


class Proxy:
    """Stands between the operator and the API server: counts its writes, refuses some, cuts its watches."""

    def __init__(self, access: Access, *, folder: Path) -> None:
        self._access = access
        self._session = open_session(access, user_agent="tests")
        self._runner: web.AppRunner | None = None
        self.kubeconfig = folder / f"proxy-{uuid.uuid4().hex[:8]}.kubeconfig"
        self.writes: list[str] = []
        self.refuse: Callable[[str, str], web.Response | None] = lambda method, path: None
        """Answers in place of the API server: for faults."""
        self._streams: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        server = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        config = {
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
            "current-context": "x",
            "clusters": [{"name": "x", "cluster": {"server": server}}],
            "users": [{"name": "x", "user": {}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    async def aclose(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        await self._session.close()

    def cut_watches(self) -> None:
        """Break all connections on which something is watched."""
        for stream in list(self._streams):
            stream.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if (refusal := self.refuse(request.method, request.path)) is not None:
            return refusal
        if request.query.get("watch") == "true":
            return await self._watch(request)
        if request.method == "GET":
            return await self._forward(request, body)
        self.writes.append(_write(request, body).label)
        return await self._forward(request, body)

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        async with self._session.request(
            request.method,
            self._access.server + request.path_qs,
            data=body or None,
            headers={key: request.headers[key] for key in ("Content-Type", "Accept") if key in request.headers},
        ) as response:
            return web.Response(status=response.status, body=await response.read(), content_type=response.content_type)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        current = asyncio.current_task()
        assert current is not None
        self._streams.add(current)
        answer = web.StreamResponse()
        try:
            async with self._session.get(
                self._access.server + request.path_qs, timeout=aiohttp.ClientTimeout(total=None)
            ) as response:
                answer.set_status(response.status)
                await answer.prepare(request)
                async for chunk in response.content.iter_any():
                    await answer.write(chunk)
        except (aiohttp.ClientError, ConnectionError):
            pass  # the operator was killed, or the API server has closed
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._streams.discard(current)
        return answer


def _write(request: web.Request, body: bytes) -> Write:
    parts = request.path.strip("/").split("/")
    plural = parts[parts.index("namespaces") + 2]
    if request.method == "PATCH":
        patch = orjson.loads(body)
        return Write("PATCH", str(patch.get("status", {}).get("phase", "status")))
    if request.method == "PUT" and parts[-1] == "status":
        return Write("PUT", orjson.loads(body)["status"]["phase"])
    return Write(request.method, plural)
