"""Nothing that is sent to the gateway ends it, or makes it answer what its document does not say."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.gateway_lab import GatewayProcess, document
from tests.support.operator_lab import Place

pytestmark = pytest.mark.integration

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
EXAMPLES = 25
"""Requests for each operation."""
FOREVER = ("/ws/tasks", "/api/v1/tasks/events")
"""Streams have tests of their own."""


@pytest.fixture
async def generous(gateway: Callable[..., GatewayProcess]) -> AsyncIterator[GatewayProcess]:
    """A gateway at work that trusts the network and never says that it is too much."""
    async with gateway(trusting=True, GATEWAY_RATE="100000", GATEWAY_BURST="1000000").at_work() as process:
        yield process


async def test_no_request_is_answered_by_a_fault_or_off_the_document(generous: GatewayProcess) -> None:
    there = (await generous.do("POST", "/api/v1/tasks", document()))["id"]
    operations = _operations(await generous.do("GET", "/openapi.json"))
    assert len(operations) >= 15
    for one in operations:
        await asyncio.to_thread(_try, one, generous.url, there)
    assert generous.exit_code() is None
    faults = [line for line in generous.lines() if line["event"] == "a handler failed"]
    assert faults == []


async def test_an_answer_off_the_document_would_be_noticed(generous: GatewayProcess) -> None:
    there = (await generous.do("POST", "/api/v1/tasks", document()))["id"]
    wrong = await generous.do("GET", "/openapi.json")
    wrong["components"]["schemas"]["TaskView"]["properties"]["attempt"] = {"type": "string"}
    [operation] = [one for one in _operations(wrong) if one.label == "GET /api/v1/tasks/{id}"]
    with pytest.raises(FailureGroup, match="Response violates schema"):
        await asyncio.to_thread(_try, operation, generous.url, there)


def _operations(document: dict[str, Any]) -> list[Any]:
    found = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations() if isinstance(one, Ok)]
    return [one for one in found if one.path not in FOREVER]


def _try(operation: Any, url: str, there: str) -> None:
    """Send requests of which about half are valid; about half of the paths name a task that is there."""
    chance = random.Random(7)

    def send(case: Any) -> None:
        if "id" in (case.path_parameters or {}) and chance.random() < 0.5:
            case.path_parameters["id"] = there
        case.call_and_validate(base_url=url, checks=list(CHECKS), timeout=20)

    quiet = settings(max_examples=EXAMPLES, phases=(Phase.generate,), database=None)
    patient = settings(quiet, suppress_health_check=list(HealthCheck))
    tried: Callable[[], None] = patient(given(operation.as_strategy())(send))  # type: ignore[no-untyped-call]  # hypothesis gives it no types
    tried()


LINES = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x00\xff\xfe\r\n\r\n",
    b"GET /api/v1/tasks\r\n\r\n",
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(5000)) + b"\r\n",
    b"GET /api/v1/tasks/\xff\xfe HTTP/1.1\r\nHost: x\r\nX-Namespace: \xff\xfe\r\nX-Request-Id: \xff\r\n\r\n",
    b"GET /api/v1/tasks?namespace=%ff%00&cursor=%f0%28%8c%28 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 4\r\n\r\nnope",
    b"GET http://other/health HTTP/1.1\r\nHost: y\r\n\r\n",
    b"CONNECT kubernetes.default:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /docs/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
)
"""What no client sends."""


async def test_bytes_that_are_no_request_end_nothing(generous: GatewayProcess, tmp_path: Path) -> None:
    chance = random.Random(7)
    noise = [chance.randbytes(chance.randint(1, 2000)) for _ in range(50)]
    cut = [line[: chance.randint(1, len(line))] for line in LINES for _ in range(3)]
    statuses = [await _raw(generous.port, data) for data in (*LINES, *noise, *cut)]
    assert {status for status in statuses if status} <= {
        b"200",
        b"400",
        b"403",
        b"404",
        b"405",
        b"411",
        b"413",
        b"414",
        b"415",
        b"422",
        b"431",
    }
    assert generous.exit_code() is None
    assert (await generous.ask("GET", "/health"))[1]["status"] == "ok"
    assert [line for line in generous.lines() if line["event"] == "a handler failed"] == []


async def _raw(port: int, data: bytes) -> bytes:
    """Send bytes and hang up; return the status of what is answered to them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 20)
    except (ConnectionError, OSError):
        return b""
    finally:
        writer.close()
    return answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/") else b""


