"""What becomes of callbacks: waits, answers, secrets; and what services are told of events."""

import base64
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_contract.callbacks import callback_body, fill_url, host_of
from task_contract.location import check_callback_url
from task_operator.callbacks import GIVE_UP, Secrets, SecretUnusable, again, delay, judge, retry_after, status_of
from task_operator.cloud_events import Event, cloud_event, rounds
from task_operator.outbox import Callback, Told
from task_operator.projection import DefaultCallback
from task_operator.settings import Settings
from task_platform.kubernetes import Forbidden, NotFound
from task_platform.settings import SettingsError, load_settings
from tests.support.operator_values import at

NOW = at(0)
UID = "0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7"


def callback(**changes: Any) -> Callback:
    fields: dict[str, Any] = {
        "id": f"task-{UID}",
        "task_uid": UID,
        "namespace": "team-a",
        "name": "handbook",
        "url": "http://hook/x",
        "host": "hook:80",
        "secret_name": "hooks",
        "secret_key": "secret",
        "body": "{}",
        "attempts": 0,
        "first_attempt_at": None,
        "lease": uuid.UUID(int=1),
    }
    return Callback(**fields | changes)


# --------------------------------------------------------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(1, 5), (2, 15), (3, 45), (4, 135), (7, 3645), (8, 10_935), (9, 14_400), (400, 14_400)]
)
def test_waits_grow_to_four_hours(attempts: int, seconds: float) -> None:
    assert delay(attempts, random=0.5).total_seconds() == pytest.approx(seconds)


@given(attempts=st.integers(1, 10_000), random=st.floats(0, 1, exclude_max=True))
def test_a_wait_is_spread_by_a_fifth(attempts: int, random: float) -> None:
    middle = delay(attempts, random=0.5)
    assert 0.79 * middle <= delay(attempts, random=random) <= 1.21 * middle


@given(randoms=st.lists(st.floats(0, 1, exclude_max=True), min_size=60, max_size=60), asked=st.integers(0, 10**6))
def test_a_receiver_that_never_answers_is_tried_for_a_day_and_no_longer(randoms: list[float], asked: int) -> None:
    now, first, attempts = NOW, None, 0
    times = []
    for random in randoms:
        times.append(now)
        settled = again("why", callback=callback(attempts=attempts, first_attempt_at=first), now=now, random=random)
        attempts, first = attempts + 1, first or now
        if settled.state == "dead":
            break
        assert settled.after > timedelta()
        now += settled.after
    assert settled.state == "dead"
    assert now - NOW == GIVE_UP
    assert 10 < attempts < 25
    assert all(before < after for before, after in pairwise(times))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("120", 120),
        (" 7 ", 7),
        ("0", 0),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("²", 0),
        ("9" * 500, GIVE_UP.total_seconds()),
        ("Sat, 31 Jan 2026 09:31:00 GMT", 60),
        ("Sat, 31 Jan 2026 09:29:00 GMT", 0),
        ("Sat, 31 Jan 2099 09:29:00 GMT", GIVE_UP.total_seconds()),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(value: str | None, seconds: float) -> None:
    now = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    assert retry_after(value, now=now).total_seconds() == seconds


@given(st.text())
def test_no_retry_after_does_harm(value: str) -> None:
    assert timedelta() <= retry_after(value, now=NOW) <= GIVE_UP


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("status", "state", "seconds"),
    [
        (200, "delivered", 0),
        (202, "delivered", 0),
        (204, "delivered", 0),
        (299, "delivered", 0),
        (301, "pending", 5),
        (308, "pending", 5),
        (400, "pending", 5),
        (404, "pending", 5),
        (410, "dead", 0),
        (429, "pending", 60),
        (500, "pending", 5),
        (503, "pending", 60),
        (101, "pending", 5),
    ],
)
def test_an_answer_means(status: int, state: str, seconds: float) -> None:
    settled = judge(status, wait=timedelta(seconds=60), callback=callback(), now=NOW, random=0.5)
    assert (settled.state, settled.after.total_seconds(), settled.status_code) == (state, seconds, status)
    assert (settled.error is None) == (state == "delivered")
    if 300 <= status < 400:
        assert "redirect" in (settled.error or "")


def test_the_last_attempt_is_made_when_the_day_ends() -> None:
    almost = callback(attempts=9, first_attempt_at=NOW)
    settled = again("why", callback=almost, now=NOW + GIVE_UP - timedelta(seconds=3), random=0.5)
    assert (settled.state, settled.after) == ("pending", timedelta(seconds=3))
    settled = again("why", callback=almost, now=NOW + GIVE_UP, random=0.5, status_code=503)
    assert (settled.state, settled.error) == ("dead", "why; given up after 10 attempts")


def test_the_status_of_a_task_says_what_became_of_it() -> None:
    told = Told(f"task-{UID}", UID, "team-a", "handbook", "pending", 1, NOW, None, "cannot connect to hook:80")
    assert status_of(told) == {
        "state": "Pending",
        "attempts": 1,
        "lastAttemptAt": NOW.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "statusCode": None,
        "message": "cannot connect to hook:80",
    }


