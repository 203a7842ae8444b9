"""The tests of this folder need the controller of Kueue: `make test-kueue` builds it, everything else passes them over."""

import os

from tests.integration.conftest import kube, kubectl, place, process

__all__ = ["kube", "kubectl", "place", "process"]

collect_ignore_glob = [] if os.environ.get("WITH_KUEUE") else ["test_*.py"]
