"""The two stores of a knowledge base, opened together."""

from collections.abc import Callable
from dataclasses import dataclass

from job_runner.index import Generation, TextIndex, VectorIndex
from job_runner.settings import Settings, revealed
from task_contract.errors import StoreUnavailable


@dataclass(frozen=True, slots=True)
class Stores:
    """Both stores of one generation."""

    vectors: VectorIndex
    texts: TextIndex

    async def aclose(self) -> None:
        """Close both."""
        await self.vectors.aclose()
        await self.texts.aclose()


OpenStores = Callable[[Generation], Stores]


def opener(settings: Settings, *, dimension: int) -> OpenStores:
    """Return what opens the configured stores. Raises StoreUnavailable, naming the variables that are not set."""
    if missing := settings.document_stores_missing:
        raise StoreUnavailable(
            f"cannot reach the stores: {', '.join(missing)} not set; "
            "set it in the environment (in a cluster, in the Secret of the stores)"
        )

    def open_stores(generation: Generation) -> Stores:
        # Imported here: the clients of the stores are the most expensive imports of the runner.
        from job_runner.elasticsearch import ElasticsearchIndex
        from job_runner.milvus import MilvusIndex

        assert settings.milvus_url is not None  # noqa: S101 - for the type checker: looked at above
        assert settings.elasticsearch_url is not None  # noqa: S101 - for the type checker: looked at above
        return Stores(
            vectors=MilvusIndex(
                generation,
                url=settings.milvus_url.get_secret_value(),
                token=revealed(settings.milvus_token),
                dimension=dimension,
            ),
            texts=ElasticsearchIndex(
                generation,
                url=settings.elasticsearch_url.get_secret_value(),
                api_key=revealed(settings.elasticsearch_api_key),
                analyzer=settings.elasticsearch_analyzer,
                replicas=settings.elasticsearch_replicas,
            ),
        )

    return open_stores
