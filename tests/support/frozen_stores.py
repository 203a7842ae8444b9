"""A knowledge base as a release made it: taken from both stores when the release is frozen, and made again as it was.

What servers say of a collection and an index is kept, and rows as they are stored: not what today's code would make of them.
"""

from collections.abc import Mapping
from typing import Any, Final

from pymilvus import CollectionSchema

from job_runner.elasticsearch import ElasticsearchIndex
from job_runner.milvus import MilvusIndex
from tests.support.runner_lab import rows_of

_FIELD: Final = ("name", "type", "params", "is_primary", "nullable", "default_value")
_INDEX: Final = ("index_type", "metric_type")
_ROWS: Final = 3
"""Rows that are kept, of the highest version."""

Frozen = Mapping[str, Any]


async def taken(stores: Any, document_id: str) -> dict[str, Any]:
    """Return collection, index and some rows of a document, as JSON."""
    in_vectors, in_texts = await rows_of(stores, document_id)
    client, name = stores.vectors._client, stores.vectors._name
    described = client.describe_collection(name)
    [index] = client.list_indexes(name)
    parameters = client.describe_index(name, index)
    found = (await stores.texts._client.indices.get(index=stores.texts._name))[stores.texts._name]
    settings = found["settings"]["index"]
    return {
        "Milvus": {
            "fields": [_field(field) for field in described["fields"]],
            "consistency_level": described["consistency_level_name"],
            "index": {key: parameters[key] for key in _INDEX}
            | {"params": {key: int(parameters[key]) for key in ("M", "efConstruction")}},
            "rows": [{**row, "embedding": [float(number) for number in row["embedding"]]} for row in _some(in_vectors)],
        },
        "Elasticsearch": {
            "mappings": found["mappings"],
            "settings": {key: settings[key] for key in ("number_of_shards", "number_of_replicas")},
            "rows": _some(in_texts),
        },
    }


def _field(field: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: field[key] for key in _FIELD if key in field} | {"type": int(field["type"])}
    if (default := kept.pop("default_value", None)) is not None:
        [(_, kept["default_value"])] = [(kind.name, value) for kind, value in default.ListFields()]
    return kept


def _some(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max(row["version"] for row in rows)
    return sorted((row for row in rows if row["version"] == last), key=lambda row: int(row["ordinal"]))[:_ROWS]


async def make_collection(index: MilvusIndex, frozen: Frozen) -> None:
    """Make a collection with its index, alias and rows as they were; nothing of today's code has a say in it."""
    await index.warm_up()
    client, name = index._client, index._name
    schema = CollectionSchema.construct_from_dict({"fields": frozen["fields"], "enable_dynamic_field": False})
    client.create_collection(name, schema=schema, consistency_level=frozen["consistency_level"])
    indexes = client.prepare_index_params()
    indexes.add_index("embedding", **frozen["index"])
    client.create_index(name, indexes, sync=False)
    client.load_collection(name)
    client.create_alias(name, index._generation.alias)
    write_vectors(index, frozen)


def write_vectors(index: MilvusIndex, frozen: Frozen) -> None:
    """Write the rows as the release wrote them."""
    index._client.upsert(index._name, [dict(row) for row in frozen["rows"]])


async def make_index(index: ElasticsearchIndex, frozen: Frozen) -> None:
    """Make an index with its alias and rows as they were."""
    await index._client.indices.create(
        index=index._name,
        mappings=frozen["mappings"],
        settings=frozen["settings"],
        aliases={index._generation.alias: {}},
    )
    await write_texts(index, frozen)


async def write_texts(index: ElasticsearchIndex, frozen: Frozen) -> None:
    """Write the rows as the release wrote them."""
    operations: list[dict[str, Any]] = []
    for row in frozen["rows"]:
        operations += [{"index": {"_id": row["id"]}}, {name: value for name, value in row.items() if name != "id"}]
    answer = await index._client.bulk(index=index._name, operations=operations)
    assert not answer["errors"], answer
