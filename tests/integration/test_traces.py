"""Traces from a real PostgreSQL: spans to a collector that is away in between, and what callbacks and events carry."""

import base64
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from devstack import tools
from task_contract.names import API_VERSION, KIND, TRACEPARENT_ANNOTATION
from task_operator.metrics import Metrics
from task_operator.projection import Database
from task_operator.spans import Sampler, span_id
from task_operator.traces import TraceSink
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import finished, manifest, processing
from tests.support.publishing import begun, caught_up, publishing
from tests.support.servers import free_port, serving

pytestmark = pytest.mark.integration

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = f"00-{TRACE}-00f067aa0ba902b7-01"


@dataclass
class Collector:
    """Takes OTLP over HTTP, and holds each request against the protocol's own messages."""

    port: int = field(default_factory=free_port)
    answers: Iterator[int] = field(default_factory=lambda: iter(()))
    """What the next requests are answered with; after these all are taken."""
    requests: list[Any] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append((request.content_type, request.headers.get("authorization"), _read(body)))
        status = next(self.answers, 200)
        if status == 200:
            self.spans += [span for one in body["resourceSpans"] for scope in one["scopeSpans"] for span in scope["spans"]]
        return web.json_response({}, status=status)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()


def _read(body: dict[str, Any]) -> ExportTraceServiceRequest:
    """Parse a request as a collector does: ids are hexadecimal in OTLP's JSON, where Protobuf's own has base64."""

    def hexadecimal(value: Any) -> Any:
        if isinstance(value, list):
            return [hexadecimal(one) for one in value]
        if not isinstance(value, dict):
            return value
        ids = {"traceId", "spanId", "parentSpanId"}
        return {
            key: base64.b64encode(bytes.fromhex(one)).decode() if key in ids else hexadecimal(one)
            for key, one in value.items()
        }

    return json_format.ParseDict(hexadecimal(body), ExportTraceServiceRequest())


@contextlib.contextmanager
def collector_before(receiver: Collector, folder: Path) -> Iterator[str]:
    """Run a real OpenTelemetry Collector that passes on what it takes; yield its endpoint."""
    port = free_port()
    configuration = {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{port}"}}}},
        "exporters": {"otlphttp": {"endpoint": receiver.endpoint, "encoding": "json", "compression": "none"}},
        "service": {
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["otlphttp"]}},
            "telemetry": {"metrics": {"level": "none"}},
        },
    }
    (folder / "otelcol.json").write_text(json.dumps(configuration))  # JSON is YAML
    command = [str(tools.otelcol()), f"--config=file:{folder / 'otelcol.json'}"]
    with serving(command, port=port, log=folder / "otelcol.log"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    database = Database(url, metrics=Metrics())
    await database.warm_up()
    yield database
    await database.aclose()


def _sink(database: Database, endpoint: str, *, ratio: float = 1.0) -> TraceSink:
    return TraceSink(
        database,
        endpoint=endpoint,
        headers={"authorization": "Bearer secret"},
        sampler=Sampler(ratio),
        instance="test",
        version="1.0",
    )


async def _live(database: Database, *, given: str | None = None) -> str:
    """Have a task live and end; return its uid."""
    uid = str(uuid.uuid4())
    for version, status in enumerate((None, processing(), finished()), start=1):
        made = manifest(name=f"task-{uid[:8]}", **({} if status is None else {"status": status}))
        made["metadata"] |= {"resourceVersion": str(version), "uid": uid}
        if given is not None:
            made["metadata"]["annotations"] = {TRACEPARENT_ANNOTATION: given}
        database.submit(made)
        await database._flush()
    return uid


async def test_a_collector_gets_the_spans_of_tasks_and_attempts(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    collector = Collector()
    async with collector.at_work(), publishing(url, _sink(database, collector.endpoint)):
        await begun(sql, "traces")
        traced, other = await _live(database, given=GIVEN), await _live(database)
        await _live(database, given=GIVEN[:-2] + "00")  # not sampled by its caller
        await caught_up(sql, "traces")
    names = {(span["traceId"], span["name"]) for span in collector.spans}
    own = other.replace("-", "")
    assert names == {(trace, name) for trace in (TRACE, own) for name in ("task document_processing", "attempt 1")}
    [task] = [span for span in collector.spans if span["spanId"] == span_id(traced)]
    assert task["parentSpanId"] == "00f067aa0ba902b7"
    content_type, authorization, parsed = collector.requests[0]
    assert (content_type, authorization) == ("application/json", "Bearer secret")
    [resource] = parsed.resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes} == {
        "service.name": "processing-tasks",
        "service.instance.id": "test",
        "service.version": "1.0",
    }
    assert resource.scope_spans[0].spans[0].end_time_unix_nano > resource.scope_spans[0].spans[0].start_time_unix_nano


@pytest.mark.timeout(600)  # the first one builds it
async def test_a_real_collector_takes_the_spans_as_they_are(
    database: Database, url: str, sql: "asyncpg.Connection[Any]", tmp_path: Path
) -> None:
    behind = Collector()
    async with behind.at_work():
        with collector_before(behind, tmp_path) as endpoint:
            async with publishing(url, _sink(database, endpoint)):
                await begun(sql, "traces")
                uid = await _live(database, given=GIVEN)

                async def told() -> bool:
                    return len(behind.spans) >= 2

                await until("it has passed on the spans", told, seconds=60)
    spans = {span["name"]: span for span in behind.spans}
    task, attempt = spans["task document_processing"], spans["attempt 1"]
    assert (task["traceId"], task["parentSpanId"], task["spanId"]) == (TRACE, "00f067aa0ba902b7", span_id(uid))
    assert (attempt["traceId"], attempt["parentSpanId"]) == (TRACE, task["spanId"])
    assert int(task["endTimeUnixNano"]) > int(task["startTimeUnixNano"])
    assert {"key": "task.uid", "value": {"stringValue": uid}} in task["attributes"]


async def test_a_collector_that_was_away_gets_all_spans_and_one_that_refuses_holds_nothing_up(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    collector = Collector(answers=iter((503, 429, 200, 400)))
    async with publishing(url, _sink(database, collector.endpoint)):
        await begun(sql, "traces")
        first = await _live(database)
        async with collector.at_work():
            await caught_up(sql, "traces")
            refused = await _live(database)
            await caught_up(sql, "traces")
            last = await _live(database)
            await caught_up(sql, "traces")
    ids = [span["spanId"] for span in collector.spans]
    assert [span_id(uid) in ids for uid in (first, refused, last)] == [True, False, True]
    assert len(collector.requests) == 5


async def test_a_trace_goes_from_the_annotation_of_a_real_task_into_its_spans(
    place: Place, process: Callable[..., OperatorProcess], url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    collector = Collector()
    async with (
        collector.at_work(),
        Kubelet(place).at_work(),
        process(OPERATOR_POSTGRES_URL=url, OPERATOR_TRACES_ENDPOINT=collector.endpoint).at_work(),
    ):
        body: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND, "spec": {"type": "health_check"}}
        body["metadata"] = {"name": "handbook", "annotations": {TRACEPARENT_ANNOTATION: GIVEN}}
        await place.kube.do("POST", place.path("processingtasks"), body)
        await place.wait_for("Completed")

        async def told() -> bool:
            return len(collector.spans) >= 2

        await until("its spans are sent", told, seconds=60)
    assert {span["traceId"] for span in collector.spans} == {TRACE}
    assert await sql.fetchval("SELECT traceparent FROM tasks") == GIVEN
    assert json.dumps(collector.spans).count("00f067aa0ba902b7") == 1
