"""The node `node1`: containerd, kubelet, kube-proxy and cluster DNS, with sockets and folders of their own.

A containerd, Docker or other container runtime of this machine is never touched: everything here lies under the state
folder and one control group of our own, which is also how `down` finds what to remove.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from devstack import cluster, machine, network, tools
from devstack.cache import cached, digest, state_dir
from devstack.docker_archive import write_image
from devstack.process import run, running, start, stop, wait_until
from devstack.progress import step

NAME = cluster.NODE
NAMES = ("containerd", "dns", "kubelet", "kube-proxy")
PAUSE_IMAGE = "localhost/pause:1"
# Made by the kubelet, containerd and CNI whatever their roots are; they go when nothing is in them.
_LEFT_FOLDERS = (
    "/run/containerd/s",
    "/run/containerd",
    "/var/lib/cni/results",
    "/var/lib/cni",
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
    "/var/log/containers",
)
_KUBELET_PORT = 10250
_CONTAINER_NAMESPACE = "k8s.io"  # where the kubelet's runtime interface looks for images


def up() -> None:
    """Start what is not running of the node and wait until it is Ready, DNS answers and Services are reachable."""
    with step("starting the node (containerd, kubelet, kube-proxy, DNS)"):
        folder = state_dir()
        parts = tools.kube()
        _write_configuration(folder)
        configuration = folder / "containerd.toml"
        changes = cluster.configured_by(configuration, folder / "cni")
        start("containerd", ["containerd", f"--config={configuration}"], env=changes)
        wait_until("containerd", lambda: bool(_ctr("version")), seconds=30, processes=["containerd"])
        pause = cached("pause", [PAUSE_IMAGE.encode(), parts / "pause"], lambda path: _pause_image(parts / "pause", path))
        import_image(pause, PAUSE_IMAGE)

        for control_group in _control_groups():
            control_group.mkdir(exist_ok=True)
        known, now = _registered(), datetime.now(UTC).replace(microsecond=0)
        kubeconfigs = cluster.kubeconfigs()
        if not running("dns"):
            remedy = "bind the name server of this machine to its own addresses only (dnsmasq: bind-interfaces)"
            network.require_free(network.ADDRESS, 53, remedy, socket.SOCK_DGRAM)
        if not running("kubelet"):
            network.require_free(network.ADDRESS, _KUBELET_PORT, "stop the kubelet or the program that does")
        start(
            "dns",
            [str(parts / "dns"), "-kubeconfig", str(kubeconfigs / "admin"), "-listen", f"{network.ADDRESS}:53"],
            env=cluster.configured_by(kubeconfigs / "admin"),
        )
        started = start(
            "kubelet",
            [
                str(parts / "kubelet"),
                f"--config={folder / 'kubelet.json'}",
                f"--kubeconfig={kubeconfigs / 'node'}",
                f"--hostname-override={NAME}",
                f"--node-ip={network.ADDRESS}",
                f"--root-dir={folder / 'kubelet'}",
            ],
            env=cluster.configured_by(kubeconfigs / "node", folder / "kubelet.json"),
        )
        start(
            "kube-proxy",
            [
                # One that starts takes chains of the one before for complete, and those it was about to remove are empty.
                *("sh", "-c", 'for f in ip ip6; do nft delete table $f kube-proxy; done 2>/dev/null; exec "$@"', "sh"),
                str(parts / "kube-proxy"),
                f"--kubeconfig={kubeconfigs / 'proxy'}",
                "--proxy-mode=nftables",
                f"--hostname-override={NAME}",
                f"--cluster-cidr={network.PODS}",
                "--bind-address=127.0.0.1",
                "--healthz-bind-address=",
                "--metrics-bind-address=",
                # Leave the machine's connection tracking as it is.
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0s",
                "--conntrack-tcp-timeout-close-wait=0s",
            ],
            env=cluster.configured_by(kubeconfigs / "proxy"),
        )
        wait_until("a Ready node", lambda: _ready(now if started and known else None), seconds=90, processes=NAMES)
        wait_until("an answer from the cluster's DNS", _dns_answers, seconds=20, processes=NAMES)
        wait_until("a way to the Services", _services_reachable, seconds=20, processes=NAMES)


def down() -> None:
    """End the node: its processes, containers, mounts and control groups; repeatable, whatever is there of them."""
    for name in ("kubelet", "kube-proxy", "dns"):
        stop(name, grace=5)
    # Containers die before containerd, then their shims; a dead container's mounts are no longer busy.
    _kill_containers()
    stop("containerd", grace=5)
    _kill(_shims())
    _kill_containers()
    folder = state_dir()
    for mount in mounts_under(Path("/proc/self/mountinfo").read_text(), folder):
        run(["umount", "--lazy", mount], doing=f"unmount {mount}")
    for control_group in _control_groups():
        _remove_control_group(control_group)
    for name in ("containerd", "kubelet", "cni", "ipam", "pod-logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # Places outside our folder that cannot be configured away: only entries of ours go.
    results = Path("/var/lib/cni/results")
    for ours in results.glob(f"{_own_name()}-*"):
        container = ours.name.removeprefix(f"{_own_name()}-").split("-")[0]
        for left in [*results.glob(f"cni-loopback-{container}-*"), ours]:
            left.unlink(missing_ok=True)
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(folder) in str(link.readlink()):
            link.unlink(missing_ok=True)
    for left in [*Path("/run/containerd/s").glob("*"), *Path("/var/lib/kubelet/device-plugins").glob("*.sock")]:
        if _nobody_listens(left):
            left.unlink(missing_ok=True)
    for empty in _LEFT_FOLDERS:
        with contextlib.suppress(OSError):
            Path(empty).rmdir()


def import_image(archive: Path, reference: str) -> None:
    """Load the docker-archive file ARCHIVE, which holds the image REFERENCE, into the node's containerd once.

    Raises DevstackError when containerd does not take it.
    """
    if reference not in images():
        _ctr("images", "import", str(archive))


def images() -> frozenset[str]:
    """Return the references of all images that pods can use."""
    return frozenset(_ctr("images", "list", "--quiet").split())


def mounts_under(mountinfo: str, folder: Path) -> list[str]:
    """Return the mount points below FOLDER in the text of /proc/PID/mountinfo, innermost and latest first."""
    points = []
    for line in mountinfo.splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
        if Path(point).is_relative_to(folder):
            points.append(point)
    return points[::-1]


def containerd_configuration(folder: Path, plugins: Path, *, restrict_oom_score: bool) -> str:
    """Return containerd's configuration, with everything it keeps under FOLDER."""
    return f"""\
version = 2
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"

[grpc]
address = "{folder}/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# The network namespaces of pods are mounts: under our folder, `down` finds them.
netns_mounts_under_state_dir = true
# Without CAP_SYS_RESOURCE runc may not give the sandbox its score of -998, and no pod would start.
restrict_oom_score_adj = {str(restrict_oom_score).lower()}

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{folder}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{folder}/containerd/runc"
"""


