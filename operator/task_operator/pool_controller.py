"""Worker pools: Jobs of their workers, size, status. Gathers, lets :mod:`task_operator.pools` decide, and applies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from task_operator.pool_queue import Look
from task_operator.pools import Backlog, Pool

OnLook = Callable[[Pool, Look | None], None]
"""Takes what there is of a pool in Redis, each second; None: Redis cannot be used."""


class PoolController:
    """Keeps worker pools as they are to be, until cancelled."""

    def __init__(self, *, on_look: OnLook, backlog: Callable[[Pool], Backlog]) -> None:
        self._on_look = on_look
        self._backlog = backlog

    def on_pool(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on WorkerPools."""

    def on_worker_job(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on Jobs; those that are no worker's are ignored."""

    @property
    def synced(self) -> bool:
        """Whether all pools have been listed once: before that nobody can say of a task that no pool serves it."""
        return True

    def pools(self) -> Sequence[Pool]:
        """Return the pools of all namespaces, also those on their way out."""
        return ()

    async def run(self) -> None:
        """Look at every pool each second."""
