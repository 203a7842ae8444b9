"""Servers that tests start as processes."""

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_PATIENCE = 30.0  # seconds until it listens


def free_port() -> int:
    """Return a port of loopback that nobody has, below those that the kernel gives to connections: one may take those before
    the server that it is for listens."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def serving(command: Sequence[str], *, port: int, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run a server until the end of the block, which begins when it listens on a port of loopback."""
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _listens(port):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield
        finally:
            server.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
