"""The CRD on a real API server: what it refuses, with which words, and what it accepts."""

import copy
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from task_contract import names
from tests.support.devstack import Kubectl
from tests.support.locations import BAD_URLS, GOOD_PATHS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT: dict[str, Any] = {"type": "document_processing", "kbId": "kb-1", "payload": {"filePath": "/data/a.pdf"}}


def task(spec: dict[str, Any], *, name: str = "a") -> dict[str, Any]:
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


def create(kubectl: Kubectl, namespace: str, manifest: object, *options: str) -> subprocess.CompletedProcess[str]:
    return kubectl.attempt("create", "-n", namespace, "-f", "-", *options, stdin=json.dumps(manifest))


def with_payload(**payload: Any) -> dict[str, Any]:
    return DOCUMENT | {"payload": DOCUMENT["payload"] | payload}


def spec(**fields: Any) -> dict[str, Any]:
    return DOCUMENT | fields


def of(kind: str, **payload: Any) -> dict[str, Any]:
    return {"type": kind, "kbId": "kb-1", "payload": payload}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("batch of nothing", of("batch_processing"), "spec.payload: batch_processing takes exactly one of filePaths, prefix"),
    (
        "batch without payload",
        {"type": "batch_processing", "kbId": "kb"},
        "spec.payload: batch_processing takes exactly one",
    ),
    ("batch of two kinds", of("batch_processing", filePaths=["a"], prefix="b"), "batch_processing takes exactly one"),
    ("batch without knowledge base", {"type": "batch_processing", "payload": {"prefix": "a"}}, "spec.kbId: required"),
    ("batch with a path that climbs", of("batch_processing", filePaths=["a", "b/../c"]), "filePaths: '..' is not allowed"),
    ("batch with a foreign path", of("batch_processing", filePaths=["/etc/a"]), "filePaths: an absolute path lies below"),
    ("batch with a signed URL", of("batch_processing", filePaths=["https://a/b?c=d"]), "filePaths: must be https://HOST"),
    ("batch of too many", of("batch_processing", filePaths=[f"a{n}" for n in range(1001)]), "spec.payload.filePaths"),
    ("batch of too long a list", of("batch_processing", filePaths=["文" * 200] * 100), "filePaths: at most 49152 bytes"),
    ("prefix that climbs", of("batch_processing", prefix="a/../.."), "spec.payload.prefix: must be a folder"),
    ("prefix outside the volume", of("batch_processing", prefix="/etc"), "spec.payload.prefix: must be a folder"),
    ("prefix without its slash", of("batch_processing", prefix="s3://manuals/a"), "spec.payload.prefix: must be a folder"),
    ("prefix on a server", of("batch_processing", prefix="https://a/b/"), "spec.payload.prefix: must be a folder"),
    ("glob without prefix", of("batch_processing", filePaths=["a"], glob="*"), "spec.payload.glob: only with prefix"),
    ("no pods", of("batch_processing", prefix="a", parallelism=0), "spec.payload.parallelism"),
    ("over 100 percent", of("batch_processing", prefix="a", maxFailedPercent=101), "spec.payload.maxFailedPercent"),
    ("indexing of nothing", of("knowledge_indexing"), "knowledge_indexing needs rebuildIndex: true, enhancementType"),
    ("indexing of nothing new", of("knowledge_indexing", rebuildIndex=False, enhancementType="none"), "needs rebuildIndex"),
    (
        "foreign action",
        of("knowledge_indexing", action="upsert"),
        "spec.payload.action: knowledge_indexing has index, rollb",
    ),
    ("repair of a document", spec(payload={"action": "repair"}), "spec.payload.action: document_processing has upsert"),
    ("purge without a word", of("knowledge_indexing", action="purge"), "spec.payload.confirm: this action removes every"),
    ("rollback with more", of("knowledge_indexing", action="rollback", rebuildIndex=True), "only index takes rebuildIndex"),
    ("gate without rebuild", of("knowledge_indexing", action="index", maxRecallDrop=1), "only a rebuild takes goldenPath"),
    ("vectors of nothing", of("embedding_generation"), "embedding_generation takes exactly one of texts, inputPath"),
    ("an empty text", of("embedding_generation", texts=[""]), "spec.payload.texts"),
    ("too many texts", of("embedding_generation", texts=["a"] * 1001), "spec.payload.texts"),
    ("too long texts", of("embedding_generation", texts=["文" * 20_000]), "spec.payload.texts: at most 49152 bytes in all"),
    ("vectors elsewhere", of("embedding_generation", texts=["a"], outputPath="/data/a.npy"), "outputPath: must be outputs/"),
    (
        "vectors that climb",
        of("embedding_generation", texts=["a"], outputPath="outputs/../a.npy"),
        "outputPath: must be out",
    ),
    ("vectors of no kind", of("embedding_generation", texts=["a"], outputPath="outputs/a.csv"), "outputPath: must be outpu"),
    ("rows from nowhere", of("vector_storage"), "vector_storage takes exactly one of inputPath, fromTask"),
    ("rows without base", {"type": "vector_storage", "payload": {"inputPath": "a"}}, "spec.kbId: required"),
    (
        "a foreign field",
        of("vector_storage", inputPath="a", filePath="b"),
        "spec.payload.filePath: only for type document_p",
    ),
    ("no type", {"kbId": "kb"}, "spec.type: Required value"),
    ("unknown type", spec(type="ocr"), "spec.type: Unsupported value"),
    ("type of another kind", spec(type=3), "spec.type"),
    ("no knowledge base", {"type": "document_processing", "payload": {"filePath": "a"}}, "spec.kbId: required"),
    ("empty kbId", spec(kbId=""), "spec.kbId"),
    ("kbId with a slash", spec(kbId="a/b"), "spec.kbId"),
    ("kbId that starts with a dot", spec(kbId=".a"), "spec.kbId"),
    ("long kbId", spec(kbId="k" * 64), "spec.kbId: Too long"),
    ("Chinese kbId", spec(kbId="知识库"), "spec.kbId"),
    ("unknown priority", spec(priority="urgent"), "spec.priority: Unsupported value"),
    ("no payload", {"type": "document_processing", "kbId": "kb"}, "spec.payload.filePath: required"),
    ("no filePath", spec(payload={}), "spec.payload.filePath: required"),
    ("empty filePath", with_payload(filePath=""), "spec.payload.filePath"),
    ("long filePath", with_payload(filePath="a" * 1025), "spec.payload.filePath: Too long"),
    ("filePath that climbs", with_payload(filePath="/data/../etc/passwd"), "spec.payload.filePath: '..' is not allowed"),
    ("filePath of dots", with_payload(filePath=".."), "spec.payload.filePath: '..' is not allowed"),
    (
        "filePath outside the volume",
        with_payload(filePath="/etc/passwd"),
        "spec.payload.filePath: an absolute path lies below",
    ),
    (
        "filePath beside the volume",
        with_payload(filePath="/database/a"),
        "spec.payload.filePath: an absolute path lies below",
    ),
    ("filePath as list", with_payload(filePath=["a"]), "spec.payload.filePath"),
    ("filePath with a line break", with_payload(filePath="a\nb"), "spec.payload.filePath"),
    ("long documentId", with_payload(documentId="d" * 513), "spec.payload.documentId: Too long"),
    ("tiny chunkSize", with_payload(chunkSize=10), "spec.payload.chunkSize"),
    ("huge chunkSize", with_payload(chunkSize=100_000), "spec.payload.chunkSize"),
    ("chunkSize as text", with_payload(chunkSize="1000"), "spec.payload.chunkSize"),
    ("negative chunkOverlap", with_payload(chunkOverlap=-1), "spec.payload.chunkOverlap"),
    (
        "overlap as large as the chunk",
        with_payload(chunkSize=300, chunkOverlap=300),
        "spec.payload.chunkOverlap: must be smaller",
    ),
    ("overlap as large as the default", with_payload(chunkOverlap=1000), "spec.payload.chunkOverlap: must be smaller"),
    ("unknown processingMode", with_payload(processingMode="magic"), "spec.payload.processingMode: Unsupported value"),
    ("metadata as list", with_payload(metadata=["a"]), "spec.payload.metadata"),
    ("metadata of numbers", with_payload(metadata={"a": 1}), "spec.payload.metadata.a"),
    ("much metadata", with_payload(metadata={f"k{n}": "v" for n in range(33)}), "spec.payload.metadata: Too many"),
    ("long metadata key", with_payload(metadata={"k" * 64: "v"}), "spec.payload.metadata"),
    (
        "long metadata",
        with_payload(metadata={f"k{n}": "v" * 1000 for n in range(13)}),
        "spec.payload.metadata: at most 12000",
    ),
    (
        "delete without a document",
        spec(payload={"action": "delete"}),
        "spec.payload.documentId: delete needs it, or the filePath",
    ),
    (
        "delete with a size",
        with_payload(action="delete", chunkSize=300),
        "spec.payload.action: only upsert takes fileBytes, chunkSize",
    ),
    ("delete with labels", with_payload(action="delete", metadata={"a": "b"}), "spec.payload.action: only upsert takes"),
    ("unknown action", with_payload(action="remove"), "spec.payload.action: Unsupported value"),
    ("upsert without a file", spec(payload={"action": "upsert", "documentId": "a"}), "spec.payload.filePath: required"),
    (
        "a knowledge base without a confirmation",
        spec(payload={"action": "delete_knowledge_base"}),
        "spec.payload.confirm: this action removes every document: give the kbId once more",
    ),
    (
        "another knowledge base confirmed",
        spec(payload={"action": "delete_knowledge_base", "confirm": "kb-2"}),
        "spec.payload.confirm: this action removes every document",
    ),
    (
        "a knowledge base and a document",
        with_payload(action="delete_knowledge_base", confirm="kb-1"),
        "spec.payload.action: delete_knowledge_base removes all documents",
    ),
    (
        "confirm without need",
        with_payload(confirm="kb-1"),
        "spec.payload.confirm: only for actions delete_knowledge_base and purge",
    ),
    (
        "action of a health check",
        {"type": "health_check", "payload": {"action": "delete", "documentId": "a"}},
        "spec.payload.action: only for type document_processing",
    ),
    ("components for a document", with_payload(components=["model"]), "spec.payload.components: only for type health_check"),
    (
        "filePath for a health check",
        {"type": "health_check", "payload": {"filePath": "a"}},
        "spec.payload.filePath: only for type",
    ),
    ("unknown component", {"type": "health_check", "payload": {"components": ["disk"]}}, "spec.payload.components[0]"),
    ("no component", {"type": "health_check", "payload": {"components": []}}, "spec.payload.components"),
    (
        "a component twice",
        {"type": "health_check", "payload": {"components": ["model", "model"]}},
        "name each component once",
    ),
    ("misspelt field", spec(prioritty="high"), 'unknown field "spec.prioritty"'),
    ("misspelt payload field", with_payload(chunksize=300), 'unknown field "spec.payload.chunksize"'),
    ("negative retry limit", spec(retry={"limit": -1}), "spec.retry.limit"),
    ("huge retry limit", spec(retry={"limit": 21}), "spec.retry.limit"),
    ("shrinking retry factor", spec(retry={"factor": 0.5}), "spec.retry.factor"),
    ("jitter over one", spec(retry={"jitter": 1.5}), "spec.retry.jitter"),
    ("delay without unit", spec(retry={"initialDelay": "10"}), "spec.retry.initialDelay"),
    ("delay over a day", spec(retry={"maxDelay": "25h"}), "spec.retry.maxDelay: must be between 0s and 24h"),
    ("first delay over the longest", spec(retry={"initialDelay": "20m"}), "spec.retry.initialDelay: must not be longer"),
    ("timeout of zero", spec(timeout="0s"), "spec.timeout: must be between 1s and 168h"),
    ("timeout of a month", spec(timeout="720h"), "spec.timeout: must be between 1s and 168h"),
    ("timeout in words", spec(timeout="ten minutes"), "spec.timeout"),
    ("resource class in capitals", spec(resourceClass="Big"), "spec.resourceClass"),
    ("file of negative size", with_payload(fileBytes=-1), "spec.payload.fileBytes"),
    ("file of two tebibytes", with_payload(fileBytes=2**41), "spec.payload.fileBytes"),
    ("stall timeout of a second", spec(stallTimeout="1s"), "spec.stallTimeout: must be between 10s and 168h"),
    ("stall timeout of a month", spec(stallTimeout="720h"), "spec.stallTimeout: must be between 10s and 168h"),
    ("deadline of zero", spec(deadline="0s"), "spec.deadline: must be between 1s and 8760h"),
    (
        "batch in a pool",
        spec(type="batch_processing", executor="pool", payload={"prefix": "a"}),
        "spec.executor: batch_processing has Jobs of its own",
    ),
    ("unknown executor", spec(executor="cloud"), "spec.executor: Unsupported value"),
    ("callback without scheme", spec(callback={"url": "a/b"}), "spec.callback.url"),
    ("callback of another scheme", spec(callback={"url": "ftp://a/b"}), "spec.callback.url"),
    ("callback with a password", spec(callback={"url": "http://u:p@a/b"}), "spec.callback.url: must be http"),
    ("callback with a fragment", spec(callback={"url": "http://a/b#c"}), "spec.callback.url: must be http"),
    ("callback with an unknown field", spec(callback={"url": "http://a/{task}"}), "spec.callback.url: must be http"),
    ("callback with a field for a host", spec(callback={"url": "http://{namespace}/"}), "spec.callback.url: must be http"),
    ("cancel as text", spec(cancel="yes"), "spec.cancel"),
    ("negative ttl", spec(ttlSecondsAfterFinished=-1), "spec.ttlSecondsAfterFinished"),
    ("null type", spec(type=None), "spec.type"),
]


