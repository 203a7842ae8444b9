"""One life of one document, from a ProcessingTask to its end, with every process real and any of them killed on the way.

Real are the API server with the Job controller, PostgreSQL, Milvus, Elasticsearch, the operator's process and the runner's.
Only the kubelet is played: :class:`Node` starts the runner of each pod as a process of this machine, with the pod's own
environment and annotation, and writes into the pod's status what a kubelet would. That is what lets a test stand at every
call of the runner, and it spares each of some hundred lives a container.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from devstack.stores import postgres
from job_runner.index import Generation
from job_runner.settings import Settings
from job_runner.stores import Stores, opener
from task_contract.models import ProcessingTask
from task_contract.names import CONTAINER, TASK_ANNOTATION, TASK_UID_LABEL
from task_operator.schema import migrate
from task_platform.kubernetes import Access
from tests.crash.faults import PLAN, RECORD, Action, Record
from tests.crash.process import COUNTER
from tests.support.operator_lab import ROOT, Kube, OperatorProcess, Place, exited, running, until
from tests.support.runner_lab import NOON, HashEmbedder, drop, run_pipeline

SECONDS = 90
"""Longest time of one life: two restarts and two retries take a fifth of it."""
OLD, NEW = "old.txt", "new.txt"
CHUNKS, SHARED = 40, 10
"""Chunks of the new content, more than one batch; and how many of them the old content has too."""


@dataclass(frozen=True)
class Scenario:
    """A kind of life, and what happens in it without any fault of ours."""

    name: str
    seeded: bool = True
    """Whether a version of the document is published before."""
    own_knowledge_base: bool = False
    """Whether the knowledge base is a new one, without collection and index."""
    runner: Mapping[str, Action] = field(default_factory=dict)
    """What happens to the runner in every life of this kind."""
    first_pod: Mapping[str, str] = field(default_factory=dict)
    """Variables of the environment that only the first pod has."""
    cancel: bool = False
    """Whether the task is canceled as soon as the runner stands still."""
    loses_node: bool = False
    """Whether the runner's node is lost as soon as the runner stands still, and is back when the task has ended."""
    deletes: bool = False
    """Whether the task deletes the document instead."""
    phase: str = "Completed"
    published: int = 2
    """Version that readers see in the end."""
    roles: tuple[str, ...] = ("operator", "runner")
    """Whose points are tried."""


@dataclass
class Life:
    """One task and what is planned for its processes."""

    scenario: Scenario
    track: "Track"
    kills: frozenset[str] = frozenset()
    """Points at which a process is killed: ``operator API PUT status #2 after``."""
    file: str = NEW
    after_kill: Callable[[], None] = lambda: None
    """Called when a runner has been killed, before anybody knows."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    seed: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Uid of the task that published before."""
    uid: str = ""
    pods: set[str] = field(default_factory=set)
    """Uids of all pods that were seen."""
    broken: list[str] = field(default_factory=list)
    """What must never be seen on the way: by a reader of the knowledge base when a runner is killed, or of the operator."""
    seconds: float = 0

    @property
    def name(self) -> str:
        return f"doc-{self.key}"

    @property
    def document_id(self) -> str:
        return f"{self.key}/document"

    @property
    def kb_id(self) -> str:
        return f"kb-{self.key}" if self.scenario.own_knowledge_base else self.track.kb_id

    @property
    def counter(self) -> Path:
        """File with one line for each text that the model has computed."""
        return self.track.folder / f"{self.key}.computed"

    def plan(self, role: str) -> dict[str, Action]:
        """Return point → action for the processes of a role."""
        kills = {point.removeprefix(f"{role} "): Action.KILL for point in self.kills if point.startswith(f"{role} ")}
        return kills | (dict(self.scenario.runner) if role == "runner" else {})

    def record(self, role: str) -> Record:
        return Record(self.track.folder / f"{self.key}.{role}")

    def environment(self, role: str) -> dict[str, str]:
        return {
            RECORD: str(self.record(role).path),
            PLAN: json.dumps(self.plan(role)),
            COUNTER: str(self.counter),
        }

    @property
    def reached(self) -> bool:
        """Whether everything that was planned has happened."""
        return all(self.plan(role).keys() <= self.record(role).done.keys() for role in ("operator", "runner"))

    @property
    def runner_kills(self) -> int:
        """How many runners were killed beyond what the scenario itself kills."""
        return sum(point.startswith("runner ") for point in self.kills)


