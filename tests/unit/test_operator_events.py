"""Kubernetes Events: which changes are told, in which words, how often; and that nobody waits for them."""

import asyncio
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest

from task_contract.models import Metadata, Status
from task_operator.controller import Controller
from task_operator.events import Events, of_transition, of_wait
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_platform.kubernetes import Conflict, Forbidden, Manifest, Unavailable
from tests.support.operator_lab import until
from tests.support.operator_values import UID, at, finished, given_back, name_of, processing, retrying, stamp, success
from tests.support.operator_values import failure as failure_outcome
from tests.support.operator_world import World, look_through

METADATA = Metadata(name="handbook", namespace="knowledge", uid=UID)


def status(values: dict[str, Any] | None = None) -> Status:
    return Status.model_validate(values or {"phase": "Queued", "attempt": 0})


BROKEN = finished("Failed", error={"reason": "DocumentEmpty", "message": "cannot find text", "retryable": False})
UNSCHEDULABLE = {"reason": "Unschedulable", "message": "0/1 nodes are available", "since": stamp(0)}


@pytest.mark.parametrize(
    ("before", "after", "reason", "note"),
    [
        (
            processing(),
            retrying(),
            "Retrying",
            "attempt 1 failed (StoresDisagree): cannot verify; the next one starts at 12:00:30Z",
        ),
        (processing(), BROKEN, "Failed", "DocumentEmpty: cannot find text"),
        (None, BROKEN, "Failed", "DocumentEmpty: cannot find text"),
        (BROKEN, BROKEN, None, None),
        (retrying(), retrying(queue=UNSCHEDULABLE), None, None),
        (None, processing(), None, None),
        (retrying(), processing(2), None, None),
        (processing(), finished(), None, None),
        (processing(), finished("Canceled"), None, None),
        (processing(), given_back(), None, None),
    ],
)
def test_retries_and_failures_are_told_and_nothing_else(
    before: dict[str, Any] | None, after: dict[str, Any], reason: str | None, note: str | None
) -> None:
    event = of_transition(METADATA, status(before), status(after), now=at(40.5))
    assert (reason, note) == (None, None) if event is None else (event["reason"], event["note"]) == (reason, note)


def test_an_event_is_exactly_this() -> None:
    event = of_transition(METADATA, status(processing()), status(BROKEN), now=at(40.5))
    assert event == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "handbook.dbc4674c7dcba6bd", "namespace": "knowledge"},
        "eventTime": "2026-11-24T12:00:40.500000Z",
        "type": "Warning",
        "reason": "Failed",
        "action": "Fail",
        "note": "DocumentEmpty: cannot find text",
        "regarding": {
            "apiVersion": "tasks.zzdsj.io/v1",
            "kind": "ProcessingTask",
            "name": "handbook",
            "namespace": "knowledge",
            "uid": UID,
        },
        "related": {"apiVersion": "batch/v1", "kind": "Job", "name": name_of(1), "namespace": "knowledge"},
    }


@pytest.mark.parametrize(
    ("queue", "seconds", "note"),
    [
        (UNSCHEDULABLE, 59, None),
        (UNSCHEDULABLE, 75.4, "waiting for 1m15s (Unschedulable): 0/1 nodes are available"),
        (UNSCHEDULABLE | {"message": None}, 60, "waiting for 1m (Unschedulable): no more is known"),
        (UNSCHEDULABLE | {"since": None}, 75, None),
        (UNSCHEDULABLE | {"reason": "Suspended"}, 7500, None),
        (None, 7500, None),
    ],
)
def test_long_waits_are_told(queue: dict[str, Any] | None, seconds: float, note: str | None) -> None:
    event = of_wait(METADATA, status({"phase": "Queued", "attempt": 0, "queue": queue}), now=at(seconds))
    assert (None if event is None else event["note"]) == note


def test_the_same_is_told_under_the_same_name_and_another_under_another() -> None:
    waits = status({"phase": "Queued", "attempt": 0, "queue": UNSCHEDULABLE})
    later = status({"phase": "Queued", "attempt": 0, "queue": UNSCHEDULABLE | {"since": stamp(1)}})
    told = [
        of_wait(METADATA, waits, now=at(70)),
        of_wait(METADATA, waits, now=at(170)),
        of_wait(METADATA, later, now=at(170)),
        of_transition(METADATA, status(processing()), status(retrying()), now=at(30)),
        of_transition(METADATA, status(processing()), status(retrying()), now=at(31)),
        of_transition(METADATA, status(processing(2)), status(retrying(2)), now=at(31)),
        of_transition(METADATA, status(processing()), status(BROKEN), now=at(31)),
    ]
    names = [event["metadata"]["name"] for event in told if event is not None]
    assert [names.index(name) for name in names] == [0, 0, 2, 3, 3, 5, 6]


