"""Vectors of an embedding_generation task that are kept in PostgreSQL: one query and one reading for all who fetch them."""

import json
import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final

INLINE: Final = "postgres"
"""What ``result.output`` says of vectors that are kept there."""
PARTS: Final = (
    "SELECT first, ids, task_vector_parts.vectors AS vectors, dimension FROM task_vector_parts "
    "JOIN task_vectors USING (task_uid) WHERE task_uid = $1 AND first >= $2 ORDER BY first LIMIT 1"
)
"""The part with the uid of a task that begins at a vector or after it: some 2 MiB; the next one begins behind it."""


def vectors_of(part: Mapping[str, Any]) -> "Iterator[tuple[str | None, array[float]]]":
    """Yield (id, vector) of a row of :data:`PARTS`, in the order of the input; a vector has float32 numbers."""
    numbers = array("f", part["vectors"])
    if sys.byteorder == "big":
        numbers.byteswap()
    dimension: int = part["dimension"]
    for index, key in enumerate(json.loads(part["ids"])):
        yield key, numbers[index * dimension : (index + 1) * dimension]
