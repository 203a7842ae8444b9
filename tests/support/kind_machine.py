"""The kind provider on a machine of its own: `kind` and `docker` are stand-ins, and what answers is real.

Run in tests.support.devstack.in_private_machine as `python -m tests.support.kind_machine`. The control plane of a devstack
is what the stand-in of kind hands out; its stores listen where kind would map those in the cluster to. No node runs, so a
thread plays the kubelet for the stores' pods. It ends with 0 and prints nothing when all is well.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import devstack
from devstack import DevstackError, Endpoints, images, providers, stores
from devstack.cache import cache_dir, state_dir
from devstack.providers import kind
from tests.support.devstack import Kubectl
from tests.support.stand_ins import StandIns

CREATE = f"create cluster --name={kind.NAME}"


class Kubelet(threading.Thread):
    """Makes the pods of the stores ready, and nothing of them real."""

    def __init__(self, endpoints: Endpoints) -> None:
        super().__init__(daemon=True)
        self._kubectl = Kubectl(endpoints, stores.NAMESPACE)
        self._done = threading.Event()

    def run(self) -> None:
        ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        while not self._done.wait(0.3):
            for pod in json.loads(self._kubectl.attempt("get", "pods", "-o", "json").stdout or '{"items": []}')["items"]:
                patch = json.dumps({"status": ready})
                self._kubectl.attempt(
                    "patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch
                )

    def stop(self) -> None:
        self._done.set()
        self.join()


def main() -> None:
    folder = state_dir().parent
    real = devstack.up(["cluster", "stores"])  # with passwords that the stores in the cluster would get, too
    kubectl = Kubectl(real)
    kubectl("delete", "namespace", stores.NAMESPACE, "--wait")  # of the embedded cluster's
    stand_ins = StandIns(folder / "stand-ins", kubeconfig=real.kubeconfig)
    os.environ |= stand_ins.environment
    os.chdir(folder)
    kubelet = Kubelet(real)
    kubelet.start()
    refuses(stand_ins)
    comes_up(stand_ins, kubectl)
    starts_again(stand_ins)
    prepares(stand_ins, kubectl)
    clears(kubectl)
    mends_what_died(stand_ins)
    takes_stores_in_hand(stand_ins, folder)
    kubelet.stop()
    passwords = (state_dir() / "passwords").rename(state_dir() / "kept")  # the real stores are not kind's to forget
    providers.choose("kind").down()
    assert [" ".join(call[:2]) for call in stand_ins.calls("kind")][-2:] == ["get clusters", "delete cluster"]
    assert not (state_dir() / "kind").exists()
    providers.choose("kind").down()
    assert ["delete", "cluster"] not in [call[:2] for call in stand_ins.calls("kind")]
    passwords.rename(state_dir() / "passwords")
    assert not (folder / ".pytest-kind").exists()
    devstack.down()


def joined(calls: list[list[str]]) -> list[str]:
    return [" ".join(call) for call in calls]


def refuses(stand_ins: StandIns) -> None:
    """No Docker, or a cluster of this name that is somebody else's."""
    stand_ins.set("docker-down", on=True)
    with pytest.raises(DevstackError, match="no Docker daemon answers"):
        providers.choose("kind").up()
    assert providers.default(root=False, docker_runs=images.docker_runs) == "embedded"
    stand_ins.set("docker-down", on=False)
    assert providers.default(root=False, docker_runs=images.docker_runs) == "kind"
    stand_ins.set("cluster", on=True)
    with pytest.raises(DevstackError, match="that this command did not make"):
        providers.choose("kind").up()
    stand_ins.set("cluster", on=False)
    assert not [call for call in joined(stand_ins.calls("kind")) if "create" in call or "delete" in call]


def comes_up(stand_ins: StandIns, kubectl: Kubectl) -> None:
    """The cluster is made once, from our configuration and into a kubeconfig of ours, and the stores in it are reached."""
    endpoints = providers.choose("kind").up()
    kubeconfig = state_dir() / "kind/kubeconfig"
    calls = joined(stand_ins.calls("kind"))
    made = [call for call in calls if call.startswith("create")]
    assert made == [f"{CREATE} --kubeconfig={kubeconfig} --config {state_dir() / 'kind/kind.yaml'}"]
    assert calls[-1] == f"get kubeconfig --name={kind.NAME}"
    assert endpoints.kubeconfig == kubeconfig
    assert kubeconfig.stat().st_mode & 0o777 == 0o600
    assert endpoints.host_urls == stores.host_urls()

    async def ask() -> Any:
        connection = await asyncpg.connect(endpoints.host_urls["TASKS_POSTGRES_URL"])
        try:
            return await connection.fetchval("SELECT 1")
        finally:
            await connection.close()

    assert asyncio.run(ask()) == 1
    services = {
        item["metadata"]["name"]: item["spec"]["ports"][0] for item in kubectl.get("service", "-n", "stores")["items"]
    }
    mapped = {port["containerPort"] for port in kind.configuration(Path("/d"))["nodes"][0]["extraPortMappings"]}
    assert {port["nodePort"] for port in services.values()} == mapped
    for store in (stores.postgres, stores.redis, stores.milvus, stores.elasticsearch):
        assert services[store.NAME]["port"] == store.SERVICE_PORT


