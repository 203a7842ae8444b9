"""``knowledge_indexing``: a knowledge base as a whole is rebuilt, rolled back, repaired, analyzed or purged.

A rebuild, in the order that makes it safe to die at any write:

1. The lease: one such task at a time (:mod:`job_runner.generations`).
2. A generation g+1 that nobody reads. The documents of g are brought into it while g serves and tasks go on publishing there
   (:mod:`job_runner.filling`), until nothing differs.
3. Both stores are read back; each must hold exactly the chunk ids that the ledger has for g+1.
4. The gate: the questions are asked of both; g+1 must find the answers as g does.
5. The switch in the ledger, if nothing differs still; else once more from 2, for what does.
6. The aliases (:mod:`job_runner.switching`).

Who dies before 5 leaves a generation that nobody reads: the next attempt goes on filling it, and after the last one a sweep
drops it. Who dies after 5 has switched; the next attempt finds that, and does 6.

A rollback is the same with the generation that is retained, without the gate: a person has judged already.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog

from job_runner.analysis import analyze
from job_runner.consistency import compare
from job_runner.embed import Embedder, embedded
from job_runner.fetch import hashed, open_document
from job_runner.filling import Filling, Side
from job_runner.generations import KnownGeneration, Lease, State, Switch
from job_runner.index import Generation, Label, Row
from job_runner.quality import Quality, Question, evaluate, questions_from_headings, read_questions
from job_runner.repair import mend, repair
from job_runner.search import Searcher
from job_runner.stages import Stages
from job_runner.stores import OpenLabelled, Stores
from job_runner.switching import finish_switch
from job_runner.work import Done, Work
from task_contract.errors import (
    ChunksLost,
    Fenced,
    InvalidTask,
    ModelUnavailable,
    NothingToRollBack,
    RecallDropped,
    StoresDisagree,
)
from task_contract.models import Action, EnhancementType, Result, Stage
from task_contract.names import digest

ROUNDS: Final = 100
"""How often documents are brought that tasks have published meanwhile: each round has those of the one before."""
_KEEP_SECONDS: Final = 604_800
_RECALL_DROP: Final = 2
_NO_GATE: Final = 100
"""Points: nothing can drop by more."""
_SAMPLE_ROWS: Final = 5_000
"""Rows that questions are made of, of documents in an order that is random and always the same."""
_NAMED: Final = 5
"""Documents that a message names."""
_STARTS: Final = {Stage.EMBED: 0, Stage.VERIFY: 70, Stage.GATE: 78, Stage.PUBLISH: 84, Stage.ANALYZE: 85}
"""Percent of an attempt that are done when a stage starts."""

log = structlog.get_logger(__name__)


class KnowledgeIndexing:
    """One attempt at one ``knowledge_indexing`` task, but for those that purge."""

    def __init__(self, work: Work, *, open_labelled: OpenLabelled) -> None:
        spec = work.task.spec
        if spec.kb_id is None:
            raise InvalidTask("cannot index without a knowledge base: set spec.kbId")
        self._work = work
        self._namespace = work.task.metadata.namespace
        self._kb_id = spec.kb_id
        self._payload = spec.payload
        self._action = spec.effective_action
        self._analyzes = spec.payload.enhancement_type is EnhancementType.SEMANTIC_ANALYSIS
        if self._action is Action.INDEX and not (spec.payload.rebuild_index or self._analyzes):
            raise InvalidTask(
                "cannot index: nothing is to be done; set payload.rebuildIndex: true, payload.enhancementType: "
                "semantic_analysis, or an action"
            )
        self._ledger = work.ledger
        self._open_labelled = open_labelled
        self._stages = Stages(work.progress, starts=_STARTS)

    async def run(self) -> Done:
        """Do it. May be canceled at any time; what the switch has made serve stays.

        Raises errors of :mod:`task_contract.errors`.
        """
        lease = await self._ledger.acquire(
            namespace=self._namespace,
            kb_id=self._kb_id,
            task_uid=self._work.uid,
            task_created_at=self._work.created_at,
            holder=self._work.settings.holder,
        )
        if lease is None:
            return Done("Superseded", Result(documents=0))
        try:
            return await self._carried_out(lease)
        except Fenced:
            if await self._ledger.was_deleted(
                namespace=self._namespace, kb_id=self._kb_id, since=self._work.created_at
            ):  # and with it the lease
                return Done("Superseded", Result(documents=0))
            raise
        finally:
            with contextlib.suppress(Exception):  # of one that is kept another attempt takes over
                await asyncio.shield(self._ledger.release(lease))

    async def _carried_out(self, lease: Lease) -> Done:
        match self._action:
            case Action.REPAIR:
                return await self._repair()
            case Action.ROLLBACK:
                facts = await self._switched() or await self._roll_back(lease)
            case _:
                facts = await self._switched() or (await self._rebuild(lease) if self._payload.rebuild_index else {})
        await self._finish_switch()
        return await self._done(facts)

    # ------------------------------------------------------------------------------------------------------- parts

    async def _serving(self) -> Label:
        found = await self._ledger.knowledge_base(namespace=self._namespace, kb_id=self._kb_id)
        if found is None:
            raise StoresDisagree(f"cannot go on with {self._kb_id}: it has been deleted meanwhile")
        return Label(self._namespace, self._kb_id, *found)

    async def _known(self) -> list[KnownGeneration]:
        return await self._ledger.generations(namespace=self._namespace, kb_id=self._kb_id)

    async def _switched(self) -> Mapping[str, Any] | None:
        """Return the result of an earlier attempt of this task that has switched."""
        mine = (one for one in await self._known() if one.task_uid == self._work.uid and one.switched)
        return next((one.facts for one in mine), None)

    @contextlib.asynccontextmanager
    async def _opened(self, label: Label) -> AsyncIterator[Stores]:
        stores = self._open_labelled(label)
        try:
            yield stores
        finally:
            await stores.aclose()

    async def _finish_switch(self) -> int:
        serving = await self._serving()

        def open_stores(generation: Generation) -> Stores:  # only what is there
            return self._open_labelled(replace(serving, generation=generation.number))

        return await finish_switch(
            namespace=self._namespace, kb_id=self._kb_id, ledger=self._ledger, open_stores=open_stores
        )

    async def _done(self, facts: Mapping[str, Any]) -> Done:
        serving = await self._serving()
        enhanced = await self._analyze(serving) if self._analyzes and serving.model_fingerprint else None
        contents = await self._ledger.contents(serving.names)
        published = contents.published.values()
        chunks = sum(one.chunk_count for one in published)
        verified = chunks if facts else None  # before the switch, and each publication since by its task
        return Done(
            "Completed",
            Result(
                **facts,
                documents=sum(one.chunk_count > 0 for one in published),
                chunks=chunks,
                milvus_count=verified,
                elasticsearch_count=verified,
                generation=serving.generation,
                enhanced=enhanced,
                seconds=self._stages.seconds,
            ),
        )

    async def _analyze(self, serving: Label) -> int:
        async with self._opened(serving) as stores:
            with self._stages.enter(Stage.ANALYZE):
                await stores.ensure()
                return await analyze(
                    self._work,
                    serving.names,
                    stores,
                    on_progress=lambda done, total: self._stages.within(Stage.ANALYZE, done, total),
                )

    # ------------------------------------------------------------------------------------------------------- rebuild

    async def _rebuild(self, lease: Lease) -> Mapping[str, Any]:
        serving = await self._serving()
        if not serving.model_fingerprint:  # nothing was ever published in it but deletions
            return {"embedded": 0, "reused": 0}
        questions = await self._given_questions()
        splitting = self._payload.manifest()
        splitting = {name: splitting[name] for name in ("chunkSize", "chunkOverlap", "processingMode") if name in splitting}
        before = await self._asking(serving)
        name = self._payload.embedding_model
        after = before if before is not None and name is None else await self._work.embedder(name)
        fingerprint: str = await asyncio.to_thread(getattr, after, "fingerprint")
        known = {one.number for one in await self._known()}
        number = await self._ledger.begin_generation(
            lease,
            model_fingerprint=fingerprint,
            dimension=after.dimension,
            embedding_model=after.name,
            splitting=splitting,
        )
        target = Label(self._namespace, self._kb_id, number, fingerprint, after.dimension)
        log.info("rebuilding", kb_id=self._kb_id, serving=serving.generation, filling=number, splitting=splitting)

        async def gate(source: Side, filled: Side) -> Mapping[str, float]:
            if before is None:
                return {}
            with self._stages.enter(Stage.GATE):
                try:
                    return await self._recall(questions, source, before, filled, after)
                except RecallDropped:
                    await self._ledger.give_up(lease, number)
                    raise

        keep = self._payload.keep_generation_seconds
        return await self._fill_and_switch(
            lease,
            serving,
            target,
            embedder=after,
            splitting=splitting,
            resumed=number in known,
            gate=gate,
            keep_seconds=_KEEP_SECONDS if keep is None else keep,
        )

    async def _roll_back(self, lease: Lease) -> Mapping[str, Any]:
        serving = await self._serving()
        retained = [one for one in await self._known() if one.state is not State.SERVING]
        number = await self._ledger.refill_generation(lease)
        found = next((one for one in retained if one.number == number), None)
        if number is None or found is None:
            raise NothingToRollBack(
                f"cannot roll {self._kb_id} back: no generation is kept that served before generation "
                f"{serving.generation}; rebuild it with the model and splitter that it had"
            )
        embedder = await self._work.embedder(fingerprint=found.model_fingerprint)
        target = Label(self._namespace, self._kb_id, number, found.model_fingerprint, found.dimension)
        return await self._fill_and_switch(
            lease,
            serving,
            target,
            embedder=embedder,
            splitting=found.splitting,
            resumed=True,
            gate=None,
            keep_seconds=_KEEP_SECONDS,
        )

    async def _fill_and_switch(
        self,
        lease: Lease,
        serving: Label,
        target: Label,
        *,
        embedder: Embedder,
        splitting: Mapping[str, Any],
        resumed: bool,
        gate: Callable[[Side, Side], Any] | None,
        keep_seconds: int,
    ) -> Mapping[str, Any]:
        """Return what the result says of it."""
        async with self._opened(serving) as old, self._opened(target) as new:
            await old.ensure()  # first, so that an alias that was lost does not lead to the new one
            await new.ensure()
            sides = tuple(
                Side(label.names, stores, label.model_fingerprint) for label, stores in ((serving, old), (target, new))
            )
            published = (await self._ledger.contents(serving.names)).published.values()
            total = sum(one.chunk_count for one in published)
            filling = Filling(
                lease,
                ledger=self._ledger,
                source=sides[0],
                target=sides[1],
                embedder=embedder,
                splitting=splitting,
                resumed=resumed,
                on_rows=lambda done: self._stages.within(Stage.EMBED, min(done, total), total),
            )
            recall: Mapping[str, float] | None = None if gate else {}
            for count in range(ROUNDS):
                with self._stages.enter(Stage.EMBED):
                    brought = await filling.round()
                with self._stages.enter(Stage.VERIFY):
                    whole = await self._verified(lease, target.names, new, embedder, None if count == 0 else brought)
                if not whole:
                    continue
                if recall is None and gate is not None:
                    recall = await gate(*sides)
                facts = {
                    "embedded": filling.embedded,
                    "reused": max(0, filling.rows - filling.embedded),
                    **(recall or {}),
                }
                with self._stages.enter(Stage.PUBLISH):
                    if await self._ledger.switch(lease, target.generation, Switch(keep_seconds, facts)):
                        log.info("switched", kb_id=self._kb_id, generation=target.generation, rounds=count + 1)
                        return facts
        raise StoresDisagree(
            f"cannot rebuild {self._kb_id}: in each of {ROUNDS} rounds tasks have published further documents; "
            "try again when fewer do"
        )

    async def _verified(
        self, lease: Lease, generation: Generation, stores: Stores, embedder: Embedder, brought: Sequence[str] | None
    ) -> bool:
        """Make both stores hold what the ledger says of a generation; what they cannot is forgotten, to be brought again.

        Return whether they do; ``brought``: of these documents, ``None``: of all.
        """
        if brought is None:
            _, suspects = await compare(generation, ledger=self._ledger, stores=stores)
        else:
            suspects = {name: set() for name in brought}

        async def embed(texts: Sequence[str]) -> Any:
            return await asyncio.to_thread(embedded, texts, embedder)

        mended = await mend(generation, suspects, ledger=self._ledger, stores=stores, embed=embed)
        if mended.changes:
            log.warning("rows of the new generation mended", rows=mended.changes)
        if mended.lost:
            await self._ledger.forget(lease, generation.number, mended.lost)
        await self._ledger.renew(lease)
        return not mended.lost

    # ---------------------------------------------------------------------------------------------------------- gate

    async def _asking(self, serving: Label) -> Embedder | None:
        """Return the model that the gate asks the present generation with.

        ``None`` where this runner has not got it and is to compare nothing: of vectors that others have computed, the model
        may be nowhere. Raises ModelUnavailable.
        """
        try:
            return await self._work.embedder(fingerprint=serving.model_fingerprint)
        except ModelUnavailable as error:
            if self._payload.embedding_model is not None and self._payload.max_recall_drop == _NO_GATE:
                return None
            raise ModelUnavailable(
                f"{error.message}; the gate asks the present generation with it. To move to another model without a "
                f"comparison, set payload.embeddingModel and payload.maxRecallDrop: {_NO_GATE}"
            ) from error

    async def _given_questions(self) -> list[Question] | None:
        """Read the questions of the payload, before anything else is done; ``None``: make some of headings."""
        if self._payload.golden_path is None:
            return None
        path, settings = self._payload.golden_path, self._work.settings
        async with contextlib.AsyncExitStack() as stack:
            source = await open_document(stack, path, settings=settings, inspect=hashed)
            try:
                return await asyncio.to_thread(_questions, source.descriptor)
            except (InvalidTask, UnicodeDecodeError) as error:
                raise InvalidTask(f"cannot use payload.goldenPath {path}: {error}") from error

    async def _recall(
        self, given: list[Question] | None, source: Side, before: Embedder, filled: Side, after: Embedder
    ) -> Mapping[str, float]:
        questions = await self._made_questions(source) if given is None else given
        if not questions:
            log.warning("no questions can be made: the gate is open", kb_id=self._kb_id)
            return {}
        found: list[Quality] = []
        for side, embedder in ((source, before), (filled, after)):
            searcher = Searcher(side.generation, stores=side.stores, embedder=embedder, ledger=self._ledger)
            found.append(await evaluate(questions, searcher.ask))
        old, new = (one.recall["fusion"] for one in found)
        log.info("gate", questions=len(questions), before=old, after=new)
        most = _RECALL_DROP if self._payload.max_recall_drop is None else self._payload.max_recall_drop
        if 100 * (old - new) > most + 1e-9:
            raise RecallDropped(
                f"cannot switch {self._kb_id} to a new generation: of {len(questions)} questions generation "
                f"{source.generation.number} answers {old:.1%} among the first five, the new one {new:.1%}, and payload."
                f"maxRecallDrop is {most} points; generation {source.generation.number} goes on serving"
            )
        return {"recall_before": round(old, 4), "recall_after": round(new, 4)}

    async def _made_questions(self, source: Side) -> list[Question]:
        contents = await self._ledger.contents(source.generation)
        rows: list[Row] = []
        for name in sorted(contents.published, key=digest):
            async for part in source.stores.texts.read(name, contents.published[name].version):
                rows += part
            if len(rows) >= _SAMPLE_ROWS:
                break
        return await asyncio.to_thread(questions_from_headings, rows)

    # -------------------------------------------------------------------------------------------------------- repair

    async def _repair(self) -> Done:
        serving = await self._serving()

        async def embed(texts: Sequence[str]) -> Any:
            embedder = await self._work.embedder(fingerprint=serving.model_fingerprint)
            return await asyncio.to_thread(embedded, texts, embedder)

        async with self._opened(serving) as stores:
            await stores.ensure()
            with self._stages.enter(Stage.VERIFY):
                repaired = await repair(serving, ledger=self._ledger, stores=stores, embed=embed)
        aliases = await self._finish_switch()
        if repaired.lost:
            named = ", ".join(repaired.lost[:_NAMED]) + (", ..." if len(repaired.lost) > _NAMED else "")
            raise ChunksLost(
                f"cannot repair {self._kb_id} whole: neither store has all chunks of {len(repaired.lost)} documents "
                f"({named}); create their tasks again, everything else is repaired ({repaired.changes + aliases} changes)"
            )
        return Done(
            "Completed",
            Result(
                documents=repaired.documents,
                chunks=repaired.chunks,
                embedded=repaired.embedded,
                milvus_count=repaired.chunks,
                elasticsearch_count=repaired.chunks,
                repaired=repaired.changes + aliases,
                generation=serving.generation,
                seconds=self._stages.seconds,
            ),
        )


def _questions(descriptor: int) -> list[Question]:
    with open(descriptor, encoding="utf-8-sig", closefd=False) as lines:
        lines.seek(0)  # it was read whole for its hash
        return read_questions(lines)
