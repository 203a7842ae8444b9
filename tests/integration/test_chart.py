"""The chart, as the real helm renders it.

With UPDATE_GOLDEN=1 the expected renders are written anew: read the difference before committing it.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from devstack import Endpoints
from task_contract.models import parse_manifest
from task_contract.pools import WorkerPool
from task_gateway.settings import Settings as GatewaySettings
from task_operator.__main__ import _parser
from task_operator.jobs import build_job, build_sweep_job
from task_operator.projection import DefaultCallback
from task_operator.settings import Settings
from task_platform.settings import load_settings
from tests.support.chart import CHART, KUBE_VERSION, ROOT, Document, documents_in, key, render, run_helm
from tests.support.devstack import Kubectl, fresh_namespace
from tests.support.operator_values import task

DATA = ROOT / "tests/data/chart"
SETS = ("minimal", "full", "existing", "hardened", "cluster-wide", "one-namespace", "bundled")
POSTGRES = "stores.postgres.url=postgresql://tasks:secret@postgres:5432/tasks"

Helm = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def helm(request: pytest.FixtureRequest) -> Helm:
    """Helm 3, or the major version that a test asks for."""
    return partial(run_helm, major=getattr(request, "param", 3))


@pytest.fixture(scope="session", params=SETS)
def rendered(request: pytest.FixtureRequest) -> tuple[str, dict[str, Document]]:
    documents = render("--values", DATA / f"{request.param}.values.yaml")
    return request.param, {key(document): document for document in documents}


@pytest.fixture(scope="session", params=SETS[:3])
def expected_of(request: pytest.FixtureRequest) -> tuple[str, dict[str, Document]]:
    """The same for the sets whose accounts, rights and addresses these tests have tables of."""
    documents = render("--values", DATA / f"{request.param}.values.yaml")
    return request.param, {key(document): document for document in documents}


def pods(documents: Iterator[Document] | list[Document]) -> list[Document]:
    made = [document["spec"]["template"]["spec"] for document in documents if document["kind"] in {"Deployment", "Job"}]
    return made + [document["spec"] for document in documents if document["kind"] == "Pod"]


def of_component(documents: dict[str, Document], component: str, *kinds: str) -> list[Document]:
    """Return the objects of these kinds that are of a component."""
    label = "app.kubernetes.io/component"
    found = (one for one in documents.values() if one["kind"] in kinds)
    return [one for one in found if one["metadata"]["labels"].get(label) == component]


def pod_of(documents: list[Document], component: str) -> Document:
    """Return the pod of the Deployment of a component."""
    [deployment] = of_component({key(one): one for one in documents}, component, "Deployment")
    pod: Document = deployment["spec"]["template"]["spec"]
    return pod


def granted(role: Document) -> dict[tuple[str, str], list[str]]:
    """Return the verbs that a role gives, by group and resource."""
    return {
        (group, resource): rule["verbs"]
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("values", SETS)
def test_lint_is_clean(helm: Helm, values: str) -> None:
    answer = helm("lint", "--strict", CHART, *KUBE_VERSION, "--values", DATA / f"{values}.values.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_lint_is_clean_without_values(helm: Helm) -> None:
    answer = helm("lint", "--strict", CHART, *KUBE_VERSION)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_renders_as_before(rendered: tuple[str, dict[str, Document]]) -> None:
    name, documents = rendered
    found = [document for document in documents.values() if document["kind"] != "CustomResourceDefinition"]
    golden = DATA / f"{name}.golden.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(yaml.safe_dump_all(found, sort_keys=False, width=120, allow_unicode=True), encoding="utf-8")
    assert found == list(documents_in(golden.read_text(encoding="utf-8")))


RECOMMENDED_LABELS = {"name", "instance", "component", "part-of", "managed-by", "version"}


def test_helm_4_renders_the_same(rendered: tuple[str, dict[str, Document]]) -> None:
    name, documents = rendered
    assert {key(one): one for one in render("--values", DATA / f"{name}.values.yaml", major=4)} == documents


@pytest.mark.parametrize("helm", [4], indirect=True)
def test_helm_4_finds_no_fault(helm: Helm) -> None:
    answer = helm("lint", "--strict", CHART, "--values", DATA / "full.values.yaml", *KUBE_VERSION)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_object_and_pod_has_the_recommended_labels(rendered: tuple[str, dict[str, Document]]) -> None:
    for identity, document in rendered[1].items():
        described = [document["metadata"]]
        if document["kind"] == "Deployment":
            described.append(document["spec"]["template"]["metadata"])
        for metadata in described:
            assert {f"app.kubernetes.io/{label}" for label in RECOMMENDED_LABELS} <= metadata["labels"].keys(), identity


def test_no_name_is_rendered_twice(rendered: tuple[str, dict[str, Document]]) -> None:
    name, documents = rendered
    assert len(render("--values", DATA / f"{name}.values.yaml")) == len(documents)


# ------------------------------------------------------------------------------------------------------------------ values

BAD_VALUES: list[tuple[list[str], list[str]]] = [
    ([], ["stores.postgres.url", "stores.existingSecret"]),
    (["operator.imag.tag=1"], ["/operator", "imag"]),
    (["replicas=2"], ["replicas"]),
    (["operator.image.pullPolicy=Sometimes"], ["/operator/image/pullPolicy"]),
    (["operator.image.repository="], ["/operator/image/repository"]),
    (["operator.image.tag=a b"], ["/operator/image/tag"]),
    (["runner.image.digest=sha256:12"], ["/runner/image/digest"]),
    (["operator.logLevel=debug"], ["/operator/logLevel"]),
    (["operator.replicas=two"], ["/operator/replicas"]),
    (["operator.leaderElection.enabled=false"], ["operator.replicas", "operator.leaderElection.enabled"]),
    (["operator.leaderElection.deadlineSeconds=9"], ["operator.leaderElection.deadlineSeconds"]),
    (["operator.leaderElection.renewSeconds=7"], ["operator.leaderElection.deadlineSeconds"]),
    (["operator.flowControl.shares=0"], ["/operator/flowControl/shares"]),
    (["operator.resyncSeconds=0"], ["/operator/resyncSeconds"]),
    (["operator.sweepIntervalSeconds=-1"], ["/operator/sweepIntervalSeconds"]),
    (["operator.historyDays=-1"], ["/operator/historyDays"]),
    (["networkPolicies.storePorts[0]=0"], ["/networkPolicies/storePorts/0"]),
    (["gateway.autoscaling.maxReplicas=0"], ["/gateway/autoscaling/maxReplicas"]),
    (
        [POSTGRES, "gateway.autoscaling.enabled=true", "gateway.autoscaling.maxReplicas=1"],
        ["gateway.autoscaling.minReplicas"],
    ),
    ([POSTGRES, "gateway.ingress.enabled=true"], ["gateway.ingress.host"]),
    (["operator.pendingDeadlineSeconds=-1"], ["/operator/pendingDeadlineSeconds"]),
    (["operator.capacityDeadlineSeconds=1h"], ["/operator/capacityDeadlineSeconds"]),
    (["operator.limits.total=-1"], ["/operator/limits/total"]),
    (["runner.resourceClasses.Big.limits.memory=8Gi"], ["/runner/resourceClasses", "Big"]),
    (["runner.lostNodeSeconds=-1"], ["/runner/lostNodeSeconds"]),
    (["operator.limits.perType.document=3"], ["/operator/limits/perType", "document"]),
    (["operator.taskBudget=many"], ["/operator/taskBudget"]),
    (["operator.clusterWide=maybe"], ["/operator/clusterWide"]),
    (["operator.extraEnv[0].value=x"], ["/operator/extraEnv/0", "name"]),
    (["operator.resources.limit.memory=1Gi"], ["/operator/resources", "limit"]),
    (["operator.metrics.service.port=99999"], ["/operator/metrics/service/port"]),
    (["operator.serviceAccount.create=false"], ["operator.serviceAccount.name"]),
    (["gateway.auth=none"], ["/gateway/auth"]),
    (["gateway.replicas=0"], ["/gateway/replicas"]),
    (["gateway.limit.perSecond=0"], ["/gateway/limit/perSecond"]),
    (["gateway.corsOrigins[0]=*"], ["/gateway/corsOrigins/0"]),
    (["gateway.service.aliases[0]=Task_Manager"], ["/gateway/service/aliases/0"]),
    (["gateway.defaultNamespace=elsewhere"], ["gateway.defaultNamespace", "elsewhere"]),
    (["gateway.serviceAccount.create=false"], ["gateway.serviceAccount.name"]),
    (["gateway.queue.enabled=true"], ["gateway.queue.enabled", "events.rabbitmq.url"]),
    (["gateway.queue.enabled=true", "events.rabbitmq.url=amqp://u:hidden@r"], ["gateway.queue.account"]),
    (["gateway.queue.prefetch=0"], ["/gateway/queue/prefetch"]),
    (["gateway.upload.enabled=true"], ["gateway.upload.claims"]),
    (
        ["gateway.upload.enabled=true", "gateway.upload.claims[0].namespace=a", "gateway.upload.claims[0].claimName=b"],
        ["gateway.upload.claims: a is not one of taskNamespaces"],
    ),
    (
        [
            "gateway.upload.enabled=true",
            "gateway.upload.s3.location=s3://bucket",
            "gateway.upload.claims[0].namespace=a",
            "gateway.upload.claims[0].claimName=b",
        ],
        ["gateway.upload.claims: leave them empty"],
    ),
    (["gateway.upload.s3.location=uploads"], ["/gateway/upload/s3/location"]),
    ([POSTGRES, "stores.bundled=true"], ["stores.bundled: leave stores.existingSecret"]),
    (["documents.subPath=../elsewhere"], ["/documents/subPath"]),
    (["bundledStores.password=short"], ["/bundledStores/password"]),
    (["bundledStores.size=much"], ["/bundledStores/size"]),
    (["gateway.upload.s3.endpoint=minio:9000"], ["/gateway/upload/s3/endpoint"]),
    (["gateway.upload.enabled=true", "gateway.upload.s3.location=s3://bucket"], ["gateway.upload.s3.accessKeyId"]),
    (
        [
            "gateway.upload.enabled=true",
            "gateway.upload.s3.location=s3://bucket",
            "gateway.upload.s3.accessKeyId=hidden",
            "gateway.upload.s3.existingSecret=account",
        ],
        ["gateway.upload.s3.existingSecret: leave accessKeyId"],
    ),
    (["taskLabels.team=a b"], ["/taskLabels/team"]),
    (["taskNamespaces[0].name=a", "taskNamespaces[0].shared=true"], ["taskNamespaces[0].shared: needs taskLabels"]),
    (
        ["taskLabels.team=a", "taskNamespaces[0].name=a", "taskNamespaces[0].shared=true", "taskNamespaces[0].create=true"],
        ["taskNamespaces[0].create: has no effect with shared"],
    ),
    (["runner.embeddingModel=7"], ["/runner/embeddingModel"]),
    (["runner.embeddingModels[0]=a b"], ["/runner/embeddingModels/0"]),
    (["runner.tolerations[0].operator=In"], ["/runner/tolerations/0/operator"]),
    (["runner.resources.requests.cpu=true"], ["/runner/resources/requests/cpu"]),
    (["priorityClasses.high.value=2000000000"], ["/priorityClasses/high/value"]),
    (["priorityClasses.low.preemptionPolicy=Always"], ["/priorityClasses/low/preemptionPolicy"]),
    (["imagePullSecrets[0]=registry"], ["/imagePullSecrets/0"]),
    (["sources.port=1"], ["/sources", "port"]),
    (["sources.ports[0]=99999"], ["/sources/ports/0"]),
    (["sources.allow=all"], ["/sources/allow"]),
    (["sources.s3.addressing=host"], ["/sources/s3/addressing"]),
    (["sources.s3.secretAccessKey=hidden", "sources.s3.secret=hidden"], ["/sources/s3", "secret"]),
    (["taskNamespaces[0].name=a", "taskNamespaces[0].sources.s3.bucket=b"], ["/taskNamespaces/0/sources/s3", "bucket"]),
    (["documents.size=ten"], ["/documents/size"]),
    (["documents.accessModes[0]=ReadWrite"], ["/documents/accessModes/0"]),
    (["documents.volumeName=pv", "taskNamespaces[0].name=a", "taskNamespaces[1].name=b"], ["documents.volumeName"]),
    (["documents.existingClaim=c", "taskNamespaces[0].name=a", "taskNamespaces[0].documents.size=1Gi"], ["[0].documents"]),
    (["taskNamespaces=null"], ["taskNamespaces", "operator.clusterWide"]),
    (["taskNamespaces[0].name=Knowledge"], ["/taskNamespaces/0/name"]),
    (["taskNamespaces[0].create=true"], ["/taskNamespaces/0", "name"]),
    (["taskNamespaces[0].name=a", "taskNamespaces[1].name=a"], ["taskNamespaces[1].name", "twice"]),
    (["taskNamespaces[0].name=processing-tasks-system", "taskNamespaces[0].create=true"], ["taskNamespaces[0].create"]),
    (["taskNamespaces[0].name=a", "taskNamespaces[0].secret=x"], ["/taskNamespaces/0", "secret"]),
    (["taskNamespaces[0].name=a", "taskNamespaces[0].stores.milvus.url=milvus"], ["taskNamespaces[0].stores.milvus.url"]),
    (["stores.existingSecret=there"], ["stores.existingSecret"]),
    (["stores.redis.url=http://redis"], ["stores.redis.url", "redis://"]),
    (["stores.milvus.url=milvus:19530"], ["stores.milvus.url", "http://"]),
    (["stores.elasticsearch.url=https://"], ["stores.elasticsearch.url", "https://"]),
    (["stores.postgres.url=mysql://tasks:hidden@db/tasks"], ["stores.postgres.url", "postgresql://"]),
    (["operator.stores.postgres.url=mysql://tasks:hidden@db/tasks"], ["operator.stores.postgres.url"]),
    (["callbacks.default.url=knowledge-service/x"], ["/callbacks/default/url"]),
    (["callbacks.default.secretRef.name=hooks"], ["callbacks.default.secretRef", "both name and key"]),
    (["callbacks.default.secretRef.name=hooks", "callbacks.default.secretRef.key=k"], ["callbacks.default.secretRef.name"]),
    (["callbacks.allow=all"], ["/callbacks/allow"]),
    (["callbacks.secrets[0]=Hooks"], ["/callbacks/secrets/0"]),
    (["callbacks.timeoutSeconds=90"], ["/callbacks/timeoutSeconds"]),
    (["events.rabbitmq.url=http://u:hidden@rabbitmq"], ["events.rabbitmq.url", "amqp://"]),
    (["events.rabbitmq.url=amqp://u:hidden@r", "events.rabbitmq.existingSecret=x"], ["events.rabbitmq.existingSecret"]),
    (["tests.seconds=5"], ["/tests/seconds"]),
    (["clusterDomain=.local"], ["/clusterDomain"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "named"), BAD_VALUES, ids=[", ".join(case[0]) or "none" for case in BAD_VALUES])
def test_bad_value_is_refused_by_name_and_never_printed_with_its_password(
    helm: Helm, settings: list[str], named: list[str]
) -> None:
    base = [POSTGRES] if settings else []
    arguments = [argument for setting in [*base, *settings] for argument in ("--set", setting)]
    answer = helm("template", "processing-tasks", CHART, "-n", "processing-tasks-system", *KUBE_VERSION, *arguments)
    assert answer.returncode != 0, answer.stdout
    assert [part for part in named if part not in answer.stderr] == [], answer.stderr
    assert "hidden" not in answer.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("taskNamespaces[0].name=a", "taskNamespaces[0].stores.redis.url=redis://r"), "taskNamespaces[0].stores"),
        (("runner.embeddingModel=all-MiniLM-L6-v2",), "runner.embeddingModel"),
        (("runner.embeddingModels[0]=all-MiniLM-L6-v2",), "runner.embeddingModels"),
        (("sources.allowHttp=true",), "sources"),
        (("sources.s3.buckets[0]=manuals",), "sources"),
        (("taskNamespaces[0].name=a", "taskNamespaces[0].sources.ca=x"), "taskNamespaces[0].sources"),
    ],
)
def test_what_an_existing_secret_has_to_hold_is_refused_beside_it(helm: Helm, settings: tuple[str, ...], named: str) -> None:
    arguments = [argument for setting in ("stores.existingSecret=there", *settings) for argument in ("--set", setting)]
    answer = helm("template", "x", CHART, *KUBE_VERSION, *arguments)
    assert answer.returncode != 0
    assert named in answer.stderr


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, None), ("documents.storageClassName=", ""), ("documents.storageClassName=fast", "fast")],
    ids=["left out: the cluster's default", "empty: none", "named"],
)
def test_storage_class_of_the_claim(setting: str | None, expected: str | None) -> None:
    documents = render("--set", POSTGRES, *(("--set", setting) if setting else ()))
    claims = [
        document["spec"].get("storageClassName") for document in documents if document["kind"] == "PersistentVolumeClaim"
    ]
    assert claims == [expected]


def test_a_namespace_may_take_back_what_holds_for_all() -> None:
    settings = (
        POSTGRES,
        "stores.redis.url=redis://redis",
        "documents.storageClassName=fast",
        "documents.keep=true",
        "taskNamespaces[0].name=a",
        "taskNamespaces[0].stores.redis.url=",
        "taskNamespaces[0].documents.storageClassName=",
        "taskNamespaces[0].documents.keep=false",
        "taskNamespaces[1].name=b",
    )
    documents = render(*(argument for setting in settings for argument in ("--set", setting)))
    found = {key(document): document for document in documents}
    secrets = [found[f"Secret {namespace}/processing-task-stores"]["data"] for namespace in "ab"]
    assert [sorted(data) for data in secrets] == [["TASKS_POSTGRES_URL"], ["TASKS_POSTGRES_URL", "TASKS_REDIS_URL"]]
    claims = [found[f"PersistentVolumeClaim {namespace}/processing-task-documents"] for namespace in "ab"]
    assert [claim["spec"]["storageClassName"] for claim in claims] == ["", "fast"]
    assert [claim["metadata"].get("annotations") for claim in claims] == [None, {"helm.sh/resource-policy": "keep"}]


def test_an_old_cluster_is_refused(helm: Helm) -> None:
    answer = helm("template", "x", CHART, "--kube-version", "1.30.0", "--set", POSTGRES)
    assert answer.returncode != 0
    assert "kubeVersion" in answer.stderr


def test_long_release_names_give_names_that_fit(helm: Helm) -> None:
    answer = helm(
        "template", "a-release-name-that-is-as-long-as-helm-allows-it-to-be", CHART, *KUBE_VERSION, "--set", POSTGRES
    )
    names = [document["metadata"]["name"] for document in documents_in(answer.stdout)]
    assert [name for name in names if len(name) > 63] == []


# --------------------------------------------------------------------------------------------------------------------- CRD


@pytest.mark.parametrize("plural", ["processingtasks", "workerpools", "processingschedules"])
def test_a_crd_is_the_generated_one_and_stays_when_the_release_goes(plural: str) -> None:
    documents = render("--set", POSTGRES)
    found = next(document for document in documents if document["metadata"]["name"] == f"{plural}.tasks.zzdsj.io")
    expected = yaml.safe_load((ROOT / "crds" / f"{plural}.yaml").read_text(encoding="utf-8"))
    assert found["spec"] == expected["spec"]
    assert found["metadata"]["name"] == expected["metadata"]["name"]
    assert found["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert found["metadata"]["labels"].items() >= expected["metadata"]["labels"].items()


def test_only_crd_and_wanted_documents_stay_on_uninstall(rendered: tuple[str, dict[str, Document]]) -> None:
    name, documents = rendered
    kept = {
        identity
        for identity, document in documents.items()
        if document["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    plurals = ("processingtasks", "workerpools", "processingschedules")
    crds = {f"CustomResourceDefinition -/{plural}.tasks.zzdsj.io" for plural in plurals}
    expected = {
        "minimal": crds,
        # The claim of the other namespace, research, says keep: false.
        "full": crds | {"Namespace -/knowledge", "PersistentVolumeClaim knowledge/processing-task-documents"},
        "existing": set(),
        "hardened": crds,
        "cluster-wide": set(),
        "one-namespace": crds | {"PersistentVolumeClaim processing-tasks-system/processing-task-documents"},
        "bundled": crds,
    }
    assert kept == expected[name]


POOLS = json.dumps([{"name": "texts", "namespace": "knowledge", "spec": {"types": ["health_check"], "max": 2}}])


def test_pools_wait_for_a_cluster_that_knows_them() -> None:
    given = ("--set", POSTGRES, "--set-json", f"workerPools={POOLS}")
    assert [one for one in render(*given) if one["kind"] == "WorkerPool"] == []
    documents = render(*given, "--api-versions", "tasks.zzdsj.io/v1/WorkerPool")
    (pool,) = (one for one in documents if one["kind"] == "WorkerPool")
    assert (pool["metadata"]["namespace"], pool["metadata"]["name"]) == ("knowledge", "texts")
    assert pool["spec"] == {"types": ["health_check"], "max": 2}
    assert WorkerPool.model_validate(pool).spec.max == 2


def test_a_pool_outside_of_the_task_namespaces_is_refused(helm: Helm) -> None:
    elsewhere = POOLS.replace("knowledge", "elsewhere")
    given = ("--set", POSTGRES, "--set-json", f"workerPools={elsewhere}", "--api-versions", "tasks.zzdsj.io/v1/WorkerPool")
    answer = helm("template", "processing-tasks", CHART, *KUBE_VERSION, *given)
    assert "workerPools: texts is in namespace elsewhere, which is not one of taskNamespaces" in answer.stderr


def test_releases_that_share_a_namespace_make_nothing_twice_and_know_their_own_by_a_label(helm: Helm) -> None:
    def of(release: str, *given: str) -> dict[str, Document]:
        pools = ("--set-json", f"workerPools={POOLS}", "--api-versions", "tasks.zzdsj.io/v1/WorkerPool")
        answer = helm("template", release, CHART, *KUBE_VERSION, "--set", POSTGRES, *pools, *given)
        assert answer.returncode == 0, answer.stderr
        return {key(one): one for one in documents_in(answer.stdout) if one["kind"] != "CustomResourceDefinition"}

    shared = json.dumps([{"name": "knowledge", "shared": True}])
    first = of("processing-tasks", "--set", "taskLabels.team=a", "--set", "taskLabels.tier=x")
    second = of("team-b", "--set", "taskLabels.team=b", "--set-json", f"taskNamespaces={shared}")
    assert {name for name in first.keys() & second.keys() if not name.startswith("WorkerPool ")} == set()
    for documents, selector, labels in (
        (first, "team=a,tier=x", {"team": "a", "tier": "x"}),
        (second, "team=b", {"team": "b"}),
    ):
        said = {
            one["name"]: one.get("value")
            for component in ("operator", "gateway")
            for container in containers(pod_of(list(documents.values()), component))
            for one in container.get("env", [])
        }
        assert (said["OPERATOR_SELECTOR"], json.loads(said["GATEWAY_TASK_LABELS"])) == (selector, labels)
        [pool] = [one for one in documents.values() if one["kind"] == "WorkerPool"]
        assert labels.items() <= pool["metadata"]["labels"].items()
        [trial] = [one for name, one in documents.items() if one["kind"] == "Pod" and "test" in name]
        assert f"--label=team={labels['team']}" in trial["spec"]["containers"][0]["args"]


# ---------------------------------------------------------------------------------------------------------------- security


def test_every_pod_is_restricted_with_a_read_only_root(rendered: tuple[str, dict[str, Document]]) -> None:
    found = pods(list(rendered[1].values()))
    assert found
    for pod in found:
        writes = "persistentVolumeClaim" in {kind for volume in pod["volumes"] for kind in volume}  # uploads
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
            **({"fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch"} if writes else {}),
        }
        assert pod["enableServiceLinks"] is False
        assert {tuple(volume) for volume in pod["volumes"]} <= {("name", "emptyDir"), ("name", "persistentVolumeClaim")}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
            assert container["resources"]["limits"]["memory"], container["name"]
            tmp, *documents = container["volumeMounts"]
            assert tmp == {"name": "tmp", "mountPath": "/tmp"}, container["name"]
            assert bool(documents) == writes, container["name"]
            own = container["name"] == "test"
            assert all(mount["mountPath"].startswith("/data" if own else "/documents/") for mount in documents)


def test_namespaces_that_the_chart_makes_enforce_restricted(rendered: tuple[str, dict[str, Document]]) -> None:
    made = [document["metadata"]["labels"] for document in rendered[1].values() if document["kind"] == "Namespace"]
    assert [labels.get("pod-security.kubernetes.io/enforce") for labels in made] == ["restricted"] * len(made)


def test_credentials_stand_in_secrets_only(expected_of: tuple[str, dict[str, Document]]) -> None:
    name, documents = expected_of
    outside = json.dumps([document for document in documents.values() if document["kind"] != "Secret"])
    assert "canary" not in outside
    assert base64.b64encode(b"canary").decode()[:6] not in outside
    inside = {
        identity: {variable: base64.b64decode(value).decode() for variable, value in document["data"].items()}
        for identity, document in documents.items()
        if document["kind"] == "Secret"
    }
    if name == "full":
        sources = {
            "TASKS_SOURCE_PORTS": "443,8443",
            "TASKS_SOURCE_ALLOW_HTTP": "true",
            "TASKS_SOURCE_CA": "-----BEGIN CERTIFICATE-----",
            "TASKS_S3_ENDPOINT": "https://minio.storage.svc:9000",
            "TASKS_S3_REGION": "eu-west-1",
            "TASKS_S3_ADDRESSING": "virtual",
            "TASKS_S3_ANONYMOUS": "true",
        }
        assert inside == {
            "Secret processing-tasks-system/kb-tasks-operator": {
                "OPERATOR_POSTGRES_URL": "postgresql://operator:canary-operator@postgres.stores:5432/tasks",
                "OPERATOR_REDIS_URL": "redis://:canary-operator-redis@redis.stores:6379/0",
            },
            "Secret processing-tasks-system/kb-tasks-rabbitmq": {
                "url": "amqp://tasks:canary-rabbitmq@rabbitmq.stores:5672/",
            },
            "Secret knowledge/processing-task-stores": {
                "TASKS_POSTGRES_URL": "postgresql://runner:canary-postgres@postgres.stores:5432/tasks",
                "TASKS_REDIS_URL": "redis://:canary-redis@redis.stores:6379/0",
                "TASKS_MILVUS_URL": "http://milvus.stores:19530",
                "TASKS_MILVUS_TOKEN": "root:canary-milvus",
                "TASKS_ELASTICSEARCH_URL": "https://elasticsearch.stores:9200",
                "TASKS_ELASTICSEARCH_API_KEY": "canary-elasticsearch",
                "TASKS_EMBEDDING_MODEL": "/models/bge-m3",
                "TASKS_SOURCE_ALLOW": "files.corp.example.com,10.20.0.0/16",
                "TASKS_S3_BUCKETS": "manuals,shared/knowledge",
                "TASKS_S3_ACCESS_KEY_ID": "knowledge",
                "TASKS_S3_SECRET_ACCESS_KEY": "canary-s3",
                **sources,
            },
            "Secret research/processing-task-stores": {
                "TASKS_POSTGRES_URL": "postgresql://research:canary-research@postgres.stores:5432/tasks",
                "TASKS_REDIS_URL": "redis://:canary-redis@redis.stores:6379/0",
                "TASKS_MILVUS_URL": "http://milvus.stores:19530",
                "TASKS_MILVUS_TOKEN": "research:canary-research-milvus",
                "TASKS_ELASTICSEARCH_URL": "https://elasticsearch.stores:9200",
                "TASKS_ELASTICSEARCH_API_KEY": "canary-elasticsearch",
                "TASKS_EMBEDDING_MODEL": "/models/bge-m3",
                "TASKS_S3_BUCKETS": "research",
                "TASKS_S3_ACCESS_KEY_ID": "research",
                "TASKS_S3_SECRET_ACCESS_KEY": "canary-research-s3",
                **sources,
            },
        }
    else:
        assert len(inside) == {"minimal": 2, "existing": 0}[name]


def test_only_pods_of_operator_gateway_and_test_get_a_token(rendered: tuple[str, dict[str, Document]]) -> None:
    for document in rendered[1].values():
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False
    assert {pod["automountServiceAccountToken"] for pod in pods(list(rendered[1].values()))} == {True}


PERMISSIONS = {
    ("tasks.zzdsj.io", "processingtasks"): ["get", "list", "watch", "create", "patch", "delete"],
    ("tasks.zzdsj.io", "processingtasks/status"): ["get", "patch", "update"],
    ("tasks.zzdsj.io", "workerpools"): ["list", "watch"],
    ("tasks.zzdsj.io", "workerpools/status"): ["patch"],
    ("tasks.zzdsj.io", "processingschedules"): ["list", "watch"],
    ("tasks.zzdsj.io", "processingschedules/status"): ["patch"],
    ("tasks.zzdsj.io", "processingtasks/finalizers"): ["update"],
    ("tasks.zzdsj.io", "workerpools/finalizers"): ["update"],
    ("tasks.zzdsj.io", "processingschedules/finalizers"): ["update"],
    ("batch", "jobs"): ["get", "list", "watch", "create", "delete"],
    ("", "pods"): ["get", "list"],
    ("events.k8s.io", "events"): ["create", "list"],
    ("", "secrets"): ["get"],
}
LEADER = {("coordination.k8s.io", "leases"): ["create", "get", "patch"]}


def test_operator_may_do_this_and_no_more(expected_of: tuple[str, dict[str, Document]]) -> None:
    name, documents = expected_of
    account = {"minimal": "processing-tasks-operator", "full": "kb-tasks-controller", "existing": "controllers"}[name]
    bindings = of_component(documents, "operator", "RoleBinding", "ClusterRoleBinding")
    leader = next(one for one in bindings if one["metadata"]["name"].endswith("-leader"))
    bindings.remove(leader)
    assert leader["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "processing-tasks-system"}]
    assert leader["metadata"]["namespace"] == "processing-tasks-system"
    role = documents[f"Role processing-tasks-system/{leader['roleRef']['name']}"]
    lease = environment(pod_of(list(documents.values()), "operator")["containers"][0])["OPERATOR_LEASE_NAME"]
    assert [(rule["resources"], rule["verbs"], rule.get("resourceNames")) for rule in role["rules"]] == [
        (["leases"], ["create"], None),
        (["leases"], ["get", "patch"], [lease]),
    ]
    expected = {"minimal": {"knowledge"}, "full": {"knowledge", "research"}, "existing": {None}}[name]
    assert {binding["metadata"].get("namespace") for binding in bindings} == expected
    for binding in bindings:
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account, "namespace": "processing-tasks-system"},
        ]
        namespace = binding["metadata"].get("namespace", "-")
        role = documents[f"{binding['roleRef']['kind']} {namespace}/{binding['roleRef']['name']}"]
        assert granted(role) == PERMISSIONS
        signing = {"full": ["hooks", "processing-task-callbacks"]}.get(name, ["processing-task-callbacks"])
        assert [rule["resourceNames"] for rule in role["rules"] if rule["resources"] == ["secrets"]] == [signing]


def test_without_secrets_that_sign_the_operator_reads_none() -> None:
    roles = [one for one in render("--set", POSTGRES, "--set", "callbacks.secrets=null") if one["kind"] == "Role"]
    assert roles
    assert not [rule for role in roles for rule in role["rules"] if "secrets" in rule["resources"]]


GATEWAY_PERMISSIONS = {
    ("tasks.zzdsj.io", "processingtasks"): ["get", "create", "patch", "delete"],
    ("", "pods"): ["get", "list"],
    ("", "pods/log"): ["get"],
}
REVIEWS = {
    ("authentication.k8s.io", "tokenreviews"): ["create"],
    ("authorization.k8s.io", "subjectaccessreviews"): ["create"],
}


def test_gateway_may_do_this_and_no_more(expected_of: tuple[str, dict[str, Document]]) -> None:
    name, documents = expected_of
    account = {"minimal": "processing-tasks-gateway", "full": "kb-tasks-door", "existing": "doors"}[name]
    found: dict[str, list[str]] = {"reviews": [], "tasks": []}
    for binding in of_component(documents, "gateway", "RoleBinding", "ClusterRoleBinding"):
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": account, "namespace": "processing-tasks-system"},
        ]
        namespace = binding["metadata"].get("namespace", "-")
        role = documents[f"{binding['roleRef']['kind']} {namespace}/{binding['roleRef']['name']}"]
        reviews = binding["metadata"]["name"].endswith("-reviews")
        assert granted(role) == (REVIEWS if reviews else GATEWAY_PERMISSIONS)
        found["reviews" if reviews else "tasks"].append(namespace)
    # Who trusts the network asks the cluster nothing about callers.
    assert found["reviews"] == {"minimal": ["-"], "full": ["-"], "existing": []}[name]
    assert found["tasks"] == {"minimal": ["knowledge"], "full": ["knowledge", "research"], "existing": ["-"]}[name]


@pytest.mark.parametrize("values", SETS[:3])
def test_gateway_reads_its_settings_from_the_rendered_environment(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = render("--values", DATA / f"{values}.values.yaml")
    [container] = pod_of(documents, "gateway")["containers"]
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    settings = load_settings(GatewaySettings, program="gateway")
    assert settings.auth == ("trust-the-network" if values == "existing" else "kubernetes")
    assert settings.namespaces == {"minimal": ("knowledge",), "full": ("knowledge", "research"), "existing": ()}[values]
    assert settings.default_namespace == {"minimal": "knowledge", "full": "research", "existing": "knowledge"}[values]
    if values == "full":
        assert (settings.rate, settings.burst, settings.audiences) == (20.5, 40, ("tasks",))
        assert settings.cors_origins == ("https://app.example.com",)
        assert (str(settings.documents), settings.upload_bytes) == ("/documents", 1_000_000_000)
        assert (settings.rabbitmq_queue, settings.rabbitmq_prefetch) == ("orders", 4)
        assert settings.rabbitmq_account == "system:serviceaccount:agents:submitter"
    else:
        assert settings.rabbitmq_url is None
    grace = pod_of(documents, "gateway")["terminationGracePeriodSeconds"]
    assert grace > settings.drain_seconds + settings.stop_seconds


def test_a_gateway_in_the_namespace_of_the_tasks_uploads_into_their_claim() -> None:
    own = ["--namespace", "knowledge", "--set", POSTGRES, "--set", "gateway.upload.enabled=true"]
    own += ["--set", "taskNamespaces[0].name=knowledge"]  # helm made it
    for given, claim in (([], "processing-task-documents"), (["--set", "documents.existingClaim=shared"], "shared")):
        pod = pod_of(render(*own, *given), "gateway")
        [container] = pod["containers"]
        [volume] = [one for one in pod["volumes"] if "persistentVolumeClaim" in one]
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
        mount = {"name": volume["name"], "mountPath": "/documents/knowledge"}
        assert mount in container["volumeMounts"]
        assert environment(container)["GATEWAY_DOCUMENTS"] == "/documents"
        assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]


def test_a_gateway_that_uploads_into_a_bucket_has_its_account_and_tasks_read_their_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {
        "gateway.upload.enabled": "true",
        "gateway.upload.s3.location": "s3://documents/uploads/",
        "gateway.upload.s3.accessKeyId": "writer",
        "gateway.upload.s3.secretAccessKey": "hidden",
        "sources.s3.endpoint": "https://minio.example.com:9000",
        "sources.s3.accessKeyId": "reader",
        "sources.s3.secretAccessKey": "other",
        "taskNamespaces[0].name": "knowledge",
        "taskNamespaces[1].name": "research",
        "taskNamespaces[1].sources.s3.buckets": "{papers}",
    }
    given = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    documents = render("--set", POSTGRES, *given)
    pod = pod_of(documents, "gateway")
    assert not [one for one in pod["volumes"] if "persistentVolumeClaim" in one]
    [container] = pod["containers"]
    account = {one["name"]: one["valueFrom"] for one in container["env"] if "_ACCESS_KEY" in one["name"]}
    assert account == {
        f"GATEWAY_S3_{name}": {"secretKeyRef": {"name": "processing-tasks-uploads", "key": key}}
        for name, key in (("ACCESS_KEY_ID", "accessKeyId"), ("SECRET_ACCESS_KEY", "secretAccessKey"))
    }
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    settings = load_settings(GatewaySettings, program="gateway")
    assert (settings.documents, settings.s3_endpoint) == ("s3://documents/uploads/", "https://minio.example.com:9000")
    secrets = {
        document["metadata"]["namespace"]: {
            name: base64.b64decode(value).decode() for name, value in document["data"].items()
        }
        for document in documents
        if document["kind"] == "Secret"
        and document["metadata"]["name"] in {"processing-tasks-uploads", "processing-task-stores"}
    }
    assert secrets["processing-tasks-system"] == {"accessKeyId": "writer", "secretAccessKey": "hidden"}
    assert secrets["knowledge"]["TASKS_S3_BUCKETS"] == "documents/uploads/knowledge"
    assert secrets["research"]["TASKS_S3_BUCKETS"] == "papers,documents/uploads/research"
    assert secrets["knowledge"]["TASKS_S3_ACCESS_KEY_ID"] == "reader"
    elsewhere = render("--set", POSTGRES, *given[:4], "--set", "gateway.upload.s3.existingSecret=account")
    assert {"name": "account", "key": "accessKeyId"} in [
        one["valueFrom"]["secretKeyRef"]
        for one in pod_of(elsewhere, "gateway")["containers"][0]["env"]
        if "valueFrom" in one
    ]
    assert not [document for document in elsewhere if document["metadata"]["name"] == "processing-tasks-uploads"]


def test_stores_of_a_trial_stand_where_tasks_and_operator_look_for_them() -> None:
    documents = {key(one): one for one in render("--values", DATA / "bundled.values.yaml")}
    place, password = "processing-tasks-system.svc.cluster.local", "canaryStorePassword"
    expected = {
        "POSTGRES": f"postgresql://tasks:{password}@processing-tasks-postgres.{place}:5432/tasks",
        "REDIS": f"redis://:{password}@processing-tasks-redis.{place}:6379/0",
        "MILVUS": f"http://processing-tasks-milvus.{place}:19530",
        "ELASTICSEARCH": f"http://elastic:{password}@processing-tasks-elasticsearch.{place}:9200",
    }
    for secret, prefix, stores in (
        ("knowledge/processing-task-stores", "TASKS", [*expected]),
        ("research/processing-task-stores", "TASKS", [*expected]),
        ("processing-tasks-system/processing-tasks-operator", "OPERATOR", ["POSTGRES", "REDIS"]),
    ):
        data = {name: base64.b64decode(value).decode() for name, value in documents[f"Secret {secret}"]["data"].items()}
        assert data == {f"{prefix}_{store}_URL": expected[store] for store in stores}
    [policy] = of_component(documents, "stores", "NetworkPolicy")
    for store in ("postgres", "redis", "milvus", "elasticsearch"):
        service = documents[f"Service processing-tasks-system/processing-tasks-{store}"]
        template = documents[f"StatefulSet processing-tasks-system/processing-tasks-{store}"]["spec"]["template"]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        [container] = template["spec"]["containers"]
        [port] = service["spec"]["ports"]
        assert {"name": port["targetPort"], "containerPort": port["port"]} in container["ports"]
        assert f":{port['port']}" in expected[store.upper()]


def test_stores_of_a_trial_get_a_password_of_their_own_and_its_storage_may_be_left_out() -> None:
    made = [{key(one): one for one in render("--set", "stores.bundled=true", "--set", "bundledStores.size=")} for _ in "12"]
    passwords = [
        base64.b64decode(one["Secret processing-tasks-system/processing-tasks-stores"]["data"]["password"]) for one in made
    ]
    assert len({*passwords}) == 2
    for one, password in zip(made, passwords, strict=True):
        assert len(password) == 24
        used = base64.b64decode(one["Secret knowledge/processing-task-stores"]["data"]["TASKS_REDIS_URL"])
        assert used.startswith(b"redis://:" + password + b"@")
        for stores in of_component(one, "stores", "StatefulSet"):
            assert "volumeClaimTemplates" not in stores["spec"]
            assert {"name": "data", "emptyDir": {}} in stores["spec"]["template"]["spec"]["volumes"]


def test_an_upgrade_keeps_the_password_of_a_trials_stores_and_pods_are_admitted_where_security_is_restricted(
    cluster: Endpoints,
) -> None:
    with fresh_namespace(cluster) as namespace:  # under Pod Security "restricted"
        kubectl = Kubectl(cluster, namespace)
        known = {"metadata": {"name": "processing-tasks-stores"}, "stringData": {"password": "keptFromBefore"}}
        kubectl.apply({"apiVersion": "v1", "kind": "Secret", **known})
        documents = render(
            *("--namespace", namespace, "--set", "stores.bundled=true", "--dry-run=server"),
            *("--kubeconfig", cluster.kubeconfig, "--set", "taskNamespaces[0].name=knowledge"),
        )
        [secret] = [
            one for one in documents if one["metadata"]["name"] == "processing-tasks-stores" and one["kind"] == "Secret"
        ]
        assert base64.b64decode(secret["data"]["password"]) == b"keptFromBefore"
        for document in documents:
            if document["kind"] == "StatefulSet":
                template = document["spec"]["template"]
                volumes = [*template["spec"]["volumes"], {"name": "data", "emptyDir": {}}]
                pod = {"metadata": {"name": document["metadata"]["name"]}, "spec": {**template["spec"], "volumes": volumes}}
                manifest = json.dumps({"apiVersion": "v1", "kind": "Pod", **pod})
                kubectl("create", "--dry-run=server", "--filename=-", stdin=manifest)


def test_gateway_is_reached_by_the_names_that_callers_know(expected_of: tuple[str, dict[str, Document]]) -> None:
    name, documents = expected_of
    services = of_component(documents, "gateway", "Service")
    names = [service["metadata"]["name"] for service in services]
    expected = {"minimal": "processing-tasks-gateway", "full": "kb-tasks-gateway", "existing": "processing-tasks-gateway"}
    assert names == sorted([expected[name], *(["task-manager-service"] if name == "full" else [])])
    for service in services:
        assert [port["port"] for port in service["spec"]["ports"]] == [8084, 8080]
    [deployment] = of_component(documents, "gateway", "Deployment")
    assert services[0]["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    budgets = of_component(documents, "gateway", "PodDisruptionBudget")
    assert len(budgets) == (0 if deployment["spec"]["replicas"] == 1 else 1)


def test_without_the_gateway_nothing_of_it_is_made() -> None:
    documents = render("--set", POSTGRES, "--set", "gateway.enabled=false")
    assert [key(document) for document in documents if "gateway" in key(document)] == []


def test_documented_permissions_are_the_granted_ones() -> None:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    everything = [*PERMISSIONS.items(), *LEADER.items(), *GATEWAY_PERMISSIONS.items(), *REVIEWS.items()]
    rows = [f"| `{resource}` | {', '.join(verbs)} |" for (_, resource), verbs in everything]
    assert [row for row in rows if row not in text] == []


# ---------------------------------------------------------------------------------------------------------------- helm test


CLOSED = {"hardened", "one-namespace"}
"""Sets with networkPolicies.enabled."""


def test_what_helm_test_makes_may_make_tasks_and_goes_with_the_test(rendered: tuple[str, dict[str, Document]]) -> None:
    name, documents = rendered
    kinds = {"ServiceAccount", "Role", "RoleBinding", "Pod"} | ({"NetworkPolicy"} if name in CLOSED else set())
    made = {one["kind"]: one for one in documents.values() if "helm.sh/hook" in one["metadata"].get("annotations", {})}
    assert made.keys() == (set() if name == "cluster-wide" else kinds), "without a task namespace there is nowhere to test"
    for one in made.values():
        assert one["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert one["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
        assert one["metadata"]["labels"]["app.kubernetes.io/component"] == "test"
    if not made:
        return
    assert len({(one["metadata"]["namespace"], one["metadata"]["name"]) for one in made.values()}) == 1
    assert granted(made["Role"]) == {("tasks.zzdsj.io", "processingtasks"): ["create", "get", "delete"]}
    [subject] = made["RoleBinding"]["subjects"]
    account = made["ServiceAccount"]["metadata"]
    assert (subject["namespace"], subject["name"]) == (account["namespace"], account["name"])
    assert made["Pod"]["spec"]["serviceAccountName"] == account["name"]
    assert made["RoleBinding"]["roleRef"]["name"] == made["Role"]["metadata"]["name"]


PAGE: list[tuple[list[str], str | None]] = [
    ([], "--folder=/data"),
    (["documents.existingClaim=corpus"], "--folder=/data"),
    (["documents.accessModes[0]=ReadOnlyMany"], None),
    (["documents.enabled=false"], None),
    (["tests.document=/data/handbook.pdf"], "--document=/data/handbook.pdf"),
    (
        ["documents.enabled=false", "tests.document=https://example.com/page.html"],
        "--document=https://example.com/page.html",
    ),
]


@pytest.mark.parametrize(("settings", "argument"), PAGE)
def test_the_page_of_helm_test_is_its_own_where_the_volume_can_be_written_to(
    settings: list[str], argument: str | None
) -> None:
    documents = render("--set", POSTGRES, *(part for setting in settings for part in ("--set", setting)))
    [pod] = [document["spec"] for document in documents if document["kind"] == "Pod"]
    [container] = pod["containers"]
    known = _parser().parse_args(container["args"])  # a wrong one ends the process
    assert (known.command, known.namespace, known.name) == ("trial", "knowledge", "processing-tasks-test")
    assert [one for one in container["args"] if one.startswith(("--folder", "--document"))] == [argument] * bool(argument)
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    expected = "corpus" if "documents.existingClaim=corpus" in settings else "processing-task-documents"
    assert claims == ([expected] if argument == "--folder=/data" else [])


@pytest.mark.parametrize("setting", ["tests.enabled=false", "rbac.create=false"])
def test_without_tests_or_rights_to_give_there_is_no_test(setting: str) -> None:
    documents = render("--set", POSTGRES, "--set", setting)
    assert [key(one) for one in documents if "helm.sh/hook" in one["metadata"].get("annotations", {})] == []


# ------------------------------------------------------------------------------------------------------------ the network


def flows(policy: Document, direction: str) -> set[tuple[int, bool]]:
    """Return (port, whether only for named peers) of what a policy lets through."""
    peers = {"ingress": "from", "egress": "to"}[direction]
    return {(port["port"], peers in rule) for rule in policy["spec"].get(direction, []) for port in rule.get("ports", [])}


def test_pods_may_speak_to_these_and_to_nobody_else() -> None:
    documents = {key(one): one for one in render("--values", DATA / "hardened.values.yaml")}
    policies = {name: one for name, one in documents.items() if one["kind"] == "NetworkPolicy"}
    system, dns = "NetworkPolicy processing-tasks-system/processing-tasks-", {(53, False)}
    stores = {(5432, True), (6379, True)}
    assert {name: flows(one, "ingress") for name, one in policies.items()} == {
        f"{system}operator": {(8081, True)},
        f"{system}gateway": {(8084, True), (8080, True)},
        "NetworkPolicy knowledge/processing-tasks-deny": set(),
        "NetworkPolicy knowledge/processing-tasks-runner": set(),
        "NetworkPolicy knowledge/processing-tasks-test": set(),
        "NetworkPolicy research/processing-tasks-runner": set(),
    }
    assert flows(policies[f"{system}operator"], "egress") == dns | stores | {(6443, True), (5672, True), (8080, True)}
    more = {(6443, True), (5672, True), (19530, True), (9200, True)}
    assert flows(policies[f"{system}gateway"], "egress") == dns | stores | more
    for namespace in ("knowledge", "research"):
        runner = policies[f"NetworkPolicy {namespace}/processing-tasks-runner"]
        assert flows(runner, "egress") == dns | stores | {(19530, True), (9200, True), (443, True)}, "no Kubernetes API"
    trial = policies["NetworkPolicy knowledge/processing-tasks-test"]
    assert flows(trial, "egress") == dns | {(6443, True)}, "the Kubernetes API alone"
    for name, policy in policies.items():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"], name
    assert policies["NetworkPolicy knowledge/processing-tasks-deny"]["spec"]["podSelector"] == {}
    for component in ("operator", "gateway"):
        [deployment] = of_component(documents, component, "Deployment")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert policies[f"{system}{component}"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_policy_of_runners_selects_the_pods_that_the_operator_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = render("--values", DATA / "hardened.values.yaml")
    for name, value in environment(containers(pod_of(documents, "operator"))[-1]).items():
        monkeypatch.setenv(name, value)
    template = load_settings(Settings, program="operator").runner_template()
    [selector] = [
        one["spec"]["podSelector"] for one in documents if key(one) == "NetworkPolicy research/processing-tasks-runner"
    ]
    [components] = [one["values"] for one in selector["matchExpressions"]]
    sweep = build_sweep_job("research", last=None, template=template)["spec"]["template"]["metadata"]["labels"]
    of_task = build_job(task(), attempt=1, template=template)["spec"]["template"]["metadata"]["labels"]
    for labels in (sweep, of_task):
        assert selector["matchLabels"].items() <= labels.items()
        assert labels["app.kubernetes.io/component"] in components


def test_a_trusted_network_has_to_be_named(helm: Helm) -> None:
    answer = helm(
        *("template", "x", CHART, *KUBE_VERSION, "--set", POSTGRES),
        *("--set", "networkPolicies.enabled=true", "--set", "gateway.auth=trust-the-network"),
    )
    assert answer.returncode != 0
    assert "networkPolicies.gatewayFrom: required" in answer.stderr


def test_users_roles_never_include_the_status() -> None:
    documents = {key(document): document for document in render("--set", POSTGRES)}
    roles = of_component(documents, "access", "ClusterRole")
    writes = {
        (role["metadata"]["name"], resource)
        for role in roles
        for rule in role["rules"]
        for resource in rule["resources"]
        if set(rule["verbs"]) - {"get", "list", "watch"}
    }
    assert writes == {
        ("processing-tasks-edit", resource)
        for resource in ("processingtasks", "workerpools", "workerpools/scale", "processingschedules")
    }


# ---------------------------------------------------------------------------------------------------------------- settings


def environment(container: Document) -> dict[str, str]:
    """The container's variables; those from Secrets are given a value that fits."""
    redis = "redis://from-secret"
    secret = {
        "OPERATOR_TRACES_HEADERS": "authorization=from-secret",
        "OPERATOR_REDIS_URL": redis,
        "GATEWAY_REDIS_URL": redis,
    }
    return {
        variable["name"]: variable.get("value", secret.get(variable["name"], "postgresql://from-secret/x"))
        for variable in container["env"]
    }


