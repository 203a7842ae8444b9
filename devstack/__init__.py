"""The one-node Kubernetes and the stores that demo and tests run on: real servers, on this machine, in seconds.

    endpoints = devstack.up()      # or `python -m devstack up`
    devstack.down()                # or `python -m devstack down`

`up` may be repeated, interrupted, run twice at once and run after a reboot; it reuses what runs. `down` leaves no
process, mount, bridge, control group or packet filter rule behind, and no data: what lasts is the cache of builds.
One devstack runs on a machine, in a network namespace to be exact; a second one is refused and told who is there.

Parts: `cluster` (etcd, API server, controller manager, scheduler), `node` (containerd, kubelet, kube-proxy, DNS) and
`stores` (PostgreSQL, Redis, Milvus, Elasticsearch).
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from devstack import cluster, machine, network, node, stores, tools
from devstack.cache import locked, state_dir
from devstack.process import boot_id, running
from devstack.progress import DevstackError, step

__all__ = ["PARTS", "DevstackError", "Endpoints", "down", "endpoints", "up"]

PARTS = ("cluster", "node", "stores")


@dataclass(frozen=True)
class Endpoints:
    """Where the parts that run are reached."""

    kubeconfig: Path
    kubectl: Path
    host_urls: dict[str, str]
    """TASKS_* variables for processes on this machine; empty without stores."""
    pod_urls: dict[str, str]
    """TASKS_* variables for pods, by Services in the namespace `stores`; empty without stores."""
    document_root: Path
    """Host folder with one folder of documents for each task namespace; see devstack.cluster.document_volume."""


def up(parts: Iterable[str] = PARTS) -> Endpoints:
    """Bring up PARTS (`node` brings `cluster` with it) and return where they are; what runs already is kept.

    Raises DevstackError, one sentence with the remedy, when a part cannot be brought up; the others stay as they are,
    and the next `up` goes on from there.
    """
    wanted = set(parts)
    if unknown := wanted - set(PARTS):
        raise DevstackError(f"cannot bring up {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if "node" in wanted:
        wanted.add("cluster")
    machine.require_root()
    with _lock():
        machine.require([part for part in PARTS if part in wanted])
        _forget_earlier_boot()
        if wanted & {"cluster", "node"}:
            tools.kube()  # builds before anything starts
        network.up()
        starting_stores = _Background(stores.up) if "stores" in wanted else None
        if "cluster" in wanted:
            cluster.up()
        if "node" in wanted:
            node.up()
        if starting_stores is not None:
            starting_stores.join()
        found = endpoints()
        if found.pod_urls and running("apiserver"):
            cluster.apply(stores.services())
        return found


def down(*, keep_data: bool = False) -> None:
    """End everything that `up` started, in whatever state it is, and put the machine back as it was.

    With KEEP_DATA documents and what is in the stores stay for the next `up`; the cluster's objects never do.
    """
    machine.require_root()
    with _lock(), step("ending the devstack"):
        stores.down(purge=not keep_data)
        node.down()
        cluster.down()
        network.down()
        if keep_data:
            return
        lock = _lock_path()
        for entry in state_dir().iterdir():
            if entry == lock:
                continue  # others may wait on it
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def endpoints() -> Endpoints:
    """Return where the parts that run are reached, without starting anything."""
    stores_run = all(running(name) for name in stores.NAMES)
    return Endpoints(
        kubeconfig=cluster.kubeconfig(),
        kubectl=tools.kubectl(),
        host_urls=stores.host_urls() if stores_run else {},
        pod_urls=stores.pod_urls() if stores_run else {},
        document_root=cluster.document_root(),
    )


def _lock_path() -> Path:
    return state_dir() / "lock"


def _lock() -> contextlib.AbstractContextManager[None]:
    return locked(_lock_path(), "another devstack command is at work: waiting for it")


def _forget_earlier_boot() -> None:
    """Clear what stood at the last shutdown: its processes are gone, and etcd's data is not to be trusted."""
    mark = state_dir() / "boot"
    if mark.exists() and mark.read_text() != boot_id():
        with step("clearing what the last boot left of the cluster"):
            node.down()
            cluster.down()
    mark.write_text(boot_id())


class _Background:
    """A function in a daemon thread: an interrupt ends the program at once, and all it runs may end at any point."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._error: BaseException | None = None

        def body() -> None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001 - raised again in join
                self._error = error

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
