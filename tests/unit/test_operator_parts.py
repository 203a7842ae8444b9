"""The operator's smaller parts: queue, cache, settings, health, metrics, patches."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

import aiohttp
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest

from task_contract.models import Priority, Status
from task_operator.__main__ import main
from task_operator.cache import Cache, surplus
from task_operator.cluster import Watches
from task_operator.controller import merge_patch
from task_operator.dispatch import Limits
from task_operator.handlers import kopf_settings
from task_operator.health import Health
from task_operator.metrics import Bounded, Metrics, Waiting
from task_operator.settings import Settings
from task_operator.statuses import tells_a_wait
from task_operator.workqueue import Glances, Turn, WorkQueue
from task_platform.kubernetes import verb_of
from task_platform.settings import SettingsError, load_settings
from tests.support.operator_values import UID, at, complete, finished, job, manifest, name_of, processing, stamp
from tests.support.servers import free_port

KEY = ("knowledge", "handbook")

# --------------------------------------------------------------------------------------------------------------- queue


async def test_a_key_waits_once_however_often_it_is_added() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert len(queue) == 2
    assert [await queue.get(), await queue.get()] == ["a", "b"]


async def test_a_key_that_changes_while_it_is_worked_on_comes_again_and_not_before() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await queue.get() == "a"


async def test_a_worker_waits_for_the_first_key_and_hands_its_turn_on_when_it_is_cancelled() -> None:
    queue: WorkQueue[str] = WorkQueue()
    first, second = (asyncio.create_task(queue.get()) for _ in range(2))
    await asyncio.sleep(0)
    queue.add("a")
    first.cancel()
    assert await asyncio.wait_for(second, 1) == "a"


def test_a_turn_is_of_one_key_and_goes_to_those_that_came_meanwhile_in_their_order() -> None:
    woken: list[str] = []
    turn: Turn[str] = Turn(woken.append)
    with turn.of("a") as of_a:
        assert of_a
        for key in ("b", "c", "b"):
            with turn.of(key) as of_another:
                assert not of_another
        assert woken == []
    assert woken == ["b"]
    with turn.of("b") as of_b:
        assert of_b
    with turn.of("d") as of_d:
        assert of_d
    assert woken == ["b", "c"]


def test_who_is_called_and_has_nothing_to_do_passes_the_turn_on() -> None:
    called: list[str] = []
    turn: Turn[str] = Turn(called.append)
    with turn.of("a"):
        for key in ("b", "c", "d"):
            with turn.of(key):
                pass
        turn.over("b")  # an earlier look: nobody was called yet
    assert called == ["b"]
    turn.over("a")
    assert called == ["b"]
    turn.over("b")  # it runs by now
    assert called == ["b", "c"]
    with turn.of("e") as of_another:  # came in between
        assert of_another
        turn.over("c")
    assert called == ["b", "c", "d"]


class Asking:
    """Answers questions about keys, and calls them."""

    def __init__(self, *, at_once: int = 10, apart: float = 0.0) -> None:
        self.asked: list[str] = []
        self.called: list[str] = []
        self.refuses = False
        self.glances = Glances[str, str](self._answer, self.called.append, at_once=at_once, apart=apart)

    async def _answer(self, key: str) -> str:
        self.asked.append(key)
        await asyncio.sleep(0)
        if self.refuses:
            raise OSError(key)
        return f"{key} {len(self.asked)}"

    async def answered(self) -> None:
        assert self.glances._working is not None
        await self.glances._working


async def test_who_glances_is_not_kept_waiting_and_is_called_for_the_answer() -> None:
    asking = Asking()
    assert [asking.glances.take(key) for key in ("a", "b", "a")] == [None, None, None]
    await asking.answered()
    assert (asking.asked, asking.called) == (["a", "b"], ["a", "b"])
    assert [asking.glances.take(key) for key in ("a", "b")] == ["a 2", "b 2"]
    assert asking.glances.take("a") is None, "it was taken"
    await asking.answered()
    assert asking.glances.take("a") == "a 3"


async def test_what_is_glanced_at_meanwhile_is_asked_for_together_in_its_order_and_not_before_its_time() -> None:
    asking = Asking(at_once=2, apart=0.1)
    began = asyncio.get_running_loop().time()
    asking.glances.take("a")
    await asyncio.sleep(0.02)
    for key in ("b", "c", "b", "d"):
        asking.glances.take(key)
    assert asking.called == ["a"]
    assert asking.glances.take("a") == "a 1", "an answer stays until it is taken"
    await asking.answered()
    assert asking.called == ["a", "b", "c", "d"]
    assert asyncio.get_running_loop().time() - began >= 0.3
    assert [asking.glances.take(key) for key in ("b", "c", "d")] == ["b 3", "c 3", "d 4"]


async def test_an_answer_that_nobody_came_for_in_time_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking()
    asking.glances.take("a")
    await asking.answered()
    monkeypatch.setattr("task_operator.workqueue._FRESH", -1.0)
    assert asking.glances.take("a") is None
    monkeypatch.undo()
    await asking.answered()
    assert asking.glances.take("a") == "a 2"


async def test_who_cannot_be_answered_is_told_why() -> None:
    asking = Asking()
    asking.refuses = True
    asking.glances.take("a")
    await asking.answered()
    assert asking.called == ["a"]
    with pytest.raises(OSError, match="a"):
        asking.glances.take("a")
    asking.refuses = False
    assert asking.glances.take("a") is None
    await asking.answered()
    assert asking.glances.take("a") == "a 2"


async def test_of_two_times_the_earlier_one_wins() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 3600)
    queue.add_after("a", 0.01)
    queue.add_after("a", 1800)
    assert await asyncio.wait_for(queue.get(), 1) == "a"
    queue.add_after("b", 0)
    assert await asyncio.wait_for(queue.get(), 1) == "b"
    queue.close()


async def test_after_errors_waits_double_to_a_minute_and_a_success_ends_that() -> None:
    queue: WorkQueue[str] = WorkQueue()
    waits = []
    for _ in range(8):
        queue._push("a")  # what its timer does
        assert await queue.get() == "a"
        waits.append(queue.failed("a"))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    queue.add("a")
    assert len(queue) == 0, "events do not shorten the wait of a key that goes wrong"
    assert queue.failed("b", at_least=7) == 7
    queue._push("a")
    await queue.get()
    queue.done("a")
    assert queue.failed("a") == 1
    queue.close()


def test_many_times_on_the_loop_of_the_operator_come_in_their_order() -> None:
    async def run() -> list[str]:
        queue: WorkQueue[str] = WorkQueue()
        loop = asyncio.get_running_loop()
        for number, late in enumerate((0.02, 0.01, 0.03, 0.00001)):
            queue.add_after(str(number), late)
        queue._schedule("past", loop.time() - 1)  # uvloop answers it with a handle that is no timer
        queue.add_after("last", 0.04)
        return [await asyncio.wait_for(queue.get(), 5) for _ in range(6)]

    assert uvloop.run(run()) == ["past", "3", "1", "0", "2", "last"]


# --------------------------------------------------------------------------------------------------------------- cache


def _task(version: int, **parts: Any) -> dict[str, Any]:
    made = manifest(**parts)
    made["metadata"]["resourceVersion"] = str(version)
    return made


def test_versions_are_compared_as_numbers() -> None:
    cache = Cache()
    assert cache.put_task(_task(9))
    assert cache.put_task(_task(10, status=processing()))
    assert not cache.put_task(_task(9))
    assert not cache.put_task(_task(10))
    cached = cache.task(KEY)
    assert cached is not None
    assert cached.manifest()["status"]["phase"] == "Processing"


def test_a_spec_is_given_back_whole_and_what_all_have_in_common_is_not_kept_with_each() -> None:
    retry = {"limit": 3, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0.2}
    spec = {
        "type": "health_check",
        "priority": "normal",
        "payload": {},
        "retry": retry,
        "executor": "auto",
        "suspend": False,
        "cancel": False,
        "ttlSecondsAfterFinished": 86400,
    }
    cache = Cache()
    for number, changed in enumerate(({}, {"retry": {**retry, "limit": 5}, "suspend": True}), start=1):
        cache.put_task(_task(number) | {"spec": spec | changed})
        cached = cache.task(KEY)
        assert cached is not None
        assert cached.manifest()["spec"] == spec | changed
        assert (b"executor" in cached.body, b"retry" in cached.body) == (False, bool(changed))


def test_what_is_known_of_a_finished_task_is_little() -> None:
    cache = Cache()
    cache.put_task(_task(5, status=finished(), managedFields=[{"manager": "kubectl"}]))
    cached = cache.task(KEY)
    assert cached is not None
    assert cached.finished
    assert cached.expires_at == at(60).timestamp() + 86_400
    spec = cached.manifest()["spec"]
    assert {key: spec[key] for key in ("type", "kbId")} == {"type": "document_processing", "kbId": "kb-42"}
    assert not {"payload", "idempotencyKey"} & spec.keys()
    assert "managedFields" not in cached.manifest()["metadata"]
    assert len(cached.body) < 700


@dataclass(frozen=True)
class Rival:
    name: str
    created: float = 0
    uid: str = "b"
    phase: str = "Queued"
    key: str | None = "k"
    namespace: str = "knowledge"
    duplicate_of: str | None = None


@pytest.mark.parametrize(
    ("why", "rivals", "first"),
    [
        ("alone", [], None),
        ("the other was created later", [Rival("later", created=20)], None),
        ("the other was created earlier", [Rival("earlier", created=5)], "earlier"),
        ("in the same second the uid decides", [Rival("same", created=10, uid="a")], "same"),
        ("and the other way round", [Rival("same", created=10, uid="z")], None),
        ("one that has failed keeps the key", [Rival("earlier", created=5, phase="Failed")], "earlier"),
        ("one that has completed comes before all", [Rival("later", created=20, phase="Completed")], "later"),
        ("a duplicate has no key to give", [Rival("earlier", created=5, phase="Canceled", duplicate_of="gone")], None),
        ("another key", [Rival("earlier", created=5, key="other")], None),
        ("no key", [Rival("earlier", created=5, key=None)], None),
        ("another namespace", [Rival("earlier", created=5, namespace="elsewhere")], None),
        ("of several the very first", [Rival("second", created=5), Rival("first", created=4)], "first"),
    ],
)
def test_of_tasks_with_one_key_the_first_has_it(why: str, rivals: list[Rival], first: str | None) -> None:
    cache = Cache()
    for version, one in enumerate([Rival("handbook", created=10), *rivals], 10):
        spec = {} if one.key is None else {"idempotencyKey": one.key}
        status = {"phase": one.phase, "attempt": 0}
        if one.duplicate_of is not None:
            status["duplicateOf"] = one.duplicate_of
        cache.put_task(
            _task(
                version,
                name=one.name,
                namespace=one.namespace,
                uid=one.uid,
                creationTimestamp=stamp(one.created),
                spec=spec,
                status=status,
            )
        )
    assert cache.first(KEY) == first
    for one in rivals:
        cache.drop_task((one.namespace, one.name), uid=one.uid)
    assert cache.first(KEY) is None
    assert cache.same_key(KEY) == set()


@pytest.mark.parametrize(
    ("why", "most", "gone"),
    [
        ("there is room", 5, []),
        ("the one that ended first goes first", 4, ["second"]),
        ("one that PostgreSQL lacks stays, and so do those that run", 0, ["second", "first"]),
    ],
)
def test_over_its_budget_a_namespace_loses_finished_tasks(why: str, most: int, gone: list[str]) -> None:
    cache = Cache()
    ends = {"first": finished(ended=20), "second": finished("Failed", ended=10), "unknown": finished(ended=5)}
    for version, name in enumerate([*ends, "runs", "waits"], 10):
        status = ends.get(name) or (processing() if name == "runs" else None)
        cache.put_task(_task(version, name=name, uid=name, status=status))
    found = surplus(cache.tasks(), most=most, archived=lambda task: task.uid != "unknown")
    assert [key[1] for key, _ in found] == gone
    assert cache.count("knowledge") == 5
    cache.drop_task(("knowledge", "runs"), uid="runs")
    assert cache.count("knowledge") == 4


def test_a_late_deletion_does_not_take_the_next_task_of_that_name() -> None:
    cache = Cache()
    cache.put_task(_task(5, uid="old"))
    cache.put_task(_task(8, uid="new"))
    assert not cache.drop_task(KEY, uid="old")
    assert cache.drop_task(KEY, uid="new")
    assert len(cache) == 0


def test_jobs_are_found_by_their_task_and_leave_only_as_themselves() -> None:
    cache = Cache()
    one = job(uid="one", resource_version=5)
    assert cache.put_job(one, now=at(1))
    assert not cache.put_job(one, now=at(2))
    assert cache.jobs_changed_at(KEY) == at(1)
    cache.mark_deleting(one)
    assert [found.deleting for found in cache.jobs(KEY)] == [True]
    assert cache.put_job(job(uid="two", resource_version=9), now=at(3))
    assert not cache.drop_job(KEY, name_of(1), uid="one", now=at(4))
    assert cache.drop_job(KEY, name_of(1), uid="two", now=at(5))
    assert cache.jobs(KEY) == ()
    assert not cache.put_job(complete(owner_name=None), now=at(6))


def test_what_a_task_and_its_job_both_say_is_kept_once() -> None:
    def news(text: str) -> str:
        return "".join(list(text))  # each event brings strings of its own

    cache = Cache()
    for version, status in enumerate([None, processing(job=news(name_of(1))), finished(job=news(name_of(1)))], 10):
        cache.put_task(_task(version, uid=news(UID), status=status))
        one = job(name=news(name_of(1)), owner_uid=news(UID), owner_name=news(KEY[1]), resource_version=version)
        cache.put_job(one, now=at(version))
    task, kept = cache.task(KEY), cache.jobs(KEY)[0]
    assert task is not None
    assert kept.owner_uid is task.uid
    assert kept.name is task.job
    assert kept.owner_name is task.key[1]
    assert next(iter(cache.job_keys())) is task.key


# ------------------------------------------------------------------------------------------------------------- patches

_VALUES = st.recursive(
    st.one_of(st.integers(), st.sampled_from(["", "x"]), st.lists(st.integers(), max_size=2)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
_MAPPINGS = st.dictionaries(st.sampled_from("abcd"), _VALUES, max_size=4)


def _apply(target: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _apply(merged.get(key), value)
    return merged


@given(before=_MAPPINGS, after=_MAPPINGS)
def test_a_patch_leads_from_one_to_the_other_and_is_empty_only_between_equals(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    patch = merge_patch(before, after)
    assert _apply(before, patch) == after
    assert (patch == {}) == (before == after)


# ------------------------------------------------------------------------------------------------------------ settings


LIMIT: dict[str, Any] = {"reason": "LimitTotal"}
WAITING: dict[str, Any] = {"phase": "Queued", "attempt": 0}


@pytest.mark.parametrize(
    ("why", "before", "after", "waits"),
    [
        ("a first reason", {}, {"queue": LIMIT, "queuedAt": "2026-11-01T00:00:00Z"}, True),
        ("another place", {"queue": LIMIT | {"position": 2}}, {"queue": LIMIT | {"position": 1}}, True),
        ("no reason any more", {"queue": {"reason": "Suspended"}}, {}, True),
        ("of a retry", {"phase": "Retrying"}, {"phase": "Retrying", "queue": LIMIT}, True),
        ("it runs", {}, {"phase": "Processing", "attempt": 1}, False),
        ("a Job has been made", {}, {"attempt": 1, "job": "a-1", "queue": {"reason": "PodPending"}}, False),
        ("given back", {"queuedAt": "2026-11-01T00:00:00Z"}, {"queuedAt": "2026-11-01T00:00:09Z"}, False),
        ("progress", {"phase": "Processing"}, {"phase": "Processing", "progress": 9}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_wait_is_to_say_why_a_task_waits(
    why: str, before: dict[str, Any], after: dict[str, Any], waits: bool
) -> None:
    assert tells_a_wait(Status.model_validate(WAITING | before), Status.model_validate(WAITING | after)) is waits


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "OPERATOR_RUNNER_IMAGE": "runner:1",
        "OPERATOR_NAMESPACES": "knowledge, other,",
        "OPERATOR_POSTGRES_URL": "",
        "OPERATOR_DOCUMENTS_CLAIM": "",
        "OPERATOR_PRIORITY_CLASSES": '{"high": "tasks-high"}',
        "OPERATOR_RUNNER_TOLERATIONS": '[{"key": "tasks", "operator": "Exists"}]',
        "OPERATOR_RUNNER_RESOURCES": '{"limits": {"memory": "1Gi"}}',
        "OPERATOR_RUNNER_RESOURCE_CLASSES": '{"gpu": {"limits": {"memory": "8Gi", "nvidia.com/gpu": "1"}}}',
        "OPERATOR_IMAGE_PULL_SECRETS": '["registry"]',
        "OPERATOR_INSTANCE": "release-1",
        "OPERATOR_PENDING_DEADLINE_SECONDS": "600",
        "OPERATOR_CAPACITY_DEADLINE_SECONDS": "0",
        "OPERATOR_LIMIT_KNOWLEDGE_BASE": "4",
        "OPERATOR_LIMIT_TYPES": '{"health_check": 2}',
        "OPERATOR_FAIR_WEIGHTS": '{"knowledge": 2, "knowledge/kb-42": 0.5}',
    }.items():
        monkeypatch.setenv(key, value)
    settings = load_settings(Settings, program="operator")
    assert settings.namespaces == ("knowledge", "other")
    assert settings.postgres_url is None
    template = settings.runner_template()
    assert template.documents_claim is None
    assert template.priority_classes == {Priority.HIGH: "tasks-high"}
    assert template.tolerations == ({"key": "tasks", "operator": "Exists"},)
    assert template.classes == {
        "small": {"limits": {"memory": "1Gi"}},
        "medium": {"limits": {"memory": "1Gi"}},
        "large": {"limits": {"memory": "2048Mi"}},
        "gpu": {"limits": {"memory": "8Gi", "nvidia.com/gpu": "1"}},
    }
    assert template.image_pull_secrets == ("registry",)
    assert (template.instance, template.version) == ("release-1", metadata.version("processing-tasks"))
    policy = settings.policy()
    assert (policy.pending_deadline, policy.capacity_deadline) == (timedelta(minutes=10), timedelta())
    weights = {"knowledge": 2.0, "knowledge/kb-42": 0.5}
    assert settings.limits() == Limits(total=1000, knowledge_base=4, types={"health_check": 2}, weights=weights)


def test_one_error_names_every_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPERATOR_RUNNER_IMAGE", raising=False)
    monkeypatch.setenv("OPERATOR_LISTEN", "8081")
    monkeypatch.setenv("OPERATOR_RESYNC_SECONDS", "soon")
    monkeypatch.setenv("OPERATOR_PRIORITY_CLASSES", '{"urgent": "x"}')
    with pytest.raises(SettingsError) as caught:
        load_settings(Settings, program="operator")
    for variable in ("RUNNER_IMAGE: is required", "LISTEN: must be HOST:PORT", "RESYNC_SECONDS", "PRIORITY_CLASSES"):
        assert f"OPERATOR_{variable}" in str(caught.value)


def test_json_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERATOR_RUNNER_IMAGE", "runner:1")
    monkeypatch.setenv("OPERATOR_RUNNER_NODE_SELECTOR", "pool=tasks")
    with pytest.raises(SettingsError, match=r"runner_node_selector.*give a JSON value"):
        load_settings(Settings, program="operator")


def test_the_command_line_says_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "run" in shown
    assert "migrate" in shown


def test_kopf_is_told_to_watch_and_nothing_else() -> None:
    settings = kopf_settings()
    assert settings.peering.standalone
    assert settings.scanning.disabled
    assert not settings.posting.enabled
    assert (settings.queueing.worker_limit, settings.queueing.idle_timeout) == (100, 0.02)


# ------------------------------------------------------------------------------------------------- health and metrics


async def test_liveness_is_the_age_of_the_watches_and_readiness_the_first_list() -> None:
    now = 1000.0
    ready = False
    watches = Watches(expected=2, clock=lambda: now)
    listen = f"127.0.0.1:{free_port()}"
    health = Health(listen=listen, watches=watches, ready=lambda: ready, metrics=Metrics(), clock=lambda: now)
    await health.warm_up()
    async with aiohttp.ClientSession(f"http://{listen}") as session:

        async def ask(path: str) -> tuple[int, str]:
            async with session.get(path) as response:
                return response.status, await response.text()

        assert await ask("/healthz") == (200, "ok\n")
        assert (await ask("/readyz"))[0] == 503
        ready = True
        assert await ask("/readyz") == (200, "ok\n")

        now += 200
        assert await ask("/healthz") == (503, "the watches were not opened in 200 s\n")
        watches.touch("/tasks")
        watches.touch("/jobs")
        now += 179
        assert (await ask("/healthz"))[0] == 200
        watches.touch("/tasks")
        now += 2
        assert await ask("/healthz") == (503, "a watch has been silent for 181 s\n")
        watches.touch("/jobs")
        assert (await ask("/healthz"))[0] == 200

        health._lag = 11
        assert await ask("/healthz") == (503, "the event loop was late by 11.0 s\n")
        assert "task_operator_watch_age_seconds" in (await ask("/metrics"))[1]
    await health.aclose()


def test_ends_are_counted_by_type_and_reason() -> None:
    metrics = Metrics()
    waiting = Waiting(Counter(high=2), {"high": 7.5}, Counter(StoreUnavailable=1, Queued=1))
    metrics.watch_queue(lambda: waiting)
    metrics.finished(type_="health_check", status=Status.model_validate(finished()))
    broken = finished("Failed", error={"reason": "OOMKilled", "retryable": True})
    metrics.finished(type_="health_check", status=Status.model_validate(broken))
    metrics.finished(type_="health_check", status=Status.model_validate(finished("Canceled")))
    text = generate_latest(metrics.registry).decode()
    assert 'task_success_total{type="health_check"} 1.0' in text
    assert 'task_failure_total{type="health_check"} 1.0' in text
    assert 'task_failure_total{type="batch_processing"} 0.0' in text
    assert 'task_failure_reasons_total{reason="OOMKilled"} 1.0' in text
    assert 'task_processing_duration_seconds_sum{type="health_check"} 110.0' in text
    assert 'task_queue_size{priority="high"} 2.0' in text
    assert 'task_queue_size{priority="low"} 0.0' in text
    assert 'task_queue_oldest_seconds{priority="high"} 7.5' in text
    assert 'task_queue_waiting{reason="StoreUnavailable"} 1.0' in text


def test_reasons_that_a_metric_tells_apart_are_bounded() -> None:
    bounded = Bounded(2)
    assert [bounded(reason) for reason in ("A", "B", "A", "C", "B")] == ["A", "B", "A", "Other", "B"]


@pytest.mark.parametrize(
    ("method", "path", "verb"),
    [
        ("GET", "/apis/batch/v1/jobs", ("list", "jobs")),
        ("GET", "/apis/batch/v1/namespaces/a/jobs", ("list", "jobs")),
        ("GET", "/apis/batch/v1/namespaces/a/jobs/one", ("get", "jobs")),
        ("POST", "/apis/batch/v1/namespaces/a/jobs", ("create", "jobs")),
        ("DELETE", "/apis/tasks.zzdsj.io/v1/namespaces/a/processingtasks/one", ("delete", "processingtasks")),
        ("PATCH", "/apis/tasks.zzdsj.io/v1/namespaces/a/processingtasks/one/status", ("patch", "processingtasks/status")),
        ("GET", "/api/v1/namespaces/a/pods", ("list", "pods")),
        ("GET", "/api/v1/namespaces/a", ("get", "namespaces")),
        ("GET", "/api/v1/namespaces", ("list", "namespaces")),
        ("PUT", "/apis/coordination.k8s.io/v1/namespaces/a/leases/leader", ("update", "leases")),
    ],
)
def test_requests_are_counted_by_verb_and_resource_and_no_name(method: str, path: str, verb: tuple[str, str]) -> None:
    assert verb_of(method, path) == verb


@pytest.mark.parametrize(
    ("why", "spec", "status", "since", "reason"),
    [
        ("new", {}, {"phase": "Queued"}, 1_767_225_600, "Queued"),
        ("back in line", {}, {"phase": "Queued", "queuedAt": "2026-01-01T00:01:00Z"}, 1_767_225_660, "Queued"),
        ("it says why", {}, {"phase": "Queued", "queue": {"reason": "PodPending"}}, 1_767_225_600, "PodPending"),
        ("taken out", {"suspend": True}, {"phase": "Queued", "queue": {"reason": "Suspended"}}, None, "Suspended"),
        ("its time will come", {}, {"phase": "Retrying"}, None, None),
        ("it runs", {}, {"phase": "Processing", "queuedAt": "2026-01-01T00:01:00Z"}, None, None),
    ],
)
def test_how_long_a_task_has_been_in_the_queue_and_what_for(
    why: str, spec: dict[str, Any], status: dict[str, Any], since: float | None, reason: str | None
) -> None:
    cache = Cache()
    metadata = {
        "name": "one",
        "namespace": "a",
        "uid": "u",
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    cache.put_task({"metadata": metadata, "spec": {"type": "health_check"} | spec, "status": status})
    task = cache.task(("a", "one"))
    assert task is not None
    assert (task.waits_since, task.waits_for) == (since, reason), why