def starts_again(stand_ins: StandIns) -> None:
    """A second `up` makes nothing; a node that stands still, as after a reboot, is started."""
    providers.choose("kind").up()
    calls = stand_ins.calls("docker")
    assert ["start", kind.NODE] in calls
    os.environ["DEVSTACK_REDIS_PORT"] = "16380"
    with pytest.raises(DevstackError, match="was made with other ports or folders"):
        providers.choose("kind").up()
    del os.environ["DEVSTACK_REDIS_PORT"]


def prepares(stand_ins: StandIns, kubectl: Kubectl) -> None:
    """Images are built by Docker and loaded; documents are a folder here and a volume there."""
    own = state_dir().parent / "cache"  # what the stand-in saves must not be taken for images
    (own / "build").mkdir(parents=True)
    for built in (cache_dir() / "build").iterdir():
        if not built.name.startswith("image-"):
            (own / "build" / built.name).symlink_to(built)
    before = os.environ.get("DEVSTACK_CACHE")
    os.environ["DEVSTACK_CACHE"] = str(own)
    provider = providers.choose("kind")
    prepared = provider.prepare(provider.up())
    os.environ.pop("DEVSTACK_CACHE")
    if before:
        os.environ["DEVSTACK_CACHE"] = before
    archives = sorted((own / "build").glob("image-*"))
    [load] = [call for call in joined(stand_ins.calls("kind")) if call.startswith("load")]
    assert load.startswith(f"load image-archive --name={kind.NAME} ")
    assert sorted(load.split()[3:]) == [str(archive) for archive in archives]
    assert len(archives) == 2
    assert prepared.documents == state_dir() / "documents/knowledge"
    volume = kubectl.get("persistentvolume", "documents-knowledge")["spec"]
    assert volume["local"]["path"] == "/documents/knowledge"
    assert volume["nodeAffinity"]["required"]["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == [kind.NODE]
    assert prepared.values["stores"]["postgres"]["url"].endswith("@postgres.stores.svc.cluster.local:5432/tasks")
    for name in ("operator", "runner"):
        image = prepared.values[name]["image"]
        assert image["repository"] == f"localhost/processing-tasks/{name}"
        assert image["pullPolicy"] == "Never"


def clears(kubectl: Kubectl) -> None:
    """What `prepare` made goes; clearing again is fine."""
    provider = providers.choose("kind")
    endpoints = provider.up()
    for _ in range(2):
        provider.clear(endpoints)
        assert kubectl.attempt("get", "namespace", provider.place.namespace).returncode != 0


def mends_what_died(stand_ins: StandIns) -> None:
    """A cluster whose making was killed is deleted and made anew; one that vanished is made anew."""
    stand_ins.set("cluster", on=False)
    stand_ins.set("create-dies", on=True)
    died = subprocess.run(
        [sys.executable, "-m", "devstack", "up", "--cluster", "kind"], cwd=Path(devstack.__file__).parents[1], check=False
    )
    assert died.returncode == -9
    stand_ins.set("create-dies", on=False)
    stand_ins.calls("kind")
    providers.choose("kind").up()
    calls = [" ".join(call[:2]) for call in stand_ins.calls("kind")]
    assert calls.index("delete cluster") < calls.index("create cluster")


def takes_stores_in_hand(stand_ins: StandIns, folder: Path) -> None:
    """With values of the user's, no store is brought up, and nothing of ours is put into the chart's."""
    del stand_ins
    values = folder / "values.yaml"
    values.write_text("stores: {postgres: {url: 'postgresql://user:secret@db:5432/tasks'}}\n")
    provider = providers.choose("kind", values=values)
    endpoints = provider.up()
    assert endpoints.host_urls == endpoints.pod_urls == {}


if __name__ == "__main__":
    main()
