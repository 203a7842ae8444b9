"""Fixtures of the pages' tests."""

# A session fixture of its own here: the installation of tests/e2e is made, or found standing, after these tests have ended.
from tests.e2e.conftest import installed

__all__ = ["installed"]
