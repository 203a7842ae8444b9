"""The client of tasks over REST, without a server: what is asked, and what is made of the answers."""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service_client import (
    AsyncTaskClient,
    BatchItem,
    CallbackReceiver,
    CallbackRefused,
    CallConfig,
    Submitted,
    Task,
    TaskClient,
    TaskClientError,
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
    TokenFile,
)
from service_client.breaker import Breakers
from service_client.programs import Answer, Emit, NoAnswer, NotSent, Program, call
from service_client.rest import LOOK, RestTransport
from service_client.sse import EventParser, ServerEvent
from service_client.transport import Page, Watched
from service_client.views import Order, TaskFilter
from task_contract.models import Payload, Result, Spec, TaskType
from task_contract.webhooks import sign
from tests.support.programs import Script

BODY = {"task_type": "document_processing", "kb_id": "kb", "payload": {"file_path": "a.pdf", "chunk_size": 500}}
MANIFEST = {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "a.pdf", "chunkSize": 500}}
SPEC = Spec(type=TaskType.DOCUMENT_PROCESSING, kb_id="kb", payload=Payload(file_path="a.pdf", chunk_size=500))
ACCEPTED = {"id": "t", "task_id": "t", "namespace": "n", "uid": "u", "status": "queued", "links": {}}


def answer(status: int, body: Any = None, **headers: str) -> Answer:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Answer(status, {"content-type": "application/json"} | named, b"" if body is None else json.dumps(body).encode())


def view(status: str = "queued", **given: Any) -> dict[str, Any]:
    return {"id": "t", "task_id": "t", "namespace": "n", "uid": "u", "status": status, **given}


def transport(script: Script, **options: Any) -> RestTransport:
    given: dict[str, Any] = {"url": "http://gateway", "namespace": "n", "clock": script.clock, "chance": lambda: 1.0}
    return RestTransport(**(given | {"breakers": Breakers(script.clock)} | options))


# -------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("task", [BODY, MANIFEST, SPEC], ids=["body of REST", "manifest", "model"])
def test_a_task_may_be_described_in_three_ways_and_is_the_same(task: Any) -> None:
    order = Order.of(task, key="k")
    assert order.body("n") == BODY | {"idempotency_key": "k", "namespace": "n"}
    assert order.spec() == MANIFEST


def test_a_body_goes_to_the_gateway_as_it_is_so_that_it_may_be_newer_than_the_client() -> None:
    newer = BODY | {"of_a_later_release": {"a": 1}, "timeout": "10m"}
    assert Order.of(newer, key="k").body(None) == newer | {"idempotency_key": "k"}


def test_what_stands_around_a_task_may_be_in_its_body() -> None:
    task = BODY | {"labels": {"a": "1"}, "idempotency_key": "mine", "namespace": "other"}
    order = Order.of(task, key="k", labels={"a": "2", "b": "3"})
    assert (order.key, order.labels, order.namespace) == ("mine", {"a": "1", "b": "3"}, "other")
    assert order.spec() == MANIFEST


@pytest.mark.parametrize(
    ("task", "field"),
    [
        (BODY | {"prio": "high"}, "prio"),
        (BODY | {"payload": {"chunk_size": 1}}, "payload.chunk_size"),
        (BODY | {"payload": {"chunkSize": 500}}, "payload.chunkSize"),
        (BODY | {"task_type": "cooking"}, "task_type"),
        (MANIFEST | {"timeout": "soon"}, "timeout"),
    ],
)
def test_a_bad_field_is_named(task: dict[str, Any], field: str) -> None:
    with pytest.raises(TaskRefused, match=field) as caught:
        Order.of(task, key="k").spec()
    assert [one.field for one in caught.value.fields] == [field]


# --------------------------------------------------------------------------------------------------------------- calls


def test_a_task_that_nobody_answered_for_is_asked_for_again_under_the_same_key() -> None:
    script = Script([NoAnswer("cut off"), answer(202, ACCEPTED, idempotent_replayed="true")])
    submitted = script.run(transport(script).submit(Order.of(BODY, key="k1")))
    assert submitted == Submitted(id="t", namespace="n", uid="u", replayed=True)
    bodies = [json.loads(request.body or b"") for request in script.requests]
    assert bodies[0] == bodies[1]
    assert bodies[0]["idempotency_key"] == "k1"
    assert script.requests[0].url == "http://gateway/api/v1/tasks"


