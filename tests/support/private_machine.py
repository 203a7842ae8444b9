"""Scenarios that need a machine of their own: what `devstack down` leaves, and what a crash or reboot does.

Run inside the namespaces of tests.support.devstack.in_private_machine as `python -m tests.support.private_machine
SCENARIO`: prints nothing and ends with 0 when all is well.
"""

import difflib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

import devstack
from devstack import cluster, network, node, process, stores
from devstack.cache import state_dir
from devstack.stores import milvus
from tests.support.devstack import Kubectl

FOLDERS = ("/run/containerd", "/run/netns", "/var/lib/cni", "/var/lib/kubelet", "/var/lib/containerd", "/var/log/containers")
COMMANDS = ("ip -brief link", "ip route", "nft --stateless list ruleset", "iptables-save", "ip6tables-save")
SETTINGS = (
    "net/ipv4/ip_forward",
    "net/bridge/bridge-nf-call-iptables",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "it"},
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "it", "image": node.PAUSE_IMAGE, "imagePullPolicy": "Never"}],
    },
}


def machine() -> str:
    """Return what a machine shows of a devstack: processes, mounts, links, rules, control groups, settings, files."""
    lines = [f"process {arguments}" for arguments in living()]
    lines += [f"mount {line.split(' ', 3)[3]}" for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for command in COMMANDS:
        printed = subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
        lines += [f"{command}: {line}" for line in printed.splitlines() if not line.startswith("#")]
    # By os.walk, which goes on where a group of a devstack outside vanishes meanwhile.
    groups = [Path(folder, name) for folder, names, _ in os.walk("/sys/fs/cgroup") for name in names]
    lines += [f"control group {path}" for path in groups if path.name.startswith("processing-tasks-devstack-")]
    lines += [f"setting {name} {Path('/proc/sys', name).read_text().strip()}" for name in SETTINGS]
    lines += [f"file {path}" for folder in FOLDERS for path in Path(folder).rglob("*")]
    if state_dir().exists():
        lines += [f"file {path}" for path in state_dir().iterdir() if path.name != "lock"]
    return "\n".join(sorted(lines))


def living() -> list[str]:
    """Return the arguments of every process but ourselves and those of this harness; zombies have none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if arguments and "tests.support.private_machine" not in arguments:
            found.append(arguments)
    return found


def assert_as(before: str) -> None:
    """Compare the machine with what it was."""
    changes = [line for line in difflib.ndiff(before.splitlines(), machine().splitlines()) if line[0] in "+-"]
    # We see the mounts of a devstack that runs outside, and they go when its pods do.
    changes = [line for line in changes if not line.startswith("- mount")]
    assert not changes, "\n".join(changes)


def assert_pod_runs(namespace: str = "default") -> None:
    """Make a pod and wait until it is ready."""
    kubectl = Kubectl(devstack.endpoints(), namespace)
    kubectl.apply(POD)
    kubectl("wait", "--for=condition=Ready", "pod/it", "--timeout=60s")


def command(*arguments: str) -> "subprocess.Popen[bytes]":
    """Start the devstack's command line as a user would."""
    return subprocess.Popen([sys.executable, "-m", "devstack", *arguments])


def killed(arguments: list[str], when: Callable[[], bool], signal_number: int = signal.SIGKILL) -> None:
    """Run a devstack command and end it with a signal as soon as WHEN is true."""
    running = command(*arguments)
    deadline = time.monotonic() + 60
    while not when() and running.poll() is None:
        assert time.monotonic() < deadline, f"{arguments}: the moment never came"
        time.sleep(0.001)
    running.send_signal(signal_number)
    running.wait(60)


def succeeded(*arguments: str) -> None:
    """Run a devstack command to its end."""
    assert command(*arguments).wait(120) == 0, arguments


def stopped(name: str) -> bool:
    """Whether the process NAME has ended."""
    return not process.running(name)


def kill(name: str) -> None:
    """Kill the process NAME, as the kernel does when memory is short."""
    server = process.find(name)
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)
    process.wait_until(f"the end of {name}", partial(stopped, name), seconds=10)


def leaves_nothing() -> None:
    """Up, up again at once from two sides, a pod, down, down again; with a firewall that drops what it does not know."""
    for chain in ("INPUT", "FORWARD"):
        subprocess.run(["iptables", "-P", chain, "DROP"], check=True)
    subprocess.run(["iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT"], check=True)
    before = machine()
    devstack.down()
    assert_as(before)
    both = [command("up") for _ in range(2)]
    assert [running.wait(120) for running in both] == [0, 0]
    assert subprocess.run(["iptables", "-S"], capture_output=True, text=True, check=True).stdout.count("cni0") == 3
    first = {name: process.find(name) for name in (*cluster.NAMES, *node.NAMES, *stores.NAMES)}
    assert None not in first.values()
    began = time.monotonic()
    devstack.up()
    assert time.monotonic() - began < 5, "a second up takes seconds at most"
    assert {name: process.find(name) for name in first} == first
    assert_pod_runs()
    devstack.down()
    assert_as(before)
    devstack.down()
    assert_as(before)


