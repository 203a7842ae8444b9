"""Tasks over REST, on a real API server and PostgreSQL."""

import asyncio
import base64
import gzip
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure, Result
from tests.support.gateway_lab import GatewayProcess, document
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, Proxy, until

pytestmark = pytest.mark.integration

TASKS = "/api/v1/tasks"
PROBLEM = "https://tasks.zzdsj.io/problems/"


def problem(answer: Any) -> tuple[str, list[str]]:
    """Return kind of a problem and the fields that it names."""
    return answer["type"].removeprefix(PROBLEM), [one["field"] for one in answer.get("errors", [])]


# -------------------------------------------------------------------------------------------------------------- create


async def test_a_task_is_accepted_once_the_cluster_has_it_and_read_at_once(trusting: GatewayProcess, place: Place) -> None:
    accepted = await trusting.do("POST", TASKS, document(labels={"team": "manuals"}, timeout="90s"))
    assert accepted["id"] == accepted["task_id"]
    assert (accepted["status"], accepted["namespace"]) == ("queued", place.namespace)

    stored = await place.task(accepted["id"])
    assert stored is not None
    assert (stored["metadata"]["uid"], stored["metadata"]["labels"]) == (accepted["uid"], {"team": "manuals"})
    assert (stored["spec"]["payload"], stored["spec"]["timeout"]) == ({"filePath": "/data/handbook.pdf"}, "1m30s")

    view = await trusting.do("GET", accepted["links"]["self"])
    assert (view["uid"], view["status"], view["progress"], view["kb_id"]) == (accepted["uid"], "queued", 0, "kb-42")
    assert (view["payload"], view["deleted_at"]) == ({"file_path": "/data/handbook.pdf"}, None)


REFUSED = {
    "no object": (["one"], 422, "invalid-task", []),
    "no type": ({"kb_id": "kb-42"}, 422, "invalid-task", ["task_type"]),
    "unknown fields, named as the caller has them": (
        document(colour="blue", payload={"file_path": "/data/a.pdf", "filePath": "/data/b.pdf"}),
        422,
        "invalid-task",
        ["payload.filePath", "colour"],
    ),
    "a field of the resource only": (document(cancel=True), 422, "invalid-task", ["cancel"]),
    "bounds of the contract": (
        document(payload={"file_path": "/data/a.pdf", "chunk_size": 1}, timeout="soon"),
        422,
        "invalid-task",
        ["payload.chunk_size", "timeout"],
    ),
    "a rule of the cluster over several fields": (
        document(payload={"file_path": "/data/a.pdf", "chunk_size": 100, "chunk_overlap": 100}),
        422,
        "invalid-task",
        ["payload.chunk_overlap"],
    ),
    "vectors from nowhere": (document(task_type="vector_storage", payload={}), 422, "invalid-task", ["payload"]),
    "no knowledge base": ({k: v for k, v in document().items() if k != "kb_id"}, 422, "invalid-task", ["kb_id"]),
    "labels of Kubernetes": (
        document(labels={"kubernetes.io/x": "y"}),
        422,
        "invalid-task",
        ["labels.kubernetes.io/x"],
    ),
    "no JSON": (b"{", 400, "invalid-request", []),
    "a namespace that is not served": (document(namespace="kube-system"), 403, "namespace-not-served", []),
    "no name of a namespace": (document(namespace="../secrets"), 422, "invalid-task", ["namespace"]),
}


async def test_a_bad_task_is_refused_with_the_fields_that_are_wrong(trusting: GatewayProcess, place: Place) -> None:
    for what, (body, status, kind, fields) in REFUSED.items():
        found, answer = await trusting.ask("POST", TASKS, body)
        assert (found, *problem(answer)) == (status, kind, fields), f"{what}: {answer}"
        assert answer["instance"] == TASKS
    assert await place.objects("processingtasks") == []


