"""What may be stale of a document, and which documents a store is asked about in one clause."""

import pytest

from job_runner.index import Stale, alike


@pytest.mark.parametrize(
    ("up_to", "keep", "possible"),
    [
        (0, (), False),
        (1, (1,), False),
        (3, (1, 2, 3), False),
        (3, (3, 4), True),
        (3, (), True),
        (2, (1, 1), True),
        (2, (0, 1), True),
    ],
)
def test_a_document_whose_every_version_is_kept_has_nothing_stale(up_to: int, keep: tuple[int, ...], possible: bool) -> None:
    assert Stale("a", up_to=up_to, keep=keep).possible is possible


def test_documents_with_the_same_versions_are_one_clause() -> None:
    stale = [Stale("a", 2, (2,)), Stale("b", 2, (1,)), Stale("c", 2, (2,)), Stale("d", 3, (2,))]
    assert alike(stale) == {(2, (2,)): ["a", "c"], (2, (1,)): ["b"], (3, (2,)): ["d"]}
