"""The commands of the pages, run as they stand and in their order, on the real cluster.

A page gets a folder with what a clone has, a kubeconfig of its own, and a cluster in the state that it assumes. Nothing in
a command is replaced but what :data:`REPLACED` says; instead the machine is made to fit: the images carry the names of the
page, the storage class is there, the files that "you" fill in hold the devstack's addresses.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devstack import Endpoints, images, installation, node, tools
from tests.docs.blocks import ON_THE_EXAMPLES, ROOT, Block, blocks
from tests.e2e.conftest import Installed
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.e2e

REPLACED = {
    # A watch ends when its reader has seen enough.
    r"^(kubectl [^#\n]*-w)\b([^#\n]*)": r"timeout 4 \1\2 || test $? = 124 ",
    # What make would install is installed: these tests run in it.
    r"^make ": "make -o .venv/.ready ",
}
"""Regular expression, multi-line → what stands for it."""
PAGE_SECONDS = 150


@dataclass
class Desk:
    """Where somebody who follows a page sits."""

    folder: Path
    endpoints: Endpoints
    place: Path | None = None
    """Where commands are run, if not in the folder."""
    said: dict[str, str] = field(default_factory=dict)
    """What stands in the page → what it is here."""
    settings: dict[str, str] = field(default_factory=dict)
    """Variables of the environment."""

    def follow(self, page: str) -> None:
        """Run all blocks of a page; AssertionError with page, line and output of the one that fails."""
        for block in blocks(ROOT / page):
            if block.file:
                (self.folder / block.file).write_text(block.text)
            elif block.language in {"sh", "python"} and not block.elsewhere:
                self._run(block)

    def _run(self, block: Block) -> None:
        script = block.text
        for said, here in self.said.items():
            script = script.replace(said, here)
        for pattern, replacement in REPLACED.items():
            script = re.sub(pattern, replacement, script, flags=re.MULTILINE)
        interpreter = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
        done = subprocess.run(
            [*interpreter, "-c", script],
            cwd=self.place or self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PAGE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{script}\n{done.stdout}"
        missing = [what for what in block.says if what not in done.stdout]
        assert not missing, f"{block} does not say {missing}:\n{done.stdout}"

    def _environment(self) -> Mapping[str, str]:
        path = [self.folder / "bin", Path(sys.executable).parent, self.endpoints.kubectl.parent, tools.helm().parent]
        return os.environ | {
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "PATH": ":".join([*map(str, path), os.environ["PATH"]]),
            **self.settings,
            "PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "crds", "operator", "client")),
        }


@pytest.fixture
def desk(devstack_node: Endpoints, tmp_path: Path) -> Desk:
    """A folder that looks like a clone of the repository, in which a page may write."""
    for entry in ROOT.iterdir():
        if entry.name != ".git":
            (tmp_path / entry.name).symlink_to(entry)
    shutil.copy(devstack_node.kubeconfig, tmp_path / "kubeconfig")
    (tmp_path / "bin").mkdir()
    return Desk(tmp_path, devstack_node)


@pytest.fixture
def bare_cluster(devstack_node: Endpoints) -> Iterator[Kubectl]:
    """The cluster without the product; whatever a page installs goes again."""
    kubectl = Kubectl(devstack_node)

    def clear() -> None:
        installation.uninstall(devstack_node)
        kubectl("delete", "namespace", installation.TASK_NAMESPACE, "--ignore-not-found", "--timeout=100s")
        kubectl("delete", "persistentvolume/page-documents", "storageclass/nfs", "--ignore-not-found")

    clear()
    try:
        yield kubectl
    finally:
        clear()


def credentials(desk: Desk) -> None:
    """Write the files with the addresses of the stores that pages ask for."""
    urls = desk.endpoints.pod_urls
    operator = {key.replace("TASKS_", "OPERATOR_"): urls[key] for key in ("TASKS_POSTGRES_URL", "TASKS_REDIS_URL")}
    for name, variables in (("knowledge", urls), ("operator", operator)):
        lines = [f"{key}={value}" for key, value in variables.items()]
        (desk.folder / f"{name}-stores.env").write_text("\n".join(lines))


def test_install(bare_cluster: Kubectl, desk: Desk) -> None:
    """From nothing to a document that is found, an upgrade, and nothing again."""
    for name, reference in images.build_images().items():
        node._ctr("images", "tag", "--force", reference, f"registry.example.com/processing-tasks/{name}:0.1.0")
    documents = desk.endpoints.document_root / "page"
    documents.mkdir(parents=True, exist_ok=True)
    documents.chmod(0o777)
    bare_cluster.apply(
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": "nfs"},
            "provisioner": "kubernetes.io/no-provisioner",
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "page-documents"},
            "spec": {
                "capacity": {"storage": "50Gi"},
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "nfs",
                "hostPath": {"path": str(documents)},
            },
        },
    )
    credentials(desk)
    desk.follow("docs/install.md")
    for plural in ("processingtasks", "workerpools", "processingschedules"):
        gone = bare_cluster.attempt("get", "crd", f"{plural}.tasks.zzdsj.io")
        assert "NotFound" in gone.stderr


def test_kustomize(bare_cluster: Kubectl, desk: Desk) -> None:
    """From manifests alone to a ready operator, and over to helm. The claim waits for a storage class all the while."""
    for name, reference in images.build_images().items():
        node._ctr("images", "tag", "--force", reference, f"localhost/processing-tasks/{name}:0.1.0")
    credentials(desk)
    desk.follow("docs/kustomize.md")
    release = bare_cluster.get("namespace", "knowledge")["metadata"]["annotations"]["meta.helm.sh/release-name"]
    assert release == installation.RELEASE, "helm has taken it over"


@pytest.fixture(scope="module")
def examples(installed: Installed) -> None:
    """The installation with the example tasks, each at its end."""
    installed.kubectl("delete", "ptask", "--all", "--wait")
    installed.kubectl("apply", "--kustomize", str(ROOT / "manifests/examples"))
    installed.kubectl("wait", "ptask", "--all", "--for=jsonpath={.status.finishedAt}", "--timeout=100s")


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("page", ON_THE_EXAMPLES)
def test_page(page: str, desk: Desk) -> None:
    desk.follow(page)


def test_contributing(installed: Installed, desk: Desk) -> None:
    """In the repository itself: what is built there depends on where it lies."""
    assert installed.endpoints == desk.endpoints
    desk.place = ROOT
    desk.follow("CONTRIBUTING.md")


def test_pipeline_without_a_cluster(desk: Desk) -> None:
    urls = desk.endpoints.host_urls
    desk.settings = {"TASKS_MILVUS_TOKEN": urls["TASKS_MILVUS_TOKEN"]}
    desk.said = {
        "postgresql://user:password@localhost:5432/tasks": urls["TASKS_POSTGRES_URL"],
        "http://localhost:19530": urls["TASKS_MILVUS_URL"],
        "http://localhost:9200": urls["TASKS_ELASTICSEARCH_URL"],
    }
    desk.follow("docs/pipeline.md")


def test_images_with_docker(desk: Desk) -> None:
    """No Docker here: a stand-in writes down what it is asked, and refuses files that are not there."""
    docker = desk.folder / "bin/docker"
    docker.write_text("""#!/bin/bash
set -eu
echo "$*" >> docker.log
while [ $# -gt 0 ]; do
  case $1 in -f) test -f "$2"; shift ;; esac
  shift
done
""")
    docker.chmod(docker.stat().st_mode | stat.S_IXUSR)
    desk.follow("docs/images.md")
    asked = (desk.folder / "docker.log").read_text().splitlines()
    for verb in ("build", "push", "run"):
        of_verb = [line for line in asked if line.startswith(verb)]
        assert [name for name in ("operator", "runner") if any(f"/{name}:0.1.0" in line for line in of_verb)] == [
            "operator",
            "runner",
        ]