async def test_what_is_too_large_or_of_another_type_is_refused(trusting: GatewayProcess) -> None:
    status, answer = await trusting.ask("POST", TASKS, b"[" + b" " * 300_000 + b"]")
    assert (status, problem(answer)[0]) == (413, "too-large")
    bomb = {"Content-Encoding": "gzip"}
    status, answer = await trusting.ask("POST", TASKS, gzip.compress(b" " * 50_000_000), headers=bomb)
    assert (status, problem(answer)[0]) == (413, "too-large")
    status, answer = await trusting.ask("POST", TASKS, gzip.compress(orjson.dumps(document())), headers=bomb)
    assert status == 202
    status, answer = await trusting.ask("POST", TASKS, b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (status, problem(answer)[0]) == (415, "unsupported-media-type")


async def test_a_repeated_request_finds_its_first_task(trusting: GatewayProcess, place: Place) -> None:
    first = await trusting.do("POST", TASKS, document(idempotency_key="upload-7"))
    backwards = dict(reversed(document(idempotency_key="upload-7").items()))
    status, headers, data = await trusting.send("POST", TASKS, backwards)
    assert (status, headers["Idempotent-Replayed"]) == (202, "true")
    assert orjson.loads(data) == first

    status, answer = await trusting.ask("POST", TASKS, document(idempotency_key="upload-7", priority="low"))
    assert (status, problem(answer)[0]) == (409, "already-exists")

    again = await asyncio.gather(*(trusting.do("POST", TASKS, document(idempotency_key="upload-8")) for _ in range(10)))
    assert len({one["uid"] for one in again}) == 1
    assert len(await place.objects("processingtasks")) == 2


async def test_a_task_whose_answer_was_lost_is_made_once(
    gateway: Callable[..., GatewayProcess], place: Place, tmp_path: Path
) -> None:
    proxy = Proxy(place.kube.access, folder=tmp_path)
    await proxy.start()
    try:
        async with gateway(trusting=True, kubeconfig=proxy.kubeconfig).at_work() as process:
            down = aiohttp.web.Response(status=503, headers={"Retry-After": "7"})
            proxy.refuse = lambda method, path: down if method == "POST" else None
            status, headers, data = await process.send("POST", TASKS, document(idempotency_key="k"))
            assert (status, headers["Retry-After"], problem(orjson.loads(data))[0]) == (503, "7", "unavailable")
            proxy.refuse = lambda method, path: None
            await process.do("POST", TASKS, document(idempotency_key="k"))
    finally:
        await proxy.aclose()
    assert len(await place.objects("processingtasks")) == 1


# --------------------------------------------------------------------------------------------------------------- batch


async def test_one_bad_item_does_not_sink_a_batch(trusting: GatewayProcess, place: Place) -> None:
    batch = [document(), {"task_type": "document_processing"}, 7, document(namespace="kube-system"), document(kb_id="kb-43")]
    answer = await trusting.do("POST", f"{TASKS}/batch", batch)
    assert (answer["accepted"], answer["refused"]) == (2, 3)
    assert [item["status"] for item in answer["items"]] == ["accepted", "refused", "refused", "refused", "accepted"]
    assert [item["problem"] and item["problem"]["status"] for item in answer["items"]] == [None, 422, 422, 403, None]
    tasks = [item["task"]["task_id"] for item in answer["items"] if item["task"]]
    assert {task["metadata"]["name"] for task in await place.objects("processingtasks")} == set(tasks)


async def test_a_batch_may_be_lines(trusting: GatewayProcess, place: Place) -> None:
    lines = b"\n".join([orjson.dumps(document()), b"", b"{", orjson.dumps(document(kb_id="kb-43"))]) + b"\n"
    answer = await trusting.do("POST", f"{TASKS}/batch", lines, headers={"Content-Type": "application/x-ndjson"})
    assert [item["status"] for item in answer["items"]] == ["accepted", "refused", "accepted"]
    assert len(await place.objects("processingtasks")) == 2


async def test_a_batch_has_a_bound(trusting: GatewayProcess, place: Place) -> None:
    bodies: list[Any] = [[], [document()] * 1001, {"tasks": []}]
    for body in bodies:
        status, answer = await trusting.ask("POST", f"{TASKS}/batch", body)
        assert (status, problem(answer)[0]) == (422, "invalid-request")
    assert await place.objects("processingtasks") == []


# --------------------------------------------------------------------------------------------------- a life, read back

LOG = "reading handbook.pdf\nout of luck"
FAILURE = AttemptOutcome(
    outcome=Outcome.FAILED,
    attempt=1,
    reason="DocumentNotFound",
    error=Failure(reason="DocumentNotFound", message="cannot find it", retryable=False, stage="fetch"),
    log=LOG,
)
SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, result=Result(documents=1, chunks=87, milvus_count=87))