@dataclass
class World:
    """The servers that all lives share."""

    kube: Kube
    kubeconfig: Path
    urls: Mapping[str, str]
    """TASKS_* variables of the stores; PostgreSQL is a fresh database."""
    sql: "asyncpg.Pool[asyncpg.Record]"
    folder: Path

    @classmethod
    @contextlib.asynccontextmanager
    async def fresh(cls, kubeconfig: Path, urls: Mapping[str, str], *, folder: Path) -> AsyncIterator["World"]:
        """Have a database of its own on servers that are up; it goes away after."""
        name = f"crash_{uuid.uuid4().hex[:10]}"
        url = await asyncio.to_thread(postgres.create_database, name)
        kube = Kube(Access.from_kubeconfig(kubeconfig))
        try:
            await migrate(url)
            async with asyncpg.create_pool(url, min_size=1, max_size=4) as sql:
                yield cls(kube=kube, kubeconfig=kubeconfig, urls={**urls, "TASKS_POSTGRES_URL": url}, sql=sql, folder=folder)
        finally:
            await kube.aclose()
            await asyncio.to_thread(postgres.drop_database, name)

    def __post_init__(self) -> None:
        self.documents = self.folder / "documents"
        self.documents.mkdir()
        shared = [f"Shared {number}" for number in range(SHARED)]
        contents = {
            OLD: shared + [f"Old {number}" for number in range(SHARED)],
            NEW: shared + [f"New {number}" for number in range(CHUNKS - SHARED)],
        }
        for file, sentences in contents.items():
            self.write(file, sentences)

    def write(self, file: str, sentences: Sequence[str]) -> None:
        """Write a document of which each sentence becomes one chunk."""
        new = self.documents / f"{file}.new"
        new.write_text("\n\n".join(f"{sentence} ".ljust(90, ".") + " end." for sentence in sentences))
        new.rename(self.documents / file)

    def settings(self, **changes: object) -> Settings:
        given = {name.removeprefix("TASKS_").lower(): value for name, value in self.urls.items()}
        return Settings.model_validate({**given, "document_root": self.documents, "log_level": "warning", **changes})

    @contextlib.asynccontextmanager
    async def track(self) -> AsyncIterator["Track"]:
        """Make a namespace with a knowledge base in which lives run one after another."""
        async with Place.fresh(self.kube) as place:
            track = Track(self, place, self.folder / place.namespace)
            track.folder.mkdir()
            try:
                async with track.node.at_work():
                    yield track
            finally:
                if track.operator is not None:
                    track.operator.kill()
                await track.aclose()


