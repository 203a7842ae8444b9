"""A document, or a whole knowledge base, out of both stores: no file, no parser, no model.

The order makes it safe to die at any write (see also :mod:`job_runner.ledger`):

1. The ledger is committed: from then on its readers see nothing, and what an older task publishes is superseded.
2. The rows, or collection and index, are removed from both stores.
3. Both stores are read back: nothing may be left.

Who dies before 1 has done nothing. Who dies after 1 leaves rows that nobody reads; the next attempt finds its own commit and
does 2 and 3, and where there is no next attempt a sweep does (:mod:`job_runner.sweep`).
"""

from dataclasses import dataclass
from typing import Final

import structlog

from job_runner.index import Generation, Stale
from job_runner.ledger import Claim, Commit, Intent, KnowledgeBaseDeletion, Ledger, Standing
from job_runner.publication import ROUNDS, to_the_end
from job_runner.stages import Stages
from job_runner.stores import OpenStores
from job_runner.work import Done, Work
from task_contract.errors import InvalidTask, StoresDisagree
from task_contract.models import Action, Payload, Result, Stage

_DOCUMENT: Final = frozenset({"action", "filePath", "documentId"})
_KNOWLEDGE_BASE: Final = frozenset({"action", "confirm"})

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Deleted:
    """What became of one document. ``version`` is None when a newer task has published."""

    documents: int
    version: int | None
    left: tuple[int, int] = (0, 0)


class Deletion:
    """One attempt at a task that deletes a document or a knowledge base.

    ``document_processing`` does with the actions delete and delete_knowledge_base, ``knowledge_indexing`` with purge, the
    latter by another name.
    """

    def __init__(self, work: Work, *, open_stores: OpenStores) -> None:
        spec = work.task.spec
        if spec.kb_id is None:
            raise InvalidTask("cannot delete without a knowledge base: set spec.kbId")
        self._namespace = work.task.metadata.namespace
        self._kb_id = spec.kb_id
        self._document_id = _checked(spec.payload, spec.kb_id)
        self._uid = work.uid
        self._created_at = work.created_at
        self._settings = work.settings
        self._ledger = work.ledger
        self._open_stores = open_stores
        self._stages = Stages(work.progress)

    async def run(self) -> Done:
        """Do it. Interrupted between documents only: each takes seconds, and every call has a timeout of its own.

        Raises errors of :mod:`task_contract.errors`.
        """
        if self._document_id is None:
            return await self._knowledge_base()
        deleted = await to_the_end(self._delete(self._document_id))
        if deleted.version is None:
            return Done("Superseded", Result(documents=0, seconds=self._stages.seconds))
        return self._done(deleted.documents, deleted.left, version=deleted.version)

    async def _delete(self, document_id: str) -> _Deleted:
        claim = Claim.to_delete(
            namespace=self._namespace,
            kb_id=self._kb_id,
            document_id=document_id,
            task_uid=self._uid,
            task_created_at=self._created_at,
            holder=self._settings.holder,
        )
        with self._stages.enter(Stage.PUBLISH):
            for _ in range(ROUNDS):
                intent = await self._ledger.begin(claim)
                log.info("intent", document=document_id, standing=str(intent.standing), version=intent.version)
                match await self._committed(intent):
                    case Commit.SUPERSEDED:
                        return _Deleted(documents=0, version=None)
                    case Commit.DONE:
                        return await self._removed(intent)
        raise StoresDisagree(
            f"cannot delete {document_id}: other tasks published it {ROUNDS} times meanwhile; try again later"
        )

    async def _committed(self, intent: Intent) -> Commit:
        match intent.standing:
            case Standing.SUPERSEDED:
                return Commit.SUPERSEDED
            case Standing.PUBLISHED:  # by an earlier attempt of this task
                return Commit.DONE
            case Standing.UNCHANGED:  # it was deleted before
                return await self._ledger.confirm(intent)
            case Standing.WORK:
                return await self._ledger.commit(intent, chunk_count=0)

    async def _removed(self, intent: Intent) -> _Deleted:
        """Remove the rows of all versions up to the deletion; later ones are of tasks that came after it."""
        claim, version = intent.claim, intent.version
        if intent.standing is Standing.UNCHANGED and intent.published is not None:
            version = intent.published.version
        stale = [Stale(claim.document_id, up_to=version)]
        stores = self._open_stores(Generation(self._namespace, self._kb_id, intent.generation))
        try:
            await stores.open_existing()
            removed = await stores.remove(stale)
            left = await stores.count(stale)
        finally:
            await stores.aclose()
        log.info("rows removed", document=claim.document_id, milvus=removed[0], elasticsearch=removed[1])
        if any(left):  # a pod that was given up for dead has written in between
            raise StoresDisagree(
                f"cannot delete {claim.document_id}: Milvus has {left[0]} of its rows again, Elasticsearch {left[1]}"
            )
        seen = intent.standing is not Standing.UNCHANGED and await self._ledger.replaced_any(claim, version)
        return _Deleted(documents=int(seen), version=version, left=left)

    async def _knowledge_base(self) -> Done:
        deletion = await to_the_end(self._take_out())
        left = (0, 0)
        if not deletion.whole:  # either there was nothing, or newer tasks have published: what is older goes
            documents = await self._ledger.older_documents(
                namespace=self._namespace, kb_id=self._kb_id, task_uid=self._uid, task_created_at=self._created_at
            )
            for document_id in documents:
                deleted = await to_the_end(self._delete(document_id))
                left = (left[0] + deleted.left[0], left[1] + deleted.left[1])
        return self._done(deletion.documents, left)

    async def _take_out(self) -> KnowledgeBaseDeletion:
        """Take the knowledge base out of the ledger, and collection and index out of the stores."""
        with self._stages.enter(Stage.PUBLISH):
            deletion = await self._ledger.delete_knowledge_base(
                namespace=self._namespace, kb_id=self._kb_id, task_uid=self._uid, task_created_at=self._created_at
            )
            log.info("deleted in the ledger", generations=deletion.generations, documents=deletion.documents)
            for number in deletion.generations:
                generation = Generation(self._namespace, self._kb_id, number)
                await drop_generation(generation, self._ledger, self._open_stores)
        return deletion

    def _done(self, documents: int, left: tuple[int, int], *, version: int | None = None) -> Done:
        return Done(
            "Deleted",
            Result(
                documents=documents,
                chunks=0,
                milvus_count=left[0],
                elasticsearch_count=left[1],
                version=version,
                seconds=self._stages.seconds,
            ),
        )