@pytest.mark.parametrize("values", SETS)
def test_operator_reads_its_settings_from_the_rendered_environment(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = render("--values", DATA / f"{values}.values.yaml")
    for container in containers(pod_of(documents, "operator")):
        with monkeypatch.context() as patch:
            for name, value in environment(container).items():
                patch.setenv(name, value)
            settings = load_settings(Settings, program="operator")
        assert settings.runner_image
        if values == "full":
            given = yaml.safe_load((DATA / "full.values.yaml").read_text(encoding="utf-8"))
            assert settings.namespaces == ("knowledge", "research")
            assert settings.log_level == "DEBUG"
            assert settings.runner_image == f"{given['runner']['image']['repository']}@{given['runner']['image']['digest']}"
            assert settings.runner_resources == {
                "requests": {"cpu": "0.5", "memory": "512Mi"},  # memory: the chart's default
                "limits": {"memory": "8Gi", "example.com/gpu": "1"},
            }
            assert settings.runner_node_selector == {"pool": "batch"}
            assert list(settings.runner_tolerations) == given["runner"]["tolerations"]
            assert settings.image_pull_secrets == ("registry",)
            assert settings.documents_claim == "processing-task-documents"
            default = given["callbacks"]["default"]
            assert settings.default_callback() == DefaultCallback(default["url"], "hooks", "secret")
            assert settings.callbacks_allow == ("hooks.example.com", "10.20.0.0/16")
            assert settings.callbacks_secrets == ("hooks", "processing-task-callbacks")
            assert (settings.callbacks_timeout_seconds, settings.cluster_domain) == (2.5, "cluster.example")
            assert (settings.rabbitmq_exchange, bool(settings.rabbitmq_url)) == ("tasks", True)
            assert set(settings.priority_classes.values()) == {
                document["metadata"]["name"] for document in documents if document["kind"] == "PriorityClass"
            }
        elif values == "existing":
            assert settings.namespaces == ()
            assert settings.stores_secret == "knowledge-stores"
            assert settings.documents_claim == "corpus"
            assert {str(priority): name for priority, name in settings.priority_classes.items()} == {
                "high": "batch-high",
                "low": "batch-low",
            }


def test_a_lone_operator_without_election_is_stopped_before_the_next_one_starts() -> None:
    alone = ("--set", "operator.replicas=1", "--set", "operator.leaderElection.enabled=false")
    documents = {key(document): document for document in render("--set", POSTGRES, *alone)}
    [deployment] = of_component(documents, "operator", "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert "OPERATOR_LEASE_NAME" not in environment(pod_of(list(documents.values()), "operator")["containers"][0])
    assert [name for name in documents if name.endswith("-leader") and "Role" in name] == []
    assert of_component(documents, "operator", "PodDisruptionBudget") == []


EVERYTHING = {
    "events.rabbitmq.url": "amqp://rabbitmq",
    "networkPolicies.enabled": True,
    "gateway.ingress.enabled": True,
    "gateway.ingress.host": "tasks.example.com",
    "gateway.autoscaling.enabled": True,
    "metrics.podMonitor.enabled": True,
    "metrics.rules.enabled": True,
    "metrics.dashboards.enabled": True,
}
"""What makes an object each that is off by default."""


@pytest.mark.parametrize("cluster_wide", [False, True], ids=["named namespaces", "cluster-wide"])
def test_two_releases_in_one_cluster_share_no_name_but_those_of_the_crds(helm: Helm, cluster_wide: bool) -> None:
    def names(release: str) -> set[str]:
        namespace = {"name": f"tasks-of-{release}", "create": True, "quota": {"pods": 4}, "limits": [{"type": "Container"}]}
        pool = {"name": "texts", "namespace": namespace["name"], "spec": {"types": ["health_check"]}}
        chosen = EVERYTHING | {"taskNamespaces": [namespace], "workerPools": [pool], "operator.clusterWide": cluster_wide}
        given = [part for name, value in chosen.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]
        command = ["template", release, CHART, *KUBE_VERSION, "--namespace", "shared", "--set", POSTGRES]
        done = helm(*command, *given, "--api-versions", "tasks.zzdsj.io/v1/WorkerPool")
        assert done.returncode == 0, done.stderr
        return {key(one) for one in documents_in(done.stdout) if one["kind"] != "CustomResourceDefinition"}

    blue = names("blue")
    assert blue & names("green") == set()
    templates = {path.stem for path in (CHART / "templates").rglob("*.yaml")} - {"crds"}
    assert len(blue) > len(templates), "nothing of the chart is left out here"


def test_the_operators_requests_have_a_level_of_their_own() -> None:
    kinds = ("FlowSchema", "PriorityLevelConfiguration")
    documents = {key(document): document for document in render("--set", POSTGRES)}
    found = of_component(documents, "operator", *kinds)
    assert sorted((one["kind"], one["metadata"]["name"]) for one in found) == [
        ("FlowSchema", "processing-tasks-operator"),
        ("FlowSchema", "processing-tasks-operator-leader"),
        ("PriorityLevelConfiguration", "processing-tasks-operator"),
    ]
    account = {"name": "processing-tasks-operator", "namespace": "processing-tasks-system"}
    for one in found:
        if one["kind"] == "FlowSchema":
            [rule] = one["spec"]["rules"]
            assert [subject["serviceAccount"] for subject in rule["subjects"]] == [account]
            assert one["spec"]["matchingPrecedence"] < 9000  # that of all service accounts
    off = render("--set", POSTGRES, "--set", "operator.flowControl.enabled=false")
    assert [one for one in off if one["kind"] in kinds] == []


def test_without_documents_there_is_neither_claim_nor_volume() -> None:
    documents = render("--set", POSTGRES, "--set", "documents.enabled=false")
    assert [document for document in documents if document["kind"] == "PersistentVolumeClaim"] == []
    assert environment(pod_of(documents, "operator")["containers"][0])["OPERATOR_DOCUMENTS_CLAIM"] == ""


def test_notes_give_manifests_that_are_valid(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    # helm prints notes after an installation only; as a template of their own they can be read without a cluster.
    (chart / "templates/NOTES.txt").rename(chart / "NOTES.txt")
    (chart / "templates/notes.yaml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: notes},"
        " data: {text: {{ tpl (.Files.Get `NOTES.txt`) . | quote }} }}"
    )
    notes = next(d for d in render("--set", POSTGRES, chart=chart) if d["kind"] == "ConfigMap")["data"]["text"]
    assert "kubectl -n processing-tasks-system rollout status deployment/processing-tasks-operator" in notes
    blocks = [block.split("\n   END")[0] for block in notes.split("<<'END'\n")[1:]]
    assert [parse_manifest(yaml.safe_load(block)).metadata.name for block in blocks] == ["health", "handbook"]
    assert "http://processing-tasks-gateway.processing-tasks-system:8084/api/v1/tasks" in notes
    assert "WARNING" not in notes
    trusting = ("--set", POSTGRES, "--set", "gateway.auth=trust-the-network")
    notes = next(d for d in render(*trusting, chart=chart) if d["kind"] == "ConfigMap")["data"]["text"]
    assert "WARNING: gateway.auth is trust-the-network" in notes


# ------------------------------------------------------------------------------------------------------------- API server


def rules(kubectl: Kubectl, account: str, namespace: str) -> dict[tuple[str, str], set[str]]:
    """Ask the API server what ACCOUNT may do in NAMESPACE; without reviews of itself, which everybody may make."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    answer = kubectl("create", "-f=-", "-o=json", "--validate=false", "--as", account, stdin=json.dumps(review))
    found: dict[tuple[str, str], set[str]] = {}
    for rule in json.loads(answer)["status"]["resourceRules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault((group, resource), set()).update(rule["verbs"])
    return {identity: verbs for identity, verbs in found.items() if not identity[1].startswith("self")}


@pytest.mark.parametrize("helm", [3, 4], ids=["helm 3", "helm 4"], indirect=True)
def test_release_comes_up_under_pod_security_and_leaves_nothing(
    helm: Helm, cluster: Endpoints, namespace: str, tmp_path: Path
) -> None:
    """On a real API server: every object is accepted, the pod is admitted, the account may do what is documented and no
    more, and uninstalling takes it all away."""
    kubectl = Kubectl(cluster)
    release = namespace  # of the same length and as unique: cluster-wide objects are named after it
    tasks = f"{namespace}-tasks"
    values = tmp_path / "values.json"
    values.write_text(
        json.dumps(
            {
                "crds": {"enabled": False},  # the cluster's CRD belongs to the tests, not to one release
                "taskNamespaces": [{"name": tasks, "create": True}],
                "stores": {"postgres": {"url": "postgresql://tasks:secret@postgres:5432/tasks"}},
                "documents": {"storageClassName": "none-such"},
            }
        )
    )
    where = ("--kubeconfig", cluster.kubeconfig, "-n", namespace)
    prefix = f"{release}-processing-tasks"[:40].rstrip("-")
    try:
        installed = helm("install", release, CHART, "--values", values, *where)
        assert installed.returncode == 0, installed.stderr
        assert f"rollout status deployment/{prefix}-operator" in installed.stdout
        upgraded = helm("upgrade", release, CHART, "--values", values, *where)
        assert upgraded.returncode == 0, upgraded.stderr

        operator = "app.kubernetes.io/component=operator"
        kubectl("wait", f"-n={namespace}", "--for=create", "--timeout=30s", "pod", f"--selector={operator}")

        account = f"system:serviceaccount:{namespace}:{prefix}-operator"
        assert rules(kubectl, account, tasks) == {identity: set(verbs) for identity, verbs in PERMISSIONS.items()}
        assert rules(kubectl, account, namespace) == {identity: set(verbs) for identity, verbs in LEADER.items()}
        door = f"system:serviceaccount:{namespace}:{prefix}-gateway"
        reviews = {identity: set(verbs) for identity, verbs in REVIEWS.items()}
        assert (
            rules(kubectl, door, tasks)
            == {identity: set(verbs) for identity, verbs in GATEWAY_PERMISSIONS.items()} | reviews
        )
        assert rules(kubectl, door, namespace) == reviews
        assert rules(kubectl, f"system:serviceaccount:{tasks}:processing-task-runner", tasks) == {}
    finally:
        removed = helm("uninstall", release, "--wait", "--timeout", "120s", *where)
    assert removed.returncode == 0, removed.stderr
    selector = f"--selector=app.kubernetes.io/instance={release}"
    assert kubectl("get", "namespaces,priorityclasses,clusterroles,clusterrolebindings", selector, "-o=name") == ""
    inside = "deployments,services,roles,rolebindings,secrets,serviceaccounts,persistentvolumeclaims,poddisruptionbudgets"
    assert kubectl("get", inside, f"-n={namespace}", selector, "-o=name") == ""
