"""A cluster in Docker, by kind: for machines where Docker answers and nobody is root.

pytest-kind's KindCluster makes and deletes it, with our kind and our kubectl: its own choice of kubectl is too old. The
kubeconfig lies in the state folder, and the user's own is left alone. Documents are a folder of this machine, mounted
into the node. The stores are pods of their makers' images in the namespace `stores` (stores.yaml), reached from this
machine by ports of loopback; with values of the user's for the chart they are left out, and the user's stores serve.
"""

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import yaml

from devstack import Endpoints, cluster, images, kubectl, stores, tools
from devstack.cache import locked, state_dir
from devstack.kubectl import Kubectl
from devstack.process import run, wait_until
from devstack.progress import DevstackError, step
from devstack.providers import Place, Prepared, embedded
from devstack.stores import elasticsearch, milvus, postgres, redis
from devstack.stores.common import HOST, write_private
from devstack.stores.passwords import password

NAME: Final = "processing-tasks"
NODE: Final = f"{NAME}-control-plane"
_DOCUMENTS: Final = "/mnt/documents"
"""The folder of documents in the node."""
_STORES_FILE: Final = Path(__file__).with_name("stores.yaml")
_NODE_PORTS: Final = {postgres: 30432, redis: 30379, milvus: 30530, elasticsearch: 30920}
"""Ports of the node that the Services in stores.yaml listen on."""


class Kind:
    """The kind cluster `processing-tasks`; VALUES stand for stores of the user's."""

    place = Place()
    ours = True

    def __init__(self, values: Path | None) -> None:
        self.values = values
        self._folder = state_dir() / "kind"

    def up(self) -> Endpoints:
        """Make the cluster, or start the one that was made, and bring up the stores in it."""
        if not images.docker_runs():
            raise DevstackError("cannot use kind: no Docker daemon answers; start it, or choose another cluster (--cluster)")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._folder / "lock", "another devstack command is at work: waiting for it"):
            reach = self._reach()
            with step(f"bringing up the kind cluster {NAME} (the first time a minute or two, most of it its image)"):
                self._bring_up()
                access = run([tools.kind(), "get", "kubeconfig", f"--name={NAME}"], doing="reach the kind cluster")
                write_private(self._kubeconfig, access)
                wait_until("an API server that is ready", lambda: bool(self._ready(reach)), seconds=120)
            kubectl.require_version(reach)
            if self.values is None:
                _bring_up_stores(reach)
        here = self.values is None
        return Endpoints(
            kubeconfig=self._kubeconfig,
            kubectl=kubectl.program(),
            host_urls=stores.host_urls() if here else {},
            pod_urls=stores.pod_urls() if here else {},
            document_root=cluster.document_root(),
        )

    def prepare(self, endpoints: Endpoints) -> Prepared:
        """Build the images with Docker and load them into the node."""
        built = images.build()
        with step(f"loading the images into the kind cluster {NAME}"):
            archives = [image.archive for image in built.values()]
            run([tools.kind(), "load", "image-archive", f"--name={NAME}", *archives], doing="load the images")
        reach = Kubectl(endpoints.kubectl, endpoints.kubeconfig)
        embedded.apply_namespace(reach, self.place.namespace)
        documents = _document_volume(reach, self.place.task_namespace)
        chosen = embedded.loaded({name: image.reference for name, image in built.items()})
        chosen |= embedded.local_documents(self.place.task_namespace)
        if endpoints.pod_urls:
            chosen |= embedded.stores(endpoints.pod_urls)
        return Prepared(chosen, documents)

    def clear(self, endpoints: Endpoints) -> None:
        """Remove the CRDs, and with them every task and pool, and the release's namespace."""
        embedded.clear(Kubectl(endpoints.kubectl, endpoints.kubeconfig), self.place)

    def down(self) -> None:
        """Delete the cluster with all in it, and what we noted of it; the documents go too."""
        with step(f"deleting the kind cluster {NAME}"):
            if self._exists():
                self._delete()
            for left in (self._folder, cluster.document_root(), state_dir() / "passwords"):
                shutil.rmtree(left, ignore_errors=True)

    @property
    def _kubeconfig(self) -> Path:
        return self._folder / "kubeconfig"

    @property
    def _made(self) -> Path:
        """A file that is there once a cluster is complete; it holds what the cluster was made from."""
        return self._folder / "made.yaml"

    def _bring_up(self) -> None:
        documents = cluster.document_root()
        documents.mkdir(parents=True, exist_ok=True)
        documents.chmod(0o755)
        wanted = yaml.safe_dump(configuration(documents))
        if self._exists():
            if self._made.exists() and self._made.read_text() != wanted:
                raise DevstackError(
                    f"cannot use the kind cluster {NAME}: it was made with other ports or folders; delete it with `python "
                    "-m devstack down --cluster kind`, and repeat"
                )
            if self._made.exists():
                run(["docker", "start", NODE], doing=f"start the node {NODE}")  # after a reboot it stands still
                return
            if not self._asked.exists():
                raise DevstackError(
                    f"cannot make the kind cluster {NAME}: one of this name exists that this command did not make; delete "
                    f"it with `kind delete cluster --name {NAME}`"
                )
            self._delete()  # we died while it was made
        self._made.unlink(missing_ok=True)
        write_private(self._asked, wanted)
        try:
            self._cluster().create(self._asked)
        except subprocess.CalledProcessError as error:
            raise DevstackError(
                f"cannot make the kind cluster {NAME}: kind ended with {error.returncode}; see above"
            ) from error
        write_private(self._made, wanted)

    @property
    def _asked(self) -> Path:
        """What the cluster is to be made from, written before it is made."""
        return self._folder / "kind.yaml"

    def _delete(self) -> None:
        try:
            self._cluster().delete()
        except subprocess.CalledProcessError as error:
            raise DevstackError(f"cannot delete the kind cluster {NAME}: kind ended with {error.returncode}") from error

    def _exists(self) -> bool:
        return NAME in run([tools.kind(), "get", "clusters"], doing="list the kind clusters").split()

    def _cluster(self) -> Any:
        """Return pytest-kind's view of the cluster; the folder that it makes where it stands lies in ours."""
        from pytest_kind import KindCluster  # takes half a second to import

        with contextlib.chdir(self._folder):
            return KindCluster(NAME, kubeconfig=self._kubeconfig, kind_path=tools.kind(), kubectl_path=kubectl.program())

    def _reach(self) -> Kubectl:
        return Kubectl(kubectl.program(), self._kubeconfig)

    @staticmethod
    def _ready(reach: Kubectl) -> bool:
        return reach("get", "--raw=/readyz", doing="reach the kind cluster") == "ok"


