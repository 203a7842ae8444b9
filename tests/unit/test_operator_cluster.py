"""The client of the Kubernetes API against a server that answers what a test tells it to, over a real socket."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from aiohttp import web

from task_operator.cluster import Cluster, Watches, open_watching
from task_platform import kubernetes as kubernetes_module
from task_platform.kubernetes import (
    Access,
    ClusterError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubeconfigError,
    Manifest,
    NotFound,
    Unavailable,
)

Answer = Callable[[web.Request], web.StreamResponse]


@dataclass
class Server:
    """What was asked, and what is answered."""

    url: str = ""
    asked: list[tuple[str, str, Any, dict[str, str]]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def says(self, status: int, body: Any, **headers: str) -> None:
        self.answers.append(lambda _: web.Response(status=status, body=orjson.dumps(body), headers=headers))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        self.asked.append((request.method, request.path_qs, orjson.loads(data) if data else None, dict(request.headers)))
        return self.answers.pop(0)(request)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Cluster]:
    client = Cluster(Access(server=server.url, ssl=None))
    await client.warm_up()
    yield client
    await client.aclose()


def _status(reason: str, message: str) -> dict[str, Any]:
    return {"kind": "Status", "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (400, "BadRequest", Invalid),
        (401, "Unauthorized", Unavailable),
        (403, "Forbidden", Forbidden),
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", Conflict),
        (410, "Expired", Gone),
        (413, "RequestEntityTooLarge", Invalid),
        (422, "Invalid", Invalid),
        (429, "TooManyRequests", Unavailable),
        (500, "InternalError", Unavailable),
        (503, "ServiceUnavailable", Unavailable),
    ],
)
async def test_a_refusal_becomes_a_typed_error_in_the_servers_words(
    server: Server, client: Cluster, status: int, reason: str, expected: type[ClusterError]
) -> None:
    server.says(status, _status(reason, "jobs.batch is out of order"))
    with pytest.raises(expected) as caught:
        await client.get_job("knowledge", "handbook-1")
    assert type(caught.value) is expected
    assert caught.value.reason == reason
    assert caught.value.status == status
    assert caught.value.message.startswith("cannot GET /apis/batch/v1/namespaces/knowledge/jobs/handbook-1: ")
    assert "jobs.batch is out of order" in caught.value.message


async def test_a_server_that_asks_to_wait_is_heard(server: Server, client: Cluster) -> None:
    server.says(429, _status("TooManyRequests", "slow down"), **{"Retry-After": "7"})
    with pytest.raises(Unavailable) as caught:
        await client.get_job("knowledge", "handbook-1")
    assert caught.value.retry_after == 7


async def test_a_proxys_page_is_an_error_like_any_other(server: Server, client: Cluster) -> None:
    server.answers.append(lambda _: web.Response(status=502, text="<html>bad gateway</html>"))
    with pytest.raises(Unavailable, match="bad gateway"):
        await client.get_job("knowledge", "handbook-1")
    server.answers.append(lambda _: web.Response(status=200, text="<html>welcome</html>"))
    with pytest.raises(Unavailable, match="is this an API server"):
        await client.get_job("knowledge", "handbook-1")


async def test_a_cut_connection_says_nothing_about_the_write(server: Server, client: Cluster) -> None:
    def cut(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    server.answers.append(cut)
    with pytest.raises(Unavailable, match="cannot POST"):
        await client.create_job({"metadata": {"namespace": "knowledge", "name": "handbook-1"}})
    assert server.asked[0][2] == {"metadata": {"namespace": "knowledge", "name": "handbook-1"}}


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    client = Cluster(Access(server="http://127.0.0.1:1", ssl=None))
    await client.warm_up()
    with pytest.raises(Unavailable, match="is the API server reachable"):
        await client.get_task("knowledge", "handbook")
    await client.aclose()


async def test_a_server_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_module, "_REQUEST_TIMEOUT", 0.2)
    hangs = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await hangs.wait()
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hang)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = Cluster(Access(server=f"http://127.0.0.1:{runner.addresses[0][1]}", ssl=None))
    await client.warm_up()
    with pytest.raises(Unavailable, match="TimeoutError"):
        await client.get_task("knowledge", "handbook")
    hangs.set()
    await client.aclose()
    await runner.cleanup()


async def test_a_status_write_names_the_version_it_was_decided_upon(server: Server, client: Cluster) -> None:
    server.says(200, {"metadata": {"name": "handbook"}})
    await client.patch_status("knowledge", "handbook", uid="u", resource_version=41, patch={"phase": "Completed"})
    method, path, body, headers = server.asked[0]
    assert (method, path.split("?")) == (
        "PATCH",
        [
            "/apis/tasks.zzdsj.io/v1/namespaces/knowledge/processingtasks/handbook/status",
            "fieldManager=processing-tasks-operator",
        ],
    )
    assert body == {"metadata": {"uid": "u", "resourceVersion": "41"}, "status": {"phase": "Completed"}}
    assert headers["Content-Type"] == "application/merge-patch+json"
    server.says(200, {"metadata": {"name": "handbook"}})
    await client.put_status("knowledge", "handbook", uid="u", resource_version=41, status={"phase": "Completed"})
    method, path, body, headers = server.asked[1]
    assert (method, path.partition("?")[0].rpartition("/")[2]) == ("PUT", "status")
    assert body["metadata"] == {"name": "handbook", "namespace": "knowledge", "uid": "u", "resourceVersion": "41"}
    assert (body["kind"], body["status"], "spec" in body) == ("ProcessingTask", {"phase": "Completed"}, False)


@pytest.mark.parametrize(
    ("notes", "refusal"),
    [
        ([], None),
        (["Error creating: pods x is forbidden", "Error creating: exceeded quota: few"], "exceeded quota: few"),
        (["(combined from similar events): Error creating: exceeded quota: few"], "exceeded quota: few"),
    ],
)
async def test_why_a_pod_was_refused_is_the_last_event_of_its_job(
    server: Server, client: Cluster, notes: list[str], refusal: str | None
) -> None:
    events = [{"metadata": {"resourceVersion": str(9 + number)}, "note": note} for number, note in enumerate(notes)]
    server.says(200, {"metadata": {"resourceVersion": "20"}, "items": events})
    assert await client.pod_refusal("knowledge", job_uid="u") == refusal
    path = server.asked[0][1]
    assert path.startswith("/apis/events.k8s.io/v1/namespaces/knowledge/events?fieldSelector=regarding.uid")
    assert "FailedCreate" in path


async def test_a_deletion_names_the_object_it_means(server: Server, client: Cluster) -> None:
    server.says(200, {})
    await client.delete_job("knowledge", "handbook-1", uid="u")
    assert server.asked[0][:3] == (
        "DELETE",
        "/apis/batch/v1/namespaces/knowledge/jobs/handbook-1",
        {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": "u"},
            "propagationPolicy": "Background",
        },
    )


async def test_what_is_gone_already_need_not_be_deleted(server: Server, client: Cluster) -> None:
    server.says(404, _status("NotFound", "gone"))
    await client.delete_job("knowledge", "handbook-1", uid="u")
    server.says(409, _status("Conflict", "the UID in the precondition does not match"))
    await client.delete_job("knowledge", "handbook-1", uid="u")


async def test_a_task_that_has_changed_is_not_deleted(server: Server, client: Cluster) -> None:
    server.says(409, _status("Conflict", "the resourceVersion in the precondition does not match"))
    with pytest.raises(Conflict):
        await client.delete_task("knowledge", "handbook", uid="u", resource_version=5)


async def test_lists_come_in_pages(server: Server, client: Cluster) -> None:
    server.says(200, {"metadata": {"resourceVersion": "9", "continue": "next"}, "items": [{"a": 1}]})
    server.says(200, {"metadata": {"resourceVersion": "9"}, "items": None})
    pages = [(list(page.items), page.resource_version) async for page in client.list_jobs("knowledge")]
    assert pages == [([{"a": 1}], 9), ([], 9)]
    assert "labelSelector=app.kubernetes.io/managed-by%3Dprocessing-tasks" in server.asked[0][1]
    assert "continue=next" in server.asked[1][1]


def pods_of(*uids: str) -> Manifest:
    label = "tasks.zzdsj.io/task-uid"
    return {
        "metadata": {"resourceVersion": "7"},
        "items": [{"metadata": {"name": f"pod-{uid}", "labels": {label: uid}}} for uid in uids],
    }


async def test_pods_that_are_asked_for_while_a_list_is_under_way_are_in_the_next_one(
    server: Server, client: Cluster
) -> None:
    for uids in (["a"], ["b", "d", "b"], ["a"]):
        server.says(200, pods_of(*uids))
    first = asyncio.create_task(client.list_pods("ns", task_uid="a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # its list is under way
    others = [asyncio.create_task(client.list_pods("ns", task_uid=uid)) for uid in ("b", "c", "d", "b")]
    names = [[pod["metadata"]["name"] for pod in await one] for one in (first, *others)]
    assert names == [["pod-a"], ["pod-b", "pod-b"], [], ["pod-d"], ["pod-b", "pod-b"]]
    assert [pod["metadata"]["name"] for pod in await client.list_pods("ns", task_uid="a")] == ["pod-a"]  # anew
    assert [path.partition("labelSelector=")[2].partition("&")[0] for _, path, _, _ in server.asked] == [
        "tasks.zzdsj.io/task-uid+in+(a)",
        "tasks.zzdsj.io/task-uid+in+(b,c,d)",
        "tasks.zzdsj.io/task-uid+in+(a)",
    ]


async def test_a_list_of_pods_that_fails_fails_for_all_who_asked_and_the_next_one_is_sent(
    server: Server, client: Cluster
) -> None:
    server.says(403, _status("Forbidden", "pods is forbidden"))
    both = await asyncio.gather(*(client.list_pods("ns", task_uid=uid) for uid in "ab"), return_exceptions=True)
    assert [type(one) for one in both] == [Forbidden, Forbidden]
    server.says(200, pods_of("a"))
    assert len(await client.list_pods("ns", task_uid="a")) == 1


async def test_who_gives_up_asking_for_pods_takes_nothing_from_the_others(server: Server, client: Cluster) -> None:
    server.says(200, pods_of("a", "b"))
    gone, stays = (asyncio.create_task(client.list_pods("ns", task_uid=uid)) for uid in "ab")
    await asyncio.sleep(0)
    gone.cancel()
    assert [pod["metadata"]["name"] for pod in await stays] == ["pod-b"]


async def test_a_list_whose_position_is_forgotten_is_gone(server: Server, client: Cluster) -> None:
    server.says(200, {"metadata": {"resourceVersion": "9", "continue": "next"}, "items": []})
    server.says(410, _status("Expired", "the provided continue parameter is too old"))
    with pytest.raises(Gone):
        async for _ in client.list_tasks(None):
            pass
    assert server.asked[0][1].startswith("/apis/tasks.zzdsj.io/v1/processingtasks?")


async def test_the_token_is_read_anew_each_minute(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("task_operator.cluster.time.monotonic", lambda: now)
    token = tmp_path / "token"
    token.write_text("first\n")
    client = Cluster(Access(server=server.url, ssl=None, token_file=token))
    await client.warm_up()
    for _ in range(3):
        server.says(200, {})
        await client.get_task("knowledge", "handbook")
        token.write_text("second\n")
        now += 31
    await client.aclose()
    assert [asked[3]["Authorization"] for asked in server.asked] == ["Bearer first", "Bearer first", "Bearer second"]


async def test_each_byte_of_a_watch_is_noted_and_none_of_another_answer(server: Server) -> None:
    now = 10.0
    watches = Watches(clock=lambda: now)
    more = asyncio.Event()
    app = web.Application()

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"type":"BOOKMARK"}\n')
        await more.wait()
        await response.write(b'{"type":"BOOKMARK"}\n')
        return response

    app.router.add_get("/tasks", watch)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    session = open_watching(Access(server=url, ssl=None), watches)

    relists: list[str] = []
    watches.on_relist = lambda: relists.append("tasks")
    server.says(200, {})
    async with session.get(f"{server.url}/tasks") as response:
        await response.read()
    assert watches.oldest() is None
    assert relists == [], "the list before the watch is the first one"

    async with session.get(f"{url}/tasks", params={"watch": "true"}) as response:
        assert watches.oldest() == 0
        stream = response.content.iter_chunked(1024)
        assert b"BOOKMARK" in await anext(stream)
        now = 70.0
        assert watches.oldest() == 60
        more.set()
        assert b"BOOKMARK" in await anext(stream)
        assert watches.oldest() == 0
    server.says(200, {})
    server.says(200, {})
    for path in ("/tasks", "/discovery"):
        async with session.get(f"{server.url}{path}") as response:
            await response.read()
    assert relists == ["tasks"]
    await session.close()
    await runner.cleanup()


async def test_events_go_to_their_sink_and_leave_bookmarks() -> None:
    event = b'{"type":"MODIFIED","object":{"metadata":{"name":"handbook","resourceVersion":"%d"}}}\n'
    lines = [event % 7, b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"8"}}}\n', b"no JSON\n", event % 9]
    lines.append(b'{"type":"ERROR","object":{"code":410}}\n')
    body = b"".join(lines)
    taken: list[tuple[str, str]] = []

    def take(kind: str, manifest: Manifest) -> None:
        version = manifest["metadata"]["resourceVersion"]
        if version == "9":
            raise ValueError("a sink that fails")
        taken.append((kind, version))

    async def collection(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.json_response({"metadata": {"resourceVersion": "6", "continue": "next"}, "items": [{}]})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(body)
        return response

    app = web.Application()
    for name in ("tasks", "pods"):
        app.router.add_get(f"/{name}", collection)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    watches = Watches()
    watches.sinks = {"tasks": take}
    session = open_watching(Access(server=url, ssl=None), watches)
    read = {}
    for name in ("tasks", "pods"):
        async with session.get(f"{url}/{name}", params={"watch": "true"}) as response:
            read[name] = b"".join([part async for part in response.content.iter_chunked(16)])  # lines come in pieces
    assert taken == [("MODIFIED", "7")]
    bookmark = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"7"}}}\n'
    assert read["tasks"] == bookmark + b"".join(lines[1:]), "what the sink has not taken stays as it is"
    assert read["pods"] == body
    async with session.get(f"{url}/tasks") as response:
        assert await response.json() == {"metadata": {"resourceVersion": "6"}, "items": []}
    async with session.get(f"{url}/pods") as response:
        assert (await response.json())["items"] == [{}]
    await session.close()
    await runner.cleanup()


# ---------------------------------------------------------------------------------------------------------- kubeconfig


def _kubeconfig(tmp_path: Path, *, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    path = tmp_path / "config"
    config = {
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "knowledge"}}],
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_kubeconfig_with_a_token_is_enough(tmp_path: Path) -> None:
    path = _kubeconfig(tmp_path, cluster={"server": "http://api/"}, user={"token": "t"})
    access = Access.from_environment({"KUBECONFIG": str(path)})
    assert (access.server, access.token, access.namespace, access.ssl) == ("http://api", "t", "knowledge", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "give a kubeconfig with a current context"),
        ("][", "give a kubeconfig with a current context"),
    ],
)
def test_a_kubeconfig_that_is_none_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(KubeconfigError, match=message):
        Access.from_kubeconfig(path)


def test_a_credential_plugin_is_refused(tmp_path: Path) -> None:
    path = _kubeconfig(tmp_path, cluster={"server": "https://api"}, user={"exec": {"command": "aws"}})
    with pytest.raises(KubeconfigError, match="credential plugins are not supported"):
        Access.from_kubeconfig(path)


def test_without_any_way_to_the_api_server_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KubeconfigError, match="set KUBECONFIG, or run in a pod"):
        Access.from_environment({})


def test_a_certificate_that_is_damaged_is_noticed_at_start(tmp_path: Path) -> None:
    broken = base64.b64encode(b"no certificate").decode()
    path = _kubeconfig(tmp_path, cluster={"server": "https://api", "certificate-authority-data": broken}, user={})
    with pytest.raises(KubeconfigError, match="cannot use"):
        Access.from_kubeconfig(path)
