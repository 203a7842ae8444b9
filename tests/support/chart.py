"""The chart as the real helm renders it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from devstack import tools

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/processing-tasks"
RELEASE, NAMESPACE = "processing-tasks", "processing-tasks-system"
# A helm built from its module believes in a cluster of v1.20 when it has none to ask.
KUBE_VERSION = ("--kube-version", "1.34.0")

Document = dict[str, Any]


def run_helm(*arguments: str | Path, major: int = 3) -> subprocess.CompletedProcess[str]:
    """Run helm, which is built where it is not there yet, and return how it ended."""
    return subprocess.run(
        [tools.helm() if major == 3 else tools.helm_4(), *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def render(*arguments: str | Path, chart: Path = CHART, major: int = 3) -> list[Document]:
    """Return the objects that `helm template` with ARGUMENTS makes of the release ``processing-tasks``."""
    answer = run_helm("template", RELEASE, chart, "-n", NAMESPACE, *KUBE_VERSION, *arguments, major=major)
    assert answer.returncode == 0, answer.stderr
    return list(documents_in(answer.stdout))


def documents_in(text: str) -> Iterator[Document]:
    """Read YAML; empty documents are left out. By libyaml: PyYAML's own reader takes a second for a rendered chart."""
    return (document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document)


def key(document: Document) -> str:
    """Return kind, namespace (or ``-``) and name."""
    metadata = document["metadata"]
    return f"{document['kind']} {metadata.get('namespace', '-')}/{metadata['name']}"