class Track:
    """One namespace, its node, its operator, and its knowledge base."""

    def __init__(self, world: World, place: Place, folder: Path) -> None:
        self.world = world
        self.place = place
        self.folder = folder
        self.kb_id = "kb-shared"
        self.node = Node(self)
        self.operator: OperatorProcess | None = None
        self._planned = False
        self._stores: dict[str, Stores] = {}
        self._number = 0

    def stores(self, kb_id: str) -> Stores:
        """Return both stores of a knowledge base."""
        if kb_id not in self._stores:
            generation = Generation(self.place.namespace, kb_id, 1)
            self._stores[kb_id] = opener(self.world.settings(), dimension=HashEmbedder.dimension)(generation)
        return self._stores[kb_id]

    async def aclose(self) -> None:
        for stores in self._stores.values():
            await drop(stores)
        await self.place.kube.ask("DELETE", f"/api/v1/nodes/lost-{self.place.namespace}")

    async def live(self, life: Life) -> None:
        """Lead a life to its end. AssertionError if it does not end."""
        started = time.monotonic()
        await self._seed(life)
        self.node.life = life
        operator = self._operator(life)
        restarting = asyncio.create_task(self._restart(operator, life))
        try:
            await self._ready(operator)
            spec: dict[str, Any] = {
                "kbId": life.kb_id,
                "payload": (
                    {"action": "delete", "documentId": life.document_id}
                    if life.scenario.deletes
                    else self._payload(life.document_id, life.file)
                ),
                "retry": {"limit": 4, "initialDelay": "1s", "maxDelay": "1s", "jitter": 0},
            }
            task = await self.place.create(life.name, **spec)
            life.uid = task["metadata"]["uid"]
            if life.scenario.cancel:
                await until("the runner stands still", self._stands_still(life), seconds=SECONDS)
                await self.place.wait_for("Processing", name=life.name, seconds=SECONDS)
                await self.place.edit(life.name, cancel=True)
            if life.scenario.loses_node:
                await until("the runner stands still", self._stands_still(life), seconds=SECONDS)
                await self.place.wait_for("Processing", name=life.name, seconds=SECONDS)
                await self._lose_node(life)
            try:
                await self.place.wait_for("Completed", "Failed", "Canceled", name=life.name, seconds=SECONDS)
                if life.scenario.loses_node:
                    await self.node.come_back()
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.node.tail(life)}\n{operator.log.read_text()[-3000:]}") from None

            async def over() -> bool:
                return life.reached

            # The last writes may follow the end that everybody sees.
            with contextlib.suppress(AssertionError):
                await until("all kills have happened", over, seconds=8)
            await self._ready(operator)
            life.seconds = time.monotonic() - started
        finally:
            restarting.cancel()

    async def _lose_node(self, life: Life) -> None:
        """Bind the pod to a node that nobody runs, and have it told to stop: it stays, and the Job waits for it."""
        name = f"lost-{self.place.namespace}"
        await self.place.kube.ask("POST", "/api/v1/nodes", {"metadata": {"name": name}})
        [pod] = of_task(await self.place.objects("pods"), life.uid)
        path = self.place.path("pods", pod["metadata"]["name"])
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": name},
        }
        await self.place.kube.do("POST", f"{path}/binding", binding)
        await self.place.kube.do("DELETE", path, {"gracePeriodSeconds": 1})

    async def forget(self, life: Life) -> None:
        """Remove a task and its Jobs, so that the operator of the next life finds an empty namespace."""
        for plural in ("processingtasks", "jobs"):
            for thing in await self.place.objects(plural):
                path = self.place.path(plural, thing["metadata"]["name"])
                await self.place.kube.ask("DELETE", path, propagationPolicy="Background")
        if life.scenario.loses_node:
            for pod in await self.place.objects("pods"):
                await self.place.kube.ask(
                    "DELETE", self.place.path("pods", pod["metadata"]["name"]), {"gracePeriodSeconds": 0}
                )

        async def empty() -> bool:
            return not await self.place.objects("jobs") and not await self.place.objects("pods")

        await until("Jobs and pods are gone", empty, seconds=30)
        await self.world.sql.execute("UPDATE tasks SET deleted_at = now() WHERE uid::text = $1", life.uid)

    @staticmethod
    async def _ready(operator: OperatorProcess) -> None:
        async def look() -> bool:
            return (await operator.get("/readyz"))[0] == 200

        try:
            await until("the operator is ready", look, seconds=SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{operator.log.read_text()[-3000:]}") from None

    @staticmethod
    def _payload(document_id: str, file: str) -> dict[str, object]:
        return {"filePath": file, "documentId": document_id, "chunkSize": 100, "chunkOverlap": 0}

    async def _seed(self, life: Life) -> None:
        """Publish the old content; in a new knowledge base, nothing."""
        if life.scenario.seeded:
            await self.seed(life.kb_id, life.document_id, uid=life.seed)

    async def seed(self, kb_id: str, document_id: str, *, uid: str) -> None:
        """Publish the old content as a document, by a task of this uid."""
        task = ProcessingTask.model_validate(
            {
                "metadata": {
                    "name": "seed",
                    "namespace": self.place.namespace,
                    "uid": uid,
                    "creationTimestamp": NOON.isoformat(),
                },
                "spec": {"type": "document_processing", "kbId": kb_id, "payload": self._payload(document_id, OLD)},
            }
        )
        done = await run_pipeline(task, self.world.settings(holder="seed"), HashEmbedder())
        assert done.reason == "Completed"

    def _operator(self, life: Life) -> OperatorProcess:
        """Return an operator for a life; one that will not be killed serves many."""
        planned = bool(life.plan("operator")) or not life.kills
        if self.operator is None or planned or self._planned:
            if self.operator is not None:
                self.operator.kill()
            self.operator = OperatorProcess(
                kubeconfig=self.world.kubeconfig,
                namespaces=[self.place.namespace],
                folder=self.folder,
                command=("tests.crash.process", "operator"),
                OPERATOR_POSTGRES_URL=self.world.urls["TASKS_POSTGRES_URL"],
                OPERATOR_REDIS_URL=self.world.urls.get("TASKS_REDIS_URL", ""),
                OPERATOR_DOCUMENTS_CLAIM="",
                OPERATOR_STUCK_SECONDS="1",
                OPERATOR_SWEEP_INTERVAL_SECONDS="0",  # the lives of a track share a namespace, a sweep would be of them all
                PYTHONPATH=os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator")),
                **life.environment("operator"),
            )
            self._planned = planned
            self.operator.start()
        return self.operator

    @staticmethod
    async def _restart(operator: OperatorProcess, life: Life) -> None:
        """Play the ReplicaSet: an operator that has died is started again."""
        while True:
            if (code := operator.exit_code()) is not None:
                if code != -signal.SIGKILL:
                    life.broken.append(f"the operator ended by itself with {code}: {operator.log.read_text()[-1000:]}")
                operator.start()
            await asyncio.sleep(0.05)

    @staticmethod
    def _stands_still(life: Life) -> Any:
        async def look() -> bool:
            return Action.STOP in life.record("runner").done.values()

        return look

    async def published(self, life: Life) -> int | None:
        """Return the version that readers see."""
        found: int | None = await self.world.sql.fetchval(
            "SELECT published_version FROM documents WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
            self.place.namespace,
            life.kb_id,
            life.document_id,
        )
        return found

    async def read(self, life: Life) -> None:
        """Look as a reader does: the published version, if there is one, is whole in both stores."""
        version = await self.published(life)
        if version is None:
            if life.scenario.seeded:
                life.broken.append("no version is published")
            return
        chunks = await self.world.sql.fetchval(
            "SELECT chunk_count FROM document_versions"
            " WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND version = $4",
            self.place.namespace,
            life.kb_id,
            life.document_id,
            version,
        )
        stores = self.stores(life.kb_id)
        if life.scenario.own_knowledge_base:
            await stores.vectors.ensure()  # connects
        found = await asyncio.gather(
            stores.vectors.stored(life.document_id, version), stores.texts.stored(life.document_id, version)
        )
        if not len(found[0]) == len(found[1]) == chunks or found[0] != found[1]:
            life.broken.append(
                f"version {version} of {chunks} chunks: {len(found[0])} and {len(found[1])} are in the stores"
            )


class Node:
    """Plays the kubelet of a namespace, with real processes for pods."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.life: Life | None = None

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        try:
            yield
            if work.done():
                work.result()
        finally:
            for task in (work, *self._tasks.values()):
                task.cancel()
            await asyncio.gather(work, *self._tasks.values(), return_exceptions=True)
            for process in self._processes.values():
                _kill_all(process)

    @property
    def busy(self) -> int:
        """How many runners have not ended."""
        return sum(process.returncode is None for process in self._processes.values())

    def tail(self, life: Life) -> str:
        """Return the end of what the runners of a life said."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(self._track.folder.glob(f"{life.key}.*.log")))

    async def _work(self) -> None:
        while True:
            pods = {pod["metadata"]["uid"]: pod for pod in await self._track.place.objects("pods")}
            for uid, pod in pods.items():
                if uid not in self._tasks and self.life is not None:
                    self.life.pods.add(uid)
                    self._tasks[uid] = asyncio.create_task(self._run(self.life, pod))
            for uid in self._tasks.keys() - pods.keys():
                self._gone(uid)
            for task in self._tasks.values():
                if task.done():
                    task.result()
            await asyncio.sleep(0.1)

    async def come_back(self) -> None:
        """Let runners that stand still go on, and wait for their end: they want to publish what they have."""
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)

        async def ended() -> bool:
            return not self.busy

        await until("the runners of the lost node have ended", ended, seconds=SECONDS)

    def _gone(self, uid: str) -> None:
        """End the process of a pod that was deleted; one that stands still is out of reach, and comes back to life."""
        process = self._processes.get(uid)
        if process is None or process.returncode is not None or self.life is None:
            return
        stopped = Action.STOP in self.life.record("runner").done.values()
        with contextlib.suppress(ProcessLookupError):  # and not send_signal: it may reap the process before asyncio does
            os.kill(process.pid, signal.SIGCONT if stopped else signal.SIGTERM)

    async def _run(self, life: Life, pod: Mapping[str, Any]) -> None:
        """Run a pod from its start to the end that the Job controller sees."""
        metadata, place = pod["metadata"], self._track.place
        [container] = [one for one in pod["spec"]["containers"] if one["name"] == CONTAINER]
        files = self._track.folder / f"{life.key}.{metadata['name']}"
        task_file, message, log = (files.with_name(f"{files.name}.{part}") for part in ("json", "message", "log"))
        task_file.write_text(metadata["annotations"][TASK_ANNOTATION])
        message.touch()
        given = {one["name"]: one.get("value", metadata["uid"]) for one in container["env"]}
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "crds")),
            **self._track.world.urls,
            "TASKS_DOCUMENT_ROOT": str(self._track.world.documents),
            "TASKS_TERMINATION_LOG": str(message),
            "TASKS_LOG_LEVEL": "warning",
            **given,
            **(life.scenario.first_pod if len(life.pods) == 1 else {}),
            **life.environment("runner"),
        }
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.crash.process", "runner", str(task_file)),
                env=environment,
                cwd=self._track.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes[metadata["uid"]] = process
        await self._write(pod, running())
        code = await process.wait()
        _kill_all(process)  # a container takes its children with it
        if code == -signal.SIGKILL:
            await self._track.read(life)
            life.after_kill()

        async def seen() -> bool:
            # What is over before the Job controller has seen it run is a shorter life.
            path = place.path("jobs", metadata["labels"]["job-name"])
            status, job = await place.kube.ask("GET", path)
            return status == 404 or bool(job.get("status", {}).get("ready"))

        with contextlib.suppress(AssertionError):
            await until("the Job controller has seen the pod run", seen, seconds=5)
        await self._write(pod, exited(code if code >= 0 else 128 - code, message=message.read_text()))

    async def _write(self, pod: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        path = self._track.place.path("pods", pod["metadata"]["name"]) + "/status"
        await self._track.place.kube.ask(
            "PATCH", path, {"status": status}, content_type="application/strategic-merge-patch+json"
        )


def _kill_all(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def of_task(objects: list[dict[str, Any]], uid: str) -> list[dict[str, Any]]:
    """Return the objects that carry the label of a task."""
    return [one for one in objects if (one["metadata"].get("labels") or {}).get(TASK_UID_LABEL) == uid]
