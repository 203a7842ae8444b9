"""A cluster in hand: the shared devstack's, seen through a kubeconfig of its own, with its stores as stores in hand."""

import contextlib
import json
import os
import pty
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
from devstack.providers import CRD, default, kind
from devstack.providers.current import LABEL
from tests.docs.blocks import blocks
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

    def switch_to(self, context: str) -> None:
        """Switch the user's current context."""
        content = yaml.safe_load(self.kubeconfig.read_text())
        self.kubeconfig.write_text(json.dumps({**content, "current-context": context}))

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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone of the repository, in which one may write."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)  # images may have to be built
def test_the_way_of_the_page_to_a_cluster_in_hand(user: User, values: Path, clone: Path, kubectl: Kubectl) -> None:
    """The commands of docs/install.md, line by line: the demo runs, and `down` leaves the cluster as it was."""
    user.namespace = "tasks-trial"
    [block] = [block.text for block in blocks(ROOT / "docs/install.md") if "CLUSTER=current" in block.text]
    demo, look, down = block.strip().splitlines()
    (clone / "trial-values.yaml").write_text(values.read_text())
    kinds = "namespace,clusterrole,clusterrolebinding,priorityclass"

    def ours() -> list[str]:
        items = kubectl.get(kinds)["items"]
        return [item["metadata"]["name"] for item in items if user.namespace in json.dumps(item["metadata"])]

    def run(command: str) -> str:
        script = command.replace("make ", "make -o .venv/.ready ")
        path = f"{user.endpoints.kubectl.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=clone,
            env=user.environment | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    told = run(demo)
    assert "context in-hand, server https://127.0.0.1" in told
    assert "All as expected" in told
    kubeconfig = user.home / "state/current" / user.namespace / "kubeconfig"
    assert kubeconfig.stat().st_mode & 0o777 == 0o600
    assert [entry["name"] for entry in yaml.safe_load(kubeconfig.read_text())["contexts"]] == ["in-hand"]
    labels = kubectl.get("namespace", user.namespace)["metadata"]["labels"]
    assert labels[LABEL] == user.namespace
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    # The CRD was there: it is left to whom it belongs.
    assert user.namespace not in json.dumps(kubectl.get("crd", CRD)["metadata"])
    assert "Completed" in run(look)

    user.switch_to("elsewhere")
    assert "it stands for the one on https://127.0.0.1" in user.refused("down")
    assert ours()
    user.switch_to("in-hand")

    assert f"The CRD {CRD} stays" in run(down)
    assert ours() == []
    assert kubectl.attempt("get", "crd", CRD).returncode == 0
    assert not kubeconfig.exists()
    assert "nothing to remove" in run(down)


def test_the_values_of_the_page_are_values_of_the_chart(tmp_path: Path) -> None:
    [text] = [block.text for block in blocks(ROOT / "docs/install.md") if block.file == "trial-values.yaml"]
    file = tmp_path / "values.yaml"
    file.write_text(text)
    command = [str(tools.helm()), "template", "trial", str(ROOT / "helm/processing-tasks"), "--kube-version=v1.31.0"]
    done = subprocess.run([*command, f"--values={file}"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


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
    user.switch_to("elsewhere")
    told = user.refused("up")
    assert "context elsewhere, server https://127.0.0.1:1" in told
    assert "cannot reach the cluster" in told


def test_a_crd_of_another_version_ends_it_with_the_ways_out(user: User, kubectl: Kubectl) -> None:
    file = user.write({"operator": IMAGE, "runner": IMAGE, "stores": STORES})
    path = "/spec/versions/0/schema/openAPIV3Schema/description"
    before = kubectl.get("crd", CRD)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"]

    def describe(text: str) -> None:
        kubectl("patch", "crd", CRD, "--type=json", "-p", json.dumps([{"op": "replace", "path": path, "value": text}]))

    describe("Another version's.")
    try:
        told = user.refused("install", "--values", str(file))
    finally:
        describe(before)
    assert f"cannot install beside the CRD {CRD}" in told
    assert "differs from the one here" in told
    assert f"meta.helm.sh/release-name={user.namespace}" in told
    assert kubectl.get("secret", f"--namespace={user.namespace}")["items"] == []
    assert user.current("down").returncode == 0


@pytest.mark.parametrize(
    ("answers", "code", "told"),
    [
        (["{0}", "{0}"], 0, "Up in"),
        (["{0}", "yes"], 1, "cannot go on: the two differ; nothing was changed"),
        (["default", "default"], 1, "cannot use the namespace default: it exists"),
        (["Upper", "Upper"], 1, "choose up to 40 lower-case letters"),
    ],
)
def test_at_a_terminal_the_namespace_is_asked_for_and_confirmed(
    user: User, answers: list[str], code: int, told: str
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, "".join(f"{answer.format(user.namespace)}\n" for answer in answers).encode())
    done = subprocess.run(
        [sys.executable, "-m", "devstack", "up", "--cluster", "current"],
        cwd=ROOT,
        env=user.environment,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "A namespace of its own" in done.stdout
    assert "context in-hand" in done.stderr
    assert (Kubectl(user.endpoints).attempt("get", "namespace", user.namespace).returncode == 0) == (code == 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--namespace", "x"], "cannot use a namespace of your own"),
        (["--values", "README.md"], "cannot use --values with the embedded cluster"),
        (["--cluster", "kind", "--parts", "node"], "--parts is for the embedded one"),
        (["--cluster", "kind", "--values", "absent.yaml"], "there is no such file"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    environment = os.environ | {"DEVSTACK_STATE": str(tmp_path / "state")}
    command = [sys.executable, "-m", "devstack", "up", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, sentence in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    ("root", "docker", "expected"),
    [(True, True, "embedded"), (True, False, "embedded"), (False, True, "kind"), (False, False, "embedded")],
)
def test_a_cluster_that_was_there_is_never_the_default(root: bool, docker: bool, expected: str) -> None:
    assert default(root=root, docker_runs=lambda: docker) == expected


@pytest.mark.long
@pytest.mark.usefixtures("devstack_node")
@pytest.mark.parametrize(
    ("scenario", "seconds"), [("drives", 280), pytest.param("page", 880, marks=pytest.mark.timeout(900))]
)
def test_kind_is_driven_as_it_wants_to_be(scenario: str, seconds: float) -> None:
    """With stand-ins of kind and Docker, which are not on every machine; see tests.support.kind_machine."""
    images.build()  # in there is no network
    with tempfile.TemporaryDirectory(prefix="devstack-test-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        script = f"cd {ROOT} && {sys.executable} -m tests.support.kind_machine {scenario}"
        done = in_private_machine(script, state=Path(folder, "state"), mounts=PRIVATE_FILES, seconds=seconds)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_real_kind_takes_our_configuration(tmp_path: Path) -> None:
    """The real kind, on a stand-in of Docker: it asks for one node, with the documents in it and ports on loopback."""
    stand_ins = StandIns(tmp_path, ["docker"])
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
    assert f"--volume={tmp_path / 'documents'}:/mnt/documents:ro" in runs[0]
    published = [argument.removeprefix("--publish=") for argument in runs[0] if argument.startswith("--publish=")]
    assert len(published) == 5  # the stores' and the API server's
    assert all(address.startswith("127.0.0.1:") for address in published)
    assert f"127.0.0.1:{stores.postgres.port()}:30432/TCP" in published