@pytest.mark.parametrize(("bad", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_manifest_is_refused_with_the_name_of_the_field(
    kubectl: Kubectl, namespace: str, bad: dict[str, Any], message: str
) -> None:
    answer = create(kubectl, namespace, task(bad), "--validate=strict", "--dry-run=server")
    assert answer.returncode != 0, answer.stdout
    assert message in answer.stderr


def with_paths(paths: Sequence[str]) -> dict[str, Any]:
    """Return a list of tasks named after the places of their paths."""
    tasks = [task(with_payload(filePath=path), name=f"a{place}") for place, path in enumerate(paths)]
    return {"apiVersion": "v1", "kind": "List", "items": tasks}


def test_a_document_may_lie_on_the_volume_in_a_bucket_or_on_a_server(kubectl: Kubectl, namespace: str) -> None:
    answer = create(kubectl, namespace, with_paths(GOOD_PATHS), "--validate=strict", "--dry-run=server")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("message", BAD_URLS)
def test_urls_of_another_form_are_refused(kubectl: Kubectl, namespace: str, message: str) -> None:
    urls = BAD_URLS[message]
    answer = create(kubectl, namespace, with_paths(urls), "--validate=strict", "--dry-run=server")
    refused = re.findall(rf'"a(\d+)" is invalid: [^\n]*spec.payload.filePath: {re.escape(message)}', answer.stderr)
    assert {urls[int(place)] for place in refused} == set(urls), answer


@pytest.mark.parametrize(
    "good",
    [
        of("batch_processing", filePaths=["a.pdf", "s3://manuals/b.md", "https://host/文档.html"], parallelism=64),
        of("batch_processing", filePaths=[f"/data/manuals/{number:04}/{'x' * 26}.pdf" for number in range(1000)]),
        of("batch_processing", prefix="/data", glob="**/*.md", maxFailedPercent=100, chunkSize=500),
        of("batch_processing", prefix="s3://manuals/2026/"),
        of("batch_processing", manifestPath="lists/today.jsonl", metadata={"a": "b"}),
        of("knowledge_indexing", rebuildIndex=True, embeddingModel="m", goldenPath="g.jsonl", keepGenerationSeconds=0),
        of("knowledge_indexing", enhancementType="semantic_analysis"),
        of("knowledge_indexing", action="rollback"),
        of("knowledge_indexing", action="repair"),
        of("knowledge_indexing", action="purge", confirm="kb-1"),
        of("embedding_generation", texts=["文" * 16_384]),
        {"type": "embedding_generation", "payload": {"inputPath": "a.jsonl", "outputPath": "/data/outputs/b/c.npy"}},
        of("vector_storage", inputPath="outputs/a.jsonl", documentId="d", embeddingModel="m"),
        of("vector_storage", fromTask="vectors"),
    ],
    ids=lambda good: f"{good['type']} {','.join(good['payload'])}",
)
def test_what_each_type_takes_is_accepted(kubectl: Kubectl, namespace: str, good: dict[str, Any]) -> None:
    answer = create(kubectl, namespace, task(good), "--validate=strict", "--dry-run=server")
    assert answer.returncode == 0, answer.stderr


def test_a_manifest_without_spec_is_refused(kubectl: Kubectl, namespace: str) -> None:
    manifest = task(DOCUMENT)
    del manifest["spec"]
    answer = create(kubectl, namespace, manifest)
    assert "spec: Required value" in answer.stderr


EXAMPLES = sorted((ROOT / "manifests/examples").rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_accepted(kubectl: Kubectl, namespace: str, path: Path) -> None:
    documents = []
    for document in yaml.safe_load_all(path.read_text()):
        document["metadata"].pop("namespace", None)
        documents.append(document)
    everything = {"apiVersion": "v1", "kind": "List", "items": documents}
    answer = create(kubectl, namespace, everything, "--validate=strict", "--dry-run=server")
    assert answer.returncode == 0, answer.stderr


IMMUTABLE: list[tuple[str, dict[str, Any], str]] = [
    ("kbId", {"kbId": "kb-2"}, "spec.kbId: immutable"),
    ("kbId removed", {"kbId": None}, "spec.kbId"),
    ("type", {"type": "health_check"}, "spec.type: immutable"),
    ("payload", {"payload": {"filePath": "b"}}, "spec.payload: immutable"),
    ("payload extended", {"payload": {"chunkSize": 500}}, "spec.payload: immutable"),
    ("retry", {"retry": {"limit": 9}}, "spec.retry: immutable"),
    ("timeout", {"timeout": "5m"}, "spec.timeout: immutable"),
    ("stallTimeout", {"stallTimeout": "5m"}, "spec.stallTimeout: immutable"),
    ("resourceClass", {"resourceClass": "large"}, "spec.resourceClass: immutable"),
    ("deadline", {"deadline": "5m"}, "spec.deadline: immutable"),
    ("executor", {"executor": "job"}, "spec.executor: immutable"),
    ("payload removed", {"payload": None}, "spec.payload: immutable"),
    ("callback", {"callback": {"url": "https://a/b"}}, "spec.callback: immutable"),
    ("dependsOn", {"dependsOn": ["b"]}, "spec.dependsOn: immutable"),
    ("idempotencyKey", {"idempotencyKey": "b"}, "spec.idempotencyKey: immutable"),
    ("kueue", {"kueue": {"queueName": "b"}}, "spec.kueue: immutable"),
    ("notBefore", {"notBefore": "2030-01-01T00:00:00Z"}, "spec.notBefore: immutable"),
    ("several", {"kbId": "kb-2", "priority": "high", "deadline": "5m"}, "spec.deadline: immutable"),
]


@pytest.mark.parametrize(("patch", "message"), [case[1:] for case in IMMUTABLE], ids=[case[0] for case in IMMUTABLE])
def test_what_the_task_is_cannot_be_changed(kubectl: Kubectl, namespace: str, patch: dict[str, Any], message: str) -> None:
    create(kubectl, namespace, task(DOCUMENT, name="fixed"))
    answer = kubectl.attempt("patch", "ptask", "fixed", "-n", namespace, "--type=merge", "-p", json.dumps({"spec": patch}))
    assert answer.returncode != 0, answer.stdout
    assert message in answer.stderr


def test_a_changed_phase_hides_no_change_of_the_spec(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, task(DOCUMENT, name="fixed"))
    both = {"spec": {"kbId": "kb-2"}, "status": {"phase": "Processing"}}
    by_spec = kubectl.attempt("patch", "ptask", "fixed", "-n", namespace, "--type=merge", "-p", json.dumps(both))
    assert "spec.kbId: immutable" in by_spec.stderr
    kubectl("patch", "ptask", "fixed", "-n", namespace, "--type=merge", "-p", json.dumps(both), "--subresource=status")
    found = kubectl.get("ptask", "fixed", "-n", namespace)
    assert (found["spec"]["kbId"], found["status"]["phase"]) == ("kb-1", "Processing")


def test_a_new_task_has_its_defaults_and_is_queued_without_a_write(kubectl: Kubectl, namespace: str) -> None:
    created = create(kubectl, namespace, task(DOCUMENT), "-o", "json")
    found = json.loads(created.stdout)
    assert found["spec"]["priority"] == "normal"
    assert found["spec"]["retry"] == {"limit": 3, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0.2}
    assert found["spec"]["payload"] == DOCUMENT["payload"]
    assert found["status"]["phase"] == "Queued"
    assert found["status"]["conditions"][0]["reason"] == "Queued"
    table = kubectl.attempt("get", "ptask", "-n", namespace).stdout.splitlines()
    assert table[0].split() == ["NAME", "TYPE", "KB", "PRIORITY", "PHASE", "STAGE", "PROGRESS", "ATTEMPT", "WAITING", "AGE"]
    wide = kubectl.attempt("get", "ptask", "-n", namespace, "-o", "wide").stdout.splitlines()
    assert wide[0].split()[-3:] == ["CHUNKS", "REASON", "JOB"]


def test_tasks_are_selected_by_type_knowledge_base_priority_and_phase(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, task(DOCUMENT | {"priority": "high"}, name="one"))
    create(kubectl, namespace, task(DOCUMENT | {"kbId": "kb-2"}, name="two"))
    create(kubectl, namespace, task({"type": "health_check"}, name="three"))
    for selector, expected in [
        ("spec.type=health_check", ["three"]),
        ("spec.kbId=kb-2", ["two"]),
        ("spec.priority=high", ["one"]),
        ("status.phase=Queued", ["one", "three", "two"]),
    ]:
        answer = kubectl.attempt("get", "ptask", "-n", namespace, "--field-selector", selector, "-o", "name")
        assert sorted(line.split("/")[1] for line in answer.stdout.split()) == expected, selector


def test_cancel_suspend_ttl_and_priority_can_be_changed_while_queued_and_cancel_is_one_way(
    kubectl: Kubectl, namespace: str
) -> None:
    create(kubectl, namespace, task(copy.deepcopy(DOCUMENT)))

    def patch(body: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
        return kubectl.attempt("patch", "ptask", "a", "-n", namespace, "--type=merge", "-p", json.dumps(body), *more)

    changes = {"suspend": True, "priority": "low", "ttlSecondsAfterFinished": 60, "cancel": True}
    assert patch({"spec": changes}).returncode == 0
    assert "spec.cancel: one way" in patch({"spec": {"cancel": False}}).stderr
    assert patch({"status": {"phase": "Processing"}}, "--subresource=status").returncode == 0
    assert "only while the task is Queued" in patch({"spec": {"priority": "high"}}).stderr
