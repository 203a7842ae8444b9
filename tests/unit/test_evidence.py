"""What a failed test leaves to read is found: its namespaces and the logs of its processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import evidence


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, []),
        ({"namespace": "test-1"}, ["test-1"]),
        ({"place": SimpleNamespace(namespace="test-2"), "namespace": "test-1"}, ["test-1", "test-2"]),
        ({"place": SimpleNamespace(namespace="test-1"), "namespace": "test-1"}, ["test-1"]),
        ({"lab": SimpleNamespace(namespace=None), "count": 3}, []),
        ({"installed": object()}, ["knowledge", "processing-tasks-system"]),
    ],
    ids=["none", "by name", "of what has one", "once", "nothing that is one", "of the installation"],
)
def test_namespaces_of_a_test(arguments: dict[str, Any], found: list[str]) -> None:
    assert evidence.namespaces(arguments) == found


def test_the_ends_of_logs_in_the_folder_and_not_of_those_that_it_links_to(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "foreign.log").write_text("not ours")
    (folder / "link").symlink_to(other)
    (folder / "operator-1.log").write_bytes("\n".join(map(str, range(100))).encode() + b"\n\xff")
    (folder / "values.json").write_text("{}")
    [(title, text)] = evidence.logs({"tmp_path": folder})
    assert "operator-1.log" in title
    assert text.splitlines()[0] == str(101 - evidence.LINES)
    assert evidence.logs({}) == []
