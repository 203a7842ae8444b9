"""The machine's network and kernel settings that the devstack needs, and their return to what they were.

The bridge `cni0` carries 10.244.0.1: the address of the API server for pods, of the node, of the stores and of the
DNS. Whatever is changed is written down first, with the boot it belongs to; so `down` puts it back whoever died when,
and after a reboot, which undoes all of it, the old notes do not count.

The bridge's alias names the state folder of the devstack that made it. It is how a second one in the same network
namespace learns who is there, and it goes when the namespace does.
"""

import ipaddress
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from devstack.cache import state_dir
from devstack.process import boot_id, living, run
from devstack.progress import DevstackError, step

BRIDGE = "cni0"
ADDRESS = "10.244.0.1"
PODS = "10.244.0.0/16"
SERVICES = "10.96.0.0/16"
RULE_COMMENT = "processing-tasks-devstack"
_ALIAS = "processing-tasks-devstack of "

# Pods reach Services of pods on the same bridge only when bridged packets pass the packet filter.
_SETTINGS = {"net/ipv4/ip_forward": "1", "net/bridge/bridge-nf-call-iptables": "1"}
# What the kubelet and the bridge plugin set by themselves.
_SET_BY_OTHERS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)


def up() -> None:
    """Make the bridge with its address, let its packets pass, and set what pods need of the kernel; idempotent.

    Raises DevstackError when the bridge's name, its addresses or the proxy's tables are in use by something else; when
    that is another devstack the error names its state folder and a process of it. After one whose processes have all
    been killed this clears up first, and keeps its data.
    """
    notes = _notes()
    if notes is None:
        _make_way()
        _remember_settings()  # from here on, the bridge and the tables count as ours
    if not _bridge_exists():
        run(["ip", "link", "add", BRIDGE, "type", "bridge"], doing=f"make the bridge {BRIDGE}")
    run(["ip", "link", "set", BRIDGE, "alias", f"{_ALIAS}{state_dir()}"], doing=f"sign the bridge {BRIDGE}")
    run(["ip", "address", "replace", f"{ADDRESS}/16", "dev", BRIDGE], doing=f"give {BRIDGE} its address")
    run(["ip", "link", "set", BRIDGE, "up"], doing=f"start the bridge {BRIDGE}")
    # Without a default route (a laptop that is offline) this machine would have no way to the Services.
    run(["ip", "route", "replace", SERVICES, "dev", BRIDGE], doing="route the Services' addresses")
    for name, value in _SETTINGS.items():
        _write_setting(name, value)
    for chain, direction in _rules():
        rule = _rule(chain, direction)
        if _policy(chain) == "DROP" and not _iptables("-C", *rule):
            _iptables("-I", *rule)


def down() -> None:
    """Remove the bridge, our rules and the proxy's tables, and restore the settings; nothing that is not ours."""
    notes = _notes()
    if notes is None:
        return
    _remove()
    for name, value in notes["settings"].items():
        _write_setting(name, value)
    _notes_path().unlink()


def _remove() -> None:
    for chain, direction in _rules():
        while _iptables("-D", *_rule(chain, direction)):
            pass
    for family in ("ip", "ip6"):
        if "kube-proxy" in _tables(family):
            run(["nft", "delete", "table", family, "kube-proxy"], doing="remove the proxy's packet filter")
    if _bridge_exists():
        run(["ip", "link", "delete", BRIDGE], doing=f"remove the bridge {BRIDGE}")