async def _status(gateway: GatewayProcess, name: str, *states: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        view: dict[str, Any] = await gateway.do("GET", f"{TASKS}/{name}")
        return view if view["status"] in states else None

    found: dict[str, Any] = await until(f"{name} is {states}", look, seconds=30)
    return found


async def test_the_life_of_a_task_is_read_back(
    trusting: GatewayProcess, process: Callable[..., OperatorProcess], place: Place, url: str
) -> None:
    operator = process(OPERATOR_POSTGRES_URL=url)
    async with operator.at_work(), Kubelet(place, outcomes={1: SUCCESS}).at_work():
        name = (await trusting.do("POST", TASKS, document()))["id"]
        status, answer = await trusting.ask("GET", f"{TASKS}/{name}/result")
        assert status in {200, 409}
        view = await _status(trusting, name, "completed")
        assert (view["progress"], view["result"]["milvus_count"], view["attempts"][0]["reason"]) == (100, 87, "Succeeded")
        result = await trusting.do("GET", f"{TASKS}/{name}/result")
        assert (result["status"], result["result"]["chunks"], result["error"]) == ("completed", 87, None)
        assert result["completed_at"] == view["completed_at"]

        async def all_told() -> list[dict[str, Any]] | None:
            events: list[dict[str, Any]] = (await trusting.do("GET", f"{TASKS}/{name}/events"))["items"]
            return events if events and events[-1]["status"] == "completed" else None

        events = await until("all events are told", all_told)
        assert events[0]["status"] == "queued"
        page = await trusting.do("GET", f"{TASKS}/{name}/events?limit=1")
        assert (page["items"], page["next_after"]) == (events[:1], events[0]["event"])
        rest = await trusting.do("GET", f"{TASKS}/{name}/events?after={page['next_after']}")
        assert (rest["items"], rest["next_after"]) == (events[1:], None)

        status, _ = await trusting.ask("GET", f"{TASKS}/{name}/documents")
        assert status == 404, "only a batch has documents"

        listed = (await trusting.do("GET", f"{TASKS}?status=completed&kb_id=kb-42"))["items"]
        assert [one["task_id"] for one in listed] == [name]
        same = {key: value for key, value in view.items() if key not in {"labels", "callback"}}
        assert {key: value for key, value in listed[0].items() if key not in {"labels", "callback"}} == same

        assert (await trusting.send("DELETE", f"{TASKS}/{name}"))[0] == 204

        async def archived() -> dict[str, Any] | None:
            found: dict[str, Any] = await trusting.do("GET", f"{TASKS}/{name}")
            return found if found["deleted_at"] else None

        assert (await until("it is in the archive", archived))["result"]["chunks"] == 87
        status, answer = await trusting.ask("POST", f"{TASKS}/{name}/cancel")
        assert (status, problem(answer)[0]) == (409, "archived")
        again = await trusting.do("POST", f"{TASKS}/{name}/retry")
        assert (await place.task(again["id"]) or {})["metadata"]["annotations"]["tasks.zzdsj.io/retry-of"] == name


async def test_a_failed_task_is_done_again_and_its_last_lines_are_kept(
    trusting: GatewayProcess, process: Callable[..., OperatorProcess], place: Place, url: str
) -> None:
    async with process(OPERATOR_POSTGRES_URL=url).at_work():
        async with Kubelet(place, outcomes={1: FAILURE}).at_work():
            first = document(labels={"team": "manuals"}, idempotency_key="k", retry={"limit": 0})
            name = (await trusting.do("POST", TASKS, first))["id"]
            view = await _status(trusting, name, "failed")
        assert (view["reason"], view["error"]["stage"]) == ("DocumentNotFound", "fetch")
        again = await trusting.do("POST", f"{TASKS}/{name}/retry")
        assert again["id"] != name
        status, answer = await trusting.ask("POST", f"{TASKS}/{again['id']}/retry")
        assert (status, problem(answer)[0]) == (409, "not-finished")
        both = [await place.task(name), await place.task(again["id"])]
        assert both[0] is not None
        assert both[1] is not None
        assert both[0]["spec"] == both[1]["spec"]
        assert both[1]["metadata"]["labels"] == {"team": "manuals"}

        for pod in await place.objects("pods"):
            await place.kube.ask("DELETE", place.path("pods", pod["metadata"]["name"]), gracePeriodSeconds="0")
        status, headers, data = await trusting.send("GET", f"{TASKS}/{name}/logs")
        assert (status, headers["X-Log-Source"], data.decode()) == (200, "kept", LOG + "\n")
        assert (await trusting.ask("GET", f"{TASKS}/{name}/logs?tail=1"))[1] == "out of luck\n"

        async def kept() -> bool:
            return bool((await trusting.ask("GET", f"{TASKS}/{name}/logs?attempt=1"))[1] == LOG + "\n")

        await until("the log of the attempt is in PostgreSQL", kept)
        status, answer = await trusting.ask("GET", f"{TASKS}/{name}/logs?attempt=2")
        assert (status, problem(answer)[0]) == (404, "no-log")


async def test_a_task_is_changed(trusting: GatewayProcess, place: Place) -> None:
    name = (await trusting.do("POST", TASKS, document()))["id"]
    assert (await trusting.do("PATCH", f"{TASKS}/{name}", {"priority": "low"}))["priority"] == "low"
    for action, field, value in (("suspend", "suspend", True), ("resume", "suspend", False), ("cancel", "cancel", True)):
        assert (await trusting.do("POST", f"{TASKS}/{name}/{action}"))["task_id"] == name
        assert (await place.task(name) or {})["spec"][field] is value
    for body, kind in (({"priority": "now"}, 422), ({"phase": "Failed"}, 422), (b"[", 400)):
        assert (await trusting.ask("PATCH", f"{TASKS}/{name}", body))[0] == kind
    await place.kube.do(
        "PATCH",
        place.path("processingtasks", name) + "/status",
        {"status": {"phase": "Processing"}},
        content_type="application/merge-patch+json",
    )
    status, answer = await trusting.ask("PATCH", f"{TASKS}/{name}", {"priority": "high"})
    assert (status, *problem(answer)) == (422, "invalid-task", ["priority"])


async def test_what_is_not_there_is_not_found_and_no_path_leaves_the_namespace(trusting: GatewayProcess) -> None:
    for method, path, kind in (
        ("GET", f"{TASKS}/nothing", "task-not-found"),
        ("GET", f"{TASKS}/nothing/result", "task-not-found"),
        ("GET", f"{TASKS}/nothing/logs", "task-not-found"),
        ("POST", f"{TASKS}/nothing/cancel", "task-not-found"),
        ("POST", f"{TASKS}/nothing/retry", "task-not-found"),
        ("DELETE", f"{TASKS}/nothing", "task-not-found"),
        ("GET", f"{TASKS}/..%2F..%2Fsecrets", "task-not-found"),
        ("GET", f"{TASKS}/a%00b", "task-not-found"),
        ("GET", f"{TASKS}/%ff%fe", "task-not-found"),
        ("DELETE", f"{TASKS}/Upper", "task-not-found"),
        ("GET", "/api/v1/nothing", "not-found"),
    ):
        status, answer = await trusting.ask(method, path)
        assert (status, problem(answer)[0]) == (404, kind), f"{method} {path}: {answer}"
    status, headers, data = await trusting.send("PUT", TASKS)
    assert (status, problem(orjson.loads(data))[0]) == (405, "method-not-allowed")
    assert set(headers["Allow"].split(",")) >= {"GET", "POST"}


async def test_a_list_is_read_page_by_page(
    trusting: GatewayProcess, process: Callable[..., OperatorProcess], place: Place, url: str
) -> None:
    async with process(OPERATOR_POSTGRES_URL=url).at_work():
        batch = [document(kb_id=f"kb-{number % 3}", priority=["low", "high"][number % 2]) for number in range(25)]
        made = [item["task"]["task_id"] for item in (await trusting.do("POST", f"{TASKS}/batch", batch))["items"]]

        async def all_there() -> bool:
            return len((await trusting.do("GET", f"{TASKS}?limit=200"))["items"]) == 25

        await until("all tasks are in PostgreSQL", all_there)
        seen: list[dict[str, Any]] = []
        path = f"{TASKS}?limit=10"
        sizes = []
        while True:
            page = await trusting.do("GET", path)
            sizes.append(len(page["items"]))
            seen += page["items"]
            if page["next_cursor"] is None:
                break
            path = f"{TASKS}?limit=10&cursor={page['next_cursor']}"
        assert sizes == [10, 10, 5]
        assert sorted(one["task_id"] for one in seen) == sorted(made)
        keys = [(one["created_at"], one["uid"]) for one in seen]
        assert keys == sorted(keys, reverse=True)

        now = datetime.now(UTC)
        for query, expected in (
            ("kb_id=kb-0", 9),
            ("kb_id=kb-0&priority=low", 5),
            ("priority=high", 12),
            ("status=queued", 25),
            ("status=failed", 0),
            ("task_type=health_check", 0),
            (f"created_before={now + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}", 25),
            (f"created_after={now + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}", 0),
            ("namespace=*", 25),
        ):
            found = await trusting.do("GET", f"{TASKS}?limit=200&{query}")
            assert len(found["items"]) == expected, query
    for query in (
        "limit=0",
        "limit=x",
        "status=Queued",
        "cursor=abc",
        "cursor=" + base64.urlsafe_b64encode(b"\x7f" * 24).decode(),
        "created_after=yesterday",
        "created_after=0001-01-01T00:00:00Z",
        "colour=blue",
        "limit=1&limit=2",
        "kb_id=a%00b",
    ):
        status, answer = await trusting.ask("GET", f"{TASKS}?{query}")
        assert (status, problem(answer)[0]) == (422, "invalid-parameter"), query


# ------------------------------------------------------------------------------------------------------ the whole of it


async def test_tasks_are_accepted_while_postgresql_is_away(gateway: Callable[..., GatewayProcess], place: Place) -> None:
    async with gateway(trusting=True, postgres="postgresql://nobody@127.0.0.1:1/nothing").at_work() as process:
        accepted = await process.do("POST", TASKS, document())
        assert (await process.do("GET", f"{TASKS}/{accepted['id']}"))["status"] == "queued"
        for path in (TASKS, f"{TASKS}/nothing"):
            status, headers, data = await process.send("GET", path)
            assert (status, problem(orjson.loads(data))[0]) == (503, "unavailable")
            assert int(headers["Retry-After"]) >= 1
        status, health = await process.ask("GET", "/health")
        assert (status, health["status"], health["components"]["postgres"]["status"]) == (200, "degraded", "down")


async def test_both_ports_serve_health_metrics_and_the_document(trusting: GatewayProcess) -> None:
    async with aiohttp.ClientSession() as session:
        for base in (trusting.url, trusting.front_url):
            async with session.get(f"{base}/health") as response:
                assert (response.status, (await response.json())["status"]) == (200, "ok")
            async with session.get(f"{base}/openapi.json", headers={"Accept-Encoding": "gzip"}) as response:
                assert (await response.json())["openapi"] == "3.1.0"
                assert response.headers["Content-Encoding"] == "gzip"
            async with session.get(f"{base}/docs") as response:
                assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                page = await response.text()
            for asset in ("swagger-ui.css", "swagger-ui-bundle.js", "page.js", "favicon-32x32.png"):
                assert asset in page or asset == "favicon-32x32.png"
                async with session.get(f"{base}/docs/{asset}") as response:
                    assert response.status == 200
            async with session.get(f"{base}/docs/..%2F__init__.py") as response:
                assert response.status == 404
    status, text = await trusting.ask("GET", "/metrics")
    assert status == 200
    assert 'task_gateway_requests_total{method="GET",route="/health",status="200"}' in text


async def test_a_replica_that_is_told_to_stop_finishes_what_it_has_begun(
    gateway: Callable[..., GatewayProcess], place: Place, tmp_path: Path
) -> None:
    proxy = Proxy(place.kube.access, folder=tmp_path)
    await proxy.start()
    try:
        process = gateway(trusting=True, kubeconfig=proxy.kubeconfig, GATEWAY_DRAIN_SECONDS="4")
        async with process.at_work():
            work = [document() for _ in range(300)]
            batch = asyncio.create_task(process.ask("POST", f"{TASKS}/batch", work))

            async def begun() -> bool:
                return bool(proxy.writes)

            await until("the batch has begun", begun, interval=0.01)
            process.signal(signal.SIGTERM)

            async def unready() -> bool:
                return (await process.ask("GET", "/readyz"))[0] == 503

            await until("the replica is unready", unready, seconds=1, interval=0.01)
            # It still takes requests, of who has not heard yet; and says that the connection ends.
            status, headers, _ = await process.send("POST", TASKS, document())
            assert (status, headers["Connection"]) == (202, "close")
            status, answer = await batch
            assert (status, answer["accepted"]) == (202, 300)

            async def gone() -> bool:
                return process.exit_code() is not None

            await until("it has stopped", gone, seconds=10)
            assert process.exit_code() == 0
    finally:
        await proxy.aclose()


async def test_a_replica_that_is_killed_loses_no_task_that_it_has_accepted(
    gateway: Callable[..., GatewayProcess], place: Place
) -> None:
    accepted: list[str] = []
    first, second = gateway(trusting=True), gateway(trusting=True)
    async with first.at_work(), second.at_work():

        async def caller(number: int) -> None:
            for turn in range(100):
                for process in (first, second):  # whichever is there
                    try:
                        status, answer = await process.ask("POST", TASKS, document(idempotency_key=f"{number}-{turn}"))
                    except aiohttp.ClientError:
                        continue
                    assert status == 202, answer
                    accepted.append(answer["uid"])
                    break
                if len(accepted) > 40 and first.exit_code() is None:
                    first.kill()

        await asyncio.gather(*(caller(number) for number in range(4)))
        assert first.exit_code() is not None
    uids = {task["metadata"]["uid"] for task in await place.objects("processingtasks")}
    assert len(accepted) == 400
    assert set(accepted) <= uids
    assert len(uids) == 400, "a request that was repeated made a second task"


async def test_each_change_has_an_audit_line(trusting: GatewayProcess, place: Place) -> None:
    status, headers, data = await trusting.send("POST", TASKS, document(), headers={"X-Request-Id": "one-1"})
    assert (status, headers["X-Request-Id"]) == (202, "one-1")
    name = orjson.loads(data)["id"]
    await trusting.send("DELETE", f"{TASKS}/{name}", headers={"X-Request-Id": "not valid: spaces"})
    await trusting.send("GET", f"{TASKS}/{name}")
    audit = [line for line in trusting.lines() if line["event"] == "audit"]
    assert [(one["action"], one["status"], one["task"], one["namespace"]) for one in audit] == [
        ("POST /api/v1/tasks", 202, name, place.namespace),
        ("DELETE /api/v1/tasks/{id}", 204, name, place.namespace),
    ]
    assert audit[0]["request_id"] == "one-1"
    assert " " not in audit[1]["request_id"]


async def test_the_documents_of_a_batch_are_read_page_by_page(
    trusting: GatewayProcess, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    wanted = {"task_type": "batch_processing", "kb_id": "kb-42", "payload": {"prefix": "manuals", "max_failed_percent": 10}}
    created = await trusting.do("POST", TASKS, wanted)
    found = await place.task(created["id"])
    assert found is not None
    assert found["spec"]["payload"] == {"prefix": "manuals", "maxFailedPercent": 10}
    documents = f"{TASKS}/{created['id']}/documents"
    assert await trusting.do("GET", documents) == {"items": [], "next_after": None}

    await sql.execute("INSERT INTO batches (task_uid, total) VALUES ($1, 5)", created["uid"])
    await sql.execute(
        "INSERT INTO batch_documents (task_uid, ordinal, shard, file_path, document_id, state, reason) "
        "SELECT $1, number, 0, 'manuals/' || number, 'id-' || number, CASE number WHEN 3 THEN 'failed' ELSE 'done' END, "
        "CASE number WHEN 3 THEN 'DocumentEmpty' ELSE 'Completed' END FROM generate_series(1, 5) AS number",
        created["uid"],
    )
    first = await trusting.do("GET", f"{documents}?limit=2")
    assert ([one["number"] for one in first["items"]], first["next_after"]) == ([1, 2], 2)
    rest = await trusting.do("GET", f"{documents}?after=2&limit=3")
    assert ([one["file_path"] for one in rest["items"]], rest["next_after"]) == (
        ["manuals/3", "manuals/4", "manuals/5"],
        None,
    )
    failed = (await trusting.do("GET", f"{documents}?state=failed"))["items"]
    assert [(one["document_id"], one["state"], one["reason"]) for one in failed] == [("id-3", "failed", "DocumentEmpty")]
    status, problem = await trusting.ask("GET", f"{documents}?state=lost")
    assert (status, problem["errors"][0]["field"]) == (422, "state")