def configuration(documents: Path) -> dict[str, Any]:
    """Return kind's configuration: one node, the folder DOCUMENTS in it, and the stores' ports on loopback alone."""
    ports = [
        {"containerPort": node_port, "hostPort": store.port(), "listenAddress": HOST, "protocol": "TCP"}
        for store, node_port in _NODE_PORTS.items()
    ]
    mounts = [{"hostPath": str(documents), "containerPath": _DOCUMENTS, "readOnly": True}]
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "nodes": [{"role": "control-plane", "extraMounts": mounts, "extraPortMappings": ports}],
    }


def store_objects() -> list[dict[str, Any]]:
    """Return the Kubernetes objects of the stores, with the Secret of their passwords."""
    names = {"POSTGRES_PASSWORD": postgres.NAME, "REDIS_PASSWORD": redis.NAME, "ELASTIC_PASSWORD": elasticsearch.NAME}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "passwords", "namespace": stores.NAMESPACE},
        "stringData": {variable: password(store) for variable, store in names.items()},
    }
    namespace, *others = yaml.safe_load_all(_STORES_FILE.read_text())
    return [namespace, secret, *others]


def _bring_up_stores(reach: Kubectl) -> None:
    with step(f"bringing up {', '.join(stores.NAMES)} in the cluster (the first time minutes: their images are fetched)"):
        reach.apply(store_objects())
        for name in stores.NAMES:
            wait = ["rollout", "status", f"--namespace={stores.NAMESPACE}", f"deployment/{name}", "--timeout=15m"]
            reach(*wait, doing=f"bring up {name} (look at `kubectl -n {stores.NAMESPACE} describe pods`)")
        milvus.secure()


def _document_volume(reach: Kubectl, namespace: str) -> Path:
    """Make the volume that the document claim of NAMESPACE binds to; return its folder on this machine."""
    folder = cluster.document_folder(namespace)
    wanted = cluster.document_volume_manifest(namespace, Path(_DOCUMENTS, namespace), node=NODE)
    found = reach.find("persistentvolume", wanted["metadata"]["name"])
    claim = reach.find("persistentvolumeclaim", cluster.DOCUMENT_CLAIM, f"--namespace={namespace}")
    bound_to = found["spec"]["claimRef"].get("uid") if found else None
    if bound_to is not None and (claim is None or claim["metadata"]["uid"] != bound_to):
        # Its claim is gone: a volume like it takes the next. It is only a name for the folder, whose documents stay.
        delete = ["delete", "persistentvolume", wanted["metadata"]["name"], "--wait", "--timeout=60s"]
        reach(*delete, doing="free the document volume for a new claim")
    reach.apply([cluster.storage_class_manifest(), wanted])
    return folder
