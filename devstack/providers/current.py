"""A cluster in hand: the current context of kubectl, with stores and a registry in hand.

What it is gets fixed at the beginning of each command, as a private copy of that context alone: a switch of the context
meanwhile changes nothing. What we make is one namespace with our label, a release of its name in it, and the CRDs where
the cluster has none; `down` removes the namespace and the release. The CRDs stay, as they do on any `helm uninstall`:
with it go all tasks of the cluster.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from devstack import Endpoints, kubectl
from devstack.cache import state_dir
from devstack.kubectl import Kubectl
from devstack.process import run
from devstack.progress import DevstackError, say
from devstack.providers import CRDS, RESTRICTED, Place, Prepared
from devstack.stores.common import write_private

LABEL: Final = "tasks.zzdsj.io/devstack"
"""On the namespace that we made: its value is the release's name."""
_CRD_FILES: Final = Path(__file__).resolve().parents[2] / "crds"
_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
"""At most 40 characters, as the chart's prefix of names."""
_IMAGES: Final = ("operator.image.repository", "runner.image.repository")
_STORES: Final = ("stores.existingSecret", "stores.postgres.url")


class Current:
    """The cluster of kubectl's current context, and in it the namespace NAMESPACE, which is asked for when it is None."""

    ours = False

    def __init__(self, namespace: str | None, values: Path | None) -> None:
        self.values = values
        self._program = kubectl.program()
        access = _current_context(self._program)
        context, server = _named(access)
        say(f"Cluster: context {context}, server {server}")
        if namespace is None:
            namespace = _ask(context)
        if not _NAMESPACE.fullmatch(namespace):
            raise DevstackError(
                f"cannot use the namespace {namespace!r}: choose up to 40 lower-case letters, digits and hyphens"
            )
        self.place = Place(release=namespace, namespace=namespace, task_namespace=namespace)
        self._folder = state_dir() / "current" / namespace
        self._kubeconfig = self._folder / "kubeconfig"
        if self._kubeconfig.exists():
            before = _named(self._kubeconfig.read_text())
            if before[1] != server:
                raise DevstackError(
                    f"cannot use the namespace {namespace} here: it stands for the one on {before[1]}; go on there with "
                    f"`kubectl config use-context {before[0]}`, or choose another namespace"
                )
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(self._kubeconfig, access)
        self._kubectl = Kubectl(self._program, self._kubeconfig)

    def up(self) -> Endpoints:
        """Make the namespace, or make sure that it is one that we made."""
        kubectl.require_version(self._kubectl)
        if not self._made():
            labels = RESTRICTED | {LABEL: self.place.release}
            manifest = {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": self.place.namespace, "labels": labels},
            }
            # Not apply: one that somebody made a moment ago must not become ours.
            self._kubectl("create", "--filename=-", doing=f"make {self.place.namespace}", stdin=yaml.safe_dump(manifest))
        return Endpoints(
            kubeconfig=self._kubeconfig, kubectl=self._program, host_urls={}, pod_urls={}, document_root=self._folder
        )

    def prepare(self, endpoints: Endpoints) -> Prepared:
        """Refuse what is missing of images, stores and CRDs; everything else is the user's."""
        given = self._given()
        if missing := [key for key in _IMAGES if not _at(given, key)]:
            raise DevstackError(
                f"cannot install without {' and '.join(missing)}: push the images to a registry that the cluster reaches "
                "(docs/images.md) and name them in the file of --values"
            )
        secret = _at(given, "stores.existingSecret")
        if not secret and not _at(given, "stores.postgres.url"):
            raise DevstackError(
                f"cannot install without stores: set {' or '.join(_STORES)} and its neighbours in the file of --values "
                "(docs/install.md, Credentials)"
            )
        if secret and self._kubectl.find("secret", secret, f"--namespace={self.place.namespace}") is None:
            raise DevstackError(
                f"cannot install: there is no Secret {secret}, which stores.existingSecret names; make it with `kubectl -n "
                f"{self.place.namespace} create secret generic {secret} --from-env-file=FILE`"
            )
        brings = [self._brings(crd) for crd in CRDS]  # each is looked at, for what it may refuse
        chosen = {
            "fullnameOverride": self.place.release,
            "taskNamespaces": [{"name": self.place.task_namespace}],
            "crds": {"enabled": all(brings)},
            "operator": {"clusterWide": False},  # tasks of others are none of ours
        }
        return Prepared(chosen, documents=None)

    def clear(self, endpoints: Endpoints) -> None:
        """Remove the namespace, if it is one that we made; the CRDs stay."""
        if self._made():
            gone = ["delete", "namespace", self.place.namespace, "--ignore-not-found", "--wait", "--timeout=180s"]
            self._kubectl(*gone, doing=f"delete the namespace {self.place.namespace}")
        names = " and ".join(CRDS)
        say(f"The CRDs {names} stay in the cluster, with the tasks of other namespaces (docs/install.md, Remove the CRDs).")

    def down(self) -> None:
        """Remove the release and the namespace that we made, and nothing else; the cluster goes on."""
        from devstack import installation  # it imports this package

        if self._made():
            installation.uninstall(self.up(), self)
        else:
            say(f"There is no namespace {self.place.namespace}: nothing to remove.")
        shutil.rmtree(self._folder)

    def _made(self) -> bool:
        """Whether the namespace is there and ours; DevstackError when it is somebody else's."""
        found = self._kubectl.find("namespace", self.place.namespace)
        if found is None:
            return False
        if found["metadata"].get("labels", {}).get(LABEL) != self.place.release:
            raise DevstackError(
                f"cannot use the namespace {self.place.namespace}: it exists and was not made by this command (no label "
                f"{LABEL}); choose a name that is not taken"
            )
        if found["status"].get("phase") == "Terminating":
            raise DevstackError(
                f"cannot use the namespace {self.place.namespace}: it is being deleted; wait with `kubectl wait "
                f"--for=delete namespace/{self.place.namespace}` and repeat"
            )
        return True

    def _given(self) -> dict[str, Any]:
        if self.values is None:
            return {}
        try:
            given = yaml.safe_load(self.values.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise DevstackError(f"cannot read the values {self.values}: {error}") from error
        if given is not None and not isinstance(given, dict):
            raise DevstackError(f"cannot read the values {self.values}: at its top has to be a map")
        return given or {}

    def _brings(self, crd: str) -> bool:
        """Whether a CRD is for our release to bring and keep up to date; DevstackError when another one differs."""
        found = self._kubectl.find("crd", crd)
        if found is None:
            return True
        notes = found["metadata"].get("annotations", {})
        owner = (notes.get("meta.helm.sh/release-name"), notes.get("meta.helm.sh/release-namespace"))
        if owner == (self.place.release, self.place.namespace):
            return True
        if self._kubectl.differs((_CRD_FILES / f"{crd.partition('.')[0]}.yaml").read_text(), field_manager="helm") is False:
            return False
        whose = f"belongs to release {owner[0]} in namespace {owner[1]}" if owner[0] else "was not made by helm"
        version = found["metadata"].get("labels", {}).get("app.kubernetes.io/version", "unknown")
        raise DevstackError(
            f"cannot install beside the CRD {crd} of this cluster: it {whose}, is of version {version} and differs from "
            "the one here; install the same version of the product, upgrade that release first, or hand the CRD over "
            f"to this one: `kubectl label crd {crd} app.kubernetes.io/managed-by=Helm --overwrite && kubectl annotate crd "
            f"{crd} --overwrite meta.helm.sh/release-name={self.place.release} "
            f"meta.helm.sh/release-namespace={self.place.namespace}`"
        )


def _current_context(program: Path) -> str:
    """Return the current context of the user's kubectl as a kubeconfig (YAML) that needs no other file."""
    command: list[str | Path] = [program, "config", "view", "--minify", "--flatten", "--raw"]
    try:
        return run(command, doing="tell the cluster in hand")
    except DevstackError as error:
        raise DevstackError(f"{error}\n  choose one with `kubectl config use-context`, or set KUBECONFIG") from error


def _named(access: str) -> tuple[str, str]:
    """Return the name of the context and its server in ACCESS, a kubeconfig of one context."""
    content = yaml.safe_load(access)
    context: str = content.get("current-context") or ""
    clusters = content.get("clusters") or []
    if not context or not clusters:
        raise DevstackError("cannot tell the cluster in hand: kubectl has no current context; `kubectl config use-context`")
    server: str = clusters[0]["cluster"].get("server", "")
    return context, server


def _ask(context: str) -> str:
    if not sys.stdin.isatty():
        raise DevstackError("cannot install into a cluster in hand without a namespace of its own: give --namespace NAME")
    try:
        namespace = input("A namespace of its own for this installation, which is made, and deleted at the end: ").strip()
        if input(f"To go on in the cluster {context}, type the namespace again: ").strip() != namespace:
            raise DevstackError("cannot go on: the two differ; nothing was changed")
    except EOFError as error:
        raise DevstackError("cannot go on without a namespace: give --namespace NAME; nothing was changed") from error
    return namespace


def _at(values: dict[str, Any], key: str) -> Any:
    """Return the value at the dotted KEY, or None."""
    place: Any = values
    for part in key.split("."):
        place = place.get(part) if isinstance(place, dict) else None
    return place
