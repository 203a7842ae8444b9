"""The CRD WorkerPool on a real API server: what it refuses, with which words, and its defaults."""

import json
import subprocess
from typing import Any

import pytest
import yaml

from task_contract.pools import PoolSpec
from tests.support.devstack import Kubectl
from tests.unit.test_examples import ROOT

pytestmark = pytest.mark.integration


def create(kubectl: Kubectl, namespace: str, *, name: str = "texts", **spec: Any) -> subprocess.CompletedProcess[str]:
    manifest = {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "WorkerPool",
        "metadata": {"name": name},
        "spec": {"types": ["health_check"]} | spec,
    }
    return kubectl.attempt("create", "-n", namespace, "--dry-run=server", "-f", "-", stdin=json.dumps(manifest))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"types": []}, "spec.types"),
        ({"types": ["batch_processing"]}, "spec.types: batch_processing has Jobs of its own; leave it out"),
        ({"types": ["health_check", "health_check"]}, "spec.types: name each type once"),
        ({"types": ["cooking"]}, "spec.types[0]: Unsupported value"),
        ({"min": -1}, "spec.min"),
        ({"min": 5, "max": 4}, "spec.min: must not be larger than spec.max"),
        ({"max": 0}, "spec.max"),
        ({"max": 257}, "spec.max"),
        ({"replicas": 257}, "spec.replicas"),
        ({"targetBacklog": 0}, "spec.targetBacklog"),
        ({"concurrency": 0}, "spec.concurrency"),
        ({"concurrency": 65}, "spec.concurrency"),
        ({"batchSize": 257}, "spec.batchSize"),
        ({"lease": "4s"}, "spec.lease: must be between 5s and 10m"),
        ({"lease": "11m"}, "spec.lease: must be between 5s and 10m"),
        ({"lease": "soon"}, "spec.lease"),
        ({"idleTimeout": "25h"}, "spec.idleTimeout: must be between 0s and 24h"),
        ({"scaleDownAfter": "61m"}, "spec.scaleDownAfter: must be between 0s and 1h"),
        ({"gracePeriod": "0s"}, "spec.gracePeriod: must be between 1s and 1h"),
        ({"resources": {"limits": {"memory": "much"}}}, "spec.resources.limits.memory"),
        ({"nodeSelector": {f"key{number}": "a" for number in range(17)}}, "spec.nodeSelector"),
        ({"priorityClassName": ""}, "spec.priorityClassName"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kubectl: Kubectl, namespace: str, spec: dict[str, Any], message: str) -> None:
    answer = create(kubectl, namespace, **spec)
    assert answer.returncode != 0
    assert message in answer.stderr


def test_a_name_has_to_leave_room_for_those_of_workers(kubectl: Kubectl, namespace: str) -> None:
    assert create(kubectl, namespace, name="a" * 40).returncode == 0
    assert "metadata.name" in create(kubectl, namespace, name="a" * 41).stderr


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/examples").glob("pool-*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_accepted_as_they_are(kubectl: Kubectl, namespace: str, path: Any) -> None:
    answer = kubectl.attempt("create", "-n", namespace, "--dry-run=server", "-f", str(path))
    assert answer.returncode == 0, answer.stderr
    PoolSpec.model_validate(yaml.safe_load(path.read_text())["spec"])


def test_defaults_are_those_of_the_models(kubectl: Kubectl, namespace: str) -> None:
    stored = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "WorkerPool", "metadata": {"name": "texts"}}
    kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(stored | {"spec": {"types": ["health_check"]}}))
    spec = kubectl.get("wpool", "texts", "-n", namespace)["spec"]
    assert PoolSpec.model_validate(spec) == PoolSpec.model_validate({"types": ["health_check"]})
    assert "replicas" not in spec
    assert spec["lease"] == "30s"
