"""The pipeline with what it needs beside a task, the model and the stores, for one document after another."""

import asyncio
from dataclasses import dataclass

from job_runner.embed import Embedder
from job_runner.pipeline import DocumentPipeline
from job_runner.stores import SharedStores, import_clients, opener
from job_runner.work import Done, Work
from task_contract.errors import ModelMismatch


@dataclass(frozen=True, slots=True)
class _Opened:
    embedder: Embedder
    fingerprint: str
    stores: SharedStores


class Indexing:
    """Processes documents of one knowledge base. Construct it cheaply; the first document opens, :meth:`aclose` closes."""

    def __init__(self) -> None:
        self._opened: _Opened | None = None

    async def process(self, work: Work) -> Done:
        """Bring the document of a task into both stores. Raises errors of :mod:`task_contract.errors`."""
        refused: set[str] = set()
        while True:
            opened = self._opened = self._opened or await _open(work)
            try:
                return await DocumentPipeline(work, embedder=opened.embedder, open_stores=opened.stores).run()
            except ModelMismatch:
                # The knowledge base was switched to another model meanwhile, which this runner may have too.
                await self.aclose()
                known = work.task.spec.payload.embedding_model is None and work.settings.embedding_models
                if opened.fingerprint in refused or not known:
                    raise
                refused.add(opened.fingerprint)

    async def aclose(self) -> None:
        """Close the stores."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.stores.aclose()


async def _open(work: Work) -> _Opened:
    # The clients of the stores are imported while the database is asked and all weights are read, which leaves a CPU idle.
    importing = asyncio.create_task(asyncio.to_thread(import_clients))
    try:
        embedder = await work.embedder_of_knowledge_base()
        fingerprint: str = await asyncio.to_thread(getattr, embedder, "fingerprint")
    finally:
        await importing
    open_stores = opener(work.settings, dimension=embedder.dimension, model_fingerprint=fingerprint)
    return _Opened(embedder, fingerprint, SharedStores(open_stores))
