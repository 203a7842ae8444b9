"""The product on the devstack: images, namespaces, document volume and the chart, as demo and end-to-end tests use it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

from devstack import Endpoints, cluster, images, tools
from devstack.cache import digest, state_dir
from devstack.progress import DevstackError, step

RELEASE: Final = "processing-tasks"
SYSTEM_NAMESPACE: Final = "processing-tasks-system"
TASK_NAMESPACE: Final = "knowledge"

_CHART: Final = Path(__file__).resolve().parent.parent / "helm/processing-tasks"
_TIMEOUT: Final = "120s"


def install(endpoints: Endpoints) -> Path:
    """Build and load the images, install or upgrade the release, wait until the operator is ready.

    Returns the host folder behind the document volume of TASK_NAMESPACE. May be repeated and interrupted; what stands
    already, from the same chart, values and images, is left alone and costs a second.
    """
    references = images.build_images()
    chosen = json.dumps(values(endpoints, references), sort_keys=True)
    made_of = f"devstack {digest([_CHART, chosen.encode(), tools.HELM.encode()])}"
    if _stands(endpoints, made_of):
        return cluster.document_volume(TASK_NAMESPACE)
    restricted = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
    cluster.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM_NAMESPACE, "labels": restricted}}])
    _clear_interrupted(endpoints)
    documents = cluster.document_volume(TASK_NAMESPACE)  # after the line above, which may delete the claim it was bound to
    file = state_dir() / "values.json"
    file.touch(mode=0o600)  # it holds the passwords of the stores
    file.write_text(chosen)
    with step(f"installing the chart as release {RELEASE} in {SYSTEM_NAMESPACE}"):
        # Tests put the CRD into the cluster by hand; the release takes it over.
        options = ["--values", str(file), "--take-ownership", "--wait", "--timeout", _TIMEOUT]
        options += ["--description", made_of]
        helm(endpoints, "upgrade", "--install", RELEASE, str(_CHART), *options)
    return documents


def uninstall(endpoints: Endpoints) -> None:
    """Uninstall the release and remove what it keeps on purpose: the CRD, and with it every task."""
    with step(f"uninstalling release {RELEASE}"):
        helm(endpoints, "uninstall", RELEASE, "--ignore-not-found", "--wait", "--timeout", _TIMEOUT)
        command = [
            str(endpoints.kubectl),
            "--kubeconfig",
            str(endpoints.kubeconfig),
            "delete",
            "--ignore-not-found",
            "--wait",
        ]
        for target in (["crd", "processingtasks.tasks.zzdsj.io"], ["namespace", SYSTEM_NAMESPACE]):
            subprocess.run([*command, *target], check=True, capture_output=True, timeout=120)


def values(endpoints: Endpoints, references: dict[str, str]) -> dict[str, Any]:
    """Return the chart's values for the devstack: images that are loaded already, stores behind Services, a local volume."""
    urls = endpoints.pod_urls

    def image(name: str) -> dict[str, str]:
        repository, _, tag = references[name].rpartition(":")
        return {"repository": repository, "tag": tag, "pullPolicy": "Never"}

    return {
        "taskNamespaces": [{"name": TASK_NAMESPACE, "create": True}],
        "stores": {
            "postgres": {"url": urls["TASKS_POSTGRES_URL"]},
            "redis": {"url": urls["TASKS_REDIS_URL"]},
            "milvus": {"url": urls["TASKS_MILVUS_URL"], "token": urls.get("TASKS_MILVUS_TOKEN", "")},
            "elasticsearch": {"url": urls["TASKS_ELASTICSEARCH_URL"]},
        },
        "documents": {"storageClassName": "devstack-documents", "accessModes": ["ReadOnlyMany"]},
        "operator": {"image": image("operator")},
        "runner": {"image": image("runner")},
    }


def helm(endpoints: Endpoints, *arguments: str) -> str:
    """Run helm on the devstack's cluster; its own folders stay inside the devstack's."""
    home = state_dir() / "helm"
    environment = os.environ | {f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    command = [str(tools.helm()), *arguments, "--kubeconfig", str(endpoints.kubeconfig), "--namespace", SYSTEM_NAMESPACE]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if answer.returncode != 0:
        raise DevstackError(f"cannot run helm {arguments[0]}: {answer.stderr.strip()}")
    return answer.stdout


def _stands(endpoints: Endpoints, made_of: str) -> bool:
    """Whether the release is what MADE_OF names, all its objects are as helm made them, and the operator is available.

    MADE_OF is the description of the release, which every install, upgrade and rollback by hand replaces. Images are
    part of it: their tags are hashes of what they are built from.
    """
    try:
        release = json.loads(helm(endpoints, "status", RELEASE, "--output", "json"))
    except DevstackError:
        return False
    if (release["info"]["status"], release["info"]["description"]) != ("deployed", made_of):
        return False
    # What was deleted or changed since: the answer of a dry run is compared with what is there, object by object.
    command = ["diff", "--server-side", "--force-conflicts", "--field-manager=helm"]
    differs = subprocess.run(
        [str(endpoints.kubectl), f"--kubeconfig={endpoints.kubeconfig}", *command, "--filename=-"],
        input=release["manifest"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if differs.returncode != 0:
        return False
    operator = cluster.get(f"/apis/apps/v1/namespaces/{SYSTEM_NAMESPACE}/deployments/{RELEASE}-operator")
    status = operator["status"]
    return bool(
        status.get("observedGeneration") == operator["metadata"]["generation"]
        and status.get("availableReplicas") == status.get("updatedReplicas") == operator["spec"]["replicas"]
    )


def _clear_interrupted(endpoints: Endpoints) -> None:
    """Let an install that was interrupted be repeated: helm refuses while a release is pending.

    A first install that never ended is uninstalled (the CRD and the tasks stay); a pending upgrade is rolled back.
    """
    listed = json.loads(helm(endpoints, "list", "--all", "--filter", f"^{RELEASE}$", "--output", "json"))
    status = listed[0]["status"] if listed else ""
    if status in {"pending-install", "uninstalling"} or (status == "failed" and listed[0]["revision"] == "1"):
        helm(endpoints, "uninstall", RELEASE, "--wait", "--timeout", _TIMEOUT)
    elif status in {"pending-upgrade", "pending-rollback"}:
        helm(endpoints, "rollback", RELEASE, "--wait", "--timeout", _TIMEOUT)
