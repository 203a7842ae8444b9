"""The manifests for kustomize and for kubectl alone: each says what the chart says with the same choices.

With UPDATE_GOLDEN=1 what is rendered from the chart is written anew: read the difference before committing it.
"""

import json
import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from devstack import tools
from devstack.json_schemas import of_openapi, strictly
from tests.support.chart import CHART, NAMESPACE, ROOT, Document, documents_in, key, render
from tests.support.devstack import Kubectl

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
    command = [str(tools.kubectl()), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns"
    documents = list(documents_in(done.stdout))
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
    same = list(documents_in(file.read_text(encoding="utf-8"))) == documents
    assert same, f"the chart renders another {file.name}: run this test with UPDATE_GOLDEN=1, and read the difference"


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


def test_kueue_takes_the_queues() -> None:
    """By the schemas of its CRDs; and the operator's Jobs get into them."""
    schemas = {}
    for file in tools.kueue_crds().glob("*.yaml"):
        definition = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]
        for version in definition["versions"]:
            identity = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schemas[identity] = strictly(version["schema"]["openAPIV3Schema"])
            schemas[identity]["properties"]["metadata"] = {"type": "object"}
    found = built(MANIFESTS / "kueue")
    assert {name.split()[0] for name in found} == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    for one in found.values():
        jsonschema.Draft202012Validator(schemas[one["apiVersion"], one["kind"]]).validate(one)
    queue, cluster_queue = found["LocalQueue knowledge/tasks"], found["ClusterQueue -/processing-tasks"]
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    [group] = cluster_queue["spec"]["resourceGroups"]
    assert found[f"ResourceFlavor -/{group['flavors'][0]['name']}"]
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    requested = values["runner"]["resources"]
    assert {name for part in requested.values() for name in part} == set(group["coveredResources"])


def test_the_application_of_argo_cd_is_the_chart_with_values_that_it_takes() -> None:
    application = yaml.safe_load((MANIFESTS / "argocd/application.yaml").read_text(encoding="utf-8"))["spec"]
    assert ROOT / application["source"]["path"] == CHART
    version = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["version"]
    assert application["source"]["targetRevision"] == f"v{version}"
    assert application["destination"]["namespace"] == NAMESPACE
    given = application["source"]["helm"]["valuesObject"]
    assert render(*(part for name, value in given.items() for part in ("--set-json", f"{name}={json.dumps(value)}")))


def test_argo_cd_gets_the_health_of_both_kinds() -> None:
    [settings] = built(MANIFESTS / "argocd").values()
    assert key(settings) == "ConfigMap argocd/argocd-cm"
    prefix = "resource.customizations.health.tasks.zzdsj.io_"
    scripts = {path.parent.name: path.read_text(encoding="utf-8") for path in (MANIFESTS / "argocd").rglob("health.lua")}
    assert settings["data"] == {f"{prefix}{kind}": script for kind, script in scripts.items()}


# ------------------------------------------------------------------------------------------------------------- API server

UNKNOWN = {"monitoring.coreos.com/v1", "kueue.x-k8s.io/v1beta2", "argoproj.io/v1alpha1"}
"""APIs of others, which the cluster of the tests lacks."""
SETS = sorted(path.name.removesuffix(".values.yaml") for path in (ROOT / "tests/data/chart").glob("*.values.yaml"))
POOL = {"name": "texts", "spec": {"types": ["health_check"], "max": 2}}


def of_set(name: str) -> list[Document]:
    """Return what the chart makes of a set of values, with a pool besides where it names namespaces, and its test."""
    values = ROOT / f"tests/data/chart/{name}.values.yaml"
    given = yaml.safe_load(values.read_text(encoding="utf-8"))
    namespaces = given.get("taskNamespaces", [{"name": "knowledge"}])
    pools = [POOL | {"namespace": one["name"]} for one in namespaces]
    chosen = ("--set-json", f"workerPools={json.dumps(pools)}", "--api-versions", "tasks.zzdsj.io/v1/WorkerPool")
    return render("--values", values, *chosen)


def of_files() -> list[Document]:
    files = [file for file in MANIFESTS.rglob("*.yaml") if not {"testdata", "base", "overlays"} & set(file.parts)]
    documents = [one for file in files for one in documents_in(file.read_text(encoding="utf-8"))]
    return [one for one in documents if {"apiVersion", "kind", "metadata"} <= (one or {}).keys()]


