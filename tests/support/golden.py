"""The golden set: questions in people's words over the example documents, and how well a knowledge base of these answers.

It is asked of one knowledge base with all documents, filled by the pipeline as a task fills it, for each way to split and
each embedding model.
"""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from job_runner.attempt import run_attempt
from job_runner.embed import Embedder
from job_runner.index import Generation
from job_runner.ledger import Ledger
from job_runner.quality import Question, read_questions
from job_runner.search import Answers, Searcher
from job_runner.settings import Settings
from job_runner.stores import opener
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingMode, ProcessingTask

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENTS: Final = ROOT / "examples/documents"
GOLDEN: Final = ROOT / "tests/data/golden"
NAMESPACE: Final = "golden"


def questions() -> list[Question]:
    """Return all questions, of both languages."""
    return [one for path in sorted(GOLDEN.glob("*.jsonl")) for one in read_questions(path.read_text().split("\n"))]


@asynccontextmanager
async def filled(
    urls: Mapping[str, str], *, mode: ProcessingMode, embedder: Embedder
) -> AsyncIterator[Callable[[str], Awaitable[Answers]]]:
    """Fill a knowledge base, yield what asks it, and remove it."""
    fields: dict[str, Any] = {name.removeprefix("TASKS_").lower(): value for name, value in urls.items()}
    settings = Settings.model_validate({**fields, "document_root": str(DOCUMENTS), "log_level": "warning"})
    kb_id = f"golden-{uuid.uuid4().hex[:8]}"
    generation = Generation(NAMESPACE, kb_id, 1)
    stores = opener(settings, dimension=embedder.dimension)(generation)
    ledger = Ledger(settings.postgres_url.get_secret_value())
    try:
        for document in sorted({question.document_id for question in questions()}):
            await _publish(document, kb_id=kb_id, mode=mode, embedder=embedder, settings=settings)
        yield Searcher(generation, stores=stores, embedder=embedder, ledger=ledger).ask
    finally:
        await ledger.aclose()
        await stores.drop()
        await stores.aclose()


async def _publish(document: str, *, kb_id: str, mode: ProcessingMode, embedder: Embedder, settings: Settings) -> None:
    metadata = {"name": "golden", "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": _now()}
    payload = {"filePath": document, "processingMode": str(mode)}
    spec = {"type": "document_processing", "kbId": kb_id, "payload": payload}
    outcome, code = await run_attempt(
        ProcessingTask.model_validate({"metadata": metadata, "spec": spec}),
        settings=settings,
        started=time.monotonic(),
        make=lambda *_, **__: embedder,
    )
    assert code is ExitCode.SUCCEEDED, outcome


def _now() -> str:
    return datetime.now(UTC).isoformat()
