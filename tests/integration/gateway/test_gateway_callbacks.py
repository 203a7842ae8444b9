"""Dead callbacks over REST, and sending them again."""

import uuid
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract.callbacks import callback_id
from tests.support.gateway_lab import GatewayProcess, account
from tests.support.operator_lab import Place

pytestmark = pytest.mark.integration

CALLBACKS = "/api/v1/callbacks"


async def put(
    sql: "asyncpg.Connection[Any]", namespace: str, name: str, *, state: str = "dead", seconds: int = 0
) -> uuid.UUID:
    uid = uuid.uuid4()
    await sql.execute(
        "INSERT INTO callbacks (id, task_uid, namespace, name, kb_id, url, host, body, state, attempts, created_at, "
        "first_attempt_at, last_attempt_at, finished_at, status_code, error, lease) VALUES ($1, $2, $3, $4, 'kb-42', "
        "'http://hook/secret-path', 'hook:80', '{}', $5, 17, now() - make_interval(secs => $6), now(), now(), now(), 500, "
        "'the receiver answered 500', gen_random_uuid())",
        callback_id(str(uid)),
        uid,
        namespace,
        name,
        state,
        float(seconds),
    )
    return uid


async def test_dead_callbacks_are_listed_with_the_reason_and_not_with_their_url(
    trusting: GatewayProcess, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    uid = await put(sql, place.namespace, "handbook")
    await put(sql, place.namespace, "other", state="delivered")
    await put(sql, "elsewhere", "handbook")
    page = await trusting.do("GET", CALLBACKS)
    assert page["next_cursor"] is None
    [one] = page["items"]
    assert (one["id"], one["uid"], one["task_id"], one["namespace"]) == (
        f"task-{uid}",
        str(uid),
        "handbook",
        place.namespace,
    )
    assert (one["state"], one["attempts"], one["status_code"], one["message"], one["host"]) == (
        "dead",
        17,
        500,
        "the receiver answered 500",
        "hook:80",
    )
    assert "secret-path" not in str(page)
    page = await trusting.do("GET", f"{CALLBACKS}?state=delivered")
    assert [one["task_id"] for one in page["items"]] == ["other"]


async def test_pages_have_every_callback_once_the_youngest_first(
    trusting: GatewayProcess, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    for number in range(5):
        await put(sql, place.namespace, f"task-{number}", seconds=number)
    names: list[str] = []
    path = f"{CALLBACKS}?limit=2"
    while True:
        page = await trusting.do("GET", path)
        names += [one["task_id"] for one in page["items"]]
        if page["next_cursor"] is None:
            break
        path = f"{CALLBACKS}?limit=2&cursor={page['next_cursor']}"
    assert names == [f"task-{number}" for number in range(5)]


async def test_a_callback_is_sent_again_from_the_beginning_with_the_id_that_it_had(
    trusting: GatewayProcess, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    uid = await put(sql, place.namespace, "handbook")
    bystander = await put(sql, place.namespace, "other")
    calls: list[str] = []
    await sql.add_listener("task_callbacks", lambda *_: calls.append("called"))
    status, answer = await trusting.ask("POST", "/api/v1/tasks/handbook/callback/replay")
    assert (status, answer) == (202, {"task_id": "handbook", "namespace": place.namespace, "state": "pending"})
    row = await sql.fetchrow("SELECT *, next_at <= now() AS due FROM callbacks WHERE task_uid = $1", uid)
    assert row is not None
    assert (row["id"], row["state"], row["attempts"], row["due"]) == (f"task-{uid}", "pending", 0, True)
    assert (row["first_attempt_at"], row["finished_at"], row["lease"]) == (None, None, None)
    assert await sql.fetchval("SELECT state FROM callbacks WHERE task_uid = $1", bystander) == "dead"
    assert calls == ["called"]


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/api/v1/tasks/nothing/callback/replay", 404, "no-callback"),
        ("POST", "/api/v1/tasks/No!/callback/replay", 404, "task-not-found"),
        ("GET", f"{CALLBACKS}?state=gone", 422, "invalid-parameter"),
        ("GET", f"{CALLBACKS}?cursor=x", 422, "invalid-parameter"),
    ],
)
async def test_what_makes_no_sense_is_a_problem(
    trusting: GatewayProcess, method: str, path: str, status: int, kind: str
) -> None:
    found, problem = await trusting.ask(method, path)
    assert (found, problem["type"].rpartition("/")[2]) == (status, kind)


async def test_callers_see_and_send_those_of_their_namespaces_alone(
    gateway: Callable[..., GatewayProcess], place: Place, cluster: Endpoints, sql: "asyncpg.Connection[Any]"
) -> None:
    await put(sql, place.namespace, "handbook")
    reader = await account(place.kube, place.namespace, "reader", verbs=["get", "list"])
    stranger = await account(place.kube, place.namespace, "stranger", verbs=[])
    async with gateway().at_work() as process:
        assert (await process.ask("GET", CALLBACKS, token=stranger))[0] == 403
        assert (await process.ask("GET", CALLBACKS, token=reader))[0] == 200
        replay = "/api/v1/tasks/handbook/callback/replay"
        assert (await process.ask("POST", replay, token=reader))[0] == 403
        writer = await account(place.kube, place.namespace, "writer", verbs=["get", "list", "patch"])
        assert (await process.ask("POST", replay, token=writer))[0] == 202
