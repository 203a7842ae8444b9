"""What the devstack writes down for the parts it starts, and what it reads of the machine."""

import tomllib
from pathlib import Path

import pytest
import yaml

from devstack import cluster, machine, network, node, tools

FOLDER = Path("/state")


@pytest.mark.parametrize("restricted", [False, True])
def test_containerd_keeps_to_our_folder(restricted: bool) -> None:
    text = node.containerd_configuration(FOLDER, Path("/opt/cni/bin"), restrict_oom_score=restricted)
    parsed = tomllib.loads(text)
    cri = parsed["plugins"]["io.containerd.grpc.v1.cri"]
    places = [parsed["root"], parsed["state"], parsed["grpc"]["address"], cri["cni"]["conf_dir"]]
    places += [cri["containerd"]["runtimes"]["runc"]["options"]["Root"]]
    assert all(Path(place).is_relative_to(FOLDER) for place in places)
    assert cri["restrict_oom_score_adj"] is restricted
    assert cri["netns_mounts_under_state_dir"] is True
    assert cri["cni"]["bin_dir"] == "/opt/cni/bin"


def test_kubelet_keeps_to_our_folder_and_control_group() -> None:
    written = node.kubelet_configuration(FOLDER, FOLDER / "pki", "ours")
    assert written["cgroupRoot"] == "/ours"
    assert written["containerRuntimeEndpoint"] == "unix:///state/containerd.sock"
    assert written["authentication"]["anonymous"] == {"enabled": False}
    assert Path(written["podLogsDir"]).is_relative_to(FOLDER)
    assert Path(written["volumePluginDir"]).is_relative_to(FOLDER)


def test_pods_get_the_bridge_and_its_addresses() -> None:
    written = node.cni_configuration(FOLDER, "ours")
    assert written["name"] == "ours"
    (plugin,) = written["plugins"]
    assert (plugin["type"], plugin["bridge"]) == ("bridge", network.BRIDGE)
    assert plugin["ipam"]["ranges"] == [[{"subnet": network.PODS, "gateway": network.ADDRESS}]]


def test_kubeconfig_is_yaml_with_everything_inside() -> None:
    content = cluster.kubeconfig_content("https://127.0.0.1:6443", b"CA", b"CERT", b"KEY")
    read = yaml.safe_load(yaml.safe_dump(content))
    assert read["clusters"][0]["cluster"] == {"server": "https://127.0.0.1:6443", "certificate-authority-data": "Q0E="}
    assert read["users"][0]["user"] == {"client-certificate-data": "Q0VSVA==", "client-key-data": "S0VZ"}
    assert read["current-context"] == read["contexts"][0]["name"]


def test_document_volume_is_for_one_claim() -> None:
    volume = cluster.document_volume_manifest("knowledge", Path("/state/documents/knowledge"))
    assert volume["metadata"]["name"] == "documents-knowledge"
    assert volume["spec"]["claimRef"]["namespace"] == "knowledge"
    assert volume["spec"]["claimRef"]["name"] == "processing-task-documents"
    assert volume["spec"]["local"] == {"path": "/state/documents/knowledge"}
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"


def test_mounts_are_found_innermost_first() -> None:
    mountinfo = (
        "1 0 8:1 / / rw - ext4 /dev/x rw\n"
        "2 1 0:9 / /state/a rw - tmpfs x rw\n"
        "3 2 0:9 / /state/a/with\\040space rw shared:1 - tmpfs x rw\n"
        "4 1 0:9 / /state-of-others/a rw - tmpfs x rw\n"
    )
    assert node.mounts_under(mountinfo, FOLDER) == ["/state/a/with space", "/state/a"]


@pytest.mark.parametrize(
    ("route", "found"),
    [
        pytest.param({"dst": "default", "dev": "eth0"}, [], id="default"),
        pytest.param({"dst": "192.168.1.0/24", "dev": "eth0"}, [], id="elsewhere"),
        pytest.param({"dst": "10.244.7.0/24", "dev": "flannel.1"}, ["10.244.7.0/24 on flannel.1"], id="within"),
        pytest.param({"dst": "10.0.0.0/8", "dev": "tun0"}, ["10.0.0.0/8 on tun0"], id="around"),
        pytest.param({"dst": "10.244.0.9", "dev": "wg0"}, ["10.244.0.9/32 on wg0"], id="one address"),
    ],
)
def test_overlapping_route_is_named(route: dict[str, str], found: list[str]) -> None:
    assert network.overlapping([route], [network.PODS]) == found


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("Name:\tx\nCapEff:\t000001fffeffffff\nCapBnd:\t000001ffffffffff\n", False),
        ("Name:\tx\nCapEff:\t000001ffffffffff\n", True),
        ("Name:\tx\n", False),
    ],
)
def test_capability_is_read_from_the_effective_set(status: str, expected: bool) -> None:
    assert machine.has_capability(status, 24) is expected


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ('openjdk version "25.0.3" 2026-04-21 LTS', 25),
        ('openjdk version "21" 2023-09-19', 21),
        ('java version "1.8.0_402"', 8),
        ("Error: no java", None),
    ],
)
def test_java_release_is_read(text: str, release: int | None) -> None:
    assert machine.java_release(text) == release


@pytest.mark.parametrize(
    ("text", "version"), [("go1.26.8", (1, 26)), ("go version go1.9 linux/amd64", (1, 9)), ("devel", None)]
)
def test_go_version_is_read(text: str, version: tuple[int, int] | None) -> None:
    assert tools.go_version(text) == version


def test_kubernetes_version_is_the_one_of_the_module() -> None:
    assert tools.kubernetes_version().startswith("v1.")


def test_missing_packages_are_named_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.missing_packages(["runc", "buildah", "runc"]) == ["runc", "buildah"]
