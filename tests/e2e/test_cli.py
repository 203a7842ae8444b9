"""`ptask` on the installation, as docs/cli.md shows it."""

import json
import uuid

import pytest

from devstack import installation
from ptask.outcomes import Exit
from tests.e2e.conftest import Installed
from tests.support.cli import Ptask

pytestmark = pytest.mark.e2e


@pytest.fixture
def ptask(installed: Installed) -> Ptask:
    return Ptask(installed.endpoints.kubeconfig, installation.TASK_NAMESPACE)


def test_a_document_from_the_command_line_to_the_knowledge_base(ptask: Ptask) -> None:
    kb = f"cli-{uuid.uuid4().hex[:6]}"
    shown = ptask(
        "submit", "--kb", kb, "-d", "/data/operations-guide.zh.md", "--set", "chunkSize=500", "--wait", "--timeout", "4m"
    )
    name = shown.split()[0].rpartition("/")[2]
    assert name.startswith("operations-guide-zh-")
    assert shown.splitlines()[-1] == f"{name} Completed 100%"
    log = ptask("logs", name)
    assert json.loads(log.splitlines()[-1])["outcome"] == "Succeeded"
    assert ptask("logs", name, "-f").splitlines()[-1] == log.splitlines()[-1]
    assert "Completed" in ptask("why", name)
    assert "It waits for nothing." in ptask("why", name)
    assert f"{ptask.namespace}/{name}" in ptask("get", name)
    [base] = [one for one in json.loads(ptask("kb list", "-o", "json"))["items"] if one["kb_id"] == kb]
    assert (base["state"], base["documents"]) == ("ready", 1)
    assert base["chunks"] > 0
    assert "Completed" in ptask("top").splitlines()[-1]
    missing = ptask.attempt("submit", "--kb", kb, "-d", "/data/nothing.md", "--name", f"missing-{kb}", "--follow")
    assert missing.returncode == Exit.FAILED
    assert "DocumentNotFound" in missing.stdout
    assert "put the file there" in ptask("why", f"missing-{kb}")
    gone = ptask.attempt(f"kb delete {kb}", "--yes", "--wait", "--timeout", "4m")
    assert gone.returncode == Exit.DONE, gone.stdout + gone.stderr


def test_the_doctor_finds_the_installation_well(ptask: Ptask) -> None:
    done = ptask.attempt("doctor", "--check", "--timeout", "3m")
    assert done.returncode == Exit.DONE, done.stdout + done.stderr
    for component in ("postgres", "milvus", "elasticsearch", "documents", "model"):
        assert f": {component}: answers" in done.stdout
    assert "FAIL" not in done.stdout
