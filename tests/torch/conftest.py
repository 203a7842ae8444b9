"""The tests of this folder need PyTorch: `make test-torch` runs them where it is, everything else passes them over."""

import importlib.util

# The fixtures of the runner's tests: real stores, a knowledge base of its own for a test.
from tests.integration.runner.conftest import database, knowledge_bases, lab, store_urls

__all__ = ["database", "knowledge_bases", "lab", "store_urls"]

collect_ignore_glob = [] if importlib.util.find_spec("sentence_transformers") else ["test_*.py"]
