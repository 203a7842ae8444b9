"""The product on a cluster: images, namespaces, document volume and the chart, as demo and end-to-end tests use it."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from devstack import Endpoints, tools
from devstack.cache import digest, state_dir
from devstack.kubectl import Kubectl
from devstack.progress import DevstackError, step
from devstack.providers import CRD, Place, Provider
from devstack.providers.embedded import Embedded
from devstack.stores.common import write_private
from task_contract.lifecycle import ExitCode

RELEASE: Final = Place.release
SYSTEM_NAMESPACE: Final = Place.namespace
TASK_NAMESPACE: Final = Place.task_namespace

_CHART: Final = Path(__file__).resolve().parent.parent / "helm/processing-tasks"
_TIMEOUT: Final = "120s"
_EMBEDDED: Final = Embedded()
_UNPACK: Final = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/data')"
_RESTRICTED: Final = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


@dataclass(frozen=True)
class Installation:
    """The product as it stands in a cluster, and the ways to its documents and stores."""

    endpoints: Endpoints
    place: Place
    documents: Path | None
    """Folder on this machine behind the document volume of the task namespace; None where only pods reach it."""

    def put(self, files: Iterable[Path]) -> None:
        """Put FILES on the document volume, readable for the pods of tasks."""
        if self.documents is not None:
            for file in files:
                target = self.documents / file.name
                target.write_bytes(file.read_bytes())
                target.chmod(0o644)
            return
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in files:
                content = file.read_bytes()
                entry = tarfile.TarInfo(file.name)
                entry.size, entry.mode = len(content), 0o644
                tar.addfile(entry, io.BytesIO(content))
        with step("putting the documents on the volume, through a pod"), self._pod(writes=True) as pod:
            done = self._exec(pod, "python", "-c", _UNPACK, stdin=packed.getvalue())
        if done.returncode != 0:
            raise DevstackError(
                f"cannot put documents on the volume of {self.place.task_namespace}: {done.stderr.decode().strip()}; fill "
                "it in the way that suits the storage (docs/install.md, Documents)"
            )

    def job_runner(self, *arguments: str) -> str:
        """Run `python -m job_runner ARGUMENTS` where the stores are reached, and return what it printed.

        That is this machine where it reaches them, and a pod of the task namespace elsewhere.
        """
        if self.endpoints.host_urls:
            done = subprocess.run(
                [sys.executable, "-m", "job_runner", *arguments],
                env=os.environ | self.endpoints.host_urls,
                capture_output=True,
                timeout=120,
                check=False,
            )
        else:
            with self._pod(writes=False) as pod:
                for _ in range(3):
                    done = self._exec(pod, "python", "-m", "job_runner", *arguments)
                    if done.returncode != ExitCode.STORE_UNAVAILABLE:  # asked again, as the operator does for a task
                        break
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            said = [line for line in lines if not line.startswith("command terminated with")][-1:]  # that is kubectl's
            raise DevstackError(f"cannot {arguments[0]}: {' '.join(said) or 'job_runner said nothing'}")
        return done.stdout.decode()

    def _exec(self, pod: str, *command: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        reach = [*self._kubectl.command, "exec", "--stdin", f"--namespace={self.place.task_namespace}", pod, "--", *command]
        return subprocess.run(reach, input=stdin, capture_output=True, timeout=300, check=False)

    @property
    def _kubectl(self) -> Kubectl:
        return Kubectl(self.endpoints.kubectl, self.endpoints.kubeconfig)

    @contextlib.contextmanager
    def _pod(self, *, writes: bool) -> Iterator[str]:
        """A pod of the runner's image with the stores' credentials and, if it WRITES, the document volume.

        It gets what the operator gives to pods of tasks, ends by itself after ten minutes, and is deleted before.
        """
        operator = _deployment(self._kubectl, self.place, "operator")
        if operator is None:
            raise DevstackError(f"cannot find the operator in {self.place.namespace}: install it first")
        [container] = operator["spec"]["template"]["spec"]["containers"]
        settings = {entry["name"]: entry.get("value", "") for entry in container["env"]}
        name = f"devstack-{uuid.uuid4().hex[:8]}"
        manifest = _pod_manifest(name, self.place, settings, writes=writes)
        namespace = f"--namespace={self.place.task_namespace}"
        try:
            self._kubectl("create", "--filename=-", doing=f"make the pod {name}", stdin=json.dumps(manifest))
            wait = ["wait", namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=180s"]
            self._kubectl(*wait, doing=f"run the pod {name} (look at `kubectl -n {self.place.task_namespace} get events`)")
            yield name
        finally:
            delete = ["delete", "pod", name, namespace, "--ignore-not-found", "--wait=false"]
            self._kubectl(*delete, doing=f"delete the pod {name}")


def install(endpoints: Endpoints, provider: Provider = _EMBEDDED) -> Installation:
    """Make the images ready, install or upgrade the release, wait until the operator is ready.

    May be repeated and interrupted; what stands already, from the same chart, values and images, is left alone and costs
    a second. The embedded cluster is the default for those who brought it up by `devstack.up`.
    """
    place = provider.place
    reach = Kubectl(endpoints.kubectl, endpoints.kubeconfig)
    standing = _clear_interrupted(endpoints, place)
    prepared = provider.prepare(endpoints)  # after the line above, which may delete the claim that the volume was bound to
    installation = Installation(endpoints, place, prepared.documents)
    chosen = json.dumps(prepared.values, sort_keys=True)
    theirs = provider.values.read_bytes() if provider.values is not None else b""
    made_of = f"devstack {digest([_CHART, chosen.encode(), theirs, tools.HELM.encode()])}"
    if standing is not None and _stands(reach, place, standing, made_of):
        return installation
    file = state_dir() / f"values-{place.release}.json"
    write_private(file, chosen)  # it may hold passwords of the stores
    files = [*([provider.values] if provider.values is not None else []), file]  # what a later one says counts
    with step(f"installing the chart as release {place.release} in {place.namespace}"):
        # Tests put the CRDs into a cluster of ours by hand; the release takes them over.
        options = [f"--values={path}" for path in files] + (["--take-ownership"] if provider.ours else [])
        # Not --wait: it would wait for claims too, and some storage classes bind only when the first task runs.
        helm(endpoints, place, "upgrade", "--install", place.release, str(_CHART), *options, "--description", made_of)
        for part in ("operator", "gateway"):
            if (deployment := _deployment(reach, place, part)) is not None:
                wait = [
                    "rollout",
                    "status",
                    f"--namespace={place.namespace}",
                    f"deployment/{deployment['metadata']['name']}",
                ]
                doing = f"get the {part} ready (look at `kubectl -n {place.namespace} describe pods` and the pods' logs)"
                reach(*wait, f"--timeout={_TIMEOUT}", doing=doing)
    return installation


def uninstall(endpoints: Endpoints, provider: Provider = _EMBEDDED) -> None:
    """Uninstall the release; with it go, in a cluster of ours, CRDs and every task, elsewhere the namespace we made."""
    place = provider.place
    reach = Kubectl(endpoints.kubectl, endpoints.kubeconfig)
    with step(f"uninstalling release {place.release}"):
        if reach.find("crd", CRD) is not None:
            # First: the document claim stays as long as there are pods of tasks, be they completed.
            tasks = [
                "delete",
                "processingtasks",
                "--all",
                f"--namespace={place.task_namespace}",
                "--wait",
                f"--timeout={_TIMEOUT}",
            ]
            reach(*tasks, doing=f"delete the tasks in {place.task_namespace}")
        helm(endpoints, place, "uninstall", place.release, "--ignore-not-found", "--wait", "--timeout", _TIMEOUT)
        provider.clear(endpoints)


def helm(endpoints: Endpoints, place: Place, *arguments: str) -> str:
    """Run helm on the cluster, in the release's namespace; its own folders stay inside the devstack's."""
    home = state_dir() / "helm"
    environment = os.environ | {f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    command = [str(tools.helm()), *arguments, "--kubeconfig", str(endpoints.kubeconfig), "--namespace", place.namespace]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if answer.returncode != 0:
        raise DevstackError(f"cannot run helm {arguments[0]}: {answer.stderr.strip()}")
    return answer.stdout


def _deployment(kubectl: Kubectl, place: Place, part: str) -> dict[str, Any] | None:
    return kubectl.find("deployment", f"{place.release}-{part}", f"--namespace={place.namespace}")


def _stands(kubectl: Kubectl, place: Place, release: dict[str, Any], made_of: str) -> bool:
    """Whether RELEASE is what MADE_OF names, all its objects are as helm made them, and the operator is available.

    MADE_OF is the description of the release, which every install, upgrade and rollback by hand replaces. Images are
    part of it: their tags are hashes of what they are built from.
    """
    if (release["info"]["status"], release["info"]["description"]) != ("deployed", made_of):
        return False
    # What was deleted or changed since: the answer of a dry run is compared with what is there, object by object.
    if kubectl.differs(release["manifest"], field_manager="helm") is not False:
        return False
    operator, gateway = (_deployment(kubectl, place, part) for part in ("operator", "gateway"))
    return operator is not None and all(_available(one) for one in (operator, gateway) if one is not None)


def _available(deployment: dict[str, Any]) -> bool:
    status = deployment["status"]
    return bool(
        status.get("observedGeneration") == deployment["metadata"]["generation"]
        and status.get("availableReplicas") == status.get("updatedReplicas") == deployment["spec"]["replicas"]
    )


def _clear_interrupted(endpoints: Endpoints, place: Place) -> dict[str, Any] | None:
    """Let an install that was interrupted be repeated: helm refuses while a release is pending.

    A first install that never ended is uninstalled (the CRDs and the tasks stay); a pending upgrade is rolled back.
    Returns the release as `helm status` shows it, None when there is none, or none any more.
    """
    try:
        release: dict[str, Any] = json.loads(helm(endpoints, place, "status", place.release, "--output", "json"))
    except DevstackError as error:
        if "not found" in str(error):
            return None
        raise
    status = release["info"]["status"]
    if status in {"pending-install", "uninstalling"} or (status == "failed" and release["version"] == 1):
        helm(endpoints, place, "uninstall", place.release, "--wait", "--timeout", _TIMEOUT)
        return None
    if status in {"pending-upgrade", "pending-rollback"}:
        helm(endpoints, place, "rollback", place.release, "--wait", "--timeout", _TIMEOUT)
    return release


def _pod_manifest(name: str, place: Place, settings: dict[str, str], *, writes: bool) -> dict[str, Any]:
    """Return the pod of `Installation._pod`; SETTINGS are the operator's environment."""
    claim = settings.get("OPERATOR_DOCUMENTS_CLAIM", "")
    if writes and not claim:
        raise DevstackError("cannot put documents anywhere: the values leave out the document volume (documents.enabled)")
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the pod's own emptyDir
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    if writes:
        mounts.append({"name": "documents", "mountPath": "/data"})
        volumes.append({"name": "documents", "persistentVolumeClaim": {"claimName": claim}})
    secrets = json.loads(settings.get("OPERATOR_IMAGE_PULL_SECRETS") or "[]")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": place.task_namespace},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": 600,
            "terminationGracePeriodSeconds": 0,
            "imagePullSecrets": [{"name": secret} for secret in secrets],
            "nodeSelector": json.loads(settings.get("OPERATOR_RUNNER_NODE_SELECTOR") or "{}"),
            "tolerations": json.loads(settings.get("OPERATOR_RUNNER_TOLERATIONS") or "[]"),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "devstack",
                    "image": settings["OPERATOR_RUNNER_IMAGE"],
                    "imagePullPolicy": settings["OPERATOR_RUNNER_IMAGE_PULL_POLICY"],
                    "command": ["sleep", "600"],
                    "envFrom": [{"secretRef": {"name": settings["OPERATOR_STORES_SECRET"]}}],
                    "securityContext": _RESTRICTED,
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        },
    }
