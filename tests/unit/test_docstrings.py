"""Examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("crds", "operator", "client", ".")
PACKAGES = (
    *("task_contract", "task_platform", "task_operator", "task_gateway"),
    *("service_client", "ptask", "job_runner", "devstack"),
)


def _modules() -> list[str]:
    """Return the modules with examples, by name."""
    found = []
    for folder in FOLDERS:
        for package in PACKAGES:
            for path in sorted((ROOT / folder / package).rglob("*.py")):
                if "    >>> " in path.read_text(encoding="utf-8"):
                    found.append(".".join(path.relative_to(ROOT / folder).with_suffix("").parts))
    return found


def test_there_are_examples() -> None:
    assert {"task_contract.rules", "task_contract.tracing", "task_operator.controller"} <= set(_modules())


@pytest.mark.parametrize("name", _modules())
def test_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 0
    assert outcome.failed == 0
