"""The client of tasks over both of its transports, in threads and in an event loop: the same tests for all four.

Everything it speaks to is real: an API server, an operator, and a gateway that asks for tokens. Pods are played.
"""

import asyncio
import contextlib
import importlib
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import pytest
import pytest_asyncio
from aiohttp import web

from devstack import Endpoints
from service_client import (
    AsyncTaskClient,
    CallbackReceiver,
    ServiceRefused,
    TaskClient,
    TaskConflict,
    TaskFailed,
    TaskForbidden,
    TaskNotFinished,
    TaskNotFound,
    TaskRefused,
    TaskStatus,
    TaskTimeout,
    TaskUnavailable,
    TaskUpdate,
    call_service,
)
from task_contract.models import Payload, Spec, TaskType
from tests.support.client_world import SECRETS, World
from tests.support.databases import fresh_database
from tests.support.devstack import Kubectl
from tests.support.gateway_lab import account
from tests.support.operator_lab import Proxy, until
from tests.support.servers import free_port

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).resolve().parents[2]
MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def database_url(stores: Endpoints) -> Iterator[str]:
    with fresh_database(stores.host_urls["TASKS_POSTGRES_URL"], prefix="client") as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(cluster: Endpoints, kubectl: Kubectl, database_url: str, folder: Path) -> AsyncIterator[World]:
    async with World.open(cluster, postgres=database_url, folder=folder) as world:
        yield world