async def drop_generation(generation: Generation, ledger: Ledger, open_stores: OpenStores) -> tuple[bool, bool]:
    """Remove a generation that is not needed any more from both stores; return which still had it.

    The knowledge base may have been filled again meanwhile, in another generation: that then takes over the aliases. One
    that a pod of an earlier release has begun under the same number is needed, and stays.
    """
    key = {"namespace": generation.namespace, "kb_id": generation.kb_id}
    dropped = (False, False)
    if not await ledger.is_needed(**key, generation=generation.number):
        stores = open_stores(generation)
        try:
            dropped = await stores.drop()
        finally:
            await stores.aclose()
        if (current := await ledger.knowledge_base(**key)) is not None:
            stores = open_stores(Generation(**key, number=current[0]))
            try:
                await stores.open_existing()
            finally:
                await stores.aclose()
    await ledger.dropped(**key, generation=generation.number)
    return dropped


def _checked(payload: Payload, kb_id: str) -> str | None:
    """Return the document's identity, None for the whole knowledge base. The API server holds these rules too."""
    whole = payload.action in {Action.DELETE_KNOWLEDGE_BASE, Action.PURGE}
    fitting = _KNOWLEDGE_BASE if whole else _DOCUMENT
    if other := sorted(payload.manifest().keys() - fitting):
        raise InvalidTask(
            f"cannot delete with payload.{', payload.'.join(other)}: action {payload.action} takes only "
            f"{', '.join(sorted(fitting))}; leave out the others"
        )
    if not whole:
        return payload.effective_document_id
    if payload.confirm != kb_id:
        raise InvalidTask(
            f"cannot delete knowledge base {kb_id}: payload.confirm is {payload.confirm!r}; give the kbId once more to "
            "confirm that every document in it is to go"
        )
    return None