@pytest.mark.parametrize("token", ["secret", lambda: "secret"], ids=["text", "function"])
def test_a_token_goes_with_every_request(token: Any) -> None:
    script = Script([answer(200, view())])
    script.run(transport(script, token=token).get("t"))
    assert script.requests[0].headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(script.requests[0])


def test_a_token_file_is_read_again_each_minute(tmp_path: Any) -> None:
    file, now = tmp_path / "token", [0.0]
    file.write_text("one\n")
    token = TokenFile(file, clock=lambda: now[0])
    assert token() == "one"
    file.write_text("two\n")
    assert token() == "one"
    now[0] = 60
    assert token() == "two"


def test_names_of_tasks_are_no_paths() -> None:
    script = Script([answer(200, view())])
    script.run(transport(script).get("../a b?c"))
    assert script.requests[0].url == "http://gateway/api/v1/tasks/..%2Fa%20b%3Fc?namespace=n"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, TaskRefused),
        (401, TaskForbidden),
        (403, TaskForbidden),
        (404, TaskNotFound),
        (409, TaskConflict),
        (413, TaskRefused),
        (422, TaskRefused),
        (429, TaskUnavailable),
        (500, TaskUnavailable),
        (503, TaskUnavailable),
        (302, TaskUnavailable),
    ],
)
def test_a_refusal_is_an_error_about_the_task(status: int, kind: type[TaskClientError]) -> None:
    problem = {"detail": "cannot do it: because", "errors": [{"field": "payload.chunk_size", "message": "m"}]}
    script = Script([answer(status, problem, retry_after="3")])
    with pytest.raises(kind, match="cannot do it: because") as caught:
        script.run(transport(script, config=CallConfig(retry_times=0)).get("t"))
    assert type(caught.value) is kind
    assert [one.field for one in caught.value.fields] == ["payload.chunk_size"]
    assert caught.value.retry_after == 3


@pytest.mark.parametrize(
    "outcome",
    [NotSent("refused"), answer(200, {"a": 1}), answer(200, [1]), answer(200), Answer(200, {}, b"<p>")],
    ids=str,
)
def test_what_is_no_answer_of_a_gateway_says_so(outcome: Any) -> None:
    script = Script([outcome])
    with pytest.raises(TaskUnavailable, match="cannot read task t: "):
        script.run(transport(script, config=CallConfig(retry_times=0)).get("t"))


def test_the_name_is_not_chosen_over_rest_and_a_client_is_for_one_namespace() -> None:
    script = Script([])
    with pytest.raises(TaskRefused, match="give idempotency_key instead"):
        script.run(transport(script).submit(Order.of(BODY, key="k", name="mine")))
    with pytest.raises(TaskRefused, match="is for namespace n, not for other"):
        script.run(transport(script).submit(Order.of(BODY | {"namespace": "other"}, key="k")))


def test_of_a_batch_each_task_has_an_outcome_in_its_place() -> None:
    refused = {"status": 422, "detail": "cannot create the task: kb_id", "errors": [{"field": "kb_id", "message": "m"}]}
    items = [
        {"index": 0, "status": "accepted", "task": ACCEPTED, "problem": None},
        {"index": 1, "status": "refused", "task": None, "problem": refused},
    ]
    script = Script([answer(202, {"accepted": 1, "refused": 1, "items": items})])
    orders = [Order.of(BODY, key="a"), Order.of(BODY | {"namespace": "x"}, key="b"), Order.of(BODY, key="c")]
    found = script.run(transport(script).submit_batch(orders))
    assert found is not None
    assert [item.index for item in found] == [0, 1, 2]
    assert found[0].task is not None
    assert found[0].task.id == "t"
    assert isinstance(found[1].error, TaskRefused)
    assert isinstance(found[2].error, TaskRefused)
    assert found[2].error.fields[0].field == "kb_id"
    assert [one["idempotency_key"] for one in json.loads(script.requests[0].body or b"")] == ["a", "c"]


