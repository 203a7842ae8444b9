"""An operator and a worker that hand tasks on through Redis, whatever it is made of, while what has their keys is killed."""

from collections.abc import Callable
from datetime import UTC, datetime

from job_runner import leases
from job_runner.leases import Leases
from task_contract.leases import PoolKeys
from task_operator.pool_queue import Offer, PoolQueue, QueueUnavailable
from tests.support.operator_lab import until

KEYS = PoolKeys("knowledge", "texts")


def offer(uid: str) -> Offer:
    return Offer(uid=uid, namespace="knowledge", name=uid, attempt=1, stamp="s", priority="normal", rank=0, task='{"a": 1}')


async def a_queue_goes_on(url: str, *, kill: Callable[[], object]) -> None:
    """Pass a task on, kill what is at ``url`` now, and pass on another one."""
    operator, worker = PoolQueue(url), Leases(url, KEYS, "worker-1")
    taken: list[str] = []

    async def offered(uid: str) -> bool:
        try:
            await operator.offer(KEYS, [offer(uid)], now=datetime.now(UTC))
        except QueueUnavailable:
            return False
        return True

    async def took(uid: str) -> bool:
        try:
            taken.extend(lease.uid for lease in await worker.take(5, held=()))
        except leases.QueueUnavailable:
            return False
        return uid in taken

    assert await offered("one")
    await until("the first is taken", lambda: took("one"))
    kill()
    await until("the next master takes offers", lambda: offered("two"), seconds=30)
    await until("the second is taken", lambda: took("two"), seconds=30)
    await operator.aclose()
    await worker.aclose()
