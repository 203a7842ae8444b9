"""Knowledge bases: from the gateway, which has the ledger; without one from the tasks that there are, which is less."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from ptask.outcomes import CommandError, Exit
from ptask.tables import Cell, Column, Manifest, age, phase_of, status_of

if TYPE_CHECKING:
    from ptask.cluster import Cluster

_SECONDS: Final = 30.0
_STATES: Final = {"ready": "green", "indexing": "blue", "degraded": "red"}


def _text(field: str) -> Any:
    return lambda row, _: Cell("" if row.get(field) is None else str(row[field]))


def _age(row: Manifest, now: datetime) -> Cell:
    return Cell(age(row.get("updated_at"), now))


KB_COLUMNS: Final = (
    Column("KB", _text("kb_id"), least=8),
    Column("STATE", lambda row, _: Cell(str(row.get("state") or ""), _STATES.get(str(row.get("state")), ""))),
    Column("DOCUMENTS", _text("documents"), goes=1),
    Column("CHUNKS", _text("chunks"), goes=2),
    Column("GENERATION", _text("generation"), goes=4),
    Column("MODEL", _text("embedding_model"), goes=5, least=10),
    Column("WRITING", _text("intents"), goes=6),
    Column("UPDATED", _age, goes=3),
)
"""Of the gateway."""
TASK_KB_COLUMNS: Final = (
    Column("KB", _text("kb_id"), least=8),
    Column("STATE", lambda row, _: Cell(str(row.get("state") or ""), _STATES.get(str(row.get("state")), ""))),
    Column("DOCUMENTS", _text("documents"), goes=1),
    Column("CHUNKS", _text("chunks"), goes=2),
    Column("TASKS", _text("tasks"), goes=4),
    Column("FAILED", _text("failed"), goes=5),
    Column("UPDATED", _age, goes=3),
)
"""Of tasks."""


def of_tasks(tasks: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return what tasks tell of knowledge bases: a lower bound, since tasks are deleted a day after their end.

    Of each document the task that ended last counts, and of all what came before a deletion of the knowledge base does not.
    """
    found: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[str, int]] = {}
    for task in sorted(tasks, key=lambda one: str(status_of(one).get("finishedAt") or "9")):
        spec, status, phase = task.get("spec") or {}, status_of(task), phase_of(task)
        if not (kb := spec.get("kbId")):
            continue
        row = found.setdefault(kb, {"kb_id": kb, "state": "", "tasks": 0, "failed": 0, "updated_at": None})
        row["tasks"] += 1
        row["failed"] += phase == "Failed"
        if phase in {"Processing", "Retrying", "Queued"}:
            row["state"] = "indexing"
        if phase == "Completed":
            row["updated_at"] = status.get("finishedAt")
            _enter(documents.setdefault(kb, {}), spec, status.get("result") or {})
    for kb, row in found.items():
        chunks = documents.get(kb, {})
        row |= {"documents": sum(1 for count in chunks.values() if count), "chunks": sum(chunks.values())}
        row["state"] = row["state"] or ("ready" if row["documents"] else "empty")
    return [found[kb] for kb in sorted(found)]


def _enter(documents: dict[str, int], spec: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    payload = spec.get("payload") or {}
    document = payload.get("documentId") or payload.get("filePath") or payload.get("inputPath") or payload.get("fromTask")
    match payload.get("action"):
        case "delete":
            documents.pop(str(document), None)
        case "delete_knowledge_base" | "purge":
            documents.clear()
        case _ if spec.get("type") in {"document_processing", "vector_storage"} and document:
            documents[str(document)] = int(result.get("chunks") or 0)


# --------------------------------------------------------------------------------------------------------------- gateway


class Gateway:
    """The gateway's REST."""

    def __init__(self, url: str, *, token: str | None) -> None:
        import httpx

        from service_client.discovery import DiscoveryError, base_url

        try:
            self._url = base_url(url, said_by="--gateway")
        except DiscoveryError as error:
            raise CommandError(str(error), code=Exit.USAGE) from error
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(headers=headers, timeout=_SECONDS)

    def bases(self, namespace: str) -> list[dict[str, Any]]:
        """Return all knowledge bases of a namespace."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            answer = self._ask(
                "/api/v1/knowledge", namespace=namespace, limit="200", **({"cursor": cursor} if cursor else {})
            )
            found += answer["items"]
            cursor = answer.get("next_cursor")
            if cursor is None:
                return found

    def base(self, kb: str, namespace: str) -> dict[str, Any]:
        """Return a knowledge base."""
        return self._ask(f"/api/v1/knowledge/{quote(kb, safe='')}", namespace=namespace)

    def _ask(self, path: str, **query: str) -> dict[str, Any]:
        import httpx

        try:
            answer = self._http.get(self._url + path, params=query)
        except httpx.HTTPError as error:
            raise CommandError(
                f"cannot ask the gateway at {self._url}: {error}; check --gateway (PTASK_GATEWAY), or leave it out",
                code=Exit.UNREACHABLE,
            ) from error
        try:
            said = answer.json()
        except ValueError:
            said = {}
        if answer.status_code == httpx.codes.OK and isinstance(said, dict):
            return said
        raise _refusal(answer.status_code, said, self._url)


def _refusal(status: int, said: Any, url: str) -> CommandError:
    detail = (said.get("detail") or said.get("title")) if isinstance(said, Mapping) else None
    if status in {401, 403}:
        what = detail or f"it answers {status}"
        return CommandError(
            f"cannot ask the gateway at {url}: {what}; give a token in PTASK_TOKEN (kubectl create token NAME)"
        )
    code = Exit.UNREACHABLE if status >= 500 or status == 429 else Exit.FAILED
    return CommandError(
        f"cannot ask the gateway at {url}: {detail or f'it answers {status}; is it the gateway?'}", code=code
    )


# ----------------------------------------------------------------------------------------------------------------- tasks

ACTIONS: Final[Mapping[str, tuple[str, str, str]]] = {
    "delete": ("document_processing", "delete_knowledge_base", "remove all documents of"),
    "purge": ("knowledge_indexing", "purge", "remove everywhere, with all its generations,"),
    "verify": ("knowledge_indexing", "repair", "compare both stores with the ledger, and mend what differs, of"),
}
"""What the command is called → type and action of the task, and what it does to a knowledge base, in words."""


def spec_of(command: str, kb: str) -> dict[str, Any]:
    """Return the task that a command makes."""
    kind, action, _ = ACTIONS[command]
    payload: dict[str, Any] = {"action": action}
    if command in {"delete", "purge"}:
        payload["confirm"] = kb
    return {"type": kind, "kbId": kb, "payload": payload}


def listed(cluster: "Cluster", gateway: str | None, token: str | None) -> tuple[list[dict[str, Any]], bool]:
    """Return the knowledge bases, and whether the gateway told them."""
    if gateway:
        return Gateway(gateway, token=token).bases(cluster.namespace), True
    from ptask.cluster import TASKS

    return of_tasks(cluster.items(TASKS, cluster.namespace)), False


def as_lines(base: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a knowledge base of the gateway as names and values."""
    return [
        (key.replace("_", " "), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in base.items()
        if value is not None
    ]