# ------------------------------------------------------------------------------------------------------------- secrets


class Cluster:
    def __init__(self, data: Mapping[str, bytes] | Exception) -> None:
        self.data = data
        self.asked = 0

    async def read(self, namespace: str, name: str) -> Mapping[str, bytes]:
        self.asked += 1
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


async def test_a_secret_is_read_once_in_a_while_and_may_have_several_keys() -> None:
    cluster, now = Cluster({"secret": b"whsec_" + base64.b64encode(b"new") + b"\nold\n"}), 0.0
    secrets = Secrets(cluster.read, allowed=frozenset({"hooks"}), clock=lambda: now)
    assert await secrets.keys(callback()) == (b"new", b"old")
    cluster.data = {"secret": b"newer"}
    assert await secrets.keys(callback()) == (b"new", b"old")
    assert await secrets.keys(callback(namespace="team-b")) == (b"newer",)
    now = 15.0
    assert await secrets.keys(callback()) == (b"newer",)
    assert cluster.asked == 3


async def test_a_callback_without_a_secret_is_not_signed() -> None:
    assert await Secrets(Cluster({}).read, allowed=frozenset()).keys(callback(secret_name=None, secret_key=None)) == ()


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ({"secret": b"x"}, "other", "may not read Secret other, only hooks; .*callbacks.secrets"),
        (NotFound("no"), "hooks", "there is no Secret hooks in team-a"),
        (Forbidden("not allowed"), "hooks", "cannot read Secret hooks in team-a: not allowed"),
        ({}, "hooks", "has no key secret"),
        ({"secret": b""}, "hooks", "the secret is empty"),
        ({"secret": b"\xff"}, "hooks", "it is no text"),
        ({"secret": b"whsec_!"}, "hooks", "no base64"),
    ],
)
async def test_a_secret_that_cannot_be_used_says_so(data: Mapping[str, bytes] | Exception, name: str, message: str) -> None:
    secrets = Secrets(Cluster(data).read, allowed=frozenset({"hooks"}))
    with pytest.raises(SecretUnusable, match=message):
        await secrets.keys(callback(secret_name=name))


# ---------------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    [
        "http://knowledge-service/api/v1/tasks/{task_id}/callback",
        "https://hooks.example.com:8443/{namespace}/{kb_id}?task={task_id}",
        "http://[2001:db8::1]:80/",
        "http://hook",
        "http://hook?x=1",
        "http://hook/知识库",
    ],
)
def test_urls_of_callbacks(url: str) -> None:
    assert check_callback_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "hook/x",
        "ftp://hook/x",
        "HTTP://hook/x",
        "http:///x",
        "http://user@hook/x",
        "http://user:word@hook/x",
        "http://hook/x#y",
        "http://hook/{task}",
        "http://hook/{",
        "http://{namespace}/x",
        "http://hook:123456/x",
        "http://hook/a b",
        "http://hook\\x",
        "http://hook/x\n",
        "http://höok/x",
    ],
)
def test_urls_that_are_none_of_a_callback(url: str) -> None:
    with pytest.raises(ValueError, match="must be http"):
        check_callback_url(url)


@pytest.mark.parametrize(
    ("url", "filled"),
    [
        ("http://h/{task_id}", "http://h/a%2Fb"),
        ("http://h/{namespace}/{kb_id}?t={task_id}&u={task_id}", "http://h/n/kb.1?t=a%2Fb&u=a%2Fb"),
        ("http://h/x", "http://h/x"),
    ],
)
def test_fields_are_filled_in_and_cannot_leave_their_place(url: str, filled: str) -> None:
    assert fill_url(url, task_id="a/b", namespace="n", kb_id="kb.1") == filled


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://hook", "hook:80"),
        ("https://Hook/x:1", "hook:443"),
        ("http://hook:8080?x", "hook:8080"),
        ("https://[2001:db8::1]/", "[2001:db8::1]:443"),
        ("https://[2001:db8::1]:8443/", "[2001:db8::1]:8443"),
    ],
)
def test_hosts_are_told_apart_by_name_and_port(url: str, host: str) -> None:
    assert host_of(url) == host


def test_the_body_is_that_of_the_platforms_services() -> None:
    body = callback_body(
        task_id="handbook",
        namespace="team-a",
        uid=UID,
        kb_id="kb-42",
        task_type="document_processing",
        phase="Completed",
        attempt=1,
        result={"milvusCount": 87, "seconds": {"embed": 1.5}},
        error=None,
        finished_at=datetime(2026, 1, 31, 9, 30, tzinfo=UTC),
    )
    assert orjson.loads(body) == {
        "task_id": "handbook",
        "status": "completed",
        "result": {"milvus_count": 87, "seconds": {"embed": 1.5}},
        "completed_at": "2026-01-31T09:30:00Z",
        "error": None,
        "namespace": "team-a",
        "kb_id": "kb-42",
        "task_type": "document_processing",
        "attempt": 1,
        "uid": UID,
    }


