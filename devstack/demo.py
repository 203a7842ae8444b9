"""`make demo`: real documents through a real cluster into real stores, and a question answered from each.

What is shown is what a user would type and see: `kubectl apply`, `kubectl get processingtasks -w`, `job_runner search`; and
what a service sends to the gateway and is told.
Every figure is read back from the cluster and the stores, and anything that is not as promised ends the demo with exit 1.
"""

import asyncio
import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import yaml

from devstack import installation
from devstack.installation import Installation
from devstack.progress import DevstackError, say
from devstack.providers import Provider
from service_client import TaskClient

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "manifests/examples"
DOCUMENTS = ROOT / "examples/documents"
EXPECTED = {
    "handbook": "Completed",
    "operations-guide": "Completed",
    "laboratory-rules": "Completed",
    "tide-station": "Completed",
    "broken": "Failed",
    "library": "Completed",
    "library-zh": "Completed",
    "topics": "Completed",
    "topics-stored": "Completed",
    "health": "Completed",
}
TASK_DEADLINE = 120.0
"""Seconds for all tasks to end; warm, they take some 15."""


def run(provider: Provider) -> None:
    """Run the whole demo on PROVIDER's cluster. Raises DevstackError, one sentence, for what is not as it should be."""
    began = time.monotonic()
    endpoints = provider.up()
    installed = installation.install(endpoints, provider)
    put_documents(installed)

    kubectl = _Kubectl(installed)
    kubectl("delete", "ptask", "--all", "--wait")
    # A knowledge base of its own for each run: in that of the last run the documents would be Unchanged and nothing to see.
    kb_id = datetime.now(UTC).strftime("demo-%H%M%S")
    files = yaml.safe_load((EXAMPLES / "kustomization.yml").read_text())["resources"]
    manifests = [_manifest(name, kb_id=kb_id) for name in files]

    _heading("kubectl apply -f manifests/examples (knowledge base " + kb_id + ")")
    with kubectl.watching():
        _show(kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests)))
        _heading("kubectl get processingtasks -w")
        tasks = _wait(kubectl, [manifest["metadata"]["name"] for manifest in manifests])
    _show(kubectl("get", "ptask", "-o", "wide"))
    problems = [*_check(tasks)]

    _heading("Why `broken` failed: kubectl get ptask broken -o jsonpath={.status.error}")
    _show(json.dumps(tasks["broken"]["status"].get("error"), ensure_ascii=False))

    questions = json.loads((DOCUMENTS / "questions.json").read_text())
    documents = list(dict.fromkeys(question["document"] for question in questions))
    for document in documents:
        question = next(one for one in questions if one["document"] == document)
        problems += _ask(installed, kb_id=kb_id, question=question)
    another = [one for one in questions if one["document"] == documents[0]][1]
    problems += _ask_both(installed, kb_id=kb_id, question=another)

    _heading("The knowledge base beside itself: kubectl apply -f manifests/examples/knowledge")
    problems += _rebuild(kubectl, kb_id=kb_id)

    if endpoints.host_urls:  # elsewhere PostgreSQL is for pods alone
        _heading("The rows in PostgreSQL")
        problems += asyncio.run(_show_rows(installed, tasks))

    if kubectl.has_gateway():  # a release of another's may be without
        _heading("The same from a service: POST /api/v1/tasks at the gateway, then its live updates")
        problems += _over_rest(kubectl, kb_id=kb_id)

    if "workerpools" in kubectl("api-resources", "--api-group=tasks.zzdsj.io", "--output=name"):
        _heading("50 small tasks through a pool of warm workers: kubectl apply -f manifests/examples/pool-texts.yaml")
        problems += _through_a_pool(kubectl, alone=tasks["topics"])

    _heading("How long each stage took, in seconds")
    _stages(tasks)
    if problems:
        raise DevstackError("cannot call this a success: " + "; ".join(problems))
    say(f"\nAll as expected, {time.monotonic() - began:.0f} s in all. What was brought up goes on running: make down.")


def put_documents(installed: Installation) -> None:
    """Put the example documents on the document volume."""
    wanted = {".pdf", ".md", ".docx", ".html", ".pptx", ".xlsx", ".csv"}
    installed.put(file for file in DOCUMENTS.iterdir() if file.suffix in wanted and file.name != "README.md")