def kubelet_configuration(folder: Path, pki: Path, control_group: str) -> dict[str, Any]:
    """Return the KubeletConfiguration, with everything the kubelet keeps under FOLDER."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{pki}/node.crt",
        "tlsPrivateKeyFile": f"{pki}/node.key",
        "address": network.ADDRESS,
        "port": _KUBELET_PORT,
        "healthzPort": 0,
        "containerRuntimeEndpoint": f"unix://{folder}/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{control_group}",
        "clusterDomain": "cluster.local",
        "clusterDNS": [network.ADDRESS],
        "maxPods": 250,
        "podLogsDir": f"{folder}/pod-logs",
        "volumePluginDir": f"{folder}/kubelet/volume-plugins",
        "registryPullQPS": 0,
        "serializeImagePulls": False,
        # Images here come from archives and could not be pulled again.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failSwapOn": False,
        # From 1.35 on the default refuses machines with control groups of version 1.
        "failCgroupV1": False,
        # kube-proxy works with nftables: no chains of iptables are needed.
        "makeIPTablesUtilChains": False,
        "shutdownGracePeriod": "0s",
    }


def cni_configuration(folder: Path, name: str) -> dict[str, Any]:
    """Return the network list NAME that puts pods on the bridge, with addresses kept under FOLDER."""
    return {
        "cniVersion": "1.0.0",
        "name": name,
        "plugins": [
            {
                "type": "bridge",
                "bridge": network.BRIDGE,
                "isDefaultGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": f"{folder}/ipam",
                    "ranges": [[{"subnet": network.PODS, "gateway": network.ADDRESS}]],
                },
            }
        ],
    }


def _write_configuration(folder: Path) -> None:
    for name in ("cni", "containerd", "kubelet", "pod-logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    restrict = not machine.may_raise_limits()
    containerd = containerd_configuration(folder, machine.cni_folder(), restrict_oom_score=restrict)
    (folder / "containerd.toml").write_text(containerd)
    (folder / "cni" / "10-pods.conflist").write_text(json.dumps(cni_configuration(folder, _own_name())))
    kubelet = kubelet_configuration(folder, cluster.pki(), _own_name())
    (folder / "kubelet.json").write_text(json.dumps(kubelet, indent=1))


def _pause_image(binary: Path, archive: Path) -> None:
    write_image(archive, PAUSE_IMAGE, {"pause": binary}, entrypoint=["/pause"])


def _ctr(*arguments: str) -> str:
    socket_path = str(state_dir() / "containerd.sock")
    command = ["ctr", "--address", socket_path, "--namespace", _CONTAINER_NAMESPACE, *arguments]
    return run(command, doing=f"reach containerd ({arguments[0]})")


def _registered() -> bool:
    return any(node["metadata"]["name"] == NAME for node in cluster.get("/api/v1/nodes")["items"])


def _ready(since: datetime | None) -> bool:
    """Whether the node is Ready and takes pods; with SINCE, by a word the kubelet has given since then."""
    node = cluster.get(f"/api/v1/nodes/{NAME}")
    conditions = {condition["type"]: condition["status"] for condition in node["status"].get("conditions", ())}
    if conditions.get("Ready") != "True" or node["spec"].get("taints"):
        return False
    if since is None:
        return True
    # After a restart the old word "Ready" stands until the node's lease has run out.
    lease = cluster.get(f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{NAME}")
    renewed: str = lease["spec"]["renewTime"]
    return datetime.fromisoformat(renewed) >= since


def _dns_answers() -> bool:
    """Ask the cluster's DNS for the Service of the API server."""
    name = b"".join(bytes([len(label)]) + label for label in b"kubernetes.default.svc.cluster.local".split(b"."))
    question = struct.pack(">6H", 1, 0, 1, 0, 0, 0) + name + b"\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(1)
        asking.sendto(question, (network.ADDRESS, 53))
        reply = asking.recv(512)
    _, flags, _, answers, _, _ = struct.unpack(">6H", reply[:12])
    return bool(flags & 0xF == 0 and answers == 1)