def test_names_and_notes_fit_the_api_servers_bounds() -> None:
    long = Metadata(name="a" * 229 + "." + "b" * 23, namespace="knowledge", uid=UID)
    broken = finished("Failed", error={"reason": "Odd", "message": "数" * 1024, "retryable": False})
    event = of_transition(long, status(), status(broken), now=at(1))
    assert event is not None
    assert len(event["metadata"]["name"]) <= 253
    assert ".." not in event["metadata"]["name"]
    assert 1000 < len(event["note"].encode()) <= 1024
    assert event["note"].endswith("数…")


# ---------------------------------------------------------------------------------------------------------------- sending


class Api:
    """Takes Events, or answers with an error."""

    def __init__(self) -> None:
        self.taken: list[Manifest] = []
        self.answers: list[Exception] = []
        self.hangs = asyncio.Event()
        self.hangs.set()

    async def create_event(self, event: Manifest) -> None:
        await self.hangs.wait()
        if self.answers:
            raise self.answers.pop(0)
        self.taken.append(event)

    async def has_taken(self, number: int) -> None:
        async def look() -> bool:
            return len(self.taken) >= number

        await until(f"{number} Events are taken", look, seconds=5, interval=0.01)


def event(number: int = 0) -> Manifest:
    return {"metadata": {"name": f"event-{number}", "namespace": "knowledge"}, "reason": "Failed"}


def counts(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    found = [line.split('"') for line in lines if line.startswith("task_operator_events_total{")]
    return {parts[1]: float(parts[2].removeprefix("} ")) for parts in found}


async def test_what_cannot_be_told_is_left_out_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    api, metrics = Api(), Metrics()
    events = Events(api.create_event, instance="host" * 99, labels={"a": "b"}, metrics=metrics, pace=0)
    work = asyncio.create_task(events.run())
    api.answers = [Unavailable("cannot POST"), Forbidden("cannot POST"), Conflict("exists")]
    for number in range(4):
        events.submit(event(number))
    await api.has_taken(1)
    (sent,) = api.taken
    assert sent["metadata"] == {"name": "event-3", "namespace": "knowledge", "labels": {"a": "b"}}
    assert sent["reportingController"] == "tasks.zzdsj.io/operator"
    assert len(sent["reportingInstance"]) == 128
    assert counts(metrics) == {"failed": 2, "known": 1, "sent": 1}
    work.cancel()
    await asyncio.wait([work])


async def test_no_more_than_some_wait() -> None:
    api, metrics = Api(), Metrics()
    api.hangs.clear()
    events = Events(api.create_event, instance="host", labels={}, metrics=metrics, pace=0)
    work = asyncio.create_task(events.run())
    for number in range(2000):
        events.submit(event(number))
    assert counts(metrics) == {"dropped": 1500}
    api.hangs.set()
    await api.has_taken(500)
    work.cancel()
    await asyncio.wait([work])


def controller(world: World, told: list[Manifest]) -> Controller:
    api: Any = world
    return Controller(
        api=api,
        template=RunnerTemplate(image="runner:1"),
        metrics=Metrics(),
        announce=told.append,
        clock=lambda: world.now,
        random=lambda: 0.5,
        pods_apart=0,
    )


async def look(operator: Controller) -> None:
    await operator._resync()
    await look_through(operator)


async def test_a_long_wait_is_told_once_by_a_process_and_by_the_next_under_the_same_name() -> None:
    world = World()
    told: list[Manifest] = []
    world.add_task()
    first = controller(world, told)
    for seconds in (0, 5, 30, 70, 100, 200):
        world.now = at(seconds)
        await look(first)
    assert [one["note"] for one in told] == [
        f"waiting for 1m10s (PodNotCreated): the pod of Job {name_of(1)} does not exist yet: kubectl describe job"
    ]
    await look(controller(world, told))
    assert len(told) == 2
    assert len({one["metadata"]["name"] for one in told}) == 1


async def test_a_life_tells_its_retry_once_whatever_is_looked_at_again() -> None:
    world = World()
    told: list[Manifest] = []
    world.add_task()
    first = controller(world, told)
    await look(first)
    world.run_pod()
    await look(first)
    world.end_pod(failure_outcome())
    for _ in range(3):
        await look(first)
    for _ in range(3):
        await look(controller(world, told))  # begins anew, as after a restart
    assert [one["reason"] for one in told] == ["Retrying"]
    world.now = at(3600)
    await look(first)
    world.run_pod()
    await look(first)
    world.end_pod(success())
    await look(first)
    assert world.status["phase"] == "Completed"
    assert [one["reason"] for one in told] == ["Retrying"]
