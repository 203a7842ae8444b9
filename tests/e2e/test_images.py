"""The images as they are shipped: how they start under the chart's security context, what they weigh, what is in them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from devstack import images, sbom
from devstack.docker_archive import BASE, weigh
from devstack.images import Image
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingTask
from task_operator.jobs import RunnerTemplate, build_job
from tests.e2e.conftest import Installed
from tests.support.devstack import Kubectl, fresh_namespace

pytestmark = pytest.mark.e2e

MB = 10**6
# Tries to make a file in every folder of the container, but those of the kernel.
PROBE = """
import json, os, subprocess, sys
writable = []
for folder, _, _ in os.walk("/"):
    if folder.startswith(("/proc", "/sys")):
        continue
    path = os.path.join(folder, ".probe")
    try:
        open(path, "w").close()
        os.unlink(path)
        writable.append(folder)
    except OSError:
        pass
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
try:
    os.setuid(0)
    root = "became root"
except PermissionError:
    root = "refused"
help = subprocess.run([sys.executable, "-m", sys.argv[1], "--help"], capture_output=True, text=True)
print(json.dumps({
    "ids": [os.getuid(), os.getgid()],
    "root": root,
    "capabilities": [status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "privileges": status["NoNewPrivs"],
    "seccomp": status["Seccomp"],
    "writable": sorted(folder for folder in writable if not folder.startswith("/tmp/")),
    "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
    "help": [help.returncode, help.stdout[:6], help.stderr],
}))
"""
CONFINED = {
    "ids": [65532, 65532],
    "root": "refused",
    "capabilities": ["0" * 16] * 5,
    "privileges": "1",
    "seccomp": "2",  # a filter
    # The emptyDir, and what the container runtime gives every container: shared memory and message queues, no files.
    "writable": ["/dev/mqueue", "/dev/shm", "/tmp"],
    "help": [0, "usage:", ""],
}


@pytest.fixture(scope="module")
def built() -> dict[str, Image]:
    return images.build()


@pytest.fixture
def kubectl(installed: Installed) -> Iterator[Kubectl]:
    """In a namespace without an operator's watch, where the runner's account and Secret stand as the chart makes them."""
    with fresh_namespace(installed.endpoints) as name:  # under Pod Security "restricted"
        kubectl = Kubectl(installed.endpoints, name)
        kubectl("create", "serviceaccount", "processing-task-runner")
        kubectl("create", "secret", "generic", "processing-task-stores")
        yield kubectl


def test_the_operator_runs_confined(installed: Installed) -> None:
    """In the very pod that the chart made."""
    system = Kubectl(installed.endpoints, "processing-tasks-system")
    probed = system("exec", "deploy/processing-tasks-operator", "--", "python", "-c", PROBE, "task_operator")
    assert json.loads(probed) == CONFINED | {"token": True}


def runner_job(image: Image) -> dict[str, Any]:
    """Return the Job that the operator makes of a task."""
    metadata = {"name": "it", "uid": "0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7", "creationTimestamp": "2026-01-01T00:00:00Z"}
    task = ProcessingTask.model_validate({"metadata": metadata, "spec": {"type": "health_check"}})
    template = RunnerTemplate(image=image.reference, image_pull_policy="Never", documents_claim=None)
    job = build_job(task, attempt=1, template=template)
    del job["metadata"]["namespace"], job["metadata"]["ownerReferences"]  # there is no such task
    return job


def ended(kubectl: Kubectl, job: dict[str, Any]) -> dict[str, Any]:
    """Run a Job and return its only container when it has ended."""
    kubectl.apply(job)
    name = job["metadata"]["name"]
    kubectl("wait", f"job/{name}", "--for=jsonpath={.status.conditions[?(@.status=='True')].status}=True", "--timeout=90s")
    [pod] = kubectl.get("pods", "--selector", f"job-name={name}")["items"]
    [container] = pod["status"]["containerStatuses"]
    assert isinstance(container, dict)
    return container


def test_the_runner_runs_confined_and_without_a_token(kubectl: Kubectl, built: dict[str, Image]) -> None:
    job = runner_job(built["runner"])
    [container] = job["spec"]["template"]["spec"]["containers"]
    container["command"] = ["python", "-c", PROBE, "job_runner"]
    assert ended(kubectl, job)["state"]["terminated"]["exitCode"] == 0
    assert json.loads(kubectl("logs", f"job/{job['metadata']['name']}")) == CONFINED | {"token": False}


def test_the_runner_starts_by_its_own_command_and_says_what_is_missing(kubectl: Kubectl, built: dict[str, Image]) -> None:
    """Without settings: that is told by its exit code and the termination message, the only two things it may write."""
    terminated = ended(kubectl, runner_job(built["runner"]))["state"]["terminated"]
    assert terminated["exitCode"] == ExitCode.STORE_UNAVAILABLE
    message = json.loads(terminated["message"])
    assert message["error"]["message"].startswith("cannot start the runner: TASKS_POSTGRES_URL")


def test_the_images_stay_within_their_limits(built: dict[str, Image]) -> None:
    operator, runner = (weigh(built[name].archive) for name in ("operator", "runner"))
    assert sum(operator.values()) - operator[BASE] <= 120 * MB, images.table(built)
    assert sum(runner.values()) <= 400 * MB, images.table(built)
    for absent in ("pip", "setuptools", "wheel", "hatchling", "pyarrow", "kubernetes"):
        assert absent not in operator.keys() | runner.keys()
    assert not {"numpy", "pandas", "pymilvus", "elasticsearch", "grpcio"} & operator.keys()


@pytest.mark.parametrize("name", images.NAMES)
def test_the_bill_of_materials_has_all_that_was_weighed(built: dict[str, Image], name: str) -> None:
    found = sbom.bill(built[name]).components
    python = {
        component.name.lower().replace("-", "_").replace(".", "_") for component in found if "pypi" in str(component.purl)
    }
    weighed = {package.lower().replace(".", "_") for package in weigh(built[name].archive) if not package.startswith("(")}
    assert python == weighed
    assert "processing_tasks" in python
    debian = {component.name for component in found if "deb/debian" in str(component.purl)}
    if not images.docker_runs():  # its base may come without
        assert {"libc6", "libssl3", "python3", "ca-certificates"} <= debian
        assert "perl" not in debian
