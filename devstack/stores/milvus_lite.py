"""The `milvus-lite` server: a second implementation of Milvus' interface, for tests of what Milvus 2.3.5 lacks.

It knows no password and is therefore on loopback only. It is no part of `devstack.stores.up`.
"""

import shutil
import socket
import sys
from pathlib import Path

from devstack.process import start, stop, wait_until
from devstack.progress import DevstackError
from devstack.stores import common

NAME = "milvus-lite"

_DEFAULT_PORT = 19640


def up() -> str:
    """Start the server and return its URL; one that runs is kept. The package `milvus-lite` is a test requirement."""
    program = Path(sys.executable).with_name("milvus-lite")
    if not program.exists():
        raise DevstackError("cannot start milvus-lite: it is not installed; run `pip install 'processing-tasks[dev]'`")
    port = common.port("milvus_lite", _DEFAULT_PORT)
    data = common.folder(NAME)
    command = [str(program), "server", "--host", common.HOST, "--data-dir", str(data), "--port", str(port)]
    start(NAME, command, cwd=data)
    wait_until("an answer of milvus-lite", lambda: _answers(port), seconds=60, processes=[NAME])
    return f"http://{common.HOST}:{port}"


def down(*, purge: bool = False) -> None:
    """Stop the server, and with PURGE delete its data."""
    stop(NAME, grace=5, kill=purge)
    if purge:
        shutil.rmtree(common.folder(NAME))


def _answers(port: int) -> bool:
    # The bare connection first: the client would wait for seconds where nobody listens yet.
    socket.create_connection((common.HOST, port), timeout=5).close()
    from pymilvus import MilvusClient

    client = MilvusClient(f"http://{common.HOST}:{port}", timeout=5)
    try:
        client.list_collections()
    finally:
        client.close()
    return True