class Hands:
    """Uses either kind of client; the one that blocks in a thread."""

    def __init__(self, client: TaskClient | AsyncTaskClient) -> None:
        self.client = client
        self.over_kubernetes = False

    async def do(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method."""
        call = partial(getattr(self.client, method), *args, **options)
        return await (call() if isinstance(self.client, AsyncTaskClient) else asyncio.to_thread(call))

    async def items(
        self, method: str, *args: Any, enough: Callable[[list[Any]], bool] = lambda found: False, **options: Any
    ) -> list[Any]:
        """Iterate until the end, or until there is enough."""
        found: list[Any] = []
        made = getattr(self.client, method)(*args, **options)
        if isinstance(self.client, AsyncTaskClient):
            async with contextlib.aclosing(made):
                async for one in made:
                    found.append(one)
                    if enough(found):
                        break
            return found

        def iterate() -> None:
            with contextlib.closing(made):
                for one in made:
                    found.append(one)
                    if enough(found):
                        break

        await asyncio.to_thread(iterate)
        return found


@pytest_asyncio.fixture(loop_scope="module", params=["rest", "rest, async", "kubernetes", "kubernetes, async"])
async def hands(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Hands]:
    transport, _, loop = str(request.param).partition(", ")
    kind = AsyncTaskClient if loop else TaskClient
    client = (
        kind.over_kubernetes(world.api(), namespace=world.place.namespace)
        if transport == "kubernetes"
        else kind.over_rest(world.gateway.url, namespace=world.place.namespace, token=world.token)
    )
    hands = Hands(client)
    hands.over_kubernetes = transport == "kubernetes"
    yield hands
    if isinstance(client, AsyncTaskClient):
        await client.aclose()
    else:
        client.close()


def body(kb_id: str | None = None, **given: Any) -> dict[str, Any]:
    """Return a task; its knowledge base is its own, so that no limit holds it back."""
    kb = kb_id or f"kb-{uuid.uuid4().hex[:8]}"
    return {"task_type": "document_processing", "kb_id": kb, "payload": {"file_path": "a.pdf"}, **given}


async def test_a_task_is_created_once_however_often_it_is_submitted(hands: Hands) -> None:
    key, kb_id = uuid.uuid4().hex, f"kb-{uuid.uuid4().hex[:8]}"
    first = await hands.do("submit", body(kb_id, suspend=True), idempotency_key=key)
    spec = Spec(type=TaskType.DOCUMENT_PROCESSING, kb_id=kb_id, payload=Payload(file_path="a.pdf"), suspend=True)
    again = await hands.do("submit", spec, idempotency_key=key)
    assert (first.replayed, again.replayed) == (False, True)
    assert (first.id, first.uid) == (again.id, again.uid)
    assert (await hands.do("submit", body(kb_id, suspend=True))).uid != first.uid
    with pytest.raises(TaskConflict):
        await hands.do("submit", body(f"{kb_id}-x", suspend=True), idempotency_key=key)


async def test_a_task_that_was_created_can_be_read(hands: Hands) -> None:
    submitted = await hands.do("submit", body("kb-read", suspend=True, priority="high"), labels={"team": "a"})
    task = await hands.do("get", submitted.id)
    assert (task.id, task.uid, task.namespace) == (submitted.id, submitted.uid, submitted.namespace)
    assert (task.task_type, task.kb_id, task.priority, task.status) == (
        "document_processing",
        "kb-read",
        "high",
        TaskStatus.QUEUED,
    )
    assert task.payload == {"file_path": "a.pdf"}
    assert task.labels["team"] == "a"
    with pytest.raises(TaskNotFinished, match="queued"):
        await hands.do("result", submitted.id)


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (body(prio="high"), "prio"),
        (body(payload={"file_path": "a.pdf", "chunk_size": 1}), "payload.chunk_size"),
        ({"task_type": "document_processing", "payload": {"file_path": "a.pdf"}}, "kb_id"),
        (body(payload={"file_path": "../a.pdf"}), "payload.file_path"),
    ],
    ids=["unknown", "out of bounds", "missing", "refused by a rule of the CRD"],
)
async def test_a_bad_task_is_refused_with_the_name_of_the_field(hands: Hands, task: dict[str, Any], field: str) -> None:
    with pytest.raises(TaskRefused, match="cannot create the task") as caught:
        await hands.do("submit", task)
    assert field in [one.field for one in caught.value.fields]


async def test_an_absent_task_is_not_found(hands: Hands) -> None:
    for method in ("get", "cancel", "retry", "result"):
        with pytest.raises(TaskNotFound, match="absent"):
            await hands.do(method, "absent")
    with pytest.raises(TaskNotFound):
        await hands.do("wait", "absent", timeout=MINUTE)
    with pytest.raises(TaskNotFound):
        await hands.items("watch", "absent")


async def test_waiting_sees_what_happens_and_returns_the_finished_task(hands: Hands) -> None:
    submitted = await hands.do("submit", body())
    seen: list[TaskUpdate] = []
    task = await hands.do("wait", submitted.id, timeout=MINUTE, on_change=seen.append)
    assert task.status is TaskStatus.COMPLETED
    assert (task.progress, task.result.chunks) == (100, 7)
    assert seen[-1].status is TaskStatus.COMPLETED
    assert {one.task_id for one in seen} == {submitted.id}
    assert (await hands.do("result", submitted.id)).chunks == 7
    assert (await hands.items("watch", submitted.id))[-1].status is TaskStatus.COMPLETED


async def test_a_canceled_task_ends_and_can_be_repeated(hands: Hands) -> None:
    submitted = await hands.do("submit", body(suspend=True))
    with pytest.raises(TaskConflict):
        await hands.do("retry", submitted.id)
    waiting = asyncio.create_task(hands.do("wait", submitted.id, timeout=MINUTE))
    assert (await hands.do("cancel", submitted.id)).id == submitted.id
    assert (await waiting).status is TaskStatus.CANCELED
    with pytest.raises(TaskFailed, match="canceled") as caught:
        await hands.do("result", submitted.id)
    assert caught.value.task.id == submitted.id
    assert (await hands.do("cancel", submitted.id)).status is TaskStatus.CANCELED, "of a task that has ended: nothing"
    again = await hands.do("retry", submitted.id)
    assert again.uid != submitted.uid
    assert (await hands.do("get", again.id)).payload == {"file_path": "a.pdf"}


async def test_waiting_ends_with_the_timeout_and_the_task_goes_on(hands: Hands) -> None:
    submitted = await hands.do("submit", body(suspend=True))
    begun = time.monotonic()
    with pytest.raises(TaskTimeout, match="queued after 0:00:01"):
        await hands.do("wait", submitted.id, timeout=timedelta(seconds=1))
    assert time.monotonic() - begun < 3
    assert (await hands.do("get", submitted.id)).status is TaskStatus.QUEUED


async def test_a_task_that_is_deleted_is_waited_for_no_longer(hands: Hands, world: World) -> None:
    submitted = await hands.do("submit", body(suspend=True))
    watched: list[TaskUpdate] = []
    waiting = asyncio.create_task(hands.do("wait", submitted.id, timeout=MINUTE, on_change=watched.append))
    await until("it waits", lambda: asyncio.sleep(0, bool(watched)))
    await world.place.kube.do("DELETE", world.place.path("processingtasks", submitted.id))
    with pytest.raises(TaskNotFound):
        await waiting


async def test_of_a_batch_a_bad_task_does_not_touch_the_others(hands: Hands) -> None:
    tasks = [body(suspend=True), body(prio="high"), body(suspend=True), {"task_type": "document_processing"}]
    items = await hands.do("submit_batch", tasks)
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert [item.task is not None for item in items] == [True, False, True, False]
    assert [type(item.error) for item in items[1::2]] == [TaskRefused] * 2
    for item in items[::2]:
        assert (await hands.do("get", item.task.id)).uid == item.task.uid


async def test_tasks_are_listed_by_what_they_are(hands: Hands) -> None:
    kb_id = f"kb-{uuid.uuid4().hex[:8]}"
    made = [await hands.do("submit", body(kb_id, suspend=True)) for _ in range(3)]
    await hands.do("cancel", made[0].id)
    await hands.do("wait", made[0].id, timeout=MINUTE)

    async def listed() -> bool:
        found = await hands.items("list", kb_id=kb_id, status=TaskStatus.QUEUED)
        return {one.id for one in found} == {one.id for one in made[1:]}

    await until("PostgreSQL has them all", listed, seconds=20)
    assert [one.id for one in await hands.items("list", kb_id=kb_id, status=TaskStatus.CANCELED)] == [made[0].id]
    assert len(await hands.items("list", kb_id=kb_id, limit=2)) == 2
    assert await hands.items("list", kb_id=kb_id, task_type="health_check") == []


async def test_a_knowledge_base_is_watched_until_one_has_seen_enough(hands: Hands) -> None:
    kb_id = f"kb-{uuid.uuid4().hex[:8]}"
    first = await hands.do("submit", body(kb_id, suspend=True))
    others: list[Any] = []

    def enough(found: list[TaskUpdate]) -> bool:
        return any(one.task_id == first.id and one.status is TaskStatus.CANCELED for one in found)

    async def meanwhile() -> None:
        await hands.do("submit", body(suspend=True))  # of another knowledge base
        others.append(await hands.do("submit", body(kb_id, suspend=True)))
        await hands.do("cancel", first.id)

    watching = asyncio.create_task(hands.items("watch", kb_id=kb_id, enough=enough))
    await meanwhile()
    seen = await asyncio.wait_for(watching, 30)
    assert {one.kb_id for one in seen} == {kb_id}
    assert {one.task_id for one in seen} <= {first.id, others[0].id}


async def test_an_event_loop_is_left_at_once(hands: Hands) -> None:
    """What waits for nothing must not hold up whoever goes away."""
    if not isinstance(hands.client, AsyncTaskClient):
        pytest.skip("a thread cannot be cancelled")
    submitted = await hands.do("submit", body(suspend=True))
    seen: list[TaskUpdate] = []
    waiting = asyncio.create_task(hands.do("wait", submitted.id, timeout=MINUTE, on_change=seen.append))
    await until("it waits", lambda: asyncio.sleep(0, bool(seen)))
    waiting.cancel()
    begun = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert time.monotonic() - begun < 2


# ------------------------------------------------------------------------------------------------------- one transport


async def test_over_rest_a_watch_goes_on_behind_the_event_that_was_seen_last(world: World) -> None:
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=world.token) as client:
        submitted = await client.submit(body(suspend=True))
        seen: list[TaskUpdate] = []
        async for one in client.watch(submitted.id):
            seen.append(one)
            if len(seen) == 1:
                await client.cancel(submitted.id)
        last = seen[-1]
        assert (last.status, last.kb_id is None) == (TaskStatus.CANCELED, False)
        assert last.event is not None, "what is looked up has no number: there was no stream"
        async with contextlib.aclosing(client.watch(kb_id=last.kb_id, after=last.event - 1)) as again:
            assert (await anext(again)).event == last.event


async def test_over_rest_a_header_makes_any_creation_repeatable(world: World) -> None:
    async def create(path: str, task: Any, key: str) -> Any:
        headers = {"Authorization": f"Bearer {world.token}", "X-Namespace": world.place.namespace}
        return await call_service(
            "task-manager-service", "POST", path, json=task, headers=headers, idempotency_key=key, url=world.gateway.url
        )

    task, keys = body(suspend=True), [uuid.uuid4().hex for _ in range(3)]
    first, again, other = [await create("/api/v1/tasks", task, key) for key in (keys[0], keys[0], keys[1])]
    assert first["uid"] == again["uid"] != other["uid"]
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=world.token) as client:
        await client.cancel(first["id"])
        await client.wait(first["id"], timeout=MINUTE)
    first, again = [await create(f"/api/v1/tasks/{first['id']}/retry", None, keys[2]) for _ in range(2)]
    assert first["uid"] == again["uid"]
    with pytest.raises(ServiceRefused, match="Idempotency-Key"):
        await create("/api/v1/tasks", task, "k" * 129)


async def test_over_rest_many_wait_at_once_and_leave_room_for_others(world: World) -> None:
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=world.token) as client:
        submitted = await client.submit(body(suspend=True))
        seen: list[TaskUpdate] = []
        waiting = [asyncio.create_task(client.wait(submitted.id, timeout=MINUTE, on_change=seen.append)) for _ in range(120)]
        await until("all wait", lambda: asyncio.sleep(0, len(seen) >= len(waiting)))
        await client.cancel(submitted.id)
        assert {task.status for task in await asyncio.gather(*waiting)} == {TaskStatus.CANCELED}


@pytest.mark.parametrize("token", [None, "nonsense"])
async def test_over_rest_a_caller_without_a_valid_token_is_refused(world: World, token: str | None) -> None:
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=token) as client:
        with pytest.raises(TaskForbidden):
            await client.submit(body())
        with pytest.raises(TaskForbidden):
            await anext(client.watch())


async def test_over_rest_a_caller_without_the_right_is_refused(world: World) -> None:
    token = await account(world.place.kube, world.place.namespace, f"reader-{uuid.uuid4().hex[:6]}", verbs=("get",))
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=token) as client:
        with pytest.raises(TaskForbidden):
            await client.submit(body())
        with pytest.raises(TaskNotFound):
            await client.get("absent")


async def test_over_kubernetes_names_may_be_chosen_and_show_who_wrote(world: World, kubectl: Kubectl) -> None:
    client, name = AsyncTaskClient.over_kubernetes(world.api(), namespace=world.place.namespace), "one"
    await client.submit(body("kb-name", suspend=True), name=name)
    assert (await client.submit(body("kb-name", suspend=True), name=name)).replayed
    with pytest.raises(TaskConflict, match="another spec"):
        await client.submit(body("kb-other", suspend=True), name=name)
    await client.cancel(name)
    found = kubectl.get("ptask", name, "-n", world.place.namespace, "--show-managed-fields")
    managed = {one["manager"] for one in found["metadata"]["managedFields"]}
    assert "processing-tasks-client" in managed
    assert not {one for one in managed if one.lower().startswith(("python", "openapi", "swagger"))}
    assert found["spec"]["cancel"] is True


async def test_over_kubernetes_the_kubeconfig_of_the_environment_is_used(world: World) -> None:
    script = (
        "import sys; from service_client import TaskClient\n"
        "task = TaskClient.from_environment(namespace=sys.argv[1]).submit({'type': 'health_check', 'suspend': True})\n"
        "print(TaskClient.over_kubernetes(namespace=sys.argv[1]).get(task.id).task_type)"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, world.place.namespace],
        env={
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("crds", "client")),
            "KUBECONFIG": str(world.cluster.kubeconfig),
            "PATH": "",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "health_check"), done.stderr


async def test_over_rest_waiting_outlasts_a_gateway_that_is_away(world: World) -> None:
    async with AsyncTaskClient.over_rest(world.gateway.url, namespace=world.place.namespace, token=world.token) as client:
        submitted = await client.submit(body(suspend=True))
        seen: list[TaskUpdate] = []
        waiting = asyncio.create_task(client.wait(submitted.id, timeout=MINUTE, on_change=seen.append))
        await until("it waits", lambda: asyncio.sleep(0, bool(seen)))
        world.gateway.kill()
        await world.place.edit(submitted.id, cancel=True)
        await world.place.wait_for("Canceled", name=submitted.id)
        assert not waiting.done()
        world.gateway.start()
        await world.gateway.ready()
        assert (await waiting).status is TaskStatus.CANCELED


async def test_over_kubernetes_waiting_outlasts_an_api_server_that_is_away(world: World, folder: Path) -> None:
    proxy = Proxy(world.place.kube.access, folder=folder)
    await proxy.start()
    try:
        api: Any = kubernetes.config.new_client_from_config(str(proxy.kubeconfig))
        api.configuration.retries = 0
        async with AsyncTaskClient.over_kubernetes(
            kubernetes.client.CustomObjectsApi(api), namespace=world.place.namespace
        ) as client:
            submitted = await AsyncTaskClient.over_kubernetes(world.api(), namespace=world.place.namespace).submit(
                body(suspend=True)
            )
            seen: list[TaskUpdate] = []
            waiting = asyncio.create_task(client.wait(submitted.id, timeout=MINUTE, on_change=seen.append))
            await until("it waits", lambda: asyncio.sleep(0, bool(seen)))
            refused: list[str] = []

            def refuse(method: str, path: str) -> web.Response:
                refused.append(path)
                return web.Response(status=503)

            proxy.refuse = refuse
            proxy.cut_watches()
            await world.place.edit(submitted.id, cancel=True)
            await world.place.wait_for("Canceled", name=submitted.id)
            await until("it has been refused", lambda: asyncio.sleep(0, len(refused) > 2))
            assert not waiting.done()
            proxy.refuse = lambda method, path: None
            assert (await waiting).status is TaskStatus.CANCELED
    finally:
        await proxy.aclose()


async def test_the_end_of_a_task_is_told_to_the_receiver_of_the_examples(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, gateway, operator, signature, receiver: nothing of it is played but the pod."""
    monkeypatch.syspath_prepend(str(ROOT / "examples/receivers"))
    module, inbox = importlib.import_module("aiohttp_receiver"), importlib.import_module("inbox").Inbox()
    runner = web.AppRunner(module.make_app(CallbackReceiver(SECRETS), inbox), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/v1/tasks/{{task_id}}/callback"
        callback = {"url": url, "secret_ref": {"name": "processing-task-callbacks", "key": "secret"}}
        async with AsyncTaskClient.over_rest(
            world.gateway.url, namespace=world.place.namespace, token=world.token
        ) as client:
            submitted = await client.submit(body(callback=callback))
            await until("it is told", lambda: asyncio.sleep(0, inbox.documents()), seconds=30)
            assert inbox.documents() == [(submitted.id, "completed", 7)]

            async def delivered() -> Any:
                told = (await client.get(submitted.id)).callback
                return told is not None and (told.state, told.attempts, told.status_code) == ("delivered", 1, 200)

            await until("its status says so", delivered, seconds=20)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("transport", ["rest", "kubernetes"])
async def test_nobody_there_is_said_so(world: World, transport: str) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    if transport == "rest":
        client = AsyncTaskClient.over_rest(nowhere)
    else:
        configuration = kubernetes.client.Configuration(host=nowhere)
        configuration.retries = 0
        api = kubernetes.client.CustomObjectsApi(kubernetes.client.ApiClient(configuration))
        client = AsyncTaskClient.over_kubernetes(api, namespace="n")
    async with client:
        with pytest.raises(TaskUnavailable, match="cannot read task t: "):
            await client.get("t")
