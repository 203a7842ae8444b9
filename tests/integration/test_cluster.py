"""The devstack's Kubernetes is a real one, and leaves a machine as it found it."""

import json
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devstack import Endpoints, images, network, tools
from devstack import cluster as control_plane
from devstack.images import Image
from tests.support.devstack import Kubectl, fresh_namespace, in_private_machine

SECURE = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_spec(image: str, *command: str, **more: Any) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {"name": "main", "image": image, "command": list(command), "securityContext": SECURE, **more.pop("main", {})}
        ],
        **more,
    }


def job(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    body = {"backoffLimit": 0, "template": {"spec": spec}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": body}


def until(check: Callable[[], Any], seconds: float = 30) -> Any:
    """Poll until CHECK gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


@pytest.mark.integration
def test_api_server_answers_with_the_version_of_the_module(cluster: Endpoints) -> None:
    version = json.loads(Kubectl(cluster)("get", "--raw", "/version"))
    assert version["gitVersion"] == tools.kubernetes_version()


@pytest.mark.integration
def test_job_controller_makes_a_pod(cluster: Endpoints, namespace: str) -> None:
    kubectl = Kubectl(cluster, namespace)
    kubectl.apply(job("it", pod_spec("localhost/none:1", "true")))
    (pod,) = until(lambda: kubectl.get("pods", "--selector=job-name=it")["items"])
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "Job"


@pytest.mark.integration
def test_pod_security_refuses_what_is_not_restricted(cluster: Endpoints, namespace: str) -> None:
    refused = Kubectl(cluster, namespace).attempt("run", "it", "--image=localhost/none:1")
    assert refused.returncode == 1
    assert 'violates PodSecurity "restricted:latest"' in refused.stderr


def claim(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": control_plane.DOCUMENT_CLAIM, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": control_plane.DOCUMENT_STORAGE_CLASS,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


@pytest.fixture
def document_folder(cluster: Endpoints, namespace: str) -> Iterator[Path]:
    folder = control_plane.document_volume(namespace)
    yield folder
    kubectl = Kubectl(cluster, namespace)
    kubectl("delete", "pod,pvc", "--all", "--grace-period=0", "--force")
    kubectl("delete", "pv", f"documents-{namespace}")


@pytest.mark.integration
def test_document_volume_serves_a_second_claim_after_the_first(
    cluster: Endpoints, namespace: str, document_folder: Path
) -> None:
    kubectl = Kubectl(cluster, namespace)
    volume = f"documents-{namespace}"
    uids = []
    for _ in range(2):
        assert control_plane.document_volume(namespace) == document_folder
        kubectl.apply(claim(namespace))
        until(lambda: kubectl.get("pvc", control_plane.DOCUMENT_CLAIM)["status"]["phase"] == "Bound")
        assert control_plane.document_volume(namespace) == document_folder  # a bound one stays as it is
        bound = kubectl.get("pv", volume)
        assert bound["status"]["phase"] == "Bound"
        uids.append(bound["spec"]["claimRef"]["uid"])
        kubectl("delete", "pvc", control_plane.DOCUMENT_CLAIM)
        until(lambda: kubectl.get("pv", volume)["status"]["phase"] == "Released")
    assert uids[0] != uids[1]


@pytest.fixture(scope="module")
def base(node: Endpoints) -> Image:
    """The base image, loaded into the node."""
    image = images.base()
    images.import_image(image)
    return image


@pytest.mark.e2e
class TestNode:
    """Pods really run."""

    def test_restricted_pod_runs_to_completion(self, node: Endpoints, base: Image, namespace: str) -> None:
        kubectl = Kubectl(node, namespace)
        kubectl.apply(job("it", pod_spec(base.reference, "python3", "-c", "import os; print('as', os.getuid())")))
        kubectl("wait", "--for=condition=Complete", "job/it", "--timeout=60s")
        assert kubectl("logs", "job/it") == "as 65532\n"

    def test_names_of_services_resolve_in_a_pod(self, node: Endpoints, base: Image, namespace: str) -> None:
        kubectl = Kubectl(node, namespace)
        kubectl("create", "service", "clusterip", "web", "--tcp=80:80")
        address = kubectl.get("service", "web")["spec"]["clusterIP"]
        code = (
            "import socket, sys\n"
            "for name in sys.argv[1:]:\n"
            "    try: print(socket.gethostbyname(name))\n"
            "    except socket.gaierror as error: print(error.errno == socket.EAI_NONAME)\n"
        )
        names = [
            "web",
            f"web.{namespace}",
            f"web.{namespace}.svc.cluster.local",
            "kubernetes.default",
            "nowhere",
            "example.com",
        ]
        kubectl.apply(job("it", pod_spec(base.reference, "python3", "-c", code, *names)))
        kubectl("wait", "--for=condition=Complete", "job/it", "--timeout=60s")
        answers = kubectl("logs", "job/it").split()
        assert answers == [address, address, address, control_plane.SERVICE_ADDRESS, "True", "True"]

    def test_pods_reach_each_other_by_service(self, node: Endpoints, base: Image, namespace: str) -> None:
        kubectl = Kubectl(node, namespace)
        server = pod_spec(base.reference, "python3", "-m", "http.server", "--directory", "/etc/alternatives", "8000")
        labels = {"name": "server", "labels": {"app": "web"}}
        kubectl.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": labels, "spec": server},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web"},
                "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
            },
        )
        kubectl("wait", "--for=condition=Ready", "pod/server", "--timeout=60s")
        code = (
            "import time, urllib.request\n"
            "for _ in range(100):\n"
            "    try: print(urllib.request.urlopen('http://web', timeout=5).status); break\n"
            "    except OSError: time.sleep(0.1)\n"
        )
        # From another pod, and from the server itself by way of the Service.
        assert kubectl("exec", "server", "--", "python3", "-c", code) == "200\n"
        kubectl.apply(job("it", pod_spec(base.reference, "python3", "-c", code)))
        kubectl("wait", "--for=condition=Complete", "job/it", "--timeout=60s")
        assert kubectl("logs", "job/it") == "200\n"

    def test_memory_limit_kills(self, node: Endpoints, base: Image, namespace: str) -> None:
        kubectl = Kubectl(node, namespace)
        limits = {"resources": {"limits": {"memory": "64Mi"}}}
        spec = pod_spec(base.reference, "python3", "-c", "x = b'x' * (1 << 30)", main=limits)
        kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": spec})
        kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "pod/it", "--timeout=60s")
        (container,) = kubectl.get("pod", "it")["status"]["containerStatuses"]
        assert container["state"]["terminated"]["reason"] == "OOMKilled"

    def test_documents_of_the_host_are_read_in_a_pod(
        self, node: Endpoints, base: Image, namespace: str, document_folder: Path
    ) -> None:
        (document_folder / "note.txt").write_text("from the host")
        kubectl = Kubectl(node, namespace)
        kubectl.apply(claim(namespace))
        volume = {
            "name": "documents",
            "persistentVolumeClaim": {"claimName": control_plane.DOCUMENT_CLAIM, "readOnly": True},
        }
        spec = pod_spec(
            base.reference,
            "sh",
            "-c",
            "cat /data/note.txt; touch /data/mine 2>/dev/null || echo , read-only",
            main={"volumeMounts": [{"name": "documents", "mountPath": "/data", "readOnly": True}]},
            volumes=[volume],
        )
        kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": spec})
        kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/it", "--timeout=60s")
        assert kubectl("logs", "pod/it") == "from the host, read-only\n"

    def test_dns_answers_each_question_in_its_way(self, node: Endpoints) -> None:
        with fresh_namespace(node) as namespace:
            kubectl = Kubectl(node, namespace)
            kubectl("create", "service", "clusterip", "web", "--tcp=80:80")
            kubectl("create", "service", "clusterip", "headless", "--clusterip=None", "--tcp=80:80")
            kubectl.apply(endpoint_slice("headless"))
            zone = f"{namespace}.svc.cluster.local"
            assert until(lambda: ask(f"web.{zone}", A)[1] == 1)
            assert ask(f"WEB.{zone}", A) == (NOERROR, 1)
            assert ask(f"web.{zone}", AAAA) == (NOERROR, 0)
            assert ask(f"headless.{zone}", A) == (NOERROR, 2)
            assert ask(f"one.headless.{zone}", A) == (NOERROR, 1)
            assert ask(f"three.headless.{zone}", A) == (NXDOMAIN, 0)
            assert ask(f"one.web.{zone}", A) == (NXDOMAIN, 0)
            assert ask(f"nowhere.{zone}", A) == (NXDOMAIN, 0)
            assert ask("example.com", AAAA) == (NXDOMAIN, 0)
            assert ask(f"web.{zone}", A, questions=2) == (FORMERR, 0)
            assert send(b"\0\7\1\0\0\1\0\0\0\0\0\0\xff\xff")[0] == FORMERR  # a header, and no question that can be read


NOERROR, FORMERR, NXDOMAIN = 0, 1, 3
A, AAAA = 1, 28


def endpoint_slice(service: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"port": 80}],
        "endpoints": [
            {"addresses": ["10.244.9.1"], "hostname": "one"},
            {"addresses": ["10.244.9.2"], "hostname": "two"},
            {"addresses": ["10.244.9.3"], "hostname": "three", "conditions": {"ready": False}},
        ],
    }


def ask(name: str, kind: int, questions: int = 1) -> tuple[int, int]:
    """Ask the cluster's DNS; return its code and the number of answers."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = labels + b"\0" + struct.pack(">2H", kind, 1)
    return send(struct.pack(">6H", 7, 0x0100, questions, 0, 0, 0) + question * questions)


def send(message: bytes) -> tuple[int, int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(5)
        asking.sendto(message, (network.ADDRESS, 53))
        reply = asking.recv(4096)
    number, flags, _, answers, _, _ = struct.unpack(">6H", reply[:12])
    assert number == 7
    return flags & 0xF, answers


PRIVATE_FILES = [f"mount -t tmpfs tmpfs {folder}" for folder in ("/run", "/var/lib", "/var/log")]


def play(scenario: str, state: Path, *mounts: str) -> None:
    done = in_private_machine(
        f"{sys.executable} -m tests.support.private_machine {scenario}", state=state, mounts=[*PRIVATE_FILES, *mounts]
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.e2e
@pytest.mark.usefixtures("devstack_node")
class TestMachine:
    """In namespaces of their own, beside the devstack that runs here and has built all there is to build."""

    @pytest.fixture
    def state(self) -> Iterator[Path]:
        # Not tmp_path, which only its owner may enter: PostgreSQL runs as another user.
        with tempfile.TemporaryDirectory(prefix="devstack-test-") as folder:
            Path(folder).chmod(0o755)
            yield Path(folder, "state")

    @pytest.mark.parametrize(
        "scenario",
        [
            "leaves_nothing",
            "strange_bridge",
            "hung_milvus",
            *(pytest.param(name, marks=pytest.mark.long) for name in ("survives_kills", "second_devstack")),
        ],
    )
    def test_machine_is_left_as_it_was(self, scenario: str, state: Path) -> None:
        play(scenario, state)

    @pytest.mark.long
    def test_reboot_is_survived(self, state: Path, tmp_path: Path) -> None:
        for number, scenario in enumerate(["prepare_reboot", "after_reboot", "down_after_reboot"]):
            boot = tmp_path / f"boot-{number}"
            boot.write_text(f"11111111-2222-3333-4444-55555555555{number}\n")
            play(scenario, state, f"mount --bind {boot} /proc/sys/kernel/random/boot_id")
