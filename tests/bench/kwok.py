"""Nodes and pods that KWOK plays: the API server, the scheduler and the Job controller take them for real.

KWOK (https://kwok.sigs.k8s.io) is a program of the Kubernetes project. What a pod does stands in ``kwok.yaml``: it runs as
soon as it has a node, and at once ends well, with the termination message of a runner.
"""

import asyncio
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from devstack import tools
from task_contract.models import ProcessingTask
from task_contract.names import TASK_UID_LABEL
from task_operator.jobs import RunnerTemplate, build_job
from tests.bench.operator_load import OUTCOME, Load, PodHand, Record, Server, task
from tests.support.operator_lab import JOBS, MERGE

SELECTOR: Final = {"tests.tasks.zzdsj.io/node": "simulated"}
_CLAIM: Final = "processing-task-documents"
_NODES: Final = 10
_STAGES: Final = Path(__file__).with_name("kwok.yaml")
_ROOM: Final = {"cpu": "1000", "memory": "2Ti", "pods": "10000"}


async def make_nodes(server: Server, namespace: str) -> None:
    """Make nodes with room for everything, which are ready, and the claim of documents that pods of tasks mount."""
    claim = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}
    volume = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": "/simulated"}}
    named = {"metadata": {"name": _CLAIM}}
    await server.send("POST", "/api/v1/persistentvolumes", named | {"spec": volume})
    claims = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
    await server.send("POST", claims, named | {"spec": claim | {"volumeName": _CLAIM}})
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "Simulated", "lastHeartbeatTime": now, "lastTransitionTime": now}
    for number in range(_NODES):
        name = f"simulated-{number}"
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **SELECTOR}
        await server.send("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
        status = {"capacity": _ROOM, "allocatable": _ROOM, "conditions": [ready]}
        await server.send("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, content_type=MERGE)


def start(kubeconfig: Path, folder: Path) -> "subprocess.Popen[bytes]":
    """Start KWOK; it keeps the nodes alive, and plays the pods that are put on them."""
    stages = folder / "kwok.yaml"
    message = OUTCOME.termination_message().replace("'", "''")
    stages.write_text(_STAGES.read_text().replace("MESSAGE", f"'{message}'"))
    selector = ",".join(f"{key}={value}" for key, value in SELECTOR.items())
    command = [
        str(tools.kwok()),
        f"--kubeconfig={kubeconfig}",
        f"--config={stages}",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-label-selector={selector}",
        "--server-address=127.0.0.1:0",
        "--node-lease-duration-seconds=40",
    ]
    with (folder / "kwok.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


class Outcomes(PodHand):
    """Stores the outcome of a pod, as a runner does, and leaves the pod to KWOK."""

    async def _live(self, path: str, pod: Mapping[str, Any]) -> None:
        await self._results.store([pod["metadata"]["labels"][TASK_UID_LABEL]])


class BareJobs(Load):
    """The Jobs that our operator would make, made by the load, and nobody that looks after them."""

    async def create(self, name: str, number: int) -> None:
        """Create one Job."""
        self.records[name] = Record(posted=time.monotonic())
        made = task(name, self.type)
        made["metadata"] |= {"namespace": self.namespace, "uid": str(uuid.uuid4()), "generation": 1}
        made["metadata"]["creationTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        template = RunnerTemplate(image="localhost/processing-tasks/runner:test", node_selector=SELECTOR)
        job = build_job(ProcessingTask.model_validate(made), attempt=1, template=template)
        del job["metadata"]["ownerReferences"]  # of a task that is not there: the garbage collector would delete it
        await self.server.send("POST", f"{JOBS}/namespaces/{self.namespace}/jobs", job)

    async def follow_tasks(self) -> None:
        """There are none: what ends is a Job."""
        while True:
            for record in self.records.values():
                if record.completed is None and record.job_done is not None:
                    record.completed = record.job_done
                    self.completed += 1
            await asyncio.sleep(0.02)
