"""Milvus 2.3.5, standalone, from the wheel `milvus`: the server binary is run directly, with a configuration of ours.

Clients must log in (`root` and a password of ours). The server listens on all interfaces: its proxy and its internal
parts bind to ":port", whatever `ip` says, and the internal ones ask for no password. So a packet filter table of ours
drops what comes for these ports from anywhere but loopback and the bridge; without `nft` that is said and left open.

Two settings make it fast here: `ip: 127.0.0.1` spares the search for an address (a start takes 1 s, not 10), and after
a kill the sessions that the dead server left in its embedded etcd are revoked (they would live for 30 s more, and a
collection could not be loaded meanwhile).

etcd does not flush to disk: a killed server loses nothing, a power cut may.
"""

import base64
import http.client
import json
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from devstack import network
from devstack.process import find, start, stop, wait_until
from devstack.progress import DevstackError, say
from devstack.stores import common
from devstack.stores.passwords import password

NAME = "milvus"
SERVICE_PORT = 19530

_DEFAULT_PORT = 19630  # not 19530, which a server of this machine's owner may hold
_USER = "root"
HUNG = 20.0
"""Seconds after which a server that runs without answering is replaced: seen after hours of collections coming and going."""
_INITIAL_PASSWORD = "Milvus"  # noqa: S105 - what every Milvus begins with; ours replaces it at the first start
_SESSIONS = "by-dev/meta/session/"  # etcd.rootPath and metaSubPath of the wheel's configuration
_TEMPORARY = Path("/tmp/milvus")  # noqa: S108 - the server writes a small file there; no setting moves it


def port() -> int:
    """Return the port that clients use; the nine below it are the server's own."""
    return common.port(NAME, _DEFAULT_PORT)


def environment(address: str) -> dict[str, str]:
    """Return the variables of a client that reaches the server at ADDRESS (host:port)."""
    return {"TASKS_MILVUS_URL": f"http://{address}", "TASKS_MILVUS_TOKEN": f"{_USER}:{password(NAME)}"}


def up(*, hung: float = HUNG) -> None:
    """Start the server and see to it that only our password opens it; one that runs is kept.

    One that runs and does not answer for HUNG seconds is killed and started anew, with its data.
    """
    package = common.wheel(NAME, _unpack) / "milvus"
    folder = common.folder(NAME)
    configuration = folder / "configs"  # the server looks for this name in its working folder
    configuration.mkdir(exist_ok=True)
    etcd = configuration / "etcd.yaml"
    etcd.write_text(render_etcd(folder, port()))
    template = (package / "data" / "config.yaml.template").read_text()
    (configuration / "milvus.yaml").write_text(render(template, settings(folder, port())))
    shutil.copyfile(package / "data" / "glog.conf", configuration / "glog.conf")
    _filter(port())
    environment = {
        "DEPLOY_MODE": "STANDALONE",
        "METRICS_PORT": str(_internal(port())["metrics"]),
        "MILVUS_RUN_DIR": str(folder / "run"),
        "LD_LIBRARY_PATH": str(package / "bin"),
        **common.digest_of(*sorted(configuration.iterdir())),
    }
    command = [str(package / "bin" / "milvus"), "run", "standalone"]
    if not start(NAME, command, env=environment, cwd=folder):
        try:
            wait_until("an answer of Milvus", _is_ready, seconds=hung, processes=[NAME])
        except DevstackError:
            say("    Milvus runs and does not answer: starting it anew, with its data")
            stop(NAME, kill=True)
            start(NAME, command, env=environment, cwd=folder)
    wait_until("an answer of Milvus", _is_ready, seconds=120, processes=[NAME])
    secure()


def secure() -> None:
    """See to it that only our password opens the server on `port()`; it answers already.

    Killed before it is done, the server still has the initial password, and the next call changes it.
    """
    if not _accepts(password(NAME)):
        _change_password()
        wait_until("Milvus to take its password", lambda: _accepts(password(NAME)), seconds=30)


