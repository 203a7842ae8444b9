"""A small Kubernetes and PostgreSQL in memory, with the rules that matter, and with crashes: where the controller is tried.

It knows preconditions, AlreadyExists, background deletion, commits under the fence, and time that moves when told to.
Nothing in it sleeps. What it cannot show, real servers do, in the integration tests.
"""

import copy
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from task_contract.leases import PoolKeys, PoolReport
from task_contract.lifecycle import ARROWS
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Phase
from task_contract.pools import POOL_TYPES, PoolSpec
from task_operator.controller import Controller, VersionsWentBack
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_operator.observation import Fence, FenceState, Policy, StoredOutcome
from task_operator.pool_queue import Heard, Look, Offer, QueueUnavailable
from task_operator.pools import Pool
from task_operator.projection import DatabaseUnavailable, Held
from task_platform.kubernetes import Conflict, NotFound, Page, Unavailable
from tests.support.operator_values import T0, UID, failure, handed_back, manifest, success

KEY = ("knowledge", "handbook")
_EXPIRED = timedelta(seconds=30)


class Crash(BaseException):
    """The process is killed here: nothing that follows in it happens."""


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class World:
    """The API server, the Job controller, one node and PostgreSQL; also the API of the controller under test."""

    now: datetime = T0
    version: int = 100
    tasks: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[tuple[str, int], StoredOutcome] = field(default_factory=dict)
    rows: dict[str, Held] = field(default_factory=dict)
    fences: set[str] = field(default_factory=set)
    holders: dict[str, str] = field(default_factory=dict)
    """Name of the pod that holds the intents of a task."""
    lost: set[str] = field(default_factory=set)
    """Names of pods on a node that does not answer: told to stop, and there."""
    published: set[str] = field(default_factory=set)
    database_up: bool = True
    down_since: datetime | None = None
    crash_in: int | None = None
    """Number of half-writes until the crash: 0 is before the next write, 1 after it, 2 before the one after."""
    fault: type[BaseException] = Crash
    """What happens there: the process is killed, or the connection is cut and the process goes on without an answer."""
    labelled: bool = False
    """Somebody writes labels all the time, faster than any read and write of the status."""
    writes: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    created: int = 0
    commits: int = 0
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------- API of tasks

    def add_task(self, **parts: Any) -> None:
        task = manifest(**parts)
        task["metadata"]["resourceVersion"] = str(self._next())
        self.tasks[KEY] = task
        self.phases.append(task["status"]["phase"])

    def edit(self, **spec: Any) -> None:
        task = self.tasks.get(KEY)
        if task is not None:
            task["spec"] |= spec
            task["metadata"]["generation"] += 1
            self._touch("task", "MODIFIED", task)

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.tasks[KEY]["status"]
        return status

    async def task_version(self, namespace: str | None) -> int:
        return self.version

    async def list_tasks(self, namespace: str | None) -> AsyncIterator[Page]:
        yield Page(items=copy.deepcopy(list(self.tasks.values())), resource_version=self.version)

    async def list_jobs(self, namespace: str | None) -> AsyncIterator[Page]:
        yield Page(items=copy.deepcopy(list(self.jobs.values())), resource_version=self.version)

    async def list_pods(self, namespace: str, *, task_uid: str) -> list[dict[str, Any]]:
        return copy.deepcopy(list(self.pods.values()))

    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None:
        return None

    async def get_task(self, namespace: str, name: str) -> dict[str, Any]:
        return copy.deepcopy(_found(self.tasks, (namespace, name)))

    async def get_job(self, namespace: str, name: str) -> dict[str, Any]:
        return copy.deepcopy(_found(self.jobs, name))

    def _unchanged(self, namespace: str, name: str, *, uid: str, resource_version: int) -> dict[str, Any]:
        task: dict[str, Any] = _found(self.tasks, (namespace, name))
        if self.labelled:
            self._touch("task", "MODIFIED", task)
        if task["metadata"]["resourceVersion"] != str(resource_version) or task["metadata"]["uid"] != uid:
            raise Conflict("cannot write: the object has been modified")
        return task

    async def put_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._half_write("put status")
        task = self._unchanged(namespace, name, uid=uid, resource_version=resource_version)
        return self._put_status(task, copy.deepcopy(dict(status)), what=str(status.get("phase", "")))

    async def patch_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, patch: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._half_write("patch status")
        task = self._unchanged(namespace, name, uid=uid, resource_version=resource_version)
        return self._put_status(task, _merge(task["status"], patch), what=str(patch.get("phase", "")))

    async def replace_status(
        self, namespace: str, name: str, *, uid: str, generation: int, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> dict[str, Any]:
        self._half_write("replace status")
        task = _found(self.tasks, (namespace, name))
        if (task["metadata"]["uid"], task["metadata"]["generation"], task["status"]) != (uid, generation, before):
            raise Conflict("cannot PATCH: the server rejected our request due to an error in our request")
        return self._put_status(task, copy.deepcopy(dict(after)), what=str(after.get("phase", "")))

    def _put_status(self, task: dict[str, Any], status: dict[str, Any], *, what: str) -> dict[str, Any]:
        before, after = Phase(task["status"]["phase"]), Phase(status["phase"])
        assert after is before or after in ARROWS[before], f"{before} → {after}"
        task["status"] = status
        if after is not before:
            self.phases.append(str(after))
        self._touch("task", "MODIFIED", task)
        self._half_write(f"patched status {what}")
        return copy.deepcopy(task)

    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None:
        self._half_write("delete task")
        task = self.tasks.pop((namespace, name), None)
        if task is not None:
            self._touch("task", "DELETED", task)
        self._half_write("deleted task")

    def restore(self) -> None:
        """Restore the API server from a backup: it counts its versions from an earlier number again."""
        self.version //= 2
        for thing in (*self.tasks.values(), *self.jobs.values()):
            thing["metadata"]["resourceVersion"] = str(self._next())

    # -------------------------------------------------------------------------------------------------- API of Jobs

    async def create_job(self, job: dict[str, Any]) -> dict[str, Any]:
        self._half_write("create Job")
        name = job["metadata"]["name"]
        if name in self.jobs:
            raise Conflict("cannot POST: already exists", reason="AlreadyExists")
        running = [other for other, one in self.jobs.items() if not one["status"].get("conditions")]
        assert not running, f"a second Job beside {running}"
        self.created += 1
        stored = copy.deepcopy(job)
        stored["metadata"] |= {"uid": f"job-{self.created}", "creationTimestamp": _stamp(self.now)}
        stored["status"] = {}
        self.jobs[name] = stored
        self._touch("job", "ADDED", stored)
        self._half_write("created Job")
        return copy.deepcopy(stored)

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        self._half_write("delete Job")
        job = self.jobs.get(name)
        if job is not None and job["metadata"]["uid"] == uid:
            self.remove_job(name)
        self._half_write("deleted Job")

    def remove_job(self, name: str) -> None:
        """Delete a Job in the background: it is gone at once, its pods stop after it."""
        job = self.jobs.pop(name)
        self._touch("job", "DELETED", job)
        uid = job["metadata"]["uid"]
        for pod_name, pod in list(self.pods.items()):
            if pod["metadata"]["ownerReferences"][0]["uid"] == uid and pod_name not in self.lost:
                if pod["status"]["phase"] == "Running":
                    self.results.setdefault(_attempt(job), self._stored(handed_back("HandedBack"), pod))
                del self.pods[pod_name]

    # ------------------------------------------------------------------------------------------------- node and pods

    def run_pod(self) -> bool:
        """Start the pod of a Job that has none."""
        for name, job in self.jobs.items():
            uid = job["metadata"]["uid"]
            owners = {pod["metadata"]["ownerReferences"][0]["uid"] for pod in self.pods.values()}
            if uid not in owners and not job["status"].get("conditions"):
                pod_name = f"{name}-{uid}"
                self.holders[_attempt(job)[0]] = pod_name
                self.pods[pod_name] = {
                    "metadata": {
                        "name": pod_name,
                        "uid": f"pod-of-{uid}",
                        "ownerReferences": [{"kind": "Job", "uid": uid, "controller": True}],
                    },
                    "status": {
                        "phase": "Running",
                        "containerStatuses": [_container({"running": {"startedAt": _stamp(self.now)}})],
                    },
                }
                job["status"] = {"active": 1, "ready": 1, "startTime": _stamp(self.now)}
                self._touch("job", "MODIFIED", job)
                return True
        return False

    def end_pod(self, outcome: AttemptOutcome, *, message: bool = True) -> bool:
        """End a running pod as its runner would: a success is a commit, which the fence may refuse."""
        for name, pod in self.pods.items():
            job = self._job_of(pod)
            if pod["status"]["phase"] != "Running" or job is None or name in self.lost:
                continue
            task_uid, attempt = _attempt(job)
            if outcome.outcome is Outcome.SUCCEEDED and not self._committed(name, task_uid):
                outcome = AttemptOutcome(outcome=Outcome.FENCED, attempt=attempt, reason="Fenced")
            outcome = outcome.model_copy(update={"attempt": attempt})
            self.results[(task_uid, attempt)] = self._stored(outcome, pod)
            good = outcome.outcome is Outcome.SUCCEEDED
            ended = {"startedAt": _stamp(self.now), "finishedAt": _stamp(self.now), "exitCode": 0 if good else 75}
            if message:
                ended["message"] = outcome.termination_message()
            pod["status"] = {
                "phase": "Succeeded" if good else "Failed",
                "containerStatuses": [_container({"terminated": ended})],
            }
            kind = "Complete" if good else "Failed"
            job["status"] = {
                "conditions": [{"type": kind, "status": "True", "reason": kind, "lastTransitionTime": _stamp(self.now)}]
            }
            self._touch("job", "MODIFIED", job)
            return True
        return False

    def commit(self) -> None:
        """Have a running pod commit, without an end yet."""
        for name, pod in self.pods.items():
            job = self._job_of(pod)
            if pod["status"]["phase"] == "Running" and job is not None and name not in self.lost:
                self._committed(name, _attempt(job)[0])

    def lose_node(self) -> None:
        """Lose the node of a running pod: the pod is told to stop, and nobody hears it."""
        for name, pod in self.pods.items():
            job = self._job_of(pod)
            if pod["status"]["phase"] == "Running" and job is not None and name not in self.lost:
                self.lost.add(name)
                pod["metadata"]["deletionTimestamp"] = _stamp(self.now + timedelta(seconds=30))
                job["status"] = {"terminating": 1, "startTime": _stamp(self.now)}
                self._touch("job", "MODIFIED", job)

    def return_node(self) -> None:
        """Have lost pods answer again: they commit what they have, if they may, and stop."""
        for name in sorted(self.lost & self.pods.keys()):
            pod = self.pods.pop(name)
            job = self._job_of(pod)
            uid = UID if job is None else _attempt(job)[0]
            good = self._committed(name, uid)
            if job is not None and not job["status"].get("conditions"):
                kind = "Complete" if good else "Failed"
                condition = {"type": kind, "status": "True", "reason": kind, "lastTransitionTime": _stamp(self.now)}
                job["status"] = {"conditions": [condition]}
                self._touch("job", "MODIFIED", job)
        self.lost.clear()

    def _committed(self, pod: str, task_uid: str) -> bool:
        """Commit, unless the fence is up or another pod has taken the intents; return whether the task is published."""
        if task_uid not in self.published:
            if task_uid in self.fences or self.holders.get(task_uid) != pod:
                return False
            self.commits += 1
            self.published.add(task_uid)
        return True

    def _job_of(self, pod: Mapping[str, Any]) -> dict[str, Any] | None:
        uid = pod["metadata"]["ownerReferences"][0]["uid"]
        return next((job for job in self.jobs.values() if job["metadata"]["uid"] == uid), None)

    def _stored(self, outcome: AttemptOutcome, pod: Mapping[str, Any]) -> StoredOutcome:
        return StoredOutcome(outcome=outcome, holder=pod["metadata"]["uid"], created_at=self.now)

    # ------------------------------------------------------------------------------------------------------ PostgreSQL

    def submit(self, manifest: Mapping[str, Any], *, deleted: bool = False, lost: int | None = None) -> None:
        """Take a row: at once."""
        uid, phase = manifest["metadata"]["uid"], Phase(manifest["status"]["phase"])
        self.rows[uid] = Held(version=int(manifest["metadata"]["resourceVersion"]), finished=phase.finished)
        if deleted:
            del self.rows[uid]

    def newest(self) -> int:
        return -1

    async def room(self) -> None:
        """There is always room."""

    def acknowledged(self, uid: str) -> int | None:
        return self.version

    def fence_later(self, uid: str, *, reason: str) -> None:
        self.fences.add(uid)

    async def result(self, uid: str, *, attempt: int) -> StoredOutcome | None:
        self._ask_database()
        return self.results.get((uid, attempt))

    async def raise_fence(self, uid: str, *, reason: str) -> Fence:
        self._half_write("raise fence")
        self._ask_database()
        if uid in self.published:
            found = [one.outcome for (of, _), one in self.results.items() if of == uid]
            return Fence(FenceState.COMMITTED, next((one for one in found if one.outcome is Outcome.SUCCEEDED), None))
        self.fences.add(uid)
        self._half_write("raised fence")
        return Fence(FenceState.RAISED)

    async def release(self, uid: str) -> Fence:
        self._half_write("release intents")
        self._ask_database()
        if uid in self.published:
            found = [one.outcome for (of, _), one in self.results.items() if of == uid]
            return Fence(FenceState.COMMITTED, next((one for one in found if one.outcome is Outcome.SUCCEEDED), None))
        self.holders.pop(uid, None)
        self._half_write("released intents")
        return Fence(FenceState.RAISED)

    async def held(self, **_: Any) -> dict[str, Held]:
        self._ask_database()
        return dict(self.rows)

    async def mark_deleted(self, gone: Mapping[str, Held]) -> None:
        self._ask_database()
        for uid, one in gone.items():
            del self.rows[uid]
            if not one.finished:
                self.fences.add(uid)

    def _ask_database(self) -> None:
        if not self.database_up:
            self.down_since = self.down_since or self.now
            raise DatabaseUnavailable("cannot use PostgreSQL")
        self.down_since = None

    # ----------------------------------------------------------------------------------------------------- the rest

    def _half_write(self, what: str) -> None:
        self.writes.append(what)
        if self.crash_in is not None:
            if self.crash_in == 0:
                self.crash_in = None
                raise self.fault("cut")
            self.crash_in -= 1

    def _next(self) -> int:
        self.version += 1
        return self.version

    def _touch(self, kind: str, event: str, thing: dict[str, Any]) -> None:
        thing["metadata"]["resourceVersion"] = str(self._next())
        self.events.append((kind, event, copy.deepcopy(thing)))


@dataclass
class Run:
    """A task that a worker has, or believes to have."""

    pool: str
    uid: str
    attempt: int
    stamp: str
    id: int
    began: datetime
    name: str

    @property
    def worker(self) -> str:
        return f"{self.pool}-1a667239-0-5f-1-w{self.id}"


@dataclass
class Entry:
    """A task in the queue of a pool."""

    offer: Offer
    id: int
    at: datetime
    run: Run | None = None
    renewed: datetime | None = None


@dataclass
class MemoryPools:
    """Worker pools and their queues in memory, by the rules of :mod:`task_contract.leases`; also their workers."""

    world: World
    names: list[str] = field(default_factory=lambda: ["texts"])
    up: bool = True
    synced: bool = True
    killed: bool = False
    """The operator was killed at one of its requests here."""
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)
    said: dict[str, list[Heard]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    count: int = 0
    offered: list[tuple[str, int]] = field(default_factory=list)
    """Pool and attempt of each offer that was news."""

    # -------------------------------------------------------------------------------------------------- of the operator

    def pools(self) -> list[Pool]:
        return [Pool("knowledge", name, f"uid-{name}", PoolSpec(types=list(POOL_TYPES))) for name in self.names]

    def unread(self, pool: str) -> list[Heard]:
        return list(self.said.get(pool, ()))

    def look(self, pool: str) -> Look:
        entries = self.entries.setdefault(pool, {})
        late = [one for one in entries.values() if one.renewed is not None and self.world.now - one.renewed >= _EXPIRED]
        for one in late:
            self.expire(one)
        taken = sum(one.run is not None for one in entries.values())
        return Look(len(late), taken, {"normal": len(entries) - taken}, frozenset(entries), {})

    async def offer(self, keys: PoolKeys, offers: Sequence[Offer], *, now: datetime) -> list[bool]:
        self._half("offer")
        answer = [self._offer(keys.pool, one) for one in offers]
        self._half("offered")
        return answer

    def _offer(self, pool: str, offer: Offer) -> bool:
        entries = self.entries.setdefault(pool, {})
        known = entries.get(offer.uid)
        same = known is not None and (known.offer.attempt, known.offer.stamp) == (offer.attempt, offer.stamp)
        if known is not None and same and (known.run is not None or known.offer.priority == offer.priority):
            return False
        self.count += 1
        entries[offer.uid] = Entry(offer, self.count, self.world.now)
        self.offered.append((pool, offer.attempt))
        return True

    async def withdraw(self, keys: PoolKeys, uid: str) -> str | None:
        self._half("withdraw")
        entry = self.entries.setdefault(keys.pool, {}).pop(uid, None)
        self._half("withdrawn")
        return None if entry is None or entry.run is None else entry.run.worker

    async def reports(self, keys: PoolKeys) -> AsyncGenerator[list[Heard], None]:
        yield []

    async def settle(self, keys: PoolKeys, numbers: Sequence[str]) -> None:
        self._half("settle")
        self.said[keys.pool] = [one for one in self.said.get(keys.pool, ()) if one.number not in numbers]
        self._half("settled")

    def _half(self, what: str) -> None:
        if not self.up:
            raise QueueUnavailable("cannot use Redis")
        try:
            self.world._half_write(what)
        except Crash:
            self.killed = True
            raise QueueUnavailable("killed") from None
        except Unavailable:
            raise QueueUnavailable("cut") from None

    # ------------------------------------------------------------------------------------------------------ of workers

    def take(self) -> Run | None:
        """Have a worker take the next task, and with it its intents in the ledger."""
        for pool, entries in self.entries.items():
            for uid, entry in entries.items():
                if entry.run is None and self.up:
                    offer = entry.offer
                    run = Run(pool, uid, offer.attempt, offer.stamp, entry.id, self.world.now, offer.name)
                    entry.run, entry.renewed = run, self.world.now
                    self.runs.append(run)
                    self.world.holders[uid] = run.worker
                    return run
        return None

    def renew(self) -> None:
        """Have all workers renew what they hold; those that hold nothing any more stop."""
        for run in list(self.runs):
            entry = self._entry(run)
            if self.up and entry is not None:
                entry.renewed = self.world.now
            elif self.up:
                self.runs.remove(run)

    def tell(self, run: Run) -> None:
        """Say that a task runs."""
        if self.up and self._entry(run) is not None:
            self._say(run, kind="running")

    def end(self, run: Run, outcome: AttemptOutcome) -> None:
        """End a task as a worker does: a success is a commit, which the fence may refuse; result first, report after."""
        self.runs.remove(run)
        outcome = outcome.model_copy(update={"attempt": run.attempt})
        if outcome.outcome is Outcome.SUCCEEDED and not self.world._committed(run.worker, run.uid):
            outcome = AttemptOutcome(outcome=Outcome.FENCED, attempt=run.attempt, reason="Fenced")
        self.world.results[(run.uid, run.attempt)] = StoredOutcome(outcome, run.worker, self.world.now)
        if not self.up:
            return  # its report is lost with it
        mine, there = self._entry(run), self.entries.get(run.pool, {}).get(run.uid)
        if mine is not None:
            del self.entries[run.pool][run.uid]
        if mine is not None or there is None:
            self._say(run, kind="ended", outcome=outcome, finished_at=self.world.now)

    def expire(self, entry: Entry) -> None:
        """End a lease that ran out. Its worker does not know."""
        if entry.run is not None:
            del self.entries[entry.run.pool][entry.run.uid]
            self._say(entry.run, kind="expired", job="", name="", started_at=None, finished_at=self.world.now)

    def silence(self) -> None:
        """Have no worker be heard of for longer than a lease."""
        for entries in self.entries.values():
            for entry in list(entries.values()):
                self.expire(entry)

    def repeat(self) -> None:
        """Have all reports be there twice."""
        for said in self.said.values():
            said += [Heard(f"{one.number}-again", one.report) for one in said if not one.number.endswith("again")]

    def wipe(self) -> None:
        """Lose everything in Redis."""
        self.entries.clear()
        self.said.clear()

    def work(self) -> bool:
        """Have a worker take and finish a task."""
        run = self.take()
        run = run or next((one for one in self.runs if self._entry(one) is not None), None)
        if run is not None:
            self.end(run, success())
        return run is not None

    def _entry(self, run: Run) -> Entry | None:
        entry = self.entries.get(run.pool, {}).get(run.uid)
        return entry if entry is not None and entry.run is run else None

    def _say(self, run: Run, **more: Any) -> None:
        self.count += 1
        known = {
            "uid": run.uid,
            "namespace": "knowledge",
            "name": run.name,
            "attempt": run.attempt,
            "stamp": run.stamp,
            "worker": run.worker,
            "job": f"{run.pool}-1a667239-0-5f-1",
            "started_at": run.began,
        }
        report = PoolReport.model_validate(known | more)
        self.said.setdefault(run.pool, []).append(Heard(str(self.count), report))


class Operator:
    """The controller under test in a world: its process can be killed, its events can be lost, and it starts again."""

    def __init__(
        self, world: World, *, database: bool = True, pools: MemoryPools | None = None, fallback: bool = False
    ) -> None:
        self.world = world
        self.database = database
        self.pools = pools
        self.fallback = fallback
        self.crashes = 0
        self.deaf = False
        """Whether events about its own writes get lost: those that come while it looks."""
        self._controller: Controller | None = None
        self._seen = 0

    async def _start(self) -> Controller:
        if self._controller is None:
            world: Any = self.world
            self._controller = Controller(
                api=world,
                template=RunnerTemplate(image="runner:1"),
                metrics=Metrics(),
                database=world if self.database else None,
                pools=self.pools,
                pool_queue=self.pools,
                policy=Policy(pool_fallback=self.fallback),
                clock=lambda: self.world.now,
                random=random.Random(1).random,
                pods_apart=0,
            )
            self._seen = len(self.world.events)
            await self._controller._resync()
            self._controller._listed.set()
            self.look_at_pools()
        return self._controller

    def look_at_pools(self) -> None:
        """Read reports and look at each pool, as is done each second."""
        if self.pools is None or self._controller is None or self._controller._pools is None:
            return
        known = self._controller._pools
        known.follow()
        pools = self.pools.pools()
        there = [(pool.namespace, pool.name) for pool in pools]
        gone = [of for of, place in known._places.items() if place.held and of not in there]
        for of in (*there, *gone) if self.pools.up else ():
            known.on_reports(of, self.pools.unread(of[1]))
            known.on_reports(of, [])
        for pool in pools:
            self._controller.on_look(pool, self.pools.look(pool.name) if self.pools.up else None)

    def deliver(self, *, lose: bool = False) -> None:
        """Hand over the watch events since the last time, or lose them."""
        news, self._seen = self.world.events[self._seen :], len(self.world.events)
        if self._controller is None or lose:
            return
        for kind, event, thing in news:
            (self._controller.on_task if kind == "task" else self._controller.on_job)(event, thing)

    async def look(self, *, resync: bool = False) -> None:
        """Look at the task once, as a worker does; a crash in it kills the process."""
        try:
            controller = await self._start()
            if resync:
                await controller._resync()
                self.look_at_pools()
            await look_through(controller)
            if controller._pools is not None:
                await controller._pools.settle()
        except (Conflict, Unavailable):
            return  # the work queue would try again
        except (Crash, VersionsWentBack):
            self._die()
        finally:
            if self.pools is not None and self.pools.killed:
                self.pools.killed = False
                self._die()

    def _die(self) -> None:
        self.crashes += 1
        self._controller = None

    async def settle(self, *, rounds: int = 8) -> None:
        """Look until nothing is written any more."""
        for _ in range(rounds):
            before = len(self.world.writes)
            self.deliver()
            self.look_at_pools()
            await self.look()
            if self.deaf:
                self.deliver(lose=True)
            if len(self.world.writes) == before:
                return

    async def finish(self, *, hours: float = 2) -> None:
        """Let everything go well from here on: pods run and succeed, time passes, the operator looks."""
        self.world.crash_in = None
        self.world.database_up = True
        if self.pools is not None:
            self.pools.up = True
        self.world.edit(suspend=False)
        step = timedelta(seconds=15)
        for _ in range(int(hours * 3600 / step.total_seconds())):
            await self.look(resync=True)
            await self.settle()
            if KEY not in self.world.tasks or Phase(self.world.status["phase"]).finished:
                return
            if self.pools is not None and self.pools.work():
                continue
            self.world.run_pod() or self.world.end_pod(success())
            self.world.now += step
        raise AssertionError(f"the task does not end: {self.world.status}")


async def look_through(controller: Controller) -> None:
    """Look at the task, and again when its pods are known, if it was left until then."""
    await controller._look(KEY)
    while (asking := controller._glances._working) is not None and not asking.done():
        await asking
        await controller._look(KEY)


def _container(state: dict[str, Any]) -> dict[str, Any]:
    return {"name": "runner", "state": state}


def _attempt(job: Mapping[str, Any]) -> tuple[str, int]:
    labels = job["metadata"]["labels"]
    return labels["tasks.zzdsj.io/task-uid"], int(labels["tasks.zzdsj.io/attempt"])


def _found(things: Mapping[Any, dict[str, Any]], key: Any) -> dict[str, Any]:
    if key not in things:
        raise NotFound(f"cannot find {key}")
    return things[key]


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


OUTCOMES: dict[str, AttemptOutcome] = {
    "success": success(),
    "failure": failure(),
    "permanent": failure("DocumentUnreadable", retryable=False),
    "given back": handed_back(),
}
