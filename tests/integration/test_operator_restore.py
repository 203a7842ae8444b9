"""An API server whose etcd is restored from a backup under a running operator: a real one, on a machine of its own."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devstack import in_private_machine

pytestmark = [pytest.mark.integration, pytest.mark.alone]


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="devstack-test-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL runs as another user
        yield Path(folder, "state")


@pytest.mark.usefixtures("cluster", "stores")
def test_tasks_and_table_follow_a_restored_api_server(state: Path) -> None:
    mounts = [f"mount -t tmpfs tmpfs {folder}" for folder in ("/run", "/var/lib", "/var/log")]
    done = in_private_machine(f"{sys.executable} -m tests.support.restored_machine", state=state, mounts=mounts)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