@pytest.mark.parametrize("outcome", [NotSent("refused"), answer(202, {"items": []}), answer(202, 5)], ids=str)
def test_a_batch_that_is_not_answered_is_an_error_of_each_task(outcome: Any) -> None:
    script = Script([outcome])
    orders = [Order.of(BODY, key="a"), Order.of(BODY, key="b")]
    found = script.run(transport(script, config=CallConfig(retry_times=0)).submit_batch(orders))
    assert found is not None
    assert [type(item.error) for item in found] == [TaskUnavailable] * 2


def test_a_batch_too_large_for_a_body_goes_in_parts() -> None:
    def items(number: int) -> list[dict[str, Any]]:
        return [{"index": one, "status": "accepted", "task": ACCEPTED} for one in range(number)]

    large = BODY | {"payload": {"file_path": "a", "metadata": {"a": "x" * 1_500_000}}}
    script = Script([answer(202, {"items": items(2)}), answer(202, {"items": items(1)})])
    found = script.run(transport(script).submit_batch([Order.of(large, key=str(one)) for one in range(3)]))
    assert found is not None
    assert all(item.task for item in found)
    assert len(script.requests) == 2


def test_filters_of_a_list_go_into_the_query() -> None:
    script = Script([answer(200, {"items": [view()], "next_cursor": "c2"})])
    wanted = TaskFilter(status=TaskStatus.FAILED, kb_id="kb")
    page = script.run(transport(script).page(wanted, limit=7, cursor="c1"))
    assert page is not None
    assert (page.items[0].id, page.cursor) == ("t", "c2")
    assert script.requests[0].url == "http://gateway/api/v1/tasks?namespace=n&status=failed&kb_id=kb&limit=7&cursor=c1"


def test_a_view_of_a_later_gateway_is_read() -> None:
    task = Task.model_validate(view("completed", result={"milvus_count": 3, "new": 1}, new={}, error=None))
    assert task.result is not None
    assert task.result.milvus_count == 3


# ------------------------------------------------------------------------------------------------- above the transport


class Away:
    """A transport without a server: what it is asked is kept, and answered by the number of the task."""

    batch = 2

    def __init__(self, *statuses: str) -> None:
        self.orders: list[Order] = []
        self.parts: list[int] = []
        self.pages: list[tuple[int, str | None]] = []
        self.statuses = list(statuses)

    def submit(self, order: Order) -> Program[Submitted]:
        self.orders.append(order)
        return (yield from call(lambda: Submitted(id=f"t{len(self.orders)}", namespace="n", uid="u")))

    def submit_batch(self, orders: Sequence[Order]) -> Program[list[BatchItem]]:
        self.parts.append(len(orders))
        tasks = []
        for order in orders:
            tasks.append((yield from self.submit(order)))
        return [BatchItem(index, task=task) for index, task in enumerate(tasks)]

    def get(self, task_id: str) -> Program[Task]:
        return (yield from call(lambda: Task.model_validate(view(self.statuses[-1], id=task_id))))

    def cancel(self, task_id: str) -> Program[Task]:
        return self.get(task_id)

    def retry(self, task_id: str, *, key: str) -> Program[Submitted]:
        return self.submit(Order.of(BODY, key=key))

    def page(self, wanted: TaskFilter, *, limit: int, cursor: str | None) -> Program[Page]:
        self.pages.append((limit, cursor))
        tasks = [Task.model_validate(view()) for _ in range(limit)]
        return (yield from call(lambda: Page(tasks, cursor="next" if len(self.pages) < 3 else None)))

    def updates(self, watched: Watched) -> Program[None]:
        for status in self.statuses:
            yield Emit(TaskUpdate.model_validate(update(status)))


