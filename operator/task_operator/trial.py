"""A trial of an installation, from where tasks run: a health check, and one page from its file to the stores and back out.

It is what ``helm test`` runs, as a caller: it needs create, get and delete on tasks of one namespace, and no settings of the
operator. One that is killed leaves nothing for good: its tasks have a time to live, and the next trial, whose knowledge base
is the same, removes what is left of it there and on the volume.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol

import structlog

from task_contract.models import Phase, Status, TaskType
from task_contract.names import DOCUMENT_ROOT
from task_platform.kubernetes import TASKS_API, ClusterError, Conflict, Manifest, NotFound, Unavailable, path_of

_log = structlog.get_logger("task_operator.trial")
_LOOK: Final = 0.5  # seconds between two looks at the tasks
_KEPT: Final = 600  # seconds that tasks of a trial stay which nobody deleted
_PAGE: Final = """# Trial of the installation

This page was written by the test of the release. It is parsed, split, embedded and stored in both stores, read back and
published; then its knowledge base is deleted again.

这一页由安装测试写入：解析、切分、嵌入、存储、校验，然后删除。
"""


class Tasks(Protocol):
    """What a trial asks of the Kubernetes API: :class:`task_platform.kubernetes.Kubernetes`."""

    async def ask(self, method: str, path: str, **options: Any) -> Manifest:
        """Make a request and return the answer."""

    async def delete(self, path: str, *, uid: str) -> None:
        """Delete this very object."""


class TrialFailed(Exception):
    """The installation does not do what it should; the message says which part, why, and where to look."""


@dataclass(frozen=True)
class Trial:
    """What is tried, and where."""

    api: Tasks
    namespace: str
    """Of the tasks."""
    name: str
    """Begins the names of the tasks, and is that of the knowledge base."""
    seconds: float
    """For all of it."""
    folder: Path | None = None
    """Root of the document volume, where this process may write; a page is put there for as long as the trial takes."""
    document: str | None = None
    """Path or URL of a document that is there, in place of a page of its own. With neither only the health is checked."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of its tasks: those by which the operator knows them, if it looks after some alone."""

    async def run(self) -> None:
        """Carry it out and clear up. Raises :class:`TrialFailed` and :class:`~task_platform.kubernetes.ClusterError`."""
        until, run = time.monotonic() + self.seconds, uuid.uuid4().hex[:8]
        made: list[Manifest] = []
        try:
            with self._document(run) as document:
                await self._carry_out(document, run=run, until=until, made=made)
        finally:
            for task in made:
                path = path_of(TASKS_API, self.namespace, "processingtasks", task["metadata"]["name"])
                with contextlib.suppress(ClusterError):  # it goes by its time to live, then
                    await self.api.delete(path, uid=task["metadata"]["uid"])

    async def _carry_out(self, document: str | None, *, run: str, until: float, made: list[Manifest]) -> None:
        tasks = {"health": {"type": TaskType.HEALTH_CHECK.value}}
        if document is not None:
            tasks["page"] = self._of_knowledge_base(filePath=document)
        for part, spec in tasks.items():
            made.append(await self._create(f"{self.name}-{part}-{run}", spec, until=until))
        for task in list(made):
            await self._succeeds(task["metadata"]["name"], until=until)
        if document is not None:
            spec = self._of_knowledge_base(action="delete_knowledge_base", confirm=self.name)
            made.append(await self._create(f"{self.name}-deleted-{run}", spec, until=until))
            await self._succeeds(made[-1]["metadata"]["name"], until=until)

    def _of_knowledge_base(self, **payload: str) -> Manifest:
        return {"type": TaskType.DOCUMENT_PROCESSING.value, "kbId": self.name, "payload": payload}

    @contextlib.contextmanager
    def _document(self, run: str) -> Iterator[str | None]:
        if self.document is not None or self.folder is None:
            yield self.document
            return
        file = self.folder / f"{self.name}-{run}.md"
        try:
            for left in self.folder.glob(f"{self.name}-{'[0-9a-f]' * 8}.md"):
                left.unlink(missing_ok=True)
            file.write_text(_PAGE, encoding="utf-8")
            file.chmod(0o644)
        except OSError as error:
            raise TrialFailed(
                f"cannot write {file.name} onto the document volume: {error.strerror}; let user 65532 write there, or "
                "name a document that is there (tests.document of the chart)"
            ) from error
        try:
            yield str(PurePosixPath(DOCUMENT_ROOT) / file.name)
        finally:
            file.unlink(missing_ok=True)

    async def _create(self, name: str, spec: Manifest, *, until: float) -> Manifest:
        path = path_of(TASKS_API, self.namespace, "processingtasks")
        manifest = {
            "apiVersion": "tasks.zzdsj.io/v1",
            "kind": "ProcessingTask",
            "metadata": {"name": name, "labels": {**self.labels, "app.kubernetes.io/part-of": "processing-tasks"}},
            "spec": spec | {"ttlSecondsAfterFinished": _KEPT, "deadline": f"{max(1, int(until - time.monotonic()))}s"},
        }
        while True:
            try:
                return await self.api.ask("POST", path, body=manifest)
            except Conflict:  # it was made, and the answer got lost: the name is nobody else's
                return await self._read(name, until=until)
            except Unavailable as error:
                await self._again(error, until=until)

    async def _read(self, name: str, *, until: float) -> Manifest:
        while True:
            try:
                return await self.api.ask("GET", path_of(TASKS_API, self.namespace, "processingtasks", name))
            except Unavailable as error:
                await self._again(error, until=until)
            except NotFound as error:
                raise TrialFailed(f"task {name} was deleted by somebody else; run the test again") from error

    @staticmethod
    async def _again(error: ClusterError, *, until: float) -> None:
        if time.monotonic() >= until:
            raise error
        await asyncio.sleep(_LOOK)

    async def _succeeds(self, name: str, *, until: float) -> None:
        while True:
            status = Status.model_validate((await self._read(name, until=until)).get("status") or {})
            if status.phase is Phase.COMPLETED:
                result = None if status.result is None else status.result.model_dump(mode="json", exclude_none=True)
                _log.info("completed", task=name, result=result)
                return
            if status.finished_at is not None:
                why = "no reason is given" if status.error is None else f"{status.error.reason}: {status.error.message}"
                raise TrialFailed(
                    f"task {name} in namespace {self.namespace} is {status.phase}: {why}; see docs/troubleshooting.md"
                )
            if time.monotonic() >= until:
                waits = "nothing is told" if status.queue is None else f"{status.queue.reason}: {status.queue.message}"
                raise TrialFailed(
                    f"task {name} in namespace {self.namespace} is {status.phase} after {self.seconds:g} s: {waits}; is the "
                    f"operator ready, and can pods run? `kubectl -n {self.namespace} get events`"
                )
            await asyncio.sleep(_LOOK)
