"""Shards of batch_processing: into how many a task is cut, and how those that are left are written.

Operator and runner count alike, since the number follows from the payload alone: the operator makes a Job of so many indexes
before any document is known, the runner deals the documents out among them.
"""

import math
from collections.abc import Iterable
from typing import Final

from task_contract.models import Payload

PARALLELISM: Final = 4
"""Pods of a batch that work at once, where nobody says."""
DOCUMENTS_A_SHARD: Final = 50
"""Of a list in the payload: a pod that is lost takes up to so many documents with it into the next attempt."""
SHARDS_A_POD: Final = 2
"""Of a folder or a manifest, whose documents nobody has counted: who is early takes another shard, and few are empty."""
COUNTS: Final = (
    "SELECT count(*) AS total, count(*) FILTER (WHERE state = 'pending') AS pending, "
    "count(*) FILTER (WHERE state = 'failed') AS failed, "
    "count(*) FILTER (WHERE state = 'done' AND reason NOT IN ('Superseded', 'Duplicate')) AS published, "
    "coalesce(sum(chunks), 0) AS chunks, coalesce(sum(embedded), 0) AS embedded, coalesce(sum(reused), 0) AS reused, "
    "coalesce(array_agg(DISTINCT shard ORDER BY shard) FILTER (WHERE state = 'pending'), '{}') AS shards "
    "FROM batch_documents WHERE task_uid = $1"
)
"""What has become of the documents of task $1; shards: those with documents that have not ended, in ascending order."""
MOST_DOCUMENTS: Final = 10_000
"""Documents of a batch: all are counted after each one, for the progress."""


def parallelism_of(payload: Payload) -> int:
    """Return how many pods work at once."""
    return payload.parallelism or PARALLELISM


def shard_count(payload: Payload) -> int:
    """Return how many shards a batch has: the same for every attempt."""
    parallelism = parallelism_of(payload)
    if payload.file_paths is None:
        return parallelism * SHARDS_A_POD
    documents = len(payload.file_paths)
    return min(documents, max(parallelism, math.ceil(documents / DOCUMENTS_A_SHARD)))


def write_shards(shards: Iterable[int]) -> str:
    """Return numbers of shards in ascending order, in few characters.

    >>> write_shards([7, 0, 1, 2])
    '0-2,7'
    """
    runs: list[list[int]] = []
    for shard in sorted(set(shards)):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_shards(text: str) -> tuple[int, ...]:
    """Return what :func:`write_shards` has written. Raises ValueError.

    >>> read_shards("0-2,7")
    (0, 1, 2, 7)
    """
    shards: list[int] = []
    for run in text.split(","):
        first, dash, last = run.partition("-")
        shards += range(int(first), int(last if dash else first) + 1)
    return tuple(shards)
