"""Every hostile file ends as what it is: a typed, permanent error or its text, within bounds, and without a connection.

Through the real child process, as a pod reads documents. Needs no server but takes too long for a unit test.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from job_runner.fetch import opened
from job_runner.parse import parse
from task_contract import errors
from tests.data.hostile import LIMITS, all_files

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """Where the files lead who follows them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


async def outcome(path: Path) -> tuple[str, str]:
    """Return the name of the error that reading a file ends with and its message, or ``""`` and the text."""
    try:
        with opened(path.name, root=path.parent, max_bytes=1 << 30) as source:
            document = await asyncio.wait_for(parse(source, limits=LIMITS, on_progress=lambda done, total: None), 120)
    except errors.TaskError as error:
        return ("to be tried again: " if error.retryable else "") + error.reason, error.message
    return "", document.text


async def test_every_hostile_file_ends_as_what_it_is(listener: socket.socket, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    wrong: list[str] = []
    count = led_away = 0
    before = set(psutil.Process().children(recursive=True))  # servers of other tests
    for file in all_files(url):
        path = tmp_path / file.name
        path.write_bytes(file.data)
        reason, said = await outcome(path)
        if (reason, file.says in said) != (file.reason, True) or (reason and not said.startswith("cannot ")):
            wrong.append(f"{file.name}: {reason or 'is read'}: {said[:200]}")
        count += 1
        led_away += url.encode() in file.data
        path.unlink()
    assert wrong == []
    assert count > 100
    assert led_away > 5  # in archives they are compressed
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_the_files_are_the_same_each_time() -> None:
    first, second = ({file.name: file.data for file in all_files()} for _ in range(2))
    assert first == second


def test_who_reads_files_has_no_connections_and_starts_no_programs() -> None:
    """What holds for every library, also for one that a file has taken over."""
    script = """
import os, socket
from job_runner.confine import confine
assert confine()
tried = [
    lambda: socket.create_connection(("127.0.0.1", 1)),
    lambda: socket.socket(socket.AF_UNIX),
    lambda: socket.getaddrinfo("a.invalid", 1),
    lambda: os.execv("/bin/true", ["true"]),
]
for attempt in tried:
    try:
        attempt()
    except (PermissionError, socket.gaierror):
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 4
