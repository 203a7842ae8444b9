"""Fixtures of the tests on a real API server."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from devstack import Endpoints
from task_contract import names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def kubectl(cluster: Endpoints) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        command = [str(cluster.kubectl), "--kubeconfig", str(cluster.kubeconfig), *arguments]
        text = None if stdin is None else json.dumps(stdin)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)

    applied = run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/processingtasks.yaml"))
    assert applied.returncode == 0, applied.stderr
    established = run("wait", "--for=condition=Established", "--timeout=30s", f"crd/{names.PLURAL}.{names.GROUP}")
    assert established.returncode == 0, established.stderr
    return run
