"""What a switch of generations leaves to do: the aliases of both stores, for those who read without the ledger.

The ledger is switched first (:meth:`job_runner.generations.Generations.switch`). Until the aliases follow, who reads through
them sees the generation that served before, whole. Who dies in between has it finished by the next attempt, the next task of
the knowledge base, or a sweep.
"""

import structlog

from job_runner.index import Generation
from job_runner.ledger import Ledger
from job_runner.stores import OpenStores

log = structlog.get_logger(__name__)


async def finish_switch(*, namespace: str, kb_id: str, ledger: Ledger, open_stores: OpenStores) -> int:
    """Make both aliases lead to the generation that serves; return how many did not.

    It may run beside itself and beside a switch: it ends only when the generation that it has found serves on. One of two
    that meet may still be late with an alias; the sweeps of the days after a switch look again.
    """
    moved = 0
    while (current := await ledger.knowledge_base(namespace=namespace, kb_id=kb_id)) is not None:
        stores = open_stores(Generation(namespace, kb_id, current[0]))
        try:
            await stores.open_existing()
            moved += (changed := await stores.serve())
        finally:
            await stores.aclose()
        if changed:
            log.info("aliases switched", kb_id=kb_id, generation=current[0], stores=changed)
        if await ledger.aliased(namespace=namespace, kb_id=kb_id, number=current[0]):
            break
    return moved