class _Kubectl:
    """kubectl in the task namespace."""

    def __init__(self, installed: Installation) -> None:
        reach, place = installed.endpoints, installed.place
        self._kubectl = [str(reach.kubectl), f"--kubeconfig={reach.kubeconfig}"]
        self._command = [*self._kubectl, f"--namespace={place.task_namespace}"]
        self.namespace = place.task_namespace
        self._gateway = [f"--namespace={place.namespace}", f"service/{place.release}-gateway"]
        self.operator_log = f"kubectl logs -n {place.namespace} deploy/{place.release}-operator"

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        answer = subprocess.run(
            [*self._command, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False
        )
        if answer.returncode != 0:
            raise DevstackError(f"cannot run kubectl {' '.join(arguments[:3])}: {answer.stderr.strip()}")
        return answer.stdout

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Show `kubectl get processingtasks -w` as it happens, until the block ends."""
        with subprocess.Popen(
            [*self._command, "get", "processingtasks", "-w"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as watch:

            def copy() -> None:
                for line in watch.stdout or ():
                    _show(line)

            thread = threading.Thread(target=copy, daemon=True)
            thread.start()
            try:
                yield
            finally:
                watch.terminate()
                watch.wait()
                thread.join()

    def has_gateway(self) -> bool:
        """Tell whether the release has a gateway."""
        found = subprocess.run([*self._kubectl, "get", *self._gateway], capture_output=True, timeout=60, check=False)
        return found.returncode == 0

    @contextlib.contextmanager
    def gateway(self) -> Iterator[str]:
        """Yield the address of the gateway for this machine, through the API server."""
        command = [*self._kubectl, "port-forward", *self._gateway, ":8084"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as forward:
            try:
                line = forward.stdout.readline() if forward.stdout else ""
                if (found := re.match(r"Forwarding from (127\.0\.0\.1:\d+)", line)) is None:
                    raise DevstackError(f"cannot reach the gateway: run {' '.join(command[2:])} to see why")
                yield f"http://{found[1]}"
            finally:
                forward.terminate()

    @contextlib.contextmanager
    def account(self, name: str) -> Iterator[str]:
        """Yield a token of an account of a service that may edit what is in the task namespace."""
        self("create", "serviceaccount", name)
        try:
            self("create", "rolebinding", name, "--clusterrole=edit", f"--serviceaccount={self.namespace}:{name}")
            yield self("create", "token", name).strip()
        finally:
            self("delete", f"serviceaccount/{name}", f"rolebinding/{name}", "--ignore-not-found")


def _manifest(name: str, *, kb_id: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    if "kbId" in manifest["spec"]:
        batch = manifest["spec"]["type"] == "batch_processing"  # of the same files, cut otherwise
        manifest["spec"]["kbId"] = f"{kb_id}-library" if batch else kb_id
    return manifest


def _wait(kubectl: _Kubectl, names: list[str]) -> dict[str, dict[str, Any]]:
    """Poll until all tasks have finished, and return them by name."""
    deadline = time.monotonic() + TASK_DEADLINE
    while True:
        items = json.loads(kubectl("get", "ptask", "-o", "json"))["items"]
        tasks = {item["metadata"]["name"]: item for item in items if item["metadata"]["name"] in names}
        unfinished = [name for name in names if tasks[name]["status"]["phase"] not in {"Completed", "Failed", "Canceled"}]
        if not unfinished:
            time.sleep(0.3)  # the last lines of the watch are on their way
            return tasks
        if time.monotonic() > deadline:
            raise DevstackError(
                f"cannot wait longer than {TASK_DEADLINE:.0f} s for {', '.join(unfinished)}: look at `kubectl describe "
                f"ptask` and `{kubectl.operator_log}`"
            )
        time.sleep(0.5)


def _check(tasks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Hold each task against what was promised."""
    for name, task in tasks.items():
        status = task["status"]
        expected = EXPECTED[name]
        if status["phase"] != expected:
            yield f"{name} is {status['phase']} instead of {expected} ({status.get('error')})"
        result = status.get("result") or {}
        counts = (result.get("chunks"), result.get("milvusCount"), result.get("elasticsearchCount"))
        if expected == "Completed" and "milvusCount" in result and (len(set(counts)) != 1 or not counts[0]):
            yield f"{name} has {counts} chunks in the document, Milvus and Elasticsearch"
    library = tasks["library"]["status"].get("result") or {}
    if (counted := [library.get(name) for name in ("documents", "documentsFailed", "documentsTotal")]) != [4, 1, 5]:
        yield f"library has {counted} documents that are published, failed and there"
    if (attempts := tasks["broken"]["status"]["attempt"]) != 1:
        yield f"broken was tried {attempts} times"


def _rebuild(kubectl: _Kubectl, *, kb_id: str) -> Iterator[str]:
    """Rebuild the knowledge base while it serves, repair what needs no repair, and go back to what served before."""
    for name, generation in (("rebuild", 2), ("repair", 2), ("rollback", 1)):
        kubectl("apply", "-f", "-", stdin=yaml.safe_dump(_manifest(f"knowledge/{name}.yaml", kb_id=kb_id)))
        status = _wait(kubectl, [name])[name]["status"]
        result = status.get("result") or {}
        told = ("generation", "documents", "chunks", "embedded", "recallBefore", "recallAfter", "repaired")
        _show(f"{name:<10} {status['phase']} " + json.dumps({field: result[field] for field in told if field in result}))
        if (status["phase"], result.get("generation")) != ("Completed", generation):
            yield f"{name} is {status['phase']} with generation {result.get('generation')} ({status.get('error')})"


def _over_rest(kubectl: _Kubectl, *, kb_id: str) -> Iterator[str]:
    """Send a task as a service does, and follow it to its end."""
    task = {"task_type": "document_processing", "kb_id": kb_id, "payload": {"file_path": "instruments.csv"}}
    _show(json.dumps(task))
    with (
        kubectl.account(kb_id) as token,
        kubectl.gateway() as url,
        TaskClient.over_rest(url, namespace=kubectl.namespace, token=token) as tasks,
    ):
        sent = tasks.submit(task, idempotency_key=f"{kb_id}-instruments")
        _show(f"202 {sent.model_dump_json(include={'id', 'namespace', 'status'})}")
        for update in tasks.watch(sent.id):
            fields = {"task_id", "event", "status", "stage", "progress"}
            _show(update.model_dump_json(include=fields, exclude_none=True))
        ended = tasks.get(sent.id)
    if ended.status != "completed" or ended.result is None or not ended.result.chunks:
        yield f"{sent.id}, sent to the gateway, is {ended.status} ({ended.error})"


def _through_a_pool(kubectl: _Kubectl, *, alone: dict[str, Any]) -> Iterator[str]:
    """Have the vectors of 50 texts made by a warm worker, a task each, beside ALONE, which had a Job."""
    pool = yaml.safe_load((EXAMPLES / "pool-texts.yaml").read_text())
    name = pool["metadata"]["name"]
    pool["spec"]["min"] = 1  # what is measured begins with a worker that is there
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(pool))
    try:
        if (reason := _first_worker(kubectl, name)) == "RedisNotConfigured":  # in a cluster that is not ours
            _show(f"not here: {reason}")
            return
        task = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask"}
        texts = {f"pooled-{number:02}": f"Line {number} of the log of the tide station." for number in range(1, 51)}
        specs = {one: {"type": "embedding_generation", "payload": {"texts": [text]}} for one, text in texts.items()}
        made = [task | {"metadata": {"name": one}, "spec": spec} for one, spec in specs.items()]
        kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(made))
        statuses = [one["status"] for one in _wait(kubectl, [*texts]).values()]
        _show(kubectl("get", "wpool"))
    finally:
        kubectl("delete", "wpool", name, "--ignore-not-found", "--wait=false")
    first = min(datetime.fromisoformat(status["queuedAt"]) for status in statuses)
    last = max(datetime.fromisoformat(status["finishedAt"]) for status in statuses)
    began, ended = (datetime.fromisoformat(alone["status"][at]) for at in ("queuedAt", "finishedAt"))
    _show(
        f"{len(statuses)} tasks from the first in the queue to the end of the last: {(last - first).total_seconds():.0f} s; "
        f"one of them as a Job ({alone['metadata']['name']}): {(ended - began).total_seconds():.0f} s"
    )
    if others := [status["phase"] for status in statuses if status["phase"] != "Completed"]:
        yield f"{len(others)} of 50 tasks in the pool are {', '.join(sorted(set(others)))}"
    if any(status.get("executor") != "pool" for status in statuses):
        yield "some of 50 small tasks had a Job although there was a pool"