def test_a_batch_of_any_size_goes_in_parts_and_keeps_its_places() -> None:
    away = Away()
    tasks: list[Any] = [BODY, {"labels": 5}, BODY, BODY, BODY | {"idempotency_key": "mine"}, BODY]
    items = TaskClient(away).submit_batch(iter(tasks))
    assert away.parts == [2, 2, 1]
    assert [item.index for item in items] == [0, 1, 2, 3, 4, 5]
    assert [item.task.id if item.task else None for item in items] == ["t1", None, "t2", "t3", "t4", "t5"]
    assert isinstance(items[1].error, TaskRefused)
    keys = [order.key for order in away.orders]
    assert keys[3] == "mine"
    assert len({*keys}) == 5
    assert TaskClient(away).submit_batch([]) == []


def test_every_submission_has_a_key() -> None:
    away = Away()
    client = TaskClient(away)
    client.submit(BODY, idempotency_key="mine")
    client.submit(BODY)
    client.submit(BODY)
    client.retry("t1")
    assert away.orders[0].key == "mine"
    assert len({order.key for order in away.orders}) == 4


@pytest.mark.parametrize(
    ("limit", "pages", "count"),
    [(None, [(100, None), (100, "next"), (100, "next")], 300), (150, [(100, None), (50, "next")], 150), (0, [], 0)],
)
def test_a_list_is_read_page_by_page_up_to_its_limit(
    limit: int | None, pages: list[tuple[int, str | None]], count: int
) -> None:
    away = Away()
    listed = TaskClient(away).list(limit=limit)
    assert away.pages == [], "nothing is read before it is asked for"
    assert (len(list(listed)), away.pages) == (count, pages)


def test_waiting_returns_the_task_or_says_how_far_it_was() -> None:
    seen: list[TaskUpdate] = []
    task = TaskClient(Away("queued", "completed")).wait("t", timeout=timedelta(minutes=1), on_change=seen.append)
    assert (task.status, [str(one.status) for one in seen]) == (TaskStatus.COMPLETED, ["queued", "completed"])
    for statuses, state in ((("queued", "processing"), "processing"), ((), "not known")):
        with pytest.raises(TaskTimeout, match=f"task t: it is {state} after 0:01:00; it goes on"):
            TaskClient(Away(*statuses)).wait("t", timeout=timedelta(minutes=1))


@pytest.mark.parametrize(
    ("status", "kind"),
    [("queued", TaskNotFinished), ("retrying", TaskNotFinished), ("failed", TaskFailed), ("canceled", TaskFailed)],
)
def test_a_result_is_that_of_a_completed_task(status: str, kind: type[TaskClientError]) -> None:
    assert TaskClient(Away("completed")).result("t") == Result()
    with pytest.raises(kind, match=status):
        TaskClient(Away(status)).result("t")


async def test_both_clients_do_the_same() -> None:
    """What the one has the other has, by the same names and arguments."""
    for name, method in vars(TaskClient).items():
        if name.startswith("_") or name == "close" or isinstance(method, classmethod):
            continue
        twin = getattr(AsyncTaskClient, name)
        assert [*inspect.signature(method).parameters] == [*inspect.signature(twin).parameters], name
    away = Away("completed")
    async with AsyncTaskClient(away) as client:
        assert (await client.submit(BODY)).id == "t1"
        assert (await client.wait("t", timeout=timedelta(minutes=1))).status is TaskStatus.COMPLETED
        assert len([one async for one in client.list(limit=5)]) == 5
        assert [str(one.status) async for one in client.watch("t")] == ["completed"]


# --------------------------------------------------------------------------------------------------------------- watch


def events(*said: dict[str, Any] | str) -> bytes:
    return b"".join(
        (
            one
            if isinstance(one, str)
            else (f"id: {one['event']}\n" if "event" in one else "") + f"data: {json.dumps(one)}\n\n"
        ).encode()
        for one in said
    )


def update(status: str, *, kind: str = "task", **given: Any) -> dict[str, Any]:
    return {"type": kind, "task_id": "t", "namespace": "n", "uid": "u", "status": status, **given}


STREAM = object()
"""A stream that was opened."""


def told(script: Script) -> list[tuple[str, int | None]]:
    return [(str(one.status), one.event) for one in script.emitted]


