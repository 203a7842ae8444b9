"""The cluster and the stores of this package, on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import devstack
from devstack import Endpoints, cluster, images
from devstack.kubectl import Kubectl
from devstack.providers import CRDS, RESTRICTED, Place, Prepared


class Embedded:
    """See the package `devstack`: real servers, which tests use too."""

    place = Place()
    values: Path | None = None
    ours = True

    def up(self) -> Endpoints:
        """Bring up every part."""
        return devstack.up()

    def prepare(self, endpoints: Endpoints) -> Prepared:
        """Build the images and load them into the node; the document volume is a folder of this machine."""
        references = images.build_images()
        apply_namespace(Kubectl(endpoints.kubectl, endpoints.kubeconfig), self.place.namespace)
        documents = cluster.document_volume(self.place.task_namespace)
        chosen = loaded(references) | stores(endpoints.pod_urls) | local_documents(self.place.task_namespace)
        for part in ("operator", "gateway"):  # a second one on the same node would keep nobody company
            chosen[part] = {**chosen.get(part, {}), "replicas": 1}
        return Prepared(chosen, documents)

    def clear(self, endpoints: Endpoints) -> None:
        """Remove the CRDs, and with them every task and pool, and the release's namespace."""
        clear(Kubectl(endpoints.kubectl, endpoints.kubeconfig), self.place)

    def down(self) -> None:
        """End every part; data is deleted."""
        devstack.down()


def apply_namespace(kubectl: Kubectl, name: str) -> None:
    """Make the namespace NAME, under Pod Security `restricted`."""
    kubectl.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}])


def clear(kubectl: Kubectl, place: Place) -> None:
    """Remove the CRDs, and with them every task and pool, and the release's namespace."""
    for target in (["crd", *CRDS], ["namespace", place.namespace]):
        kubectl("delete", "--ignore-not-found", "--wait", "--timeout=120s", *target, doing=f"delete {' '.join(target)}")


def loaded(references: Mapping[str, str]) -> dict[str, Any]:
    """Return the chart's values for images (name -> reference) that the node has already."""
    chosen: dict[str, Any] = {}
    for name, reference in references.items():
        repository, _, tag = reference.rpartition(":")
        chosen[name] = {"image": {"repository": repository, "tag": tag, "pullPolicy": "Never"}}
    return chosen


def stores(urls: Mapping[str, str]) -> dict[str, Any]:
    """Return the chart's values for stores that pods reach at URLS (TASKS_* variables)."""
    return {
        "stores": {
            "postgres": {"url": urls["TASKS_POSTGRES_URL"]},
            "redis": {"url": urls["TASKS_REDIS_URL"]},
            "milvus": {"url": urls["TASKS_MILVUS_URL"], "token": urls.get("TASKS_MILVUS_TOKEN", "")},
            "elasticsearch": {"url": urls["TASKS_ELASTICSEARCH_URL"]},
        }
    }


def local_documents(task_namespace: str) -> dict[str, Any]:
    """Return the chart's values for a task namespace whose documents are a volume of the node."""
    return {
        "taskNamespaces": [{"name": task_namespace, "create": True}],
        "documents": {"storageClassName": cluster.DOCUMENT_STORAGE_CLASS, "accessModes": ["ReadOnlyMany"]},
        "tests": {"document": "/data/tide-station.html"},  # of the examples, which lie there: pods may only read
    }