def _services_reachable() -> bool:
    with socket.create_connection((cluster.SERVICE_ADDRESS, 443), timeout=1):
        return True


def _own_name() -> str:
    """Return the name of our control group and pod network."""
    default = "processing-tasks-devstack"
    if state_dir().name == default:
        return default
    return f"{default}-{digest([os.fsencode(state_dir())])}"  # another devstack, in a network namespace of its own


def _control_groups() -> list[Path]:
    """Return our group in each hierarchy: one folder for version 2, one for each controller for version 1."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root / _own_name()]
    return [folder / _own_name() for folder in sorted(root.iterdir()) if (folder / "cgroup.procs").exists()]


def _kill_containers() -> None:
    """Kill every process in our control groups, until none is left; containers may fork meanwhile."""
    deadline = time.monotonic() + 10
    while pids := {pid for group in _control_groups() for pid in _members(group)}:
        _kill(pids)
        if time.monotonic() > deadline:
            return  # what cannot die holds a mount or group, and that is reported there
        time.sleep(0.02)


def _members(control_group: Path) -> set[int]:
    """Return the living processes in CONTROL_GROUP and below; zombies stay listed until they are reaped."""
    found = set()
    for folder, _, files in os.walk(control_group):  # unlike rglob it goes on where a folder vanishes meanwhile
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                listed = Path(folder, "cgroup.procs").read_text()
                found |= {int(pid) for pid in listed.split() if Path("/proc", pid, "exe").exists()}
    return found


def _shims() -> set[int]:
    """Return the shims of our containerd: they outlive it, and name its socket."""
    ours = os.fsencode(state_dir() / "containerd.sock")
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in arguments[0] and ours in arguments:
                found.add(int(process.name))
    return found


def _nobody_listens(path: Path) -> bool:
    """Whether PATH is a socket whose process has gone, such as a killed shim's or kubelet's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _remove_control_group(control_group: Path) -> None:
    """Remove CONTROL_GROUP with all below; the kernel lets a group go only a moment after its last process."""
    if not control_group.exists():
        return
    folders = sorted((path for path in control_group.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))

    def removed() -> bool:
        for folder in [*folders, control_group]:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
        return not control_group.exists()

    wait_until(f"rid of the control group {control_group}", removed, seconds=15)
