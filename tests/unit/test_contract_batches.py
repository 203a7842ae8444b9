"""Shards: how many a batch has, and how they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_contract.batches import DOCUMENTS_A_SHARD, parallelism_of, read_shards, shard_count, write_shards
from task_contract.models import Payload


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"filePaths": ["a"]}, 1),
        ({"filePaths": ["a"] * 3, "parallelism": 4}, 3),
        ({"filePaths": ["a"] * 20}, 4),
        ({"filePaths": ["a"] * 20, "parallelism": 8}, 8),
        ({"filePaths": ["a"] * 1000}, 20),
        ({"prefix": "manuals"}, 8),
        ({"manifestPath": "list.txt", "parallelism": 64}, 128),
    ],
)
def test_the_number_of_shards_follows_from_the_payload(payload: dict[str, object], expected: int) -> None:
    assert shard_count(Payload.model_validate(payload)) == expected


@given(documents=st.integers(1, 1000), parallelism=st.integers(1, 64))
def test_no_shard_of_a_list_is_empty_or_too_long(documents: int, parallelism: int) -> None:
    payload = Payload(file_paths=["a"] * documents, parallelism=parallelism)
    shards = shard_count(payload)
    assert 1 <= shards <= documents
    assert min(documents, parallelism_of(payload)) <= shards, "a pod that may work would have nothing to do"
    assert documents <= shards * DOCUMENTS_A_SHARD


@given(st.sets(st.integers(0, 300), min_size=1))
def test_shards_are_read_as_they_were_written(shards: set[int]) -> None:
    assert read_shards(write_shards(shards)) == tuple(sorted(shards))
