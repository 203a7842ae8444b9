"""Who may, with accounts of the cluster: tokens of two namespaces, rights by Role, tickets, and limits."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import orjson
import pytest

from task_gateway.callers import Callers
from task_gateway.cluster import Cluster
from task_gateway.database import Database
from tests.support.gateway_lab import GatewayProcess, account, document
from tests.support.operator_lab import Kube, OperatorProcess, Place, until

pytestmark = pytest.mark.integration

TASKS = "/api/v1/tasks"
EVERYTHING = ("create", "get", "list", "patch", "delete")


@pytest.fixture
async def other(kube: Kube) -> AsyncIterator[Place]:
    """A second namespace."""
    async with Place.fresh(kube) as place:
        yield place


def kind(answer: Any) -> str:
    return str(answer["type"]).rpartition("/")[2]


async def test_namespaces_of_callers_never_mix(
    gateway: Callable[..., GatewayProcess],
    process: Callable[..., OperatorProcess],
    kube: Kube,
    place: Place,
    other: Place,
    url: str,
) -> None:
    ada = await account(kube, place.namespace, "ada", verbs=EVERYTHING)
    bob = await account(kube, other.namespace, "bob", verbs=EVERYTHING)
    both = [place.namespace, other.namespace]
    async with gateway(namespaces=both).at_work() as door, process(namespaces=both, OPERATOR_POSTGRES_URL=url).at_work():
        mine = await door.do("POST", TASKS, document(idempotency_key="k"), token=ada)
        his = await door.do("POST", TASKS, document(idempotency_key="k", namespace=other.namespace), token=bob)
        assert (mine["namespace"], his["namespace"]) == (place.namespace, other.namespace)
        assert mine["id"] != his["id"]
        created_by = (await place.task(mine["id"]) or {})["metadata"]["annotations"]["tasks.zzdsj.io/created-by"]
        assert created_by == f"system:serviceaccount:{place.namespace}:ada"

        where = f"?namespace={other.namespace}"
        for method, path, body in (
            ("POST", TASKS + where, document()),
            ("GET", TASKS + where, None),
            ("GET", f"{TASKS}/{his['id']}{where}", None),
            ("GET", f"{TASKS}/{his['id']}/result{where}", None),
            ("GET", f"{TASKS}/{his['id']}/events{where}", None),
            ("GET", f"{TASKS}/{his['id']}/logs{where}", None),
            ("POST", f"{TASKS}/{his['id']}/cancel{where}", None),
            ("POST", f"{TASKS}/{his['id']}/suspend{where}", None),
            ("POST", f"{TASKS}/{his['id']}/resume{where}", None),
            ("POST", f"{TASKS}/{his['id']}/retry{where}", None),
            ("PATCH", f"{TASKS}/{his['id']}{where}", {"priority": "low"}),
            ("DELETE", f"{TASKS}/{his['id']}{where}", None),
        ):
            status, answer = await door.ask(method, path, body, token=ada)
            assert (status, kind(answer)) == (403, "not-allowed"), f"{method} {path}: {answer}"
            assert his["uid"] not in str(answer)
        batch = [document(), document(namespace=other.namespace)]
        outcome = await door.do("POST", f"{TASKS}/batch", batch, token=ada)
        assert [item["status"] for item in outcome["items"]] == ["accepted", "refused"]

        async def told() -> bool:
            rows = (await door.do("GET", f"{TASKS}?namespace=*", token=ada))["items"]
            assert {row["namespace"] for row in rows} <= {place.namespace}
            return len(rows) == 2

        await until("ada's tasks are listed", told)
        rows = (await door.do("GET", f"{TASKS}?namespace=*", token=bob))["items"]
        assert [row["uid"] for row in rows] in ([], [his["uid"]])

        nobody = await account(kube, place.namespace, "nobody")
        assert (await door.do("GET", f"{TASKS}?namespace=*", token=nobody))["items"] == []


async def test_each_verb_is_a_right_of_its_own(gateway: Callable[..., GatewayProcess], kube: Kube, place: Place) -> None:
    reader = await account(kube, place.namespace, "reader", verbs=("get",))
    writer = await account(kube, place.namespace, "writer", verbs=("create",))
    async with gateway().at_work() as door:
        name = (await door.do("POST", TASKS, document(), token=writer))["id"]
        assert (await door.do("GET", f"{TASKS}/{name}", token=reader))["id"] == name
        refused = [
            ("POST", TASKS, document(), reader),
            ("GET", f"{TASKS}/{name}", None, writer),
            ("GET", TASKS, None, reader),
            ("POST", f"{TASKS}/{name}/cancel", None, reader),
            ("POST", f"{TASKS}/{name}/retry", None, writer),
            ("DELETE", f"{TASKS}/{name}", None, writer),
            ("GET", f"{TASKS}/{name}/logs", None, reader),  # a log is the pod's
        ]
        for method, path, body, token in refused:
            status, answer = await door.ask(method, path, body, token=token)
            assert (status, kind(answer)) == (403, "not-allowed"), f"{method} {path}"
        for unknown in (None, "none.such.token"):
            status, headers, data = await door.send("GET", f"{TASKS}/{name}", token=unknown)
            assert (status, kind(orjson.loads(data))) == (401, "not-authenticated")
            assert headers["WWW-Authenticate"].startswith("Bearer")
        audit = [line for line in door.lines() if line["event"] == "audit"]
        assert audit[0]["caller"] == f"system:serviceaccount:{place.namespace}:writer"
        assert "none.such.token" not in door.log.read_text()
        assert writer not in door.log.read_text()


async def test_a_right_that_is_taken_away_is_gone(gateway: Callable[..., GatewayProcess], kube: Kube, place: Place) -> None:
    token = await account(kube, place.namespace, "ada", verbs=EVERYTHING)
    binding = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}/rolebindings/ada"
    async with gateway(GATEWAY_AUTH_CACHE_SECONDS="1").at_work() as door:
        await door.do("POST", TASKS, document(), token=token)
        await kube.do("DELETE", binding)

        async def refused() -> bool:
            return (await door.ask("POST", TASKS, document(), token=token))[0] == 403

        await until("the right is gone", refused, seconds=10)
        await kube.do("DELETE", f"/api/v1/namespaces/{place.namespace}/serviceaccounts/ada")

        async def unknown() -> bool:
            return (await door.ask("POST", TASKS, document(), token=token))[0] == 401

        await until("the token is gone", unknown, seconds=20)


async def test_a_ticket_is_good_once_at_any_replica_and_is_kept_as_a_digest(
    gateway: Callable[..., GatewayProcess], kube: Kube, place: Place, url: str
) -> None:
    token = await account(kube, place.namespace, "ada", verbs=("get",))
    async with gateway().at_work() as door:
        answer = await door.do("POST", "/api/v1/tickets", token=token)
        assert (await door.ask("POST", "/api/v1/tickets"))[0] == 401
    connection = await asyncpg.connect(url)
    try:
        stored = str(await connection.fetch("SELECT * FROM gateway_tickets"))
        assert "ada" in stored
        assert answer["ticket"] not in stored
        assert token not in stored
        database = Database(url)
        await database.warm_up()
        callers = Callers(
            reviews=Cluster(place.kube.access),
            tickets=database,
            trusting=False,
            namespaces=(),
            default_namespace="default",
        )
        found = await asyncio.gather(*(callers.of_ticket(answer["ticket"]) for _ in range(5)), return_exceptions=True)
        names = [one.name for one in found if not isinstance(one, BaseException)]
        assert names == [f"system:serviceaccount:{place.namespace}:ada"]
        late, _ = await callers.issue_ticket(await callers.of_ticket(await _ticket(callers, found)))
        await connection.execute("UPDATE gateway_tickets SET expires_at = now() - interval '1 second'")
        with pytest.raises(Exception, match="older than 30 s"):
            await callers.of_ticket(late)
        await database.aclose()
    finally:
        await connection.close()


async def _ticket(callers: Callers, found: list[Any]) -> str:
    [caller] = [one for one in found if not isinstance(one, BaseException)]
    return (await callers.issue_ticket(caller))[0]


async def test_who_asks_too_often_is_told_when_to_come_again_and_holds_up_nobody_else(
    gateway: Callable[..., GatewayProcess], kube: Kube, place: Place
) -> None:
    ada = await account(kube, place.namespace, "ada", verbs=("get",))
    bob = await account(kube, place.namespace, "bob", verbs=("get",))
    async with gateway(GATEWAY_RATE="0.5", GATEWAY_BURST="20").at_work() as door:
        answers = [await door.send("GET", f"{TASKS}/x", token=ada) for _ in range(30)]
        assert {status for status, _, _ in answers} == {404, 429}
        status, headers, data = answers[-1]
        assert (status, kind(orjson.loads(data))) == (429, "too-many-requests")
        assert 1 <= int(headers["Retry-After"]) <= 2
        assert (await door.ask("GET", f"{TASKS}/x", token=bob))[0] == 404
        guesses = [await door.ask("GET", f"{TASKS}/x", token=f"guess-{number}") for number in range(5)]
        assert [status for status, _ in guesses][-1] == 429
        # Who guesses takes nothing from those who are known.
        assert (await door.ask("GET", f"{TASKS}/x", token=bob))[0] == 404


async def test_a_gateway_that_trusts_the_network_says_so(trusting: GatewayProcess) -> None:
    warnings = [line["event"] for line in trusting.lines() if line["level"] == "warning"]
    assert any("trust-the-network" in warning and "NetworkPolicy" in warning for warning in warnings)


async def test_pages_of_other_origins_get_nothing_unless_they_are_named(gateway: Callable[..., GatewayProcess]) -> None:
    page = {"Origin": "https://app.example.com"}
    preflight = page | {"Access-Control-Request-Method": "POST"}
    async with gateway(trusting=True).at_work() as door:
        status, headers, _ = await door.send("OPTIONS", TASKS, headers=preflight)
        assert (status, headers.get("Access-Control-Allow-Origin")) == (405, None)
    async with gateway(trusting=True, GATEWAY_CORS_ORIGINS="https://app.example.com").at_work() as door:
        status, headers, _ = await door.send("OPTIONS", TASKS, headers=preflight)
        assert (status, headers["Access-Control-Allow-Origin"]) == (204, "https://app.example.com")
        status, headers, _ = await door.send("GET", f"{TASKS}/x", headers={"Origin": "https://evil.example.com"})
        assert (status, headers.get("Access-Control-Allow-Origin")) == (404, None)
        status, headers, _ = await door.send("GET", f"{TASKS}/x", headers=page)
        assert headers["Access-Control-Allow-Origin"] == "https://app.example.com"
