"""A cluster in hand: the shared devstack's, seen through a kubeconfig of its own, with its stores as stores in hand."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
import yaml

from devstack import Endpoints, images, stores, tools
from devstack.providers import CRD, kind
from devstack.providers.current import LABEL
from tests.integration.test_cluster import PRIVATE_FILES
from tests.support.devstack import Kubectl, in_private_machine
from tests.support.stand_ins import StandIns

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e


@dataclass
class User:
    """Somebody with a cluster in hand: their kubeconfig of two contexts, state folder and values."""

    home: Path
    endpoints: Endpoints
    namespace: str

    @property
    def kubeconfig(self) -> Path:
        return self.home / "kubeconfig"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "DEVSTACK_STATE": str(self.home / "state")}

    def devstack(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "devstack", *arguments]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    def current(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.devstack(command, "--cluster", "current", "--namespace", self.namespace, *arguments)

    def refused(self, command: str, *arguments: str) -> str:
        """Run what must fail; return its one sentence."""
        done = self.current(command, *arguments)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    def write(self, values: Mapping[str, Any]) -> Path:
        file = self.home / f"values-{uuid.uuid4().hex[:6]}.yaml"
        file.write_text(yaml.safe_dump(dict(values)))
        return file


@pytest.fixture
def user(devstack_node: Endpoints, tmp_path: Path) -> Iterator[User]:
    content = json.loads(devstack_node.kubeconfig.read_text())
    content["contexts"] = [
        {"name": "in-hand", "context": content["contexts"][0]["context"]},
        {"name": "elsewhere", "context": {"cluster": "elsewhere", "user": content["users"][0]["name"]}},
    ]
    content["clusters"].append({"name": "elsewhere", "cluster": {"server": "https://127.0.0.1:1"}})
    content["current-context"] = "in-hand"
    user = User(tmp_path, devstack_node, f"hand-{uuid.uuid4().hex[:8]}")
    user.kubeconfig.write_text(json.dumps(content))
    yield user
    kubectl = Kubectl(devstack_node)
    kubectl("delete", "namespace", user.namespace, "--ignore-not-found", "--wait=false")
    kinds = "priorityclass,clusterrole,clusterrolebinding"
    kubectl("delete", kinds, "-l", f"app.kubernetes.io/instance={user.namespace}", "--ignore-not-found")


@contextlib.contextmanager
def volume(user: User, folder: Path) -> Iterator[str]:
    """A volume of the user's for the documents, as an administrator makes one; yields its name."""
    folder.mkdir()
    folder.chmod(0o777)
    name = f"documents-{user.namespace}"
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node1"]}
    kubectl = Kubectl(user.endpoints)
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
                "local": {"path": str(folder)},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
            },
        }
    )
    try:
        yield name
    finally:
        kubectl("delete", "persistentvolume", name, "--wait=false")


@pytest.fixture
def values(user: User, tmp_path: Path) -> Iterator[Path]:
    """Stores, images and a volume in hand, as a file of values."""
    database = user.namespace.replace("-", "_")
    stores.create_database(database)
    urls = user.endpoints.pod_urls
    postgres = urlunsplit(urlsplit(urls["TASKS_POSTGRES_URL"])._replace(path=f"/{database}"))
    built = {name: reference.rpartition(":") for name, reference in images.build_images().items()}
    parts = {name: {"image": {"repository": one[0], "tag": one[2], "pullPolicy": "Never"}} for name, one in built.items()}
    folder = Path(f"/var/tmp/{user.namespace}")
    with volume(user, folder) as name:
        yield user.write(
            {
                "stores": {
                    "postgres": {"url": postgres},
                    "redis": {"url": urls["TASKS_REDIS_URL"]},
                    "milvus": {"url": urls["TASKS_MILVUS_URL"], "token": urls["TASKS_MILVUS_TOKEN"]},
                    "elasticsearch": {"url": urls["TASKS_ELASTICSEARCH_URL"]},
                },
                "documents": {"storageClassName": "", "accessModes": ["ReadWriteOnce"], "volumeName": name, "size": "1Gi"},
                **parts,
            }
        )
    subprocess.run(["rm", "-r", str(folder)], check=True)
    stores.drop_database(database)