def test_a_watch_of_one_task_reads_its_state_once_the_stream_is_there_and_ends_with_its_end() -> None:
    script = Script(
        [STREAM, answer(200, view()), events(update("processing", event=4)), events(update("completed", event=5))]
    )
    script.run(transport(script).updates(Watched(task_id="t")))
    assert told(script) == [("queued", None), ("processing", 4), ("completed", 5)]
    opened, looked = script.requests
    assert opened.url == "http://gateway/api/v1/tasks/events?namespace=n&task_id=t"
    assert opened.headers["Accept"] == "text/event-stream"
    assert "/api/v1/tasks/t?" in looked.url


def test_a_watch_goes_on_behind_what_it_has_seen_and_tells_nothing_twice() -> None:
    script = Script(
        [
            STREAM,
            events(update("queued", kind="snapshot"), update("processing", kind="snapshot", uid="v", event=7)),
            b"",
            STREAM,
            events(update("processing", event=7), update("processing", event=8)) + b"id: 9\nevent: ready\ndata: {}\n\n",
            NoAnswer("cut off"),
            NotSent("refused"),
            STREAM,
            events(update("completed", event=10)),
        ]
    )
    script.until = lambda: len(script.emitted) == 4
    script.run(transport(script).updates(Watched(kb_id="kb")))
    assert told(script) == [("queued", None), ("processing", 7), ("processing", 8), ("completed", 10)]
    assert [request.headers.get("Last-Event-ID") for request in script.requests] == [None, "7", "9", "9"]


def test_a_watch_may_begin_behind_a_number() -> None:
    script = Script([STREAM, events(update("completed", event=41))])
    script.until = lambda: bool(script.emitted)
    script.run(transport(script).updates(Watched(after=40)))
    assert script.requests[0].headers["Last-Event-ID"] == "40"


def test_numbers_that_begin_anew_are_followed() -> None:
    script = Script([STREAM, events(update("queued", kind="snapshot", event=3, reset=True), update("completed", event=4))])
    script.until = lambda: len(script.emitted) == 2
    script.run(transport(script).updates(Watched(after=900)))
    assert told(script) == [("queued", 3), ("completed", 4)]


@pytest.mark.parametrize(
    "outcomes",
    [
        [answer(404)],
        [answer(503)],
        [answer(429)],
        [NotSent("refused")] * 3,
        [STREAM, answer(200, view()), b"", *[NoAnswer("x")] * 3],
    ],
    ids=["no such path", "no PostgreSQL", "too many", "refused", "cut off"],
)
def test_where_there_is_no_stream_the_task_is_looked_at_again_and_again(outcomes: list[Any]) -> None:
    looks = [answer(200, view()), answer(200, view()), answer(503), answer(200, view("completed"))]
    script = Script([*outcomes, *looks])
    script.run(transport(script, config=CallConfig(retry_times=0)).updates(Watched(task_id="t")))
    assert told(script) == [("queued", None), ("completed", None)]
    assert script.outcomes == []


def test_after_a_while_a_stream_is_tried_again() -> None:
    script = Script([answer(503)])
    script.outcomes += [answer(200, view())] * 30 + [STREAM, answer(200, view()), events(update("completed", event=1))]
    script.run(transport(script).updates(Watched(task_id="t")))
    assert told(script) == [("queued", None), ("completed", 1)]


def test_many_tasks_are_looked_at_by_their_list() -> None:
    script = Script([answer(503), answer(200, {"items": [view()], "next_cursor": None})])
    script.outcomes += [answer(200, {"items": [view("completed"), view(uid="v")], "next_cursor": None})]
    script.until = lambda: len(script.emitted) == 3
    script.run(transport(script).updates(Watched(kb_id="kb")))
    assert told(script) == [("queued", None), ("completed", None), ("queued", None)]


@pytest.mark.parametrize(("status", "kind"), [(401, TaskForbidden), (403, TaskForbidden), (422, TaskRefused)])
def test_a_watch_that_is_refused_ends(status: int, kind: type[TaskClientError]) -> None:
    script = Script([answer(status, {"detail": "cannot watch: because"})])
    with pytest.raises(kind):
        script.run(transport(script).updates(Watched()))