def survives_kills() -> None:
    """`up` and `down` die at every stage, and servers die; `up` mends it and `down` clears it, each time."""
    before = machine()
    state = state_dir()
    moments: list[Callable[[], bool]] = [
        lambda: (state / "network.json").exists(),
        lambda: (state / "pki.new").exists(),
        *(partial(process.running, name) for name in (*cluster.NAMES, *node.NAMES)),
    ]
    for moment in moments:  # each goes on from where the one before died
        killed(["up", "--parts", "node"], moment)
    killed(["up", "--parts", "node"], lambda: process.running("kube-proxy"), signal.SIGINT)
    devstack.up(["node"])
    assert_pod_runs()
    for port in ("6444", "6443"):  # every part follows, the proxy's rules too; up itself asks a Service
        os.environ["DEVSTACK_API_PORT"] = port
        devstack.up(["node"])
    for name in ("scheduler", "containerd", "kubelet", "apiserver"):
        kill(name)
    devstack.up(["node"])
    assert_pod_runs()
    kill("containerd")
    for name in ("kubelet", "containerd", "apiserver"):
        killed(["down"], partial(stopped, name))
    devstack.down()
    assert_as(before)
    for moment in moments[::3]:  # alone, with a down from there
        killed(["up", "--parts", "node"], moment)
        devstack.down()
        assert_as(before)


def prepare_reboot() -> None:
    """Leave everything running; the machine ends with this process, as at a power failure."""
    devstack.up(["node"])
    assert_pod_runs()
    (state_dir() / "documents" / "kept").mkdir(parents=True)


def after_reboot() -> None:
    """A new boot finds the old state: the cluster starts anew and documents are kept; then the machine ends again."""
    assert not any(process.running(name) for name in (*cluster.NAMES, *node.NAMES))
    devstack.up(["node"])
    kubectl = Kubectl(devstack.endpoints())
    assert kubectl.get("pods", "--all-namespaces")["items"] == []
    assert (state_dir() / "documents" / "kept").exists()
    assert_pod_runs()


def down_after_reboot() -> None:
    """Down alone copes with what a boot before left."""
    before = machine().splitlines()
    devstack.down()
    assert [line for line in machine().splitlines() if line not in before] == []
    assert [path.name for path in state_dir().iterdir()] == ["lock"]


def strange_bridge() -> None:
    """A bridge of another cluster is neither used nor removed."""
    subprocess.run(["ip", "link", "add", "cni0", "type", "bridge"], check=True)
    before = machine()
    with pytest.raises(devstack.DevstackError, match="cannot make the bridge cni0"):
        devstack.up(["cluster"])
    devstack.down()
    assert_as(before)


def second_devstack() -> None:
    """A second one is told who is there; after a killed one it clears up, and starts."""
    before = machine()
    first, second = state_dir(), state_dir().with_name("second")
    devstack.up(["node"])
    assert_pod_runs()
    (first / "documents" / "kept").mkdir(parents=True)
    pids = [server.pid for server in process.living(first).values()]
    os.environ["DEVSTACK_STATE"] = str(second)
    for parts in (["cluster"], ["stores"]):
        with pytest.raises(devstack.DevstackError, match=f"the one in {first} runs here") as refused:
            devstack.up(parts)
        assert any(f"process {pid}" in str(refused.value) for pid in pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.wait_until("the end of the first", lambda: not process.living(first), seconds=10)
    devstack.up(["node"])
    assert_pod_runs()
    assert (first / "documents" / "kept").exists()
    devstack.down()
    os.environ["DEVSTACK_STATE"] = str(first)
    devstack.down()
    assert_as(before)


def hung_milvus() -> None:
    """A Milvus that runs and does not answer is replaced by the next `up`, with its data; one that answers is kept."""
    before = machine()
    network.up()
    milvus.up()
    first = process.find(milvus.NAME)
    assert first is not None
    reached = milvus.environment(f"127.0.0.1:{milvus.port()}")
    options: dict[str, Any] = {"uri": reached["TASKS_MILVUS_URL"], "token": reached["TASKS_MILVUS_TOKEN"], "timeout": 30}
    MilvusClient(**options).create_collection("kept", dimension=4)
    milvus.up(hung=1)
    assert process.find(milvus.NAME) == first
    os.kill(first.pid, signal.SIGSTOP)
    milvus.up(hung=1)
    assert process.find(milvus.NAME) not in {first, None}
    assert MilvusClient(**options).list_collections() == ["kept"]
    devstack.down()
    assert_as(before)


if __name__ == "__main__":
    scenarios = [
        leaves_nothing,
        survives_kills,
        prepare_reboot,
        after_reboot,
        down_after_reboot,
        strange_bridge,
        second_devstack,
        hung_milvus,
    ]
    {scenario.__name__: scenario for scenario in scenarios}[sys.argv[1]]()
    print(json.dumps({"scenario": sys.argv[1]}))