def down(*, kill: bool = False) -> None:
    """Stop the server and take the packet filter away."""
    process = find(NAME)
    # It cannot hand its work to another node and waits in vain: `gracefulStopTimeout` ends that after a second.
    stop(NAME, grace=10, kill=kill)
    if process is not None and _TEMPORARY.is_dir():
        (_TEMPORARY / f"server_id_{process.pid}").unlink(missing_ok=True)
        if not any(_TEMPORARY.iterdir()):
            _TEMPORARY.rmdir()
    if shutil.which("nft") and os.geteuid() == 0:
        name = filter_name(port())
        _nft(f"table inet {name}\ndelete table inet {name}\n")  # the first line makes sure that there is one


def settings(folder: Path, port: int) -> dict[str, Any]:
    """Return what our configuration has other than the wheel's, by dotted key."""
    internal = _internal(port)
    changed: dict[str, Any] = {
        "etcd.config.path": str(folder / "configs" / "etcd.yaml"),
        "etcd.endpoints": f"{common.HOST}:{internal['etcd']}",
        "etcd.data.dir": str(folder / "data" / "etcd"),
        "localStorage.path": str(folder / "data"),
        "rocksmq.path": str(folder / "data" / "rocksmq"),
        "log.file.rootPath": "",  # it writes to standard error, which is in the devstack's log folder
        "log.level": "warn",
        "etcd.log.level": "warn",
        "etcd.log.path": "stdout",
        "common.security.authorizationEnabled": True,
        "common.gracefulStopTimeout": 1,
        "proxy.port": port,
        "proxy.internalPort": internal["proxy"],
    }
    for part in ("rootCoord", "queryCoord", "dataCoord", "queryNode", "dataNode", "indexNode"):
        changed[f"{part}.port"] = internal[part]
    for part in ("rootCoord", "proxy", "queryCoord", "dataCoord", "queryNode", "dataNode", "indexNode"):
        changed[f"{part}.ip"] = common.HOST
    return changed


def render(template: str, changed: Mapping[str, Any]) -> str:
    """Return milvus.yaml: the wheel's TEMPLATE with its own defaults, and CHANGED (dotted key -> value) on top.

    The template writes `{{ name(type): default }}` where a value may be set.
    """
    filled = re.sub(r"\{\{\s*\w+\s*(?:\(\w+\))?\s*(?::\s*(.*?))?\s*\}\}", lambda found: found[1] or "", template)
    configuration = yaml.safe_load(filled)
    for key, value in changed.items():
        *parents, last = key.split(".")
        place = configuration
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return yaml.safe_dump(configuration, sort_keys=False)