async def test_deep_and_wide_bodies_are_refused(generous: GatewayProcess) -> None:
    for body in (
        b"[" * 100_000 + b"]" * 100_000,
        b'{"payload":' * 5000 + b"1" + b"}" * 5000,
        b'{"labels":{' + b",".join(b'"k%d":"v"' % number for number in range(10_000)) + b"}}",
        b'{"task_type":"\\ud800"}',
        b'{"task_type":NaN}',
        b'{"task_type":"document_processing","kb_id":"a\\u0000b"}',
        b"\xff\xfe{}",
        b'"' + b"x" * 200_000 + b'"',
        b"1e999999",
    ):
        for path in ("/api/v1/tasks", "/api/v1/tasks/batch"):
            status, _ = await generous.ask("POST", path, body)
            assert status in {400, 413, 422}, (path, body[:40])


# ------------------------------------------------------------------------------------------------ the platform's snippets

SUBMIT = '''
# 知识库服务中提交任务
async def process_document(kb_id: str, file_path: str):
    """提交文档处理任务"""
    task_request = {
        "task_type": "document_processing",
        "kb_id": kb_id,
        "priority": "high",
        "payload": {
            "file_path": file_path,
            "chunk_size": 1000,
            "chunk_overlap": 200,
            "processing_mode": "intelligent_split"
        }
    }
    
    # 调用任务管理器
    async with httpx.AsyncClient() as client:
        response = await client.post(
            "http://localhost:8084/api/v1/tasks",
            json=task_request
        )
        task_info = response.json()
        
    # 返回任务ID给前端
    return {
        "task_id": task_info["id"],
        "status": "submitted",
        "message": "文档处理任务已提交"
    }
'''  # noqa: W293 - as the platform's document has it
BATCH = '''
# 智能体服务中批量处理
async def batch_knowledge_enhancement(kb_ids: List[str]):
    """批量知识库增强"""
    tasks = []
    for kb_id in kb_ids:
        tasks.append({
            "task_type": "knowledge_indexing",
            "kb_id": kb_id,
            "priority": "normal",
            "payload": {
                "enhancement_type": "semantic_analysis",
                "rebuild_index": True
            }
        })
    
    # 批量提交任务
    async with httpx.AsyncClient() as client:
        response = await client.post(
            "http://localhost:8084/api/v1/tasks/batch",
            json=tasks
        )
        
    return response.json()
'''  # noqa: W293


async def test_the_snippets_of_the_platforms_document_run_as_they_stand(trusting: GatewayProcess, place: Place) -> None:
    """Apart from the port, which is another one here."""
    names: dict[str, Any] = {"httpx": httpx, "List": list}
    for snippet in (SUBMIT, BATCH):
        exec(snippet.replace("localhost:8084", f"127.0.0.1:{trusting.port}"), names)
    answer = await names["process_document"]("kb-42", "/data/handbook.pdf")
    assert answer["status"] == "submitted"
    task = await place.task(answer["task_id"])
    assert task is not None
    assert task["spec"]["payload"] == {
        "filePath": "/data/handbook.pdf",
        "chunkSize": 1000,
        "chunkOverlap": 200,
        "processingMode": "intelligent_split",
    }
    outcome = await names["batch_knowledge_enhancement"](["kb-1", "kb-2"])
    assert (outcome["accepted"], outcome["refused"]) == (2, 0)
    for item in outcome["items"]:
        task = await place.task(item["task"]["id"])
        assert task is not None
        assert task["spec"]["payload"] == {"enhancementType": "semantic_analysis", "rebuildIndex": True}