@pytest.mark.parametrize(
    "outcomes",
    [
        [answer(404, {"detail": "cannot find task t"})],
        [answer(200, view("processing", deleted_at="2026-01-31T09:30:00Z"))],
        [answer(200, view()), events(update("canceled", reason="Deleted", event=4))],
    ],
    ids=["never was", "archived", "deleted"],
)
def test_a_task_that_is_not_there_ends_its_watch(outcomes: list[Any]) -> None:
    script = Script([STREAM, *outcomes])
    with pytest.raises(TaskNotFound):
        script.run(transport(script).updates(Watched(task_id="t")))


def test_an_event_that_never_comes_is_not_waited_for() -> None:
    script = Script([STREAM, answer(200, view()), b":\n\n", b":\n\n", answer(200, view("completed"))], seconds=LOOK / 2)
    script.run(transport(script).updates(Watched(task_id="t")))
    assert told(script) == [("queued", None), ("completed", None)]


def test_a_look_that_fails_ends_no_watch() -> None:
    config = CallConfig(retry_times=0)
    script = Script([STREAM, answer(503), STREAM, answer(200, view()), events(update("completed", event=1))])
    script.run(transport(script, config=config).updates(Watched(task_id="t")))
    assert told(script) == [("queued", None), ("completed", 1)]


def test_a_look_takes_no_longer_than_the_watch() -> None:
    script = Script([STREAM, answer(200, view()), *[b":\n\n"] * 50], seconds=1)
    script.run(transport(script).updates(Watched(task_id="t", until=script.now + 5)))
    assert script.requests[1].seconds <= 5


def test_a_watch_ends_at_its_time() -> None:
    script = Script([STREAM, answer(200, view()), *[b":\n\n"] * 50], seconds=1)
    script.run(transport(script).updates(Watched(task_id="t", until=script.now + 10)))
    assert script.now <= 1011
    assert script.requests[0].seconds == 10


# ------------------------------------------------------------------------------------------------- answers of any kind

KEYS = [
    "id",
    "items",
    "index",
    "task",
    "problem",
    "status",
    "errors",
    "field",
    "detail",
    "next_cursor",
    "type",
    "event",
    "uid",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=15,
)
ANSWERS = st.builds(
    Answer,
    status=st.sampled_from([200, 202, 204, 301, 404, 422, 429, 503]),
    headers=st.fixed_dictionaries({"content-type": st.sampled_from(["application/json", "text/html"])}),
    body=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20),
)
CALLS: list[Callable[[RestTransport], Program[Any]]] = [
    lambda rest: rest.get("t"),
    lambda rest: rest.submit(Order.of(BODY, key="k")),
    lambda rest: rest.submit_batch([Order.of(BODY, key="k")]),
    lambda rest: rest.cancel("t"),
    lambda rest: rest.page(TaskFilter(), limit=1, cursor=None),
]


@given(answered=ANSWERS, asked=st.sampled_from(CALLS))
@settings(max_examples=50)
def test_whatever_is_answered_the_error_is_one_of_ours(answered: Answer, asked: Callable[[RestTransport], Any]) -> None:
    script = Script([answered])
    with contextlib.suppress(TaskClientError):
        script.run(asked(transport(script, config=CallConfig(retry_times=0))))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000])
def test_an_answer_that_is_nested_without_end_is_none(body: bytes) -> None:
    script = Script([Answer(status, {"content-type": "application/json"}, body) for status in (200, 422)])
    for kind in (TaskUnavailable, TaskRefused):
        with pytest.raises(kind):
            script.run(transport(script).get("t"))


@given(said=JSON, number=st.text(max_size=5) | st.integers().map(str) | st.just("9" * 5000))
@settings(max_examples=50)
def test_whatever_a_stream_says_a_watch_goes_on(said: Any, number: str) -> None:
    text = f"id: {number}\ndata: {json.dumps(said)}\n\n".encode()
    script = Script([STREAM, text, events(update("completed", event=2**62))])
    script.until = lambda: any(one.event == 2**62 for one in script.emitted) or not script.outcomes
    script.run(transport(script).updates(Watched()))