# -------------------------------------------------------------------------------------------------------- cloud events


def row(number: int = 7, uid: str = UID, phase: str = "Retrying") -> dict[str, Any]:
    return {
        "number": number,
        "uid": uid,
        "namespace": "team-a",
        "name": "handbook",
        "kb_id": "kb-42",
        "type": "document_processing",
        "phase": phase,
        "attempt": 1,
        "reason": "StoresDisagree",
        "message": "why",
        "at": datetime(2026, 1, 31, 9, 30, tzinfo=UTC),
    }


def test_an_event_is_a_cloud_event_whose_data_is_the_live_update() -> None:
    assert cloud_event(row(), source="//tasks.zzdsj.io/one") == {
        "specversion": "1.0",
        "id": "7",
        "source": "//tasks.zzdsj.io/one",
        "type": "io.zzdsj.tasks.retrying",
        "subject": "team-a/handbook",
        "time": "2026-01-31T09:30:00Z",
        "datacontenttype": "application/json",
        "data": {
            "type": "task",
            "event": 7,
            "task_id": "handbook",
            "namespace": "team-a",
            "uid": UID,
            "kb_id": "kb-42",
            "task_type": "document_processing",
            "status": "retrying",
            "progress": 0,
            "stage": None,
            "attempt": 1,
            "reason": "StoresDisagree",
            "message": "why",
            "at": "2026-01-31T09:30:00Z",
        },
    }


@pytest.mark.parametrize(
    ("phase", "key"),
    [
        ("Queued", "tasks.team-a.document_processing.queued"),
        ("Completed", "tasks.team-a.document_processing.completed"),
        ("Deleted", "tasks.team-a.document_processing.canceled"),
    ],
)
def test_routing_keys_name_namespace_type_and_status(phase: str, key: str) -> None:
    assert Event(row(phase=phase), source="one").routing_key == key


@given(st.lists(st.sampled_from(["a", "b", "c"])))
def test_a_round_has_one_event_of_a_task_and_keeps_the_order_of_each(uids: list[str]) -> None:
    events = [Event(row(number, uid), source="one") for number, uid in enumerate(uids)]
    found = rounds(events)
    assert all(len({one.uid for one in each}) == len(each) for each in found)
    for uid in set(uids):
        told = [one.number for each in found for one in each if one.uid == uid]
        assert told == sorted(told)
    assert sorted(one.number for each in found for one in each) == list(range(len(uids)))


# ------------------------------------------------------------------------------------------------------------ settings


def read_settings(monkeypatch: pytest.MonkeyPatch, **given: str) -> Settings:
    defaults = {"RUNNER_IMAGE": "runner", "POSTGRES_URL": "postgresql://p/x"}
    for name, value in (defaults | given).items():
        monkeypatch.setenv(f"OPERATOR_{name}", value)
    return load_settings(Settings, program="operator")


async def test_the_host_of_the_default_may_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_settings(
        monkeypatch,
        CALLBACKS_DEFAULT_URL="http://Knowledge.Platform.svc/{task_id}",
        CALLBACKS_DEFAULT_SECRET="hooks/secret",
        CALLBACKS_ALLOW="10.20.0.0/16, *.example.com",
    )
    assert found.default_callback() == DefaultCallback("http://Knowledge.Platform.svc/{task_id}", "hooks", "secret")
    allowed = found.callback_targets(frozenset()).allowed
    assert allowed.names == {"knowledge.platform.svc", "*.example.com"}
    assert [str(network) for network in allowed.networks] == ["10.20.0.0/16"]


def test_without_a_default_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(monkeypatch, CALLBACKS_DEFAULT_URL="").default_callback() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"CALLBACKS_DEFAULT_URL": "knowledge-service"}, "CALLBACKS_DEFAULT_URL: must be http"),
        ({"CALLBACKS_DEFAULT_URL": "http://hook/{task}"}, "CALLBACKS_DEFAULT_URL: must be http"),
        ({"CALLBACKS_DEFAULT_SECRET": "hooks"}, "CALLBACKS_DEFAULT_SECRET"),
        ({"CALLBACKS_ALLOW": "http://hook"}, "CALLBACKS_ALLOW: 'http://hook' is no host name"),
        ({"CALLBACKS_CA": "x"}, "CALLBACKS_CA: must be one or more certificates in PEM form"),
        ({"CALLBACKS_TIMEOUT_SECONDS": "0"}, "CALLBACKS_TIMEOUT_SECONDS"),
        ({"CALLBACKS_DEFAULT_URL": "http://hook", "POSTGRES_URL": ""}, "CALLBACKS_DEFAULT_URL needs OPERATOR_POSTGRES_URL"),
        ({"RABBITMQ_URL": "amqp://r", "POSTGRES_URL": ""}, "RABBITMQ_URL needs OPERATOR_POSTGRES_URL"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(monkeypatch, **given)
