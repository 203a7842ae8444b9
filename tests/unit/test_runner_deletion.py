"""What a deletion refuses before it has touched anything."""

import uuid
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from job_runner.deletion import Deletion
from job_runner.progress import SilentProgress
from job_runner.work import Work
from task_contract.errors import InvalidTask
from task_contract.models import ProcessingTask


def deletion(*, kb_id: str | None = "kb-1", **payload: Any) -> Deletion:
    spec = {"type": "document_processing", "payload": payload} | ({} if kb_id is None else {"kbId": kb_id})
    work = Work(
        ProcessingTask.model_validate({"metadata": {"name": "a"}, "spec": spec}),
        uid=uuid.uuid4(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        settings=cast("Any", None),
        ledger=cast("Any", None),
        progress=SilentProgress(),
        make_embedder=cast("Any", None),
    )
    return Deletion(work, open_stores=cast("Any", None))


@pytest.mark.parametrize(
    "payload",
    [
        {"action": "delete", "filePath": "/data/a.pdf"},
        {"action": "delete", "documentId": "a"},
        {"action": "delete", "filePath": "a.pdf", "documentId": "a"},
        {"action": "delete_knowledge_base", "confirm": "kb-1"},
    ],
)
def test_what_says_clearly_what_goes_is_accepted(payload: dict[str, str]) -> None:
    deletion(**payload)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"action": "delete"}, "cannot identify the document: set payload.filePath or payload.documentId"),
        ({"action": "delete", "documentId": "a", "chunkSize": 300, "metadata": {}}, "payload.chunkSize, payload.metadata"),
        ({"action": "delete", "documentId": "a", "confirm": "kb-1"}, "takes only action, documentId, filePath"),
        ({"action": "delete", "documentId": "a", "kb_id": None}, "set spec.kbId"),
        ({"action": "delete_knowledge_base"}, "payload.confirm is None; give the kbId once more"),
        ({"action": "delete_knowledge_base", "confirm": "kb-2"}, "payload.confirm is 'kb-2'"),
        ({"action": "delete_knowledge_base", "confirm": "kb-1", "documentId": "a"}, "takes only action, confirm"),
    ],
)
def test_what_may_mean_something_else_is_refused(payload: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTask, match=message):
        deletion(**payload)
