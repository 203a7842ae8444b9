"""Callbacks from the end of a task to its receiver, on a real PostgreSQL and real HTTP servers."""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web

from task_contract.networks import AllowList
from task_contract.webhooks import parse_secrets, verify
from task_operator.callbacks import Sender
from task_operator.metrics import Metrics
from task_operator.outbox import Listener, Outbox, Told
from task_operator.projection import Database, DefaultCallback
from task_operator.targets import Targets
from task_platform.kubernetes import NotFound
from tests.docs.blocks import ROOT, blocks
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import finished, manifest, processing
from tests.support.receivers import Received, Receiver, never, ok, receiving, status
from tests.support.servers import free_port

pytestmark = pytest.mark.integration

UID = manifest()["metadata"]["uid"]
SECRET = "whsec_bmV3\nold"


def _task(version: int, *, uid: str = UID, callback: Mapping[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    spec = dict(manifest()["spec"])
    made = manifest(spec=spec | ({} if callback is None else {"callback": callback}), **parts)
    made["metadata"] |= {"resourceVersion": str(version), "uid": uid}
    return made


async def _written(database: Database, version: int, *, uid: str = UID) -> None:
    async def look() -> bool:
        return (database.acknowledged(uid) or 0) >= version

    await until(f"version {version} is in PostgreSQL", look, seconds=20, interval=0.02)


class Cluster:
    """The part of the API server that a sender needs: Secrets, and the statuses that it writes."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, bytes]] = {}
        self.told: list[tuple[str, str, int]] = []
        self.gone: set[str] = set()

    async def get_secret(self, namespace: str, name: str) -> Mapping[str, bytes]:
        if name not in self.secrets:
            raise NotFound("no such Secret")
        return self.secrets[name]

    async def patch_callback(self, namespace: str, name: str, *, uid: str, callback: Mapping[str, Any]) -> None:
        if name in self.gone:
            raise NotFound("no such task")
        self.told.append((name, callback["state"], callback["attempts"]))


class Lab:
    """An outbox, and senders on it."""

    def __init__(self, database: Database, sql: "asyncpg.Connection[Any]", url: str) -> None:
        self.database = database
        self.sql = sql
        self.url = url
        self.cluster = Cluster()
        self.metrics = Metrics()
        self.dead: list[Told] = []

    async def add(self, url: str, *, number: int = 1, name: str = "handbook", secret: bool = True) -> str:
        """Have a task end; return its uid."""
        uid = str(uuid.uuid5(uuid.UUID(UID), f"{name} {number}"))
        callback: dict[str, Any] = {"url": url} | ({"secretRef": {"name": "hooks", "key": "secret"}} if secret else {})
        self.database.submit(_task(number, uid=uid, callback=callback, status=finished(), name=name))
        await _written(self.database, number, uid=uid)
        return uid

    async def add_many(self, number: int, url: str, *, name: str) -> None:
        """Have so many tasks end at once; return when their callbacks are in the outbox."""
        for index in range(number):
            task = _task(index + 1, uid=str(uuid.uuid4()), callback={"url": url}, status=finished(), name=f"{name}-{index}")
            self.database.submit(task)

        async def written() -> bool:
            return bool(await self.sql.fetchval("SELECT count(*) >= $1 FROM callbacks", number))

        await until("all are in the outbox", written)

    @contextlib.asynccontextmanager
    async def sending(self, *, allow: str = "127.0.0.0/8", seconds: float = 2, lease: float = 30) -> AsyncIterator[Sender]:
        sender = Sender(
            outbox=Outbox(self.database, lease=timedelta(seconds=lease)),
            targets=Targets(allowed=AllowList.parse([allow])),
            api=self.cluster,
            secrets=frozenset({"hooks"}),
            metrics=self.metrics,
            announce=self.dead.append,
            timeout=timedelta(seconds=seconds),
        )
        await sender.warm_up()
        listener = Listener(self.url, {"task_callbacks": sender.wake})
        work = [asyncio.create_task(sender.run()), asyncio.create_task(listener.run())]
        try:
            yield sender
            for part in work:
                if part.done():
                    part.result()
        finally:
            for part in work:
                part.cancel()
            await asyncio.wait(work)
            await sender.aclose()

    async def row(self, name: str = "handbook") -> asyncpg.Record:
        row: asyncpg.Record | None = await self.sql.fetchrow("SELECT * FROM callbacks WHERE name = $1", name)
        assert row is not None
        return row

    async def until_state(
        self, state: str, *, attempts: int = 0, name: str = "handbook", seconds: float = 20
    ) -> asyncpg.Record:
        async def look() -> bool:
            row = await self.row(name)
            return bool(row["state"] == state and row["attempts"] >= attempts)

        try:
            await until(f"{name} is {state}", look, seconds=seconds, interval=0.02)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {dict(await self.row(name))}") from None
        return await self.row(name)

    async def due(self) -> None:
        """Let the waits be over."""
        await self.sql.execute("UPDATE callbacks SET next_at = now() WHERE state = 'pending'; NOTIFY task_callbacks")


@pytest.fixture
def lab(database: Database, sql: "asyncpg.Connection[Any]", url: str) -> Lab:
    lab = Lab(database, sql, url)
    lab.cluster.secrets["hooks"] = {"secret": SECRET.encode()}
    return lab


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


# ------------------------------------------------------------------------------------------------------ into the outbox


async def _bodies(sql: "asyncpg.Connection[Any]") -> list[dict[str, Any]]:
    return [json.loads(row["body"]) for row in await sql.fetch("SELECT body FROM callbacks ORDER BY created_at")]


async def test_the_end_of_a_task_puts_its_callback_into_the_outbox_once(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    callback = {"url": "http://hook/{namespace}/{task_id}", "secretRef": {"name": "hooks", "key": "secret"}}
    database.submit(_task(1, callback=callback, status=processing()))
    await _written(database, 1)
    assert await _bodies(sql) == []
    database.submit(_task(2, callback=callback, status=finished(result={"milvusCount": 87})))
    await _written(database, 2)
    [row] = await sql.fetch("SELECT * FROM callbacks")
    assert (row["id"], str(row["task_uid"]), row["state"], row["attempts"]) == (f"task-{UID}", UID, "pending", 0)
    assert (row["url"], row["host"]) == ("http://hook/knowledge/handbook", "hook:80")
    assert (row["secret_name"], row["secret_key"]) == ("hooks", "secret")
    body = json.loads(row["body"])
    assert (body["task_id"], body["status"], body["result"], body["kb_id"]) == (
        "handbook",
        "completed",
        {"milvus_count": 87},
        "kb-42",
    )
    # Later versions, a second operator, the deletion of the row of the task, and of the task.
    database.submit(_task(3, callback=callback, status=finished()))
    await _written(database, 3)
    other = Database(url, metrics=Metrics())
    await other.warm_up()
    other.submit(_task(4, callback=callback, status=finished()))
    await other._flush()
    await other.aclose()
    await sql.execute("TRUNCATE tasks")
    await database.held(namespaces=[])
    database.submit(_task(5, callback=callback, status=finished()), lost=database.newest())
    await _written(database, 5)
    database.submit(_task(6, callback=callback, status=finished()), deleted=True)

    async def archived() -> bool:
        return bool(await sql.fetchval("SELECT deleted_at IS NOT NULL FROM tasks"))

    await until("its deletion is in PostgreSQL", archived)
    assert await _bodies(sql) == [body]


async def test_a_task_that_ends_again_after_a_restored_backup_calls_back_once(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    callback = {"url": "http://hook/x"}
    database.submit(_task(9, callback=callback, status=finished()))
    await _written(database, 9)
    await database.held(namespaces=[])
    database.submit(_task(5, callback=callback, status=processing()), lost=database.newest())
    await _written(database, 5)
    database.submit(_task(12, callback=callback, status=finished("Failed", error={"reason": "X", "retryable": False})))
    await _written(database, 12)
    phases = [row["phase"] for row in await sql.fetch("SELECT phase FROM task_events ORDER BY number")]
    assert [phase for phase in phases if phase in {"Completed", "Failed"}] == ["Completed", "Failed"]
    assert [body["status"] for body in await _bodies(sql)] == ["completed"]


@pytest.mark.parametrize(
    ("state", "deleted", "expected"),
    [
        ("Completed", False, ["completed"]),
        ("Failed", False, ["failed"]),
        ("Canceled", False, ["canceled"]),
        ("Completed", True, ["completed"]),
        ("Processing", True, []),
    ],
)
async def test_every_end_calls_back_but_not_that_of_a_task_that_was_deleted_before(
    database: Database, sql: "asyncpg.Connection[Any]", state: str, deleted: bool, expected: list[str]
) -> None:
    status = processing() if state == "Processing" else finished(state)
    database.submit(_task(3, callback={"url": "http://hook/x"}, status=status), deleted=deleted)

    async def written() -> bool:
        return bool(await sql.fetchval("SELECT count(*) FROM task_events WHERE phase IN ('Deleted', $1)", state))

    await until("the task is in PostgreSQL", written)
    assert [body["status"] for body in await _bodies(sql)] == expected


async def test_tasks_that_name_no_callback_have_the_one_of_the_settings(url: str, sql: "asyncpg.Connection[Any]") -> None:
    default = DefaultCallback("http://knowledge-service/api/v1/tasks/{task_id}/callback", "hooks", "secret")
    database = Database(url, metrics=Metrics(), default_callback=default)
    await database.warm_up()
    database.submit(_task(1, status=finished()))
    other = str(uuid.uuid4())
    database.submit(_task(2, uid=other, name="other", callback={"url": "http://own/x"}, status=finished()))
    await database._flush()
    await database.aclose()
    rows = await sql.fetch("SELECT url, secret_name, secret_key FROM callbacks ORDER BY url")
    assert [tuple(row) for row in rows] == [
        ("http://knowledge-service/api/v1/tasks/handbook/callback", "hooks", "secret"),
        ("http://own/x", None, None),
    ]


async def test_a_task_counts_as_archived_only_with_its_callback(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    await sql.execute("ALTER TABLE callbacks RENAME TO away")
    database.submit(_task(3, callback={"url": "http://hook/x"}, status=finished()))

    async def tried() -> bool:
        return database.down_since is not None

    await until("PostgreSQL has refused it", tried)
    assert database.acknowledged(UID) is None  # and so the TTL does not delete the task
    assert await sql.fetchval("SELECT count(*) FROM tasks") == 0
    assert await sql.fetchval("SELECT count(*) FROM task_events") == 0
    await sql.execute("ALTER TABLE away RENAME TO callbacks")
    await _written(database, 3)
    assert len(await _bodies(sql)) == 1


async def test_history_stays_while_a_callback_is_pending(lab: Lab, receiver: Receiver) -> None:
    uid = await lab.add(receiver.url())
    await lab.sql.execute("UPDATE tasks SET deleted_at = now() - interval '1 day'")
    before = (await lab.row())["created_at"]
    assert await lab.database.expire(before=before, most=10) == 0
    async with lab.sending():
        await lab.until_state("delivered")
    assert await lab.database.expire(before=before, most=10) == 1
    assert await lab.sql.fetchval("SELECT count(*) FROM callbacks WHERE task_uid = $1", uid) == 0


# ---------------------------------------------------------------------------------------------------- out of the outbox


async def test_a_callback_is_sent_at_once_signed_and_only_once(lab: Lab, receiver: Receiver) -> None:
    async with lab.sending():
        uid = await lab.add(receiver.url("/tasks/{task_id}/callback?x=1"))
        row = await lab.until_state("delivered")
    [one] = receiver.received
    assert (one.path, one.id) == ("/tasks/handbook/callback?x=1", f"task-{uid}")
    assert one.headers["content-type"] == "application/json"
    assert one.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert one.headers["user-agent"].startswith("processing-tasks")
    assert one.body.decode() == row["body"]
    for key in parse_secrets(SECRET):  # the new one and the old one
        assert verify(one.body, one.headers, [key]) == one.id
    assert (row["attempts"], row["status_code"], row["error"]) == (1, 204, None)
    assert row["finished_at"] is not None
    assert lab.cluster.told in ([], [("handbook", "Delivered", 1)])


async def test_a_callback_goes_on_with_the_trace_of_its_task(lab: Lab, receiver: Receiver) -> None:
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    uid = await lab.add(receiver.url())
    await lab.sql.execute("UPDATE tasks SET traceparent = $2 WHERE uid = $1", uid, given)
    async with lab.sending():
        await lab.until_state("delivered")
    assert receiver.received[0].headers["traceparent"] == given


async def test_a_callback_without_a_secret_is_not_signed(lab: Lab, receiver: Receiver) -> None:
    async with lab.sending():
        await lab.add(receiver.url(), secret=False)
        await lab.until_state("delivered")
    assert "webhook-signature" not in receiver.received[0].headers
    assert "webhook-id" in receiver.received[0].headers


async def test_a_receiver_that_is_down_gets_it_when_it_is_back(lab: Lab) -> None:
    receiver = Receiver(port=free_port())
    async with lab.sending():
        await lab.add(receiver.url())
        row = await lab.until_state("pending", attempts=1)
        assert "cannot connect to 127.0.0.1" in row["error"]
        assert 3.9 <= (row["next_at"] - row["last_attempt_at"]).total_seconds() <= 6.1
        await lab.due()
        await lab.until_state("pending", attempts=2)
        await receiver.start()
        await lab.due()
        row = await lab.until_state("delivered")

        async def told() -> bool:
            return ("handbook", "Delivered", 3) in lab.cluster.told

        await until("the task says so", told)
    await receiver.stop()
    assert len(receiver.ids) == 1
    # The first failure, and the change of state: two writes, however often it was tried.
    assert [state for _, state, _ in lab.cluster.told] == ["Pending", "Delivered"]


async def _large(_: Received) -> web.StreamResponse:
    return web.Response(status=200, body=b"x" * 10_000_000)


async def _endless(request: Received) -> web.StreamResponse:
    raise ConnectionResetError


@pytest.mark.parametrize(
    ("answer", "state", "error", "wait"),
    [
        pytest.param(ok, "delivered", None, None, id="204"),
        pytest.param(_large, "delivered", None, None, id="a large answer, which is not read"),
        pytest.param(status(410), "dead", "410", None, id="410"),
        pytest.param(status(302, Location="/elsewhere"), "pending", "302, a redirect, which is not followed", 5, id="302"),
        pytest.param(status(429, Retry_After="100"), "pending", "429", 100, id="429 with Retry-After"),
        pytest.param(status(503, Retry_After="1"), "pending", "503", 5, id="503 with a short Retry-After"),
        pytest.param(status(500, Retry_After="100"), "pending", "500", 5, id="500"),
        pytest.param(status(404), "pending", "404", 5, id="404"),
        pytest.param(never, "pending", "no answer of 127.0.0.1:.* within 0.5 s", 5, id="silence"),
        pytest.param(_endless, "pending", "the receiver answered 500", 5, id="a crash"),
    ],
)
async def test_what_becomes_of_a_callback_follows_from_the_answer(
    lab: Lab, answer: Any, state: str, error: str | None, wait: float | None
) -> None:
    async with receiving(answer) as receiver, lab.sending(seconds=0.5):
        await lab.add(receiver.url())
        row = await lab.until_state(state, attempts=1)
        assert [one.path for one in receiver.received] == ["/callback"]
    if error is None:
        assert row["error"] is None
    else:
        assert re.search(error, row["error"]), row["error"]
    if wait is not None:
        assert 0.79 * wait <= (row["next_at"] - row["last_attempt_at"]).total_seconds() <= 1.21 * wait


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/x",
        "http://169.254.169.254/latest",
        "https://kubernetes.default/",
        "http://hooks.example.com/",
    ],
)
async def test_a_target_that_is_refused_is_dead_at_once_and_says_why(lab: Lab, receiver: Receiver, target: str) -> None:
    async with lab.sending(allow="10.0.0.0/8" if "example" not in target else "other.example.com"):
        await lab.add(target.replace("{port}", str(receiver.port)))
        row = await lab.until_state("dead")

        async def told() -> bool:
            return [one.name for one in lab.dead] == ["handbook"]

        await until("its death is announced", told)
    assert "spec.callback.url" in row["error"]
    assert receiver.received == []
    assert lab.cluster.told == [("handbook", "Dead", 1)]


async def test_a_secret_that_is_missing_is_waited_for(lab: Lab, receiver: Receiver) -> None:
    del lab.cluster.secrets["hooks"]
    async with lab.sending():
        await lab.add(receiver.url())
        row = await lab.until_state("pending", attempts=1)
        assert "there is no Secret hooks in knowledge; create it" in row["error"]
        lab.cluster.secrets["hooks"] = {"secret": b"new"}
        await lab.due()
        await lab.until_state("delivered")
    assert verify(receiver.received[0].body, receiver.received[0].headers, [b"new"])


async def test_a_day_after_the_first_attempt_it_is_dead_and_can_be_sent_again(lab: Lab) -> None:
    async with receiving(status(500)) as receiver, lab.sending():
        await lab.add(receiver.url())
        await lab.until_state("pending", attempts=1)
        await lab.sql.execute("UPDATE callbacks SET first_attempt_at = now() - interval '24 hours'")
        await lab.due()
        row = await lab.until_state("dead")
        assert "given up after 2 attempts" in row["error"]
        receiver.answer = ok
        [page] = [block for block in blocks(ROOT / "docs/callbacks.md") if block.language == "sql"]
        await lab.sql.execute(page.text)
        row = await lab.until_state("delivered")
        assert row["attempts"] == 1

        async def told() -> bool:
            return [state for _, state, _ in lab.cluster.told][-1:] == ["Delivered"]

        await until("the task says so", told)
    assert len(set(receiver.ids)) == 1
    assert [one.name for one in lab.dead] == ["handbook"]


async def test_a_task_that_is_gone_gets_its_callback_all_the_same(lab: Lab, receiver: Receiver) -> None:
    lab.cluster.gone.add("handbook")
    async with lab.sending():
        await lab.add(receiver.url())
        await lab.until_state("delivered")

        async def settled() -> bool:
            return bool((await lab.row())["told_state"] == "delivered")

        await until("nobody is to be told any more", settled)


# ------------------------------------------------------------------------------------------- many, several, and crashes


async def test_a_receiver_that_hangs_holds_up_no_other(lab: Lab, receiver: Receiver) -> None:
    async with receiving(never) as hanging, lab.sending(seconds=3):
        await lab.add_many(100, hanging.url(), name="hanging")

        async def in_delivery() -> int:
            return int(await lab.sql.fetchval("SELECT count(*) FROM callbacks WHERE lease IS NOT NULL"))

        async def hangs() -> bool:
            return await in_delivery() == 8

        await until("its share is in use", hangs)
        started = time.monotonic()
        await lab.add(receiver.url(), number=200)
        await lab.until_state("delivered", seconds=3)
        print(f"delivered beside a receiver that hangs in {time.monotonic() - started:.2f} s")
        assert await in_delivery() <= 8


async def test_two_senders_share_the_work_and_send_nothing_twice(lab: Lab, receiver: Receiver) -> None:
    await lab.add_many(200, receiver.url(), name="task")
    started = time.monotonic()
    async with lab.sending(), lab.sending():

        async def delivered() -> bool:
            return bool(await lab.sql.fetchval("SELECT bool_and(state = 'delivered') FROM callbacks"))

        await until("all are delivered", delivered, seconds=30, interval=0.05)
        print(f"200 callbacks by two senders in {time.monotonic() - started:.2f} s")
    assert len(receiver.ids) == len(set(receiver.ids)) == 200


async def test_a_sender_that_stops_gives_back_what_it_has_not_sent(lab: Lab, receiver: Receiver) -> None:
    receiver.answer = never
    async with lab.sending(seconds=30):
        await lab.add(receiver.url())

        async def asked() -> bool:
            return receiver.at_once == 1

        await until("the receiver is asked", asked)
    row = await lab.row()
    assert (row["lease"], row["attempts"], row["state"]) == (None, 0, "pending")
    receiver.answer = ok
    async with lab.sending():
        await lab.until_state("delivered", seconds=5)


async def test_a_lease_that_has_run_out_is_taken_over_and_the_late_answer_counts_if_it_delivered(lab: Lab) -> None:
    release = asyncio.Event()

    async def slow(_: Received) -> web.StreamResponse:
        await release.wait()
        return web.Response(status=200)

    async with receiving(slow) as receiver, lab.sending(seconds=20, lease=0.2), lab.sending(seconds=20, lease=0.2):
        await lab.add(receiver.url())

        async def twice() -> bool:
            return receiver.at_once >= 2

        await until("both have sent it", twice)
        release.set()
        row = await lab.until_state("delivered")
    assert set(receiver.ids) == {row["id"]}


@pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "after the answer, before it is noted"])
async def test_an_operator_that_is_killed_over_a_callback_leaves_it_to_be_sent_again_with_the_same_id(
    place: Place,
    process: Callable[..., OperatorProcess],
    url: str,
    sql: "asyncpg.Connection[Any]",
    receiver: Receiver,
    answered: bool,
) -> None:
    settings = {
        "OPERATOR_POSTGRES_URL": url,
        "OPERATOR_CALLBACKS_ALLOW": "127.0.0.1",
        "OPERATOR_CALLBACKS_TIMEOUT_SECONDS": "5",
    }
    first = process(**settings)

    async def kill(_: Received) -> web.StreamResponse:
        if answered:  # it stands still from now on: the answer is out, and nobody notes it
            os.kill(first.pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(0.3, os.kill, first.pid, signal.SIGKILL)
        else:
            os.kill(first.pid, signal.SIGKILL)
        return web.Response(status=200)

    receiver.answer = kill
    async with Kubelet(place).at_work():
        first.start()
        await first.ready()
        await place.create(callback={"url": receiver.url("/{task_id}")})

        async def dead() -> bool:
            return first.exit_code() is not None

        await until("the operator is killed", dead)
        row = await sql.fetchrow("SELECT state, attempts FROM callbacks")
        assert row is not None
        assert tuple(row) == ("pending", 0)
        receiver.answer = ok
        await sql.execute("UPDATE callbacks SET next_at = now()")  # the lease is over
        async with process(**settings).at_work():

            async def delivered() -> bool:
                return bool(await sql.fetchval("SELECT state = 'delivered' FROM callbacks"))

            await until("it is delivered", delivered)
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1


# ------------------------------------------------------------------------------------------------------ the whole way


async def test_a_task_says_what_became_of_its_callback_and_an_event_when_it_is_dead(
    place: Place, process: Callable[..., OperatorProcess], url: str, receiver: Receiver
) -> None:
    secret = {"metadata": {"name": "hooks"}, "stringData": {"secret": SECRET}}
    await place.kube.do("POST", f"/api/v1/namespaces/{place.namespace}/secrets", secret)
    settings = {
        "OPERATOR_POSTGRES_URL": url,
        "OPERATOR_CALLBACKS_ALLOW": "127.0.0.1",
        "OPERATOR_CALLBACKS_SECRETS": "hooks",
        "OPERATOR_CALLBACKS_DEFAULT_URL": receiver.url("/api/v1/tasks/{task_id}/callback"),
    }
    async with Kubelet(place).at_work(), process(**settings).at_work():
        reference = {"name": "hooks", "key": "secret"}
        await place.create("signed", callback={"url": receiver.url("/signed"), "secretRef": reference})
        await place.create("refused", callback={"url": "http://169.254.169.254/"})
        await place.create("plain")

        async def states() -> bool:
            found = {name: ((await place.status(name)).get("callback") or {}) for name in ("signed", "refused", "plain")}
            return {name: one.get("state") for name, one in found.items()} == {
                "signed": "Delivered",
                "refused": "Dead",
                "plain": "Delivered",
            }

        await until("the tasks say it", states)
        signed = await place.status("signed")
        assert (signed["callback"]["attempts"], signed["callback"]["statusCode"]) == (1, 204)
        assert signed["callback"]["lastAttemptAt"]
        assert "metadata service" in (await place.status("refused"))["callback"]["message"]

        async def told() -> bool:
            path = f"/apis/events.k8s.io/v1/namespaces/{place.namespace}/events"
            events = (await place.kube.do("GET", path))["items"]
            return [(one["regarding"]["name"]) for one in events if one["reason"] == "CallbackDead"] == ["refused"]

        await until("an Event says it", told)
    paths = {one.path: one for one in receiver.received}
    assert set(paths) == {"/signed", "/api/v1/tasks/plain/callback"}
    assert verify(paths["/signed"].body, paths["/signed"].headers, parse_secrets(SECRET))
    assert paths["/signed"].json()["namespace"] == place.namespace


async def test_a_task_with_a_callback_is_refused_where_there_is_no_outbox(
    place: Place, process: Callable[..., OperatorProcess]
) -> None:
    async with process().at_work():
        await place.create(callback={"url": "http://hook/x"})
        failed = await place.wait_for("Failed")
    assert "OPERATOR_POSTGRES_URL" in failed["error"]["message"]


async def test_the_command_line_lists_dead_callbacks_and_sends_them_again(
    lab: Lab, url: str, tmp_path: Path, process: Callable[..., OperatorProcess]
) -> None:
    async with receiving(status(410)) as receiver, lab.sending():
        await lab.add(receiver.url())
        await lab.until_state("dead")
        receiver.answer = ok

        def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
            one = process(command=("task_operator", "callbacks", *arguments), OPERATOR_POSTGRES_URL=url)
            one.start()
            assert one._process is not None
            code = one._process.wait(30)
            return code, [json.loads(line) for line in one.log.read_text().splitlines()]

        code, [line] = await asyncio.to_thread(run, "list", "--namespace", "knowledge")
        assert code == 0
        assert (line["name"], line["state"], line["status_code"]) == ("handbook", "dead", 410)
        assert (await asyncio.to_thread(run, "list", "--namespace", "other"))[1] == []
        assert (await asyncio.to_thread(run, "replay", "--namespace", "knowledge", "unknown"))[0] == 1
        assert (await asyncio.to_thread(run, "replay", "--namespace", "knowledge", "--dead"))[0] == 0
        await lab.until_state("delivered")
