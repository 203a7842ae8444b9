"""Whatever happens to a batch in whatever order, with the operator killed before or after any write: it ends, once."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from task_contract.batches import read_shards
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Phase
from task_contract.names import SHARDS_ANNOTATION
from task_operator.jobs import INDEX_ANNOTATION
from task_operator.observation import Batch, Fence, FenceState, StoredOutcome
from tests.support.operator_values import UID, failure, handed_back, success
from tests.support.operator_world import Operator, World

SHARDS = 4
DOCUMENTS = 8
ENDS: dict[str, AttemptOutcome] = {
    "done": success(),
    "failed": failure("ParserCrashed"),
    "out of memory": failure("OOMKilled"),
    "given back": handed_back(),
}


@dataclass
class BatchWorld(World):
    """A world with one batch: documents, two a shard, and Jobs that are Indexed."""

    listed: bool = False
    documents: dict[int, str] = field(default_factory=dict)
    """Number → pending, done or failed."""
    processed: list[int] = field(default_factory=list)
    """Documents in the order in which they were published."""
    jobs_over: list[tuple[int, ...]] = field(default_factory=list)
    """Shards of each Job that was made."""

    def documents_of(self, shard: int) -> list[int]:
        return [number for number in range(DOCUMENTS) if number % SHARDS == shard]

    # ------------------------------------------------------------------------------------------------- node and pods

    async def create_job(self, job: dict[str, Any]) -> dict[str, Any]:
        made = await super().create_job(job)
        self.jobs_over.append(read_shards(job["metadata"]["annotations"][SHARDS_ANNOTATION]))
        assert job["spec"]["completions"] == len(self.jobs_over[-1])
        return made

    def run_pod(self) -> bool:
        """Start a pod of each index of a Job that has none."""
        for job in self.jobs.values():
            uid = job["metadata"]["uid"]
            if job["status"].get("conditions") or any(self._job_uid(pod) == uid for pod in self.pods.values()):
                continue
            for index in range(job["spec"]["completions"]):
                name = f"{uid}-{index}"
                self.pods[name] = {
                    "metadata": {
                        "name": name,
                        "uid": f"pod-{name}",
                        "annotations": {INDEX_ANNOTATION: str(index)},
                        "ownerReferences": [{"kind": "Job", "uid": uid, "controller": True}],
                    },
                    "status": {
                        "phase": "Running",
                        "containerStatuses": [{"name": "runner", "state": {"running": {"startedAt": self._now()}}}],
                    },
                }
            self.listed = True
            self.documents = self.documents or dict.fromkeys(range(DOCUMENTS), "pending")
            job["status"] = {"ready": job["spec"]["completions"], "startTime": self._now()}
            self._touch("job", "MODIFIED", job)
            return True
        return False

    def end_shard(self, how: AttemptOutcome, *, document_fails: bool = False, message: bool = True) -> bool:
        """End the first pod that runs: one that is done has published its documents, unless the fence is up."""
        for pod in self.pods.values():
            job = self._job_of(pod)
            if pod["status"]["phase"] != "Running" or job is None:
                continue
            index = int(pod["metadata"]["annotations"][INDEX_ANNOTATION])
            shard = read_shards(job["metadata"]["annotations"][SHARDS_ANNOTATION])[index]
            if how.outcome is Outcome.SUCCEEDED:
                for number in self.documents_of(shard):
                    how = self._publish(number, fails=document_fails and number == shard) or how
            good = how.outcome is Outcome.SUCCEEDED
            ended = {"startedAt": self._now(), "finishedAt": self._now(), "exitCode": 0 if good else 75}
            if message:
                ended["message"] = how.termination_message()
            pod["status"] = {
                "phase": "Succeeded" if good else "Failed",
                "containerStatuses": [{"name": "runner", "state": {"terminated": ended}}],
            }
            self._end_job(job)
            return True
        return False

    def _publish(self, number: int, *, fails: bool) -> AttemptOutcome | None:
        if self.documents[number] != "pending":
            return None
        if UID in self.fences:
            return AttemptOutcome(outcome=Outcome.FENCED, attempt=1, reason="Fenced")
        self.documents[number] = "failed" if fails else "done"
        self.processed.append(number)
        return None

    def _end_job(self, job: dict[str, Any]) -> None:
        mine = [pod["status"]["phase"] for pod in self.pods.values() if self._job_uid(pod) == job["metadata"]["uid"]]
        if "Running" not in mine and len(mine) == job["spec"]["completions"]:
            kind, reason = ("Complete", "CompletionsReached") if set(mine) == {"Succeeded"} else ("Failed", "FailedIndexes")
            condition = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": self._now()}
            job["status"] = {"conditions": [condition]}
        else:
            job["status"] = {**job["status"], "ready": mine.count("Running")}
        self._touch("job", "MODIFIED", job)

    def remove_job(self, name: str) -> None:
        job = self.jobs.pop(name)
        self._touch("job", "DELETED", job)
        self.pods = {key: pod for key, pod in self.pods.items() if self._job_uid(pod) != job["metadata"]["uid"]}

    @staticmethod
    def _job_uid(pod: Mapping[str, Any]) -> str:
        return str(pod["metadata"]["ownerReferences"][0]["uid"])

    def _now(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    # ------------------------------------------------------------------------------------------------------ PostgreSQL

    async def result(self, uid: str, *, attempt: int) -> StoredOutcome | None:
        self._ask_database()
        return None  # the outcome of a shard is not stored

    async def batch(self, uid: str) -> Batch:
        self._ask_database()
        return self._batch()

    def _batch(self) -> Batch:
        states = list(self.documents.values())
        left = sorted({number % SHARDS for number, state in self.documents.items() if state == "pending"})
        failed = states.count("failed")
        return Batch(
            total=len(states),
            pending=states.count("pending"),
            failed=failed,
            published=states.count("done"),
            shards=tuple(left),
            failures=("DocumentEmpty 1 (a: no text)",) if failed else (),
        )

    async def settle_batch(self, uid: str, *, reason: str, message: str) -> Batch:
        self._half_write("settle")
        self._ask_database()
        self.fences.add(uid)
        self.documents = {number: "failed" if state == "pending" else state for number, state in self.documents.items()}
        self._half_write("settled")
        return self._batch()

    async def raise_fence(self, uid: str, *, reason: str) -> Fence:
        self._half_write("raise fence")
        self._ask_database()
        if self._batch().ended:
            return Fence(FenceState.COMMITTED)
        self.fences.add(uid)
        self._half_write("raised fence")
        return Fence(FenceState.RAISED)

    async def release(self, uid: str) -> Fence:
        self._ask_database()
        return Fence(FenceState.COMMITTED if self._batch().ended else FenceState.RAISED)


STEPS = st.one_of(
    st.tuples(st.just("look"), st.integers(0, 7)),
    st.tuples(st.just("look"), st.none()),
    st.tuples(st.sampled_from(["end", "end silently"]), st.sampled_from(sorted(ENDS))),
    st.tuples(st.just("end with a bad document"), st.none()),
    st.tuples(st.sampled_from(["run", "lose events", "suspend", "resume", "restart", "delete Job", "cancel"]), st.none()),
    st.tuples(st.sampled_from(["database down", "database up"]), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, 15, 90, 400])),
)
RUNS: list[tuple[str, Any]] = [("look", None), ("run", None), ("look", None)]
BEGINNINGS: list[list[tuple[str, Any]]] = [
    [],
    RUNS,
    [*RUNS, ("end", "done"), ("end", "failed"), ("end", "done"), ("end", "done"), ("look", None)],
    [*RUNS, ("end", "done"), ("end", "given back"), ("end", "done"), ("end", "given back"), ("look", None)],
    [*RUNS, ("end", "done"), ("delete Job", None), ("look", None)],
    [*RUNS, ("end", "done"), ("cancel", None)],
    [*RUNS, *[("end", "done")] * 4, ("database down", None), ("look", None)],
]


async def _play(world: BatchWorld, operator: Operator, steps: list[tuple[str, Any]]) -> None:
    for step, argument in steps:
        match step:
            case "look":
                world.crash_in = argument
                operator.deliver()
                await operator.settle(rounds=3)
                world.crash_in = None
            case "run":
                world.run_pod()
            case "end" | "end silently":
                world.end_shard(ENDS[argument], message=step == "end")
            case "end with a bad document":
                world.end_shard(ENDS["done"], document_fails=True)
            case "lose events":
                operator.deliver(lose=True)
            case "delete Job":
                for name in list(world.jobs)[:1]:
                    world.remove_job(name)
            case "suspend" | "resume":
                world.edit(suspend=step == "suspend")
            case "cancel":
                world.edit(cancel=True)
            case "database down" | "database up":
                world.database_up = step == "database up"
            case "restart":
                operator._controller = None
            case "wait":
                world.now += timedelta(seconds=argument)
    await _finish(world, operator)


async def _finish(world: BatchWorld, operator: Operator) -> None:
    """Let everything go well from here on."""
    world.crash_in, world.database_up = None, True
    world.edit(suspend=False)
    for _ in range(400):
        await operator.look(resync=True)
        await operator.settle()
        if Phase(world.status["phase"]).finished:
            return
        if not world.run_pod():
            while world.end_shard(ENDS["done"]):
                pass
        world.now += timedelta(seconds=15)
    raise AssertionError(f"the batch does not end: {world.status}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(
    begin=[("look", None), ("run", None), ("look", None), *[("end", "done")] * 4, ("database down", None), ("look", None)],
    steps=[("delete Job", None), ("cancel", None), ("look", 0)],
    allowed=0,
)
@given(begin=st.sampled_from(BEGINNINGS), steps=st.lists(STEPS, max_size=15), allowed=st.sampled_from([0, 50, 100]))
def test_every_history_of_a_batch_converges(
    begin: list[tuple[str, Any]], steps: list[tuple[str, Any]], allowed: int
) -> None:
    world = BatchWorld()
    files = [f"{number}.md" for number in range(DOCUMENTS)]
    world.add_task(spec={"type": "batch_processing", "payload": {"filePaths": files, "maxFailedPercent": allowed}})

    asyncio.run(_play(world, Operator(world), begin + steps))

    status, counts = world.status, world._batch()
    phase = Phase(status["phase"])
    numbers = [attempt["number"] for attempt in status.get("attempts", [])]
    assert numbers == list(range(1, len(numbers) + 1)), "an attempt is counted twice, or never"
    assert len(numbers) <= 4, "more attempts than the policy allows"
    assert len(world.processed) == len(set(world.processed)), "a document was processed twice"
    assert all(set(after) <= set(before) for before, after in zip(world.jobs_over, world.jobs_over[1:], strict=False))
    assert all(job["status"].get("conditions") for job in world.jobs.values()), "a Job runs for a finished task"
    if phase is Phase.CANCELED:
        names = {step for step, _ in begin + steps}
        assert "cancel" in names
        # While PostgreSQL is away nobody can ask it what was published: a task without a pod is then canceled all the same.
        assert not counts.ended or UID in world.fences or "database down" in names
        return
    assert counts.ended, "documents are left of a task that has ended"
    assert status["result"]["documents"] == counts.published
    assert status["result"]["documentsFailed"] == counts.failed
    good = 100 * counts.failed <= allowed * DOCUMENTS
    assert phase is (Phase.COMPLETED if good else Phase.FAILED)
    if not good:
        assert status["error"]["reason"] == "BatchFailed"


def test_an_operator_that_is_killed_at_any_write_ends_a_batch_all_the_same() -> None:
    """At each half-write of a history with a retry, a shard given back and documents given up."""
    steps = [
        *RUNS,
        *[("end", "done"), ("end", "failed"), ("end", "given back"), ("end", "done")],
        *[("look", None), ("wait", 15), ("look", None), ("run", None), ("look", None)],
        *[("end", "done"), ("end", "failed"), ("look", None)],
    ]
    for crash in range(12):
        for place in (index for index, (step, _) in enumerate(steps) if step == "look"):
            world = BatchWorld()
            payload = {"filePaths": ["a.md"] * DOCUMENTS, "maxFailedPercent": 0}
            retry = {"limit": 1, "initialDelay": "10s", "jitter": 0}
            world.add_task(spec={"type": "batch_processing", "payload": payload, "retry": retry})
            killed = [*steps[:place], ("look", crash), *steps[place + 1 :]]
            asyncio.run(_play(world, Operator(world), killed))
            assert Phase(world.status["phase"]).finished
            assert world._batch().ended