def test_demo_on_a_cluster_in_hand_and_down_leaves_the_cluster_as_it_was(user: User, values: Path) -> None:
    kubectl = Kubectl(user.endpoints)
    kinds = "namespace,clusterrole,clusterrolebinding,priorityclass,customresourcedefinition"

    def ours() -> list[str]:
        return [
            f"{item['kind']} {item['metadata']['name']}"
            for item in kubectl.get(kinds)["items"]
            if user.namespace in json.dumps(item["metadata"]) and item["kind"] != "CustomResourceDefinition"
        ]

    demo = user.current("demo", "--values", str(values))
    assert demo.returncode == 0, demo.stderr
    assert "context in-hand, server https://127.0.0.1" in demo.stderr
    assert "All as expected" in demo.stderr
    kubeconfig = user.home / "state/current" / user.namespace / "kubeconfig"
    assert kubeconfig.stat().st_mode & 0o777 == 0o600
    assert len(json.loads(json.dumps(yaml.safe_load(kubeconfig.read_text())))["contexts"]) == 1
    labels = kubectl.get("namespace", user.namespace)["metadata"]["labels"]
    assert labels[LABEL] == user.namespace
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"

    # A switch of the context does not lead anybody astray.
    run = ["kubectl", f"--kubeconfig={user.kubeconfig}", "config", "use-context", "elsewhere"]
    subprocess.run([str(user.endpoints.kubectl), *run[1:]], check=True, capture_output=True)
    assert "it stands for the one on https://127.0.0.1" in user.refused("down")
    assert ours()
    subprocess.run([str(user.endpoints.kubectl), *run[1:-1], "in-hand"], check=True, capture_output=True)

    down = user.current("down")
    assert down.returncode == 0, down.stderr
    assert ours() == []
    assert kubectl.attempt("get", "crd", CRD).returncode == 0
    assert not kubeconfig.exists()
    again = user.current("down")
    assert again.returncode == 0, again.stderr
    assert "nothing to remove" in again.stderr


def test_nothing_is_done_without_being_told_where(user: User) -> None:
    done = user.devstack("up", "--cluster", "current")
    assert done.returncode == 1
    assert "context in-hand" in done.stderr
    assert "give --namespace NAME" in done.stderr
    assert not (user.home / "state/current").exists()


@pytest.mark.parametrize("namespace", ["kube-system", "default"])
def test_a_namespace_of_somebody_else_is_neither_used_nor_removed(user: User, namespace: str) -> None:
    user.namespace, mine = namespace, user.namespace
    try:
        for command in ("up", "install", "demo", "down", "uninstall"):
            assert f"cannot use the namespace {namespace}: it exists" in user.refused(command)
        assert Kubectl(user.endpoints).get("namespace", namespace)["status"]["phase"] == "Active"
    finally:
        user.namespace = mine


IMAGE = {"image": {"repository": "registry.example.com/tasks"}}
STORES = {"postgres": {"url": "postgresql://runner:secret@postgres:5432/tasks"}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (None, "cannot install without operator.image.repository and runner.image.repository"),
        ({"operator": IMAGE, "stores": STORES}, "cannot install without runner.image.repository"),
        ({"operator": IMAGE, "runner": IMAGE}, "cannot install without stores"),
        ({"operator": IMAGE, "runner": IMAGE, "stores": {"existingSecret": "mine"}}, "there is no Secret mine"),
        (["a list"], "at its top has to be a map"),
    ],
)
def test_what_is_missing_is_named(user: User, values: Any, sentence: str) -> None:
    file = user.home / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    options = ["--values", str(file)] if values is not None else []
    assert sentence in user.refused("install", *options)
    assert Kubectl(user.endpoints).get("secret", f"--namespace={user.namespace}")["items"] == []  # of helm's, too
    assert user.current("down").returncode == 0


def test_a_context_that_does_not_answer_is_named(user: User) -> None:
    content = json.loads(user.kubeconfig.read_text())
    content["current-context"] = "elsewhere"
    user.kubeconfig.write_text(json.dumps(content))
    told = user.refused("up")
    assert "context elsewhere, server https://127.0.0.1:1" in told
    assert "cannot reach the cluster" in told


@pytest.mark.usefixtures("devstack_node")
def test_kind_is_driven_as_it_wants_to_be() -> None:
    """With stand-ins of kind and Docker, which are not on every machine; see tests.support.kind_machine."""
    with tempfile.TemporaryDirectory(prefix="devstack-test-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        script = f"cd {ROOT} && {sys.executable} -m tests.support.kind_machine"
        done = in_private_machine(script, state=Path(folder, "state"), mounts=PRIVATE_FILES)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_real_kind_takes_our_configuration(tmp_path: Path) -> None:
    """The real kind, on a stand-in of Docker: it asks for one node, with the documents in it and ports on loopback."""
    stand_ins = StandIns(tmp_path, programs=["docker"])
    file = tmp_path / "kind.yaml"
    file.write_text(yaml.safe_dump(kind.configuration(tmp_path / "documents")))
    command = [
        str(tools.kind()),
        "create",
        "cluster",
        f"--name={kind.NAME}",
        f"--config={file}",
        f"--kubeconfig={tmp_path / 'kc'}",
    ]
    done = subprocess.run(
        command, env=os.environ | stand_ins.environment, capture_output=True, text=True, timeout=120, check=False
    )
    runs = [call for call in stand_ins.calls("docker") if call[0] == "run"]
    assert len(runs) == 1, done.stderr
    assert runs[0][runs[0].index("--name") + 1] == kind.NODE
    assert f"--volume={tmp_path / 'documents'}:/documents:ro" in runs[0]
    published = [argument.removeprefix("--publish=") for argument in runs[0] if argument.startswith("--publish=")]
    assert len(published) == 5  # the stores' and the API server's
    assert all(address.startswith("127.0.0.1:") for address in published)
    assert f"127.0.0.1:{stores.postgres.port()}:30432/TCP" in published