@given(chunks=st.lists(st.binary(max_size=30), max_size=8))
@settings(max_examples=50)
def test_bytes_of_any_kind_are_the_same_events_in_one_piece(chunks: list[bytes]) -> None:
    def parsed(pieces: Sequence[bytes]) -> list[ServerEvent]:
        parser = EventParser()
        return [event for piece in pieces for event in parser.feed(piece)]

    assert parsed(chunks) == parsed([b"".join(chunks)])


# -------------------------------------------------------------------------------------------------- server-sent events

SEPARATORS = "before\u2028between\u0085after"
RAW = (
    b"\xef\xbb\xbf: a comment\r\nretry: 1000\r\n\r\n"
    b"id: 1\ndata: one\n\n"
    b"event: ready\rdata:two\rdata: lines\r\r"
    b"data\n\n"
    b"id: a\0b\nunknown: field\ndata: " + SEPARATORS.encode() + b"\n\n"
    b"event: nothing to say\n\n"
    b"data: not ended"
)
PARSED = [
    ServerEvent("one", id="1"),
    ServerEvent("two\nlines", kind="ready", id="1"),
    ServerEvent("", id="1"),
    ServerEvent(SEPARATORS, id="1"),
]


def chunked(size: int) -> Iterator[bytes]:
    for first in range(0, len(RAW), size):
        yield RAW[first : first + size]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_their_bytes_come(size: int) -> None:
    parser = EventParser()
    assert [event for chunk in chunked(size) for event in parser.feed(chunk)] == PARSED


def test_a_line_without_end_is_given_up() -> None:
    parser = EventParser()
    with pytest.raises(ValueError, match="has no end"):
        list(parser.feed(b"data: " + b"x" * 2**21))


# ----------------------------------------------------------------------------------------------------------- callbacks

SECRET = "whsec_c2VjcmV0"
SAID = {
    "task_id": "t",
    "status": "completed",
    "result": {"chunks": 7},
    "completed_at": "2026-01-31T09:30:00Z",
    "namespace": "n",
    "uid": "u",
    "attempt": 1,
    "error": None,
    "of_a_later_release": 1,
}


def signed(body: bytes, *, key: bytes = b"secret", at: int = 1000) -> dict[str, str]:
    return {name.title(): value for name, value in sign(body, message_id="m1", timestamp=at, secrets=[key]).items()}


def test_a_signed_callback_is_an_event() -> None:
    body = json.dumps(SAID).encode()
    event = CallbackReceiver(SECRET, clock=lambda: 1010).receive(body, signed(body))
    assert (event.id, event.task_id, event.status, event.sent_at.timestamp()) == ("m1", "t", TaskStatus.COMPLETED, 1000)
    assert event.result is not None
    assert event.result.chunks == 7


def test_while_a_key_is_replaced_both_are_believed() -> None:
    body = json.dumps(SAID).encode()
    receiver = CallbackReceiver(f"{SECRET}\nolder\n", clock=lambda: 1010)
    assert receiver.receive(body, signed(body)) == receiver.receive(body, signed(body, key=b"older"))


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{}", {}, 401, "webhook-id"),
        (b"{}", signed(b"{ }"), 401, "none of the secrets"),
        (b"{}", signed(b"{}", key=b"other"), 401, "none of the secrets"),
        (b"{}", signed(b"{}", at=600), 401, "in the past"),
        (b"{}", signed(b"{}", at=1500), 401, "in the future"),
        (b"{}", signed(b"{}"), 422, "task_id"),
        (b"[]", signed(b"[]"), 422, "no JSON object"),
        (b"\xff", signed(b"\xff"), 422, "no JSON"),
        (b'{"task_id": "t", "status": "eaten"}', signed(b'{"task_id": "t", "status": "eaten"}'), 422, "status"),
    ],
)
def test_a_callback_that_is_not_to_be_believed_or_read_is_refused(
    body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    with pytest.raises(CallbackRefused, match=message) as caught:
        CallbackReceiver(SECRET, clock=lambda: 1000).receive(body, headers)
    assert caught.value.status == status


def test_a_receiver_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="secret is empty"):
        CallbackReceiver("\n")
