"""The tests of this folder need PyTorch: `make test-torch` runs them where it is, everything else passes them over."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from job_runner.embed import Embedder, make_embedder
from job_runner.model_folder import folder_of

# The fixtures of the runner's tests: real stores, a knowledge base of its own for a test.
from tests.integration.runner.conftest import database, knowledge_bases, lab, store_urls

__all__ = ["database", "knowledge_bases", "lab", "store_urls"]

collect_ignore_glob = [] if importlib.util.find_spec("sentence_transformers") else ["test_*.py"]

NAME = "all-MiniLM-L6-v2"
"""The model that a package carries."""


@pytest.fixture(scope="session")
def original() -> Embedder:
    """The carried model under sentence-transformers."""
    return make_embedder(NAME)


def carried() -> Path:
    """Return its folder."""
    found = folder_of(NAME)
    assert found is not None
    return found


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a file of settings."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
