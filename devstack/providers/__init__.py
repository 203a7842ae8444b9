"""Clusters that the product is tried on, behind one protocol.

    provider = choose(None)           # or "embedded", "kind", "current"
    endpoints = provider.up()
    installation.install(endpoints, provider)
    provider.down()

- `embedded`: the one-node Kubernetes and the stores of this package, on this machine; needs root.
- `kind`: a cluster in Docker, made by pytest-kind's KindCluster, with the stores in it; needs Docker and no root.
- `current`: a cluster in hand, by the current context of kubectl, and stores in hand. It is never chosen by itself, and
  what is made there is one namespace, one release named after it, and the CRDs where there are none.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from devstack import Endpoints, images
from devstack.progress import DevstackError

NAMES: Final = ("embedded", "kind", "current")
CRD: Final = "processingtasks.tasks.zzdsj.io"
CRDS: Final = (CRD, "workerpools.tasks.zzdsj.io", "processingschedules.tasks.zzdsj.io")
RESTRICTED: Final = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
"""Labels of a namespace under Pod Security `restricted`."""


@dataclass(frozen=True)
class Place:
    """Where in a cluster the product goes."""

    release: str = "processing-tasks"
    namespace: str = "processing-tasks-system"
    task_namespace: str = "knowledge"


@dataclass(frozen=True)
class Prepared:
    """What a cluster has ready for the chart."""

    values: dict[str, Any]
    """On top of the chart's defaults and of a file of the user's."""
    documents: Path | None
    """Folder on this machine behind the document volume; None where only pods reach it."""


class Provider(Protocol):
    """A cluster to try the product on. Every method may be repeated, and may be interrupted at any point."""

    place: Place
    values: Path | None
    """The user's values for the chart."""
    ours: bool
    """Whether the whole cluster is ours: what stands in the way of the release (CRDs made by hand) may be taken over."""

    def up(self) -> Endpoints:
        """Bring up the cluster and, where they come with it, the stores, or make sure of them."""

    def prepare(self, endpoints: Endpoints) -> Prepared:
        """Make images, namespaces and the document volume ready for the chart."""

    def clear(self, endpoints: Endpoints) -> None:
        """Remove what `prepare` and the release left in the cluster; the release is gone."""

    def down(self) -> None:
        """End what `up` began: the cluster, or what we made in one that is not ours."""


def default(*, root: bool, docker_runs: Callable[[], bool]) -> str:
    """Return the cluster that is taken when none is named: never one that was there before."""
    return "kind" if not root and docker_runs() else "embedded"


def choose(name: str | None, *, namespace: str | None = None, values: Path | None = None) -> Provider:
    """Return the provider NAME; without a name `kind` where Docker answers an ordinary user, else `embedded`.

    NAMESPACE is for `current` alone, VALUES (a file for the chart) for `kind` and `current`. Raises DevstackError for
    what does not go together.
    """
    if name is None:
        name = default(root=os.geteuid() == 0, docker_runs=images.docker_runs)
    if name not in NAMES:
        raise DevstackError(f"cannot use a cluster {name!r}: choose one of {', '.join(NAMES)}")
    if namespace is not None and name != "current":
        raise DevstackError(f"cannot use a namespace of your own with the cluster {name}, which is ours: leave it out")
    if values is not None and not values.is_file():
        raise DevstackError(f"cannot read the values {values}: there is no such file")
    # Imported when chosen: the one needs root's tools, the other pytest-kind.
    if name == "current":
        from devstack.providers.current import Current

        return Current(namespace, values)
    if name == "kind":
        from devstack.providers.kind import Kind

        return Kind(values)
    from devstack.providers.embedded import Embedded

    if values is not None:
        raise DevstackError("cannot use --values with the embedded cluster, which has stores of its own: leave it out")
    return Embedded()