def _first_worker(kubectl: _Kubectl, name: str) -> str:
    """Wait for a worker that takes tasks; return the reason of the pool's condition Ready."""
    deadline = time.monotonic() + TASK_DEADLINE
    while True:
        found = json.loads(kubectl("get", "wpool", name, "-o", "json")).get("status") or {}
        reason = next((one["reason"] for one in found.get("conditions", ()) if one["type"] == "Ready"), "")
        if found.get("ready") or reason == "RedisNotConfigured":
            return str(reason)
        if time.monotonic() > deadline:
            raise DevstackError(f"cannot wait longer for a worker: look at `kubectl -n {kubectl.namespace} describe wpool`")
        time.sleep(0.3)


def _ask(installed: Installation, *, kb_id: str, question: dict[str, Any]) -> Iterator[str]:
    """Put a question to both stores and show the best chunk of each."""
    text = question["question"]
    _heading(f"Question: {text}")
    where = ["--namespace", installed.place.task_namespace, "--kb-id", kb_id]
    answer = installed.job_runner("search", "--json", "--top-k", "1", *where, "--query", text)
    found = {hit["store"]: hit for hit in map(json.loads, answer.splitlines())}
    for store in ("milvus", "elasticsearch"):
        if (hit := found.get(store)) is None:
            yield f"{store} finds nothing for {text!r}"
            continue
        page = f", page {hit['pageStart']}" if hit.get("pageStart") else ""
        say(f"  {store:<14} {hit['documentId']}{page}, under {' > '.join(hit['headingPath'])!r}, score {hit['score']:.2f}")
        say("    " + " ".join(_around(hit["text"], question["answer"]).split()))
        if " ".join(question["answer"].split()) not in " ".join(hit["text"].split()):
            yield f"the best chunk in {store} for {text!r} does not hold {question['answer']!r}"