def require_free(address: str, port: int, remedy: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
    """Raise DevstackError, ending with REMEDY, when another program listens on PORT of ADDRESS."""
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        try:
            probe.bind((address, port))
        except OSError as error:
            raise DevstackError(f"cannot listen on {address}:{port}: {error.strerror}; {remedy}") from error


def overlapping(routes: Iterable[dict[str, Any]], networks: Iterable[str]) -> list[str]:
    """Return "DESTINATION on DEVICE" of each route (as `ip -json route` prints them) that overlaps NETWORKS."""
    ours = [ipaddress.ip_network(network) for network in networks]
    found = []
    for route in routes:
        if route["dst"] == "default":
            continue
        destination = ipaddress.ip_network(route["dst"], strict=False)
        if any(isinstance(destination, ipaddress.IPv4Network) and destination.overlaps(network) for network in ours):
            found.append(f"{destination} on {route.get('dev', route.get('type', 'unknown'))}")
    return found


def holder() -> Path | None:
    """Return the state folder of the devstack that holds this network namespace, or None when none has signed it."""
    if not _bridge_exists():
        return None
    links = json.loads(run(["ip", "-json", "link", "show", "dev", BRIDGE], doing=f"look at the bridge {BRIDGE}"))
    alias: str = links[0].get("ifalias", "")
    return Path(alias.removeprefix(_ALIAS)) if alias.startswith(_ALIAS) else None


def _make_way() -> None:
    other = holder()
    if other is not None and other != state_dir():
        if processes := living(other):
            name, process = next(iter(processes.items()))
            raise DevstackError(
                f"cannot start a second devstack in this network namespace: the one in {other} runs here ({name} is "
                f"process {process.pid}); use that one, or end it with `DEVSTACK_STATE={other} python -m devstack down`"
            )
        _clear_up_after(other)
    _refuse_others()


def _clear_up_after(other: Path) -> None:
    """Remove what the killed devstack in OTHER left running and mounted; its documents and stores keep their data."""
    with step(f"clearing up after the devstack in {other}, none of whose processes is left"):
        command = [sys.executable, "-m", "devstack", "down", "--keep-data"]
        project = Path(__file__).parent.parent
        run(command, doing=f"clear up after {other}", env={"DEVSTACK_STATE": str(other)}, cwd=project)
        if holder() == other:  # its folder, with the notes of what to remove, is gone too
            _remove()


def _refuse_others() -> None:
    if _bridge_exists():
        raise DevstackError(
            f"cannot make the bridge {BRIDGE}: one that the devstack did not make exists already; stop the cluster that "
            f"uses it, or remove it with `ip link delete {BRIDGE}`"
        )
    routes = json.loads(run(["ip", "-json", "-4", "route"], doing="list the routes") or "[]")
    if taken := overlapping(routes, (PODS, SERVICES)):
        raise DevstackError(
            f"cannot use the addresses {PODS} and {SERVICES}: this machine already routes {', '.join(taken)}; "
            "stop what uses them (a VPN or another cluster)"
        )
    if any("kube-proxy" in _tables(family) for family in ("ip", "ip6")):
        raise DevstackError(
            "cannot run a node: the packet filter already has tables of another Kubernetes node (kube-proxy); stop it, "
            "or remove what it left with `nft delete table ip kube-proxy; nft delete table ip6 kube-proxy`"
        )


def _remember_settings() -> None:
    names = [*_SETTINGS, *_SET_BY_OTHERS]
    if not _setting("net/bridge/bridge-nf-call-iptables").exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True, check=False)
    settings = {name: _setting(name).read_text().strip() for name in names if _setting(name).exists()}
    if missing := _SETTINGS.keys() - settings.keys():
        raise DevstackError(
            f"cannot run pods: the kernel has no setting {', '.join(sorted(missing))}; load it with `modprobe br_netfilter`"
        )
    path = _notes_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"boot": boot_id(), "namespace": _namespace(), "settings": settings}))
    new.rename(path)


def _notes() -> dict[str, Any] | None:
    """Return what was written down in this boot and network namespace, or None when nothing of ours is there."""
    try:
        notes: dict[str, Any] = json.loads(_notes_path().read_text())
    except FileNotFoundError:
        return None
    return notes if notes["boot"] == boot_id() and notes["namespace"] == _namespace() else None


def _notes_path() -> Path:
    return state_dir() / "network.json"


def _namespace() -> str:
    return str(Path("/proc/self/ns/net").readlink())


def _setting(name: str) -> Path:
    return Path("/proc/sys") / name


def _write_setting(name: str, value: str) -> None:
    path = _setting(name)
    if path.exists() and path.read_text().strip() != value:
        try:
            path.write_text(value)
        except OSError as error:
            raise DevstackError(f"cannot set {name} to {value}: {error}; set it by hand with sysctl") from error


def _bridge_exists() -> bool:
    # Not from /sys, which goes on showing the network namespace that it was mounted in.
    return BRIDGE in {name for _, name in socket.if_nameindex()}


def _tables(family: str) -> list[str]:
    if not shutil.which("nft"):
        return []
    listed = run(["nft", "list", "tables", family], doing="list the packet filter's tables")
    return [line.split()[-1] for line in listed.splitlines() if line]


def _rules() -> tuple[tuple[str, str], ...]:
    """Chains that a firewall or Docker may have closed, with the option that matches packets of the bridge."""
    return (("INPUT", "-i"), ("FORWARD", "-i"), ("FORWARD", "-o"))


def _rule(chain: str, direction: str) -> list[str]:
    return [chain, direction, BRIDGE, "-m", "comment", "--comment", RULE_COMMENT, "-j", "ACCEPT"]


def _policy(chain: str) -> str:
    listed = subprocess.run(["iptables", "-w", "-S", chain], capture_output=True, text=True, check=False).stdout
    return listed.split("\n", 1)[0].rpartition(" ")[2]


def _iptables(*arguments: str) -> bool:
    if not shutil.which("iptables"):
        return False
    return subprocess.run(["iptables", "-w", *arguments], capture_output=True, check=False).returncode == 0