def refused(kubectl: Kubectl, namespace: str, documents: list[Document]) -> str:
    """Return what the API server does not take of DOCUMENTS, each put into NAMESPACE, by its schemas and admission.

    Nothing is made but accounts, which a pod has to have. Names of objects of the whole cluster are others than those there;
    CRDs, which cannot be, are applied by the fixture of kubectl.
    """
    asked: list[Document] = json.loads(json.dumps(documents, default=datetime.isoformat))
    asked = [one for one in asked if one["apiVersion"] not in UNKNOWN and one["kind"] != "CustomResourceDefinition"]
    for one in asked:
        if "namespace" in one["metadata"] or one["apiVersion"].startswith("tasks.zzdsj.io/"):
            one["metadata"]["namespace"] = namespace
        elif one["kind"] != "ResourceQuota":
            one["metadata"]["name"] = f"{namespace}-{one['metadata']['name']}"
    if accounts := [one for one in asked if one["kind"] == "ServiceAccount"]:
        kubectl.apply(*accounts)
    others = {"apiVersion": "v1", "kind": "List", "items": [one for one in asked if one not in accounts]}
    strict = ("create", "--dry-run=server", "--validate=strict", f"--namespace={namespace}", "-f=-")
    return kubectl.attempt(*strict, stdin=json.dumps(others)).stderr


@pytest.fixture(scope="session")
def schemas(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with JSON Schemas of all kinds of the cluster, without ours."""
    folder = tmp_path_factory.mktemp("schemas")
    for path, text in of_openapi(json.loads(kubectl("get", "--raw=/openapi/v2"))).items():
        if not path.startswith("tasks.zzdsj.io/"):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    return folder


def nonconforming(schemas: Path, documents: list[Document]) -> str:
    """Return what kubeconform finds wrong with DOCUMENTS by SCHEMAS and ours."""
    template = "{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json"
    locations = [f"-schema-location={folder}/{template}" for folder in (ROOT / "crds/schemas", schemas)]
    asked = [one for one in documents if one["apiVersion"] not in UNKNOWN]
    assert asked
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": asked}, default=datetime.isoformat)
    command = [str(tools.kubeconform()), "-strict", "-summary", *locations]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert f"Valid: {len(asked)}" in done.stdout or done.returncode, done.stdout
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize("name", SETS)
def test_what_the_chart_makes_conforms_to_the_schemas(schemas: Path, name: str) -> None:
    assert nonconforming(schemas, of_set(name)) == ""


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_kustomize_builds_conforms_to_the_schemas(schemas: Path, folder: str) -> None:
    assert nonconforming(schemas, list(built(MANIFESTS / folder).values())) == ""


def test_the_other_manifests_conform_to_the_schemas(schemas: Path) -> None:
    assert nonconforming(schemas, of_files()) == ""


@pytest.mark.parametrize("name", SETS)
def test_the_api_server_takes_all_that_the_chart_makes(kubectl: Kubectl, namespace: str, name: str) -> None:
    assert refused(kubectl, namespace, of_set(name)) == ""


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_api_server_takes_all_that_kustomize_builds(kubectl: Kubectl, namespace: str, folder: str) -> None:
    assert refused(kubectl, namespace, list(built(MANIFESTS / folder).values())) == ""


def test_the_api_server_takes_the_other_manifests(kubectl: Kubectl, namespace: str) -> None:
    assert refused(kubectl, namespace, of_files()) == ""


WRONG: list[tuple[str, Callable[[Document], object], str]] = [
    ("Service", lambda one: one["spec"].update(colour="red"), 'unknown field "colour"'),
    ("Role", lambda one: one["rules"][0].update(verbs="all"), "(Role.rules[0].verbs): invalid type"),
    ("WorkerPool", lambda one: one["spec"].update(max=1000), "spec.max"),
    ("Pod", lambda one: one["spec"].pop("securityContext"), 'violates PodSecurity "restricted'),
    ("Deployment", lambda one: one["spec"]["template"]["metadata"].pop("labels"), "spec.template.metadata.labels"),
]


@pytest.mark.parametrize(("kind", "spoil"), [case[:2] for case in WRONG[:3]], ids=[case[0] for case in WRONG[:3]])
def test_what_does_not_conform_is_found(schemas: Path, kind: str, spoil: Callable[[Document], object]) -> None:
    documents = of_set("minimal")
    spoil(next(one for one in documents if one["kind"] == kind))
    assert f"{kind} " in nonconforming(schemas, documents)


@pytest.mark.parametrize(("kind", "spoil", "said"), WRONG, ids=[case[0] for case in WRONG])
def test_what_the_api_server_does_not_take_is_found(
    kubectl: Kubectl, namespace: str, kind: str, spoil: Callable[[Document], object], said: str
) -> None:
    documents = of_set("minimal")
    spoil(next(one for one in documents if one["kind"] == kind))
    assert said in refused(kubectl, namespace, documents)
