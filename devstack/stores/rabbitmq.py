"""RabbitMQ: Debian's when it is installed, else out of Debian's packages, which are unpacked into the cache.

No store of the product, and not part of ``up``: tests of the broker start it, and ``down`` stops it with the others. It
listens on loopback and the bridge and wants a password. Its nodes' own port and their name server (epmd) are on loopback.
Queues and persistent messages outlive a stop and a kill.
"""

import os
import shutil
import socket
from pathlib import Path

from devstack.cache import cached
from devstack.process import run, start, stop, wait_until
from devstack.progress import DevstackError, step
from devstack.stores import common
from devstack.stores.passwords import password

NAME = "rabbitmq"
SERVICE_PORT = 5672

_NAME_SERVER = "rabbitmq-epmd"
_DEFAULT_PORT = 15672  # not 5672, which a server of this machine's owner may hold
_USER = "tasks"
_ERLANG = (
    *("base", "asn1", "crypto", "eldap", "ftp", "inets", "mnesia", "os-mon", "parsetools", "public-key"),
    *("runtime-tools", "snmp", "ssl", "syntax-tools", "tftp", "tools", "xmerl"),
)
_PACKAGES = ("rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG))
_INSTALLED = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def port() -> int:
    """Return the port that the server listens on; the two above it are those of epmd and of nodes."""
    return common.port(NAME, _DEFAULT_PORT)


def url(address: str) -> str:
    """Return the address for a client that reaches the server at ADDRESS (host:port)."""
    return f"amqp://{_USER}:{password(NAME)}@{address}/"


def environment(address: str) -> dict[str, str]:
    """Return the variables of a client that reaches the server at ADDRESS (host:port): none is of the product's runner."""
    return {"OPERATOR_RABBITMQ_URL": url(address)}


def up() -> None:
    """Start the server; one that runs is kept."""
    root = _root()
    folder = common.folder(NAME)
    configuration = folder / "rabbitmq.conf"
    common.write_private(configuration, render(port(), password(NAME)))
    common.write_private(folder / "enabled_plugins", "[].\n")
    erlang = root / "usr/lib/erlang"
    environment = {
        "ERL_EPMD_ADDRESS": common.HOST,
        "ERL_EPMD_PORT": str(port() + 1),
        "HOME": str(folder),  # of the cookie that nodes know each other by
        "PATH": f"{erlang / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "RABBITMQ_CONFIG_FILE": str(configuration.with_suffix("")),
        "RABBITMQ_DIST_PORT": str(port() + 2),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_NODENAME": "tasks@localhost",
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none",
    }
    # In the foreground and by name: RabbitMQ would leave a daemon behind that nobody stops.
    start(
        _NAME_SERVER,
        [str(erlang / "bin/epmd"), "-address", common.HOST, "-port", str(port() + 1)],
        env={"HOME": str(folder)},
    )
    wait_until("an answer of epmd", lambda: _listens(port() + 1), seconds=10, processes=[_NAME_SERVER])
    program = str(root / _INSTALLED.relative_to("/"))
    start(NAME, [program], env=environment | common.digest_of(configuration), cwd=folder)
    wait_until("an answer of RabbitMQ", _answers, seconds=90, processes=[NAME])


def down(*, kill: bool = False) -> None:
    """Stop the server: clean, or SIGKILL with KILL."""
    stop(NAME, kill=kill)
    stop(_NAME_SERVER, kill=kill)


def render(port: int, secret: str) -> str:
    """Return rabbitmq.conf for a server with one user."""
    listeners = [f"listeners.tcp.{number} = {address}:{port}" for number, address in enumerate(common.LISTEN, 1)]
    lines = [
        *listeners,
        f"default_user = {_USER}",
        f"default_pass = {secret}",
        "loopback_users = none",
        "vm_memory_high_watermark.absolute = 256MB",
        "disk_free_limit.absolute = 64MB",
        "log.console = true",
        "log.console.level = warning",
    ]
    return "".join(f"{line}\n" for line in lines)


def _root() -> Path:
    """Return the folder below which RabbitMQ and Erlang lie as Debian has them: ``/``, or one in the cache."""
    if _INSTALLED.exists():
        return Path("/")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DevstackError("cannot find RabbitMQ: there is none on this machine; install rabbitmq-server")

    def build(folder: Path) -> None:
        with step(f"downloading RabbitMQ and Erlang ({len(_PACKAGES)} packages of Debian, 35 MB)"):
            packages = folder.with_name("packages")
            packages.mkdir()
            options = ["-o", "APT::Sandbox::User=root"]  # its own user may not write into the cache
            run(["apt-get", "download", "--quiet", *options, *_PACKAGES], doing="download RabbitMQ", cwd=packages)
            for package in sorted(packages.glob("*.deb")):
                run(["dpkg-deb", "--extract", package, folder], doing=f"unpack {package.name}")
            erl = folder / "usr/lib/erlang/bin/erl"  # it knows where it was installed; now it looks where it lies
            here = '"$(dirname "$(dirname "$(readlink -f "$0")")")"'
            erl.write_text(erl.read_text().replace("ROOTDIR=/usr/lib/erlang", f"ROOTDIR={here}"))

    return cached("rabbitmq", [" ".join(_PACKAGES).encode(), b"erl finds itself"], build, keep=1)


def _listens(number: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((common.HOST, number)) == 0


def _answers() -> bool:
    """Ask for protocol 0-9-1: the answer is the frame Connection.Start."""
    with socket.create_connection((common.HOST, port()), timeout=5) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        return connection.recv(1) == b"\x01"
