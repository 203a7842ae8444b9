"""The manifests for kustomize and for kubectl alone: each says what the chart says with the same choices.

With UPDATE_GOLDEN=1 what is rendered from the chart is written anew: read the difference before committing it.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import tools
from tests.support.chart import NAMESPACE, ROOT, Document, key, render

MANIFESTS = ROOT / "manifests"
VALUES = MANIFESTS / "base/values.yaml"
TASK_NAMESPACES = [{"name": "knowledge", "create": True}, {"name": "research", "create": True}]

pytestmark = pytest.mark.integration


def chart(**values: Any) -> dict[str, Document]:
    """Return what the chart makes of the base's values and these."""
    given = [argument for name, value in values.items() for argument in ("--set-json", f"{name}={json.dumps(value)}")]
    documents = render("--skip-tests", "--values", VALUES, *given)
    return {key(one): one for one in [namespace(), *documents]}


def namespace() -> Document:
    """Return the namespace of the release, which helm makes itself; under Pod Security `restricted` as the page says."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}}


def built(folder: Path) -> dict[str, Document]:
    """Return what kustomize makes of FOLDER."""
    command = [tools.kubectl(), "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns"
    documents = [one for one in yaml.safe_load_all(done.stdout) if one]
    found = {key(one): one for one in documents}
    assert len(found) == len(documents)
    return found


def by_whom(document: Document) -> set[str]:
    """Take the label that tells who manages an object, from it and from its pods, and return its values."""
    described = [document["metadata"]]
    if document["kind"] == "Deployment":
        described.append(document["spec"]["template"]["metadata"])
    return {metadata.setdefault("labels", {}).pop("app.kubernetes.io/managed-by", "nobody") for metadata in described}


def by_name(document: Document) -> Document:
    """Put the variables of containers into the order of their names: a patch puts its own first; none refers to another."""
    if document["kind"] == "Deployment":
        pod = document["spec"]["template"]["spec"]
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            container["env"].sort(key=lambda variable: variable["name"])
    return document


def held(file: Path, documents: list[Document]) -> None:
    """Hold FILE to DOCUMENTS, or write it."""
    if os.environ.get("UPDATE_GOLDEN"):
        head = "# Made from the chart helm/processing-tasks by tests/integration/test_manifests.py: change that one.\n---\n"
        text = yaml.safe_dump_all(documents, sort_keys=False, width=120, allow_unicode=True)
        file.write_text(head + text, encoding="utf-8")
    assert list(yaml.safe_load_all(file.read_text(encoding="utf-8"))) == documents


def test_install_yaml_is_the_rendered_chart() -> None:
    held(MANIFESTS / "base/install.yaml", list(chart().values()))
    assert (MANIFESTS / "install.yaml").resolve() == MANIFESTS / "base/install.yaml"


def test_overlays_bring_what_the_chart_makes() -> None:
    found = chart(taskNamespaces=TASK_NAMESPACES)
    added = [one for one in found.values() if "research" in {one["metadata"].get("namespace"), one["metadata"]["name"]}]
    held(MANIFESTS / "overlays/namespace-scoped/research.yaml", added)
    before, after = chart(), chart(**{"operator.clusterWide": True})
    held(MANIFESTS / "overlays/cluster-wide/clusterroles.yaml", [one for name, one in after.items() if name not in before])


OVERLAYS: dict[str, dict[str, Any]] = {
    "base": {},
    "overlays/namespace-scoped": {"taskNamespaces": TASK_NAMESPACES},
    "overlays/cluster-wide": {"operator.clusterWide": True},
    "overlays/dev": {
        "operator.image.tag": "dev",
        "runner.image.tag": "dev",
        "operator.replicas": 1,
        "gateway.replicas": 1,
        "operator.logLevel": "DEBUG",
        "gateway.logLevel": "DEBUG",
        "documents.accessModes": ["ReadWriteOnce"],
        "documents.size": "1Gi",
    },
}


def test_every_overlay_is_held_to_the_chart() -> None:
    assert {f"overlays/{folder.name}" for folder in (MANIFESTS / "overlays").iterdir()} == OVERLAYS.keys() - {"base"}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kustomize_builds_what_the_chart_makes_of_the_same_choices(folder: str) -> None:
    found, expected = built(MANIFESTS / folder), chart(**OVERLAYS[folder])
    assert set().union(*map(by_whom, found.values())) == {"kustomize"}
    for document in expected.values():
        by_whom(document)
    assert found.keys() == expected.keys()
    different = [name for name, document in found.items() if by_name(document) != by_name(expected[name])]
    assert different == []


def test_every_folder_for_kustomize_builds() -> None:
    folders = [file.parent for file in MANIFESTS.rglob("kustomization.y*ml")]
    assert folders
    assert [str(folder) for folder in folders if not built(folder)] == []
