"""A machine of its own on which etcd is restored from a backup while the operator runs.

Run inside the namespaces of tests.support.devstack.in_private_machine as `python -m tests.support.restored_machine`: ends
with 0 when tasks and table have followed.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import asyncpg

import devstack
from devstack import process
from devstack.cache import state_dir
from devstack.cluster import NAMES
from devstack.stores import common, postgres
from task_operator.schema import migrate
from task_platform.kubernetes import Access
from tests.support.devstack import Kubectl
from tests.support.operator_lab import ROOT, Kube, Kubelet, OperatorProcess, Place, until

ETCD, BACKUP = "etcd", "etcd-backup"


def back_up() -> None:
    """Copy etcd's data while it is stopped; the other parts wait for it."""
    process.stop("etcd")
    shutil.copytree(state_dir() / ETCD, state_dir() / BACKUP)
    devstack.up(["cluster"])


def restore() -> None:
    """Begin again from the copy, as the Kubernetes documentation says: with the API server and the controllers stopped."""
    for name in reversed(NAMES):
        process.stop(name, kill=True)
    shutil.rmtree(state_dir() / ETCD)
    shutil.copytree(state_dir() / BACKUP, state_dir() / ETCD)
    devstack.up(["cluster"])


async def supervise(operator: OperatorProcess) -> None:
    """Start the operator again whenever it ends, as a kubelet does."""
    while True:
        if operator.exit_code() is not None:
            operator.start()
        await asyncio.sleep(0.2)


async def scenario(place: Place, operator: OperatorProcess, sql: "asyncpg.Connection[Any]") -> None:
    async def rows() -> dict[str, tuple[str, bool]]:
        found = await sql.fetch("SELECT name, phase, deleted_at IS NOT NULL AS deleted FROM tasks")
        return {row["name"]: (row["phase"], row["deleted"]) for row in found}

    async def table(**expected: tuple[str, bool]) -> None:
        async def look() -> bool:
            return await rows() == expected

        try:
            await until("", look)
        except AssertionError:
            raise AssertionError(f"the table shows {await rows()} and not {expected}") from None

    async with Kubelet(place, outcomes={1: None}).at_work():
        await place.create("runs")
        await place.wait_for("Processing", name="runs")
        await place.create("returns", suspend=True)
    await table(runs=("Processing", False), returns=("Queued", False))
    await asyncio.to_thread(back_up)

    async with Kubelet(place).at_work():
        await place.create("vanishes", suspend=True)
        await place.wait_for("Completed", name="runs")
    await place.kube.do("DELETE", place.path("processingtasks", "returns"))
    for _ in range(50):  # versions that the restored API server will count anew, one by one
        await place.kube.do("POST", place.path("configmaps"), {"metadata": {"generateName": "version-"}})
    await table(runs=("Completed", False), returns=("Queued", True), vanishes=("Queued", False))
    await asyncio.to_thread(restore)

    # What ran when the backup was made runs to its end again, what was deleted after it is back, and a new task is seen.
    async with Kubelet(place).at_work():
        await place.create("new")
        for name in ("new", "runs"):
            await place.wait_for("Completed", name=name, seconds=90)
    await table(runs=("Completed", False), returns=("Queued", False), vanishes=("Queued", True), new=("Completed", False))
    assert "the API server was restored from a backup" in operator.log.read_text()


async def main() -> None:
    endpoints = devstack.up(["cluster"])
    common.make_bridge()
    postgres.up()
    url = postgres.create_database("operator")
    await migrate(url)
    sql = await asyncpg.connect(url)
    kubectl = Kubectl(endpoints)
    kubectl("apply", "--server-side", "-f", str(ROOT / "crds"))
    plurals = ("processingtasks", "workerpools", "processingschedules")
    crds = [f"crd/{plural}.tasks.zzdsj.io" for plural in plurals]
    kubectl("wait", "--for=condition=Established", "--timeout=30s", *crds)
    kube = Kube(Access.from_kubeconfig(endpoints.kubeconfig))
    with tempfile.TemporaryDirectory() as folder:
        async with Place.fresh(kube) as place:
            operator = OperatorProcess(
                kubeconfig=endpoints.kubeconfig,
                namespaces=[place.namespace],
                folder=Path(folder),
                OPERATOR_POSTGRES_URL=url,
            )
            async with operator.at_work():
                supervising = asyncio.create_task(supervise(operator))
                try:
                    await scenario(place, operator, sql)
                except AssertionError as error:
                    raise AssertionError(f"{error}\n{operator.log.read_text()[-4000:]}") from None
                finally:
                    supervising.cancel()
    await kube.aclose()
    await sql.close()


if __name__ == "__main__":
    asyncio.run(main())