def render_etcd(folder: Path, port: int) -> str:
    """Return the configuration of the etcd inside the server: on loopback only, and off etcd's well-known ports."""
    internal = _internal(port)
    client, peer = (f"http://{common.HOST}:{internal[name]}" for name in ("etcd", "etcd-peer"))
    configuration = {
        "name": "milvus",
        "data-dir": str(folder / "data" / "etcd"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"milvus={peer}",
        "log-level": "warn",
        "unsafe-no-fsync": True,
    }
    return yaml.safe_dump(configuration, sort_keys=False)


def filter_name(port: int) -> str:
    """Return the name of the packet filter table of the server on PORT."""
    return f"processing-tasks-devstack-milvus-{port}"


def render_filter(port: int) -> str:
    """Return the nftables commands that keep the server's ports for loopback and the bridge; may be run again."""
    ports = ", ".join(str(number) for number in sorted([port, *_internal(port).values()]))
    name = filter_name(port)
    lines = [
        f"table inet {name}",  # makes sure that there is one to delete; all of it happens at once
        f"delete table inet {name}",
        f"table inet {name} {{",
        "  chain input {",
        "    type filter hook input priority filter; policy accept;",
        f'    iifname != {{ "lo", "{network.BRIDGE}" }} tcp dport {{ {ports} }} drop',
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def stale_leases(sessions: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the leases of those SESSIONS (Milvus' own records) that an earlier run of the server left.

    A server takes one number for all its parts, and each run a higher one. Before the new run has put its first record
    there, the old ones are not known as such.
    """
    records = list(sessions)
    newest = max((record["ServerID"] for record in records), default=0)
    return [record["LeaseID"] for record in records if record["ServerID"] < newest]


def _internal(port: int) -> dict[str, int]:
    """Return the ports of the server's own parts: below PORT, where the kernel hands out none to outgoing connections."""
    names = (
        "proxy",
        "rootCoord",
        "queryCoord",
        "dataCoord",
        "queryNode",
        "dataNode",
        "indexNode",
        "metrics",
        "etcd",
        "etcd-peer",
    )
    return {name: port - 1 - position for position, name in enumerate(names)}


def _unpack(target: Path) -> None:
    """Unpack the wheel's compressed programs beside it, once, and drop the compressed ones."""
    source, programs = target / "milvus" / "data" / "bin", target / "milvus" / "bin"
    programs.mkdir()

    def unpack(packed: Path) -> None:
        program = programs / packed.stem
        with lzma.open(packed) as compressed, program.open("wb") as plain:
            shutil.copyfileobj(compressed, plain, 1 << 20)
        program.chmod(0o755)
        packed.unlink()

    with ThreadPoolExecutor() as pool:
        list(pool.map(unpack, sorted(source.glob("*.lzma"), key=lambda file: -file.stat().st_size)))


def _filter(port: int) -> None:
    if shutil.which("nft") and os.geteuid() == 0:
        _nft(render_filter(port))
    else:
        say(f"Milvus is open on all interfaces, ports {port - 10} to {port}: without nft, or not root, nothing bars them")


def _nft(commands: str) -> None:
    done = subprocess.run(["nft", "-f", "-"], input=commands, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevstackError(f"cannot set the packet filter of Milvus: {done.stderr.strip()}")


def _is_ready() -> bool:
    """Whether every part of the server is well and its proxy answers, be it that it wants another password."""
    for lease in stale_leases(_sessions()):
        _etcd("lease/revoke", {"ID": str(lease)})
    status, answer = _http(_internal(port())["metrics"], "GET", "/healthz")
    if status != 200 or answer.strip() != "OK":
        return False
    return _accepts(password(NAME)) or _accepts(_INITIAL_PASSWORD)


def _accepts(secret: str) -> bool:
    """Whether the server lists its collections for the user with the password SECRET."""
    status, answer = _http(port(), "GET", "/v1/vector/collections", headers={"Authorization": f"Bearer {_USER}:{secret}"})
    return status == 200 and json.loads(answer).get("code") == 200


def _change_password() -> None:
    from pymilvus import MilvusClient  # takes a second to import and is needed at the first start alone

    client = MilvusClient(f"http://{common.HOST}:{port()}", token=f"{_USER}:{_INITIAL_PASSWORD}", timeout=10)
    try:
        client.update_password(_USER, _INITIAL_PASSWORD, password(NAME))
    finally:
        client.close()


def _sessions() -> list[dict[str, Any]]:
    end = _SESSIONS[:-1] + chr(ord(_SESSIONS[-1]) + 1)  # the first key after those with this prefix
    found = _etcd("kv/range", {"key": _base64(_SESSIONS), "range_end": _base64(end)})
    values = [json.loads(base64.b64decode(entry["value"])) for entry in found.get("kvs", []) if "lease" in entry]
    return [value for value in values if isinstance(value, dict) and value.keys() >= {"ServerID", "LeaseID"}]


def _etcd(call: str, body: Mapping[str, str]) -> dict[str, Any]:
    """Call the JSON gateway of the embedded etcd."""
    status, answer = _http(_internal(port())["etcd"], "POST", f"/v3/{call}", body=json.dumps(body))
    if status != 200:
        raise DevstackError(f"cannot ask the etcd of Milvus: {call} answered {status}: {answer}")
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def _http(
    port: int, method: str, path: str, *, body: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(common.HOST, port, timeout=5)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
