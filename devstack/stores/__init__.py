"""The stores of the devstack: real PostgreSQL, Redis, Milvus and Elasticsearch servers on this machine.

    urls = stores.up()     # TASKS_* variables for processes on this machine
    stores.down()          # data is kept; stores.down(purge=True) deletes it

Each store has a module with one shape: NAME, SERVICE_PORT, `port`, `environment`, `up` and `down`. `up` may be repeated
and interrupted: folders and passwords get their names when they are complete, and a store counts as up when it has
answered a question, not when its process is there. A store's files lie in the state folder under its name.

RabbitMQ (`rabbitmq`) is there for tests that start it by themselves, with `up_optional`: the product can do without.

Pods reach them through Services in the namespace `stores`, which lead to the bridge's address.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from devstack import network
from devstack.cache import state_dir
from devstack.process import running
from devstack.progress import step
from devstack.stores import common, elasticsearch, milvus, milvus_lite, postgres, rabbitmq, redis
from devstack.stores.postgres import create_database, drop_database

__all__ = [
    "NAMES",
    "NAMESPACE",
    "create_database",
    "down",
    "drop_database",
    "host_urls",
    "pod_urls",
    "services",
    "status",
    "stop",
    "up",
    "up_optional",
]

NAMESPACE = "stores"


class Store(Protocol):
    """What the module of a store offers."""

    NAME: str
    SERVICE_PORT: int

    def port(self) -> int:
        """Return the port on this machine."""

    def environment(self, address: str) -> dict[str, str]:
        """Return the variables of a client that reaches the store at ADDRESS (host:port)."""

    def up(self) -> None:
        """Start the store and wait for its answer."""

    def down(self, *, kill: bool = False) -> None:
        """Stop the store."""


_STORES: tuple[Store, ...] = (postgres, redis, milvus, elasticsearch)

_OPTIONAL: tuple[Store, ...] = (rabbitmq,)

NAMES = tuple(store.NAME for store in _STORES)
"""The names of the stores, which are those of their processes."""


def up() -> dict[str, str]:
    """Bring up all stores, side by side, and return `host_urls()`. What runs already is kept.

    Raises DevstackError, one sentence with the remedy, of the first store that cannot be brought up.
    """
    common.make_bridge()
    with step(f"bringing up {', '.join(NAMES)}"):
        _side_by_side([store.up for store in _STORES])
    return host_urls()


def up_optional(name: str) -> None:
    """Bring up a store that `up` leaves out; `down` stops it. Raises DevstackError."""
    common.make_bridge()
    with step(f"bringing up {name}"):
        next(store for store in _OPTIONAL if name == store.NAME).up()


def down(*, purge: bool = False) -> None:
    """Stop all stores; with PURGE also delete their data and passwords, at once."""
    _side_by_side(
        [lambda store=store: store.down(kill=purge) for store in (*_STORES, *_OPTIONAL)]
        + [lambda: milvus_lite.down(purge=purge)]
    )
    if purge:
        for name in (*NAMES, *(store.NAME for store in _OPTIONAL), "passwords"):
            shutil.rmtree(state_dir() / name, ignore_errors=True)


def stop(name: str) -> None:
    """Stop one store; its data is kept, and `up` or `up_optional` starts it again."""
    next(store for store in (*_STORES, *_OPTIONAL) if name == store.NAME).down()


def status() -> dict[str, str]:
    """Return what each store is doing, by name."""
    told = {}
    for store in (*_STORES, *(store for store in _OPTIONAL if running(store.NAME))):
        told[store.NAME] = f"running on {common.HOST}:{store.port()}" if running(store.NAME) else "not running"
    return told


def host_urls() -> dict[str, str]:
    """Return the TASKS_* variables for processes on this machine."""
    return _environment(lambda store: f"{common.HOST}:{store.port()}")


def pod_urls() -> dict[str, str]:
    """Return the TASKS_* variables for pods, by the names of `services()`."""
    return _environment(lambda store: f"{store.NAME}.{NAMESPACE}.svc.cluster.local:{store.SERVICE_PORT}")


def services() -> list[dict[str, Any]]:
    """Return the Kubernetes objects that give the stores names in the cluster.

    The Services select no pods; each has an EndpointSlice with the bridge's address and the store's real port.
    """
    objects: list[dict[str, Any]] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}]
    for store in _STORES:
        metadata = {"name": store.NAME, "namespace": NAMESPACE}
        port = {"name": store.NAME, "protocol": "TCP"}
        objects += [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {"ports": [{**port, "port": store.SERVICE_PORT, "targetPort": store.port()}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**metadata, "labels": {"kubernetes.io/service-name": store.NAME}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [network.ADDRESS], "conditions": {"ready": True}}],
                "ports": [{**port, "port": store.port()}],
            },
        ]
    return objects


def _environment(address: Callable[[Store], str]) -> dict[str, str]:
    return {key: value for store in _STORES for key, value in store.environment(address(store)).items()}


def _side_by_side(tasks: Sequence[Callable[[], None]]) -> None:
    """Run TASKS in threads, wait for all, and raise the first error.

    Daemon threads, not a pool: an interrupt ends the program at once, and every task may end at any point.
    """
    errors: list[BaseException] = []

    def body(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=body, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