def _ask_both(installed: Installation, *, kb_id: str, question: dict[str, Any]) -> Iterator[str]:
    """Put a question to both stores at once, and show why the best chunks are where they are."""
    text = question["question"]
    _heading(f"Both stores in one ranking, job_runner search --mode hybrid --explain: {text}")
    where = ["--namespace", installed.place.task_namespace, "--kb-id", kb_id, "--query", text]
    answer = installed.job_runner("search", "--mode", "hybrid", "--explain", "--json", "--top-k", "3", *where)
    hits = [json.loads(line) for line in answer.splitlines()]
    for hit in hits:
        ranks = ", ".join(f"{store} {hit[store]['rank'] if hit[store] else '-'}" for store in ("milvus", "elasticsearch"))
        say(f"  {hit['score']:.4f}  {hit['documentId']}, under {' > '.join(hit['headingPath'])!r}; rank in {ranks}")
    if not any(question["answer"] in hit["text"] for hit in hits):
        yield f"none of the best chunks of both stores for {text!r} holds {question['answer']!r}"


def _around(text: str, answer: str, *, width: int = 220) -> str:
    """Return the part of a chunk that holds the answer."""
    at = max(text.find(answer), 0)
    start = max(0, at - width // 2)
    return ("…" if start else "") + text[start : at + width] + ("…" if at + width < len(text) else "")


async def _show_rows(installed: Installation, tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Show the projection and the ledger, once the projection holds the end of each task."""
    problems = []
    connection = await asyncpg.connect(installed.endpoints.host_urls["TASKS_POSTGRES_URL"])
    try:
        uids = [task["metadata"]["uid"] for task in tasks.values()]
        for _ in range(50):
            rows = await connection.fetch(
                "SELECT name, type, phase, attempt, round(extract(epoch FROM finished_at - created_at)) AS seconds, "
                "result->>'chunks' AS chunks, error->>'reason' AS error "
                "FROM tasks WHERE uid = ANY($1::uuid[]) ORDER BY name",
                uids,
            )
            if len(rows) == len(uids) and all(row["seconds"] is not None for row in rows):
                break
            await asyncio.sleep(0.1)
        else:
            problems.append("the projection does not hold the end of every task after 5 s")
        _table("tasks", rows)
        kb_id = tasks["handbook"]["spec"]["kbId"]
        documents = await connection.fetch(
            "SELECT document_id, published_version AS version, chunk_count, left(content_hash, 12) AS content "
            "FROM documents WHERE namespace = $1 AND kb_id = $2 AND published_version IS NOT NULL ORDER BY document_id",
            installed.place.task_namespace,
            kb_id,
        )
        _table("documents", documents)
        completed = [
            name for name, phase in EXPECTED.items() if phase == "Completed" and tasks[name]["spec"].get("kbId") == kb_id
        ]
        if len(documents) != len(completed):
            problems.append(f"the ledger has {len(documents)} published documents instead of {len(completed)}")
    finally:
        await connection.close()
    return problems


def _table(title: str, rows: list[Any]) -> None:
    if not rows:
        say(f"  {title}: no rows")
        return
    lines = [list(rows[0].keys()), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    say(f"  {title}")
    for line in lines:
        say("    " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _stages(tasks: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, task in sorted(tasks.items()):
        status = task["status"]
        created, finished = task["metadata"]["creationTimestamp"], status.get("finishedAt")
        whole = (datetime.fromisoformat(finished) - datetime.fromisoformat(created)).total_seconds() if finished else None
        stages = (status.get("result") or {}).get("seconds") or {}
        rows.append({"task": name, "apply to end": whole} | {stage: f"{seconds:.2f}" for stage, seconds in stages.items()})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    _table("", [{column: row.get(column) for column in columns} for row in rows])


def _heading(text: str) -> None:
    say(f"\n{text}")


def _show(text: str) -> None:
    for line in text.rstrip().splitlines():
        say("  " + line)
