"""The kind provider on a machine of its own: `kind` and `docker` are stand-ins, and what answers is real.

Run in tests.support.devstack.in_private_machine as `python -m tests.support.kind_machine drives`, or `page` (the commands of
docs/install.md). The cluster of a devstack is what the stand-in of kind hands out. Its stores listen where kind would map
those in the cluster to; a thread leads the Services there, too, as no image of the stores can be fetched.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import devstack
from devstack import DevstackError, Endpoints, cluster, images, providers, stores
from devstack.cache import cache_dir, state_dir
from devstack.providers import kind
from tests.docs.blocks import ROOT, blocks
from tests.support.devstack import Kubectl
from tests.support.stand_ins import StandIns

CREATE = f"create cluster --name={kind.NAME}"


class Containers(threading.Thread):
    """Takes the place of the stores' containers: the pods go, and the Services lead to the devstack's stores."""

    def __init__(self, endpoints: Endpoints) -> None:
        super().__init__(daemon=True)
        self._kubectl = Kubectl(endpoints, stores.NAMESPACE)

    def run(self) -> None:
        while True:
            deployments = json.loads(self._kubectl.attempt("get", "deployments", "-o", "json").stdout or "{}").get(
                "items", []
            )
            for name in [item["metadata"]["name"] for item in deployments if item["spec"]["replicas"]]:
                service = self._kubectl.attempt("get", "service", name, "-o", "json")
                if service.returncode == 0:  # applied after its deployment
                    self._replace(name, json.loads(service.stdout)["spec"]["ports"][0]["name"])
            time.sleep(0.3)

    def _replace(self, name: str, port: str) -> None:
        self._kubectl.attempt("patch", "service", name, "--type=merge", "-p", '{"spec": {"selector": null}}')
        [ours] = [o for o in stores.services() if o["kind"] == "EndpointSlice" and o["metadata"]["name"] == name]
        ours["metadata"]["name"] = f"{name}-real"
        ours["ports"][0]["name"] = port
        self._kubectl.apply(ours)
        self._kubectl.attempt("scale", f"deployment/{name}", "--replicas=0")  # last: then its rollout is done


def main(scenario: str) -> None:
    folder = state_dir().parent
    real = devstack.up()  # with passwords that the stores in the cluster would get, too
    kubectl = Kubectl(real)
    kubectl("delete", "namespace", stores.NAMESPACE, "--wait")  # of the embedded cluster's
    kubectl("label", "node", "node1", f"kubernetes.io/hostname={kind.NODE}", "--overwrite")
    stand_ins = StandIns(folder / "stand-ins")
    built = {name: image.archive for name, image in images.build().items()}
    stand_ins.hand_over(kubeconfig=real.kubeconfig, containerd=state_dir() / "containerd.sock", images=built)
    os.environ |= stand_ins.environment
    own_cache(folder / "cache")
    os.chdir(folder)
    Containers(real).start()
    if scenario == "page":
        follows_the_page(stand_ins, real)
    else:
        refuses(stand_ins)
        comes_up(stand_ins, kubectl)
        starts_again(stand_ins)
        prepares(stand_ins, kubectl)
        clears(kubectl)
        mends_what_died(stand_ins)
        takes_stores_in_hand(folder)
        passwords = (state_dir() / "passwords").rename(state_dir() / "kept")  # the real stores' are not kind's to forget
        providers.choose("kind").down()
        passwords.rename(state_dir() / "passwords")
        assert [" ".join(call[:2]) for call in stand_ins.calls("kind")][-2:] == ["get clusters", "delete cluster"]
        assert not (state_dir() / "kind").exists()
    providers.choose("kind").down()
    assert ["delete", "cluster"] not in [call[:2] for call in stand_ins.calls("kind")]
    assert not (folder / ".pytest-kind").exists()
    devstack.down()


def own_cache(folder: Path) -> None:
    """Use a cache of our own, with all in it but images: what the stand-in saves must not be taken for them later."""
    (folder / "build").mkdir(parents=True)
    for built in (cache_dir() / "build").iterdir():
        if not built.name.startswith("image-"):
            (folder / "build" / built.name).symlink_to(built)
    os.environ["DEVSTACK_CACHE"] = str(folder)


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
    provider = providers.choose("kind")
    prepared = provider.prepare(provider.up())
    archives = sorted((cache_dir() / "build").glob("image-*"))
    [load] = [call for call in joined(stand_ins.calls("kind")) if call.startswith("load")]
    assert load.startswith(f"load image-archive --name={kind.NAME} ")
    assert sorted(load.split()[3:]) == [str(archive) for archive in archives]
    assert len(archives) == 2
    assert prepared.documents == state_dir() / "documents/knowledge"
    volume = kubectl.get("persistentvolume", "documents-knowledge")["spec"]
    assert volume["local"]["path"] == "/mnt/documents/knowledge"
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


def takes_stores_in_hand(folder: Path) -> None:
    """With values of the user's, no store is brought up, and nothing of ours is put into the chart's."""
    values = folder / "values.yaml"
    values.write_text("stores: {postgres: {url: 'postgresql://user:secret@db:5432/tasks'}}\n")
    endpoints = providers.choose("kind", values=values).up()
    assert endpoints.host_urls == endpoints.pod_urls == {}


def follows_the_page(stand_ins: StandIns, real: Endpoints) -> None:
    """The commands of docs/install.md, as they stand: the demo with stores that come along, and with stores in hand."""
    mounted = Path("/mnt/documents")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True)
    mounted.mkdir()
    cluster.document_root().mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", cluster.document_root(), mounted], check=True)
    clone = state_dir().parent / "clone"
    clone.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (clone / entry.name).symlink_to(entry)
    urls = real.pod_urls
    own = {
        "postgres": {"url": urls["TASKS_POSTGRES_URL"]},
        "redis": {"url": urls["TASKS_REDIS_URL"]},
        "milvus": {"url": urls["TASKS_MILVUS_URL"], "token": urls["TASKS_MILVUS_TOKEN"]},
        "elasticsearch": {"url": urls["TASKS_ELASTICSEARCH_URL"]},
    }
    (clone / "trial-values.yaml").write_text(json.dumps({"stores": own}))  # JSON is YAML
    with_stores, in_hand = [block.text for block in blocks(ROOT / "docs/install.md") if "CLUSTER=kind" in block.text]
    demo, down = with_stores.strip().splitlines()
    for command in (demo, in_hand.strip()):
        told = shell(command, clone)
        assert "All as expected" in told, told
        assert ("The rows in PostgreSQL" in told) == (command == demo)
    stand_ins.calls("kind")
    subprocess.run(["umount", mounted], check=True)
    shell(down, clone)
    assert [" ".join(call[:2]) for call in stand_ins.calls("kind")] == ["get clusters", "delete cluster"]
    assert not (state_dir() / "kind").exists()


def shell(command: str, folder: Path) -> str:
    script = f"timeout 270 {command}".replace("make ", "make -o .venv/.ready ")
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
