"""Jobs that Kueue admits: the real controller of Kueue, and the real Job controller; pods are played."""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from devstack import Endpoints, tools
from task_contract.messages import AttemptOutcome, Outcome
from tests.support.devstack import Kubectl
from tests.support.operator_lab import MERGE, Kubelet, OperatorProcess, Place, until
from tests.support.servers import free_port

pytestmark = [pytest.mark.integration, pytest.mark.alone]

Start = Callable[..., OperatorProcess]
SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed")
API = "kueue.x-k8s.io/v1beta2"


@pytest.fixture(scope="module")
def kueue(kubectl: Kubectl, cluster: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kueue at work, without its webhooks: what they would fill in is given. Yields its log."""
    program, crds = tools.kueue()
    folder = tmp_path_factory.mktemp("kueue")
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
    kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(crds))
    _certificate(folder)
    config = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{free_port()}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": free_port(), "certDir": str(folder)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "integrations": {"frameworks": ["batch/job"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    log = folder / "kueue.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-ec", _IN_ITS_OWN_ETC, program, folder],
            env=os.environ | {"KUBECONFIG": str(cluster.kubeconfig)},
            stdout=output,
            stderr=output,
        )
        try:
            yield log
        finally:
            kubectl("delete", "--ignore-not-found", "--timeout=60s", "-f", str(crds))
            process.terminate()
            process.wait()


_IN_ITS_OWN_ETC = """
mount -t tmpfs tmpfs /etc
mkdir -p /etc/kueue/metrics
ln -s "$1" /etc/kueue/metrics/certs
exec "$0" --config "$1/config.yaml" --feature-gates=VisibilityOnDemand=false
"""
"""It reads the certificate of its metrics from /etc/kueue/metrics/certs, whatever is configured."""


def _certificate(folder: Path) -> None:
    """Make the certificate that the server of the webhooks wants, although nobody calls it."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=kueue"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run([*command, *files], check=True, capture_output=True)


@contextlib.asynccontextmanager
async def queue_for_one(place: Place) -> AsyncIterator[str]:
    """A queue with quota for one pod at a time; yields the path of its ClusterQueue."""
    paths = {kind: f"/apis/{API}/{kind}" for kind in ("resourceflavors", "clusterqueues")}
    name = place.namespace
    flavor = {"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": name}}
    quota = [{"name": "cpu", "nominalQuota": "300m"}, {"name": "memory", "nominalQuota": "64Gi"}]
    cluster_queue = {
        "apiVersion": API,
        "kind": "ClusterQueue",
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {},
            "queueingStrategy": "BestEffortFIFO",
            "stopPolicy": "None",
            "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": name, "resources": quota}]}],
        },
    }
    local = {"apiVersion": API, "kind": "LocalQueue", "metadata": {"name": "team"}, "spec": {"clusterQueue": name}}
    await place.kube.do("POST", paths["resourceflavors"], flavor)
    await place.kube.do("POST", paths["clusterqueues"], cluster_queue)
    queues = f"/apis/{API}/namespaces/{name}/localqueues"
    await place.kube.do("POST", queues, local)
    try:
        yield f"{paths['clusterqueues']}/{name}"
    finally:
        workloads = f"/apis/{API}/namespaces/{name}/workloads"
        await place.kube.ask("DELETE", f"/apis/tasks.zzdsj.io/v1/namespaces/{name}/processingtasks")
        await until("Kueue lets go", lambda: _none(place, workloads), seconds=60)
        for path in (f"{queues}/team", f"{paths['clusterqueues']}/{name}", f"{paths['resourceflavors']}/{name}"):
            await place.kube.ask("DELETE", path)
            await until(f"{path} is gone", partial(_gone, place, path), seconds=60)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8")[-3000:]


async def _none(place: Place, path: str) -> bool:
    return not (await place.kube.do("GET", path))["items"]


async def _gone(place: Place, path: str) -> bool:
    return (await place.kube.ask("GET", path))[0] == 404


async def _suspended(place: Place) -> dict[str, bool]:
    jobs = await place.objects("jobs")
    return {job["metadata"]["ownerReferences"][0]["name"]: job["spec"].get("suspend", False) for job in jobs}


async def test_kueue_admits_jobs_within_its_quota_and_what_it_evicts_is_not_counted(
    place: Place, process: Start, kueue: Path
) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with queue_for_one(place) as cluster_queue, process(OPERATOR_KUEUE_QUEUE="team").at_work(), kubelet.at_work():
        await place.create("first", resourceClass="medium")
        try:
            await place.wait_for("Processing", name="first", seconds=90)
        except AssertionError as error:
            raise AssertionError(f"{error}; Kueue says: {_end_of(kueue)}") from None
        await place.create("second", resourceClass="medium")
        waits = await place.wait_for("Queued", name="second", reason="KueueAdmission")
        assert waits["queue"]["message"].endswith("waits to be admitted by Kueue, in queue team")
        assert await _suspended(place) == {"first": False, "second": True}

        await place.kube.do("PATCH", cluster_queue, {"spec": {"stopPolicy": "HoldAndDrain"}}, content_type=MERGE)
        evicted = await place.wait_for("Queued", name="first", reason="KueueAdmission")
        assert (evicted["attempt"], evicted.get("attempts", [])) == (1, [])
        assert await _suspended(place) == {"first": True, "second": True}, "nobody but Kueue starts them again"

        kubelet.outcomes = {1: SUCCESS}
        await place.kube.do("PATCH", cluster_queue, {"spec": {"stopPolicy": "None"}}, content_type=MERGE)
        for name in ("first", "second"):
            status = await place.wait_for("Completed", name=name, seconds=90)
            assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]
